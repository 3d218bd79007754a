"""The numbers that a published command line stands for."""

import json
import math

import pytest
import torch
from torch import nn

import engine_for_finetuning
import modeling_finetune
import run_class_finetuning
import run_mae_pretraining
from datasets.build import build_finetuning_loader
from datasets.moving_shapes import write_dataset
from optim_factory import cosine_schedule
from runtime.build import clips_per_batch, effective_batch, recipe_settings
from tests.helpers.runs import assert_names, naming
from utils import UsageError

TINY = """--model vit_tiny_patch8_64 --input_size 32 --num_frames 4 --sampling_rate 2 --data_set custom --nb_classes 10
    --num_workers 0 --device cpu --aa none --reprob 0 --mixup 0 --cutmix 0 --test_num_segment 1
    --test_num_crop 1""".split()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("shapes"), train=12, val=10, size=32, frames=12)


def test_kinetics_line_counts_videos():
    """VideoMAE's K400 line on 64 GPUs: 6 videos x 2 clips on each; the learning rate is scaled by videos / 256."""
    line = "--batch_size 6 --num_sample 2 --lr 1e-3 --opt adamw --opt_betas 0.9 0.999 --data_set Kinetics-400"
    args = run_class_finetuning.get_parser().parse_args(line.split())
    args.world_size = 64
    run_class_finetuning.check_flags(args)
    assert (effective_batch(args), clips_per_batch(args)) == (384, 12)
    settings = recipe_settings(args, torch.device("cpu"), 626)
    assert settings["lr"] == pytest.approx(1e-3 * 384 / 256)
    assert settings["min_lr"] == pytest.approx(1e-6 * 384 / 256)


def test_a_batch_is_so_many_videos_with_so_many_clips_of_each(shapes):
    args = run_class_finetuning.get_parser().parse_args(
        [*TINY, "--data_path", str(shapes), "--batch_size", "3", "--num_sample", "2"]
    )
    run_class_finetuning.check_flags(args)
    batches = list(build_finetuning_loader(args))
    assert len(batches) == 4 and all(batch["video"].shape[0] == 6 and len(batch["index"]) == 3 for batch in batches)


def test_a_run_of_counted_clips_is_not_resumed_in_silence(shapes, tmp_path):
    """Earlier revisions: 6 clips, 2 of each video. The message has the flags that resume it as it was."""
    flags = [*TINY, "--data_path", str(shapes), "--output_dir", str(tmp_path), "--num_sample", "2"]
    run_class_finetuning.main([*flags, "--epochs", "1", "--batch_size", "3", "--lr", "2e-3"])
    path = tmp_path / "checkpoint-0.pth"
    state = torch.load(path, weights_only=True)
    assert state["args"].pop("batch_counts") == "videos"
    state["args"] |= {"batch_size": 6, "lr": 1e-3, "min_lr": state["args"]["min_lr"] / 2}
    torch.save(state, path)
    with pytest.raises(SystemExit, match=naming(path, "--batch_size 3 --num_sample 2 --lr 0.002")):
        run_class_finetuning.main([*flags, "--epochs", "2", "--batch_size", "6", "--lr", "1e-3"])
    run_class_finetuning.main([*flags, "--epochs", "2", "--batch_size", "3", "--lr", "2e-3"])
    assert (tmp_path / "checkpoint-1.pth").exists()


def test_warm_up_starts_at_zero_unless_told_otherwise():
    """VideoMAE takes --warmup_lr and starts its schedule at 0; here a value that is given counts."""
    for parser in (run_mae_pretraining.get_parser(), run_class_finetuning.get_parser()):
        assert parser.parse_args([]).warmup_lr == 0
    args = run_mae_pretraining.get_parser().parse_args(["--warmup_lr", "1e-5", "--batch_size", "512"])
    assert recipe_settings(args, torch.device("cpu"), 10)["warmup_lr"] == pytest.approx(2e-5)
    assert cosine_schedule(0, 100, 1.0, 0.0, 10, 0.0) == 0


def test_pretraining_crops_are_bilinear_as_published():
    assert run_mae_pretraining.get_parser().parse_args([]).train_interpolation == "bilinear"
    assert run_class_finetuning.get_parser().parse_args([]).train_interpolation == "bicubic"
    named = run_mae_pretraining.get_parser().parse_args(["--train_interpolation", "bicubic"])
    assert named.train_interpolation == "bicubic"


def test_initial_weights_of_a_classifier_have_the_published_deviation():
    """Normal, deviation 0.02, cut at +-2 and hence not at all; cut at one deviation it would be 0.54 of it."""
    torch.manual_seed(0)
    model = modeling_finetune.vit_small_patch16_224(num_classes=400, init_scale=1.0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            deviation, count = module.weight.std().item(), module.weight.numel()
            assert deviation == pytest.approx(0.02, rel=5 / math.sqrt(2 * count)), name
            assert module.weight.abs().max() > 3 * 0.02, name


@pytest.mark.parametrize("probe", [False, True])
def test_head_is_in_full_precision_under_autocast(probe):
    torch.manual_seed(0)
    if probe:
        encoder = modeling_finetune.vit_tiny_patch8_64(num_classes=0, use_mean_pooling=False)
        model = modeling_finetune.Probe(encoder, "linear", 50).eval()
    else:
        model = modeling_finetune.vit_tiny_patch8_64(num_classes=50, init_scale=1.0).eval()
    seen = {}
    model.head.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], logits=output))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(torch.rand(2, 3, 8, 64, 64))
    assert logits.dtype == seen["x"].dtype == torch.float32
    exact = seen["x"].double() @ model.head.weight.double().T + model.head.bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_last_epoch_is_tested_and_the_best_beside_it(shapes, tmp_path, capsys, monkeypatch):
    """The validation is made to like epoch 0 best. The scores of the report are those of the last epoch's weights."""
    tested = []
    measures, evaluate = engine_for_finetuning.Scores.measures, run_class_finetuning.evaluate

    def watched(model, loader, recipe, amp, batch_size, allow_missing, header=""):
        scores = evaluate(model, loader, recipe, amp, batch_size, allow_missing, header)
        if header:
            tested.append((header, {name: value.clone() for name, value in model.state_dict().items()}))
        else:
            epochs.append(None)
            found = {"acc1": 90.0 if len(epochs) == 1 else 10.0, "acc5": 95.0, "loss": 1.0}
            monkeypatch.setattr(engine_for_finetuning.Scores, "measures", lambda *_: dict(found))
        return scores

    epochs = []
    monkeypatch.setattr(run_class_finetuning, "evaluate", watched)
    flags = [*TINY, "--data_path", str(shapes), "--epochs", "2", "--batch_size", "4", "--num_sample", "1"]
    run_class_finetuning.main([*flags, "--output_dir", str(tmp_path)])
    monkeypatch.setattr(engine_for_finetuning.Scores, "measures", measures)
    (last, last_weights), (best, best_weights) = tested
    assert (last, best) == ("test", "best epoch")
    for path, weights in (("checkpoint-1.pth", last_weights), ("checkpoint-best.pth", best_weights)):
        saved = torch.load(tmp_path / path, weights_only=True)["model"]
        assert all(torch.equal(weights[name], saved[name]) for name in saved), path
    assert any(not torch.equal(last_weights[name], best_weights[name]) for name in last_weights)
    result = json.loads((tmp_path / "test.json").read_text())
    assert result["checkpoint"].endswith("checkpoint-1.pth") and result["best_epoch"] == 0
    assert result["best_chosen_on_test_videos"] is True
    assert_names(capsys.readouterr().out, "best epoch", "chosen")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "val.csv").write_text(f"{shapes}/videos/train_00000.mp4 0\n")
    del tested[:], epochs[:]
    monkeypatch.setattr(run_class_finetuning, "evaluate", watched)
    lists = ["--eval_data_path", str(tmp_path / "other" / "val.csv"), "--test_data_path", str(shapes / "val.csv")]
    run_class_finetuning.main([*flags, *lists, "--output_dir", str(tmp_path / "apart")])
    result = json.loads((tmp_path / "apart" / "test.json").read_text())
    assert result["best_chosen_on_test_videos"] is False
    del tested[:], epochs[:]
    run_class_finetuning.main([*flags, "--no-test_best", "--output_dir", str(tmp_path / "once")])
    assert [header for header, _ in tested] == ["test"]
    assert "acc1_best" not in json.loads((tmp_path / "once" / "test.json").read_text())


def test_odd_numbers_of_clips_cannot_be_mixed():
    args = run_class_finetuning.get_parser().parse_args(["--batch_size", "3", "--num_sample", "1"])
    with pytest.raises(UsageError, match=naming("--batch_size 3", "--num_sample 1", "--mixup", "--cutmix")):
        run_class_finetuning.check_flags(args)
    args = run_class_finetuning.get_parser().parse_args(["--batch_size", "3", "--num_sample", "2"])
    run_class_finetuning.check_flags(args)
