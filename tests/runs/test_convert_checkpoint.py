"""Checkpoints to Hugging Face folders and back: no weight changes, and transformers' models give our outputs."""

import argparse
import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import run_class_finetuning
import run_mae_pretraining
import run_mae_vis
from datasets.moving_shapes import write_dataset
from datasets.transforms import normalize
from masking_generator import Mask
from runtime.convert import from_huggingface, to_huggingface
from runtime.foreign_files import load_checkpoint
from tests.helpers.models import make_huggingface, random_classifier, randomize
from tests.helpers.runs import assert_names, finetuning_flags, run_here
from tools import convert_checkpoint

torch.set_num_threads(1)
NAMES = [f"shape {label}" for label in range(8)] + ["twice", "twice"]


def convert(source, output, *flags):
    convert_checkpoint.main(["--input", str(source), "--output", str(output), *map(str, flags)])
    return output


def refusal(source, output, *flags) -> str:
    with pytest.raises(SystemExit) as error:
        convert(source, output, *flags)
    message = str(error.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def agree(ours, theirs):
    """To 1e-4 of the largest: some norms of transformers have another eps."""
    assert ours.std() > 0.1 and (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def a_clip(frames=4, size=32):
    return torch.randn(2, 3, frames, size, size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("shapes"), train=10, val=10, size=32, frames=12)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, shapes):
    """Folders of runs of one epoch, with every weight random afterwards: biases and norms start at 0 and 1."""
    folder = tmp_path_factory.mktemp("pretrained")
    for mask_type in ("tube", "tats", "adamae"):
        run = folder / mask_type
        flags = ["--mask_type", mask_type, "--epochs", 1, "--tats_start_epoch", 0, "--no-imagenet_default_mean_and_std"]
        run_here(shapes / "train.csv", *flags, "--output_dir", run)
        state = torch.load(run / "checkpoint-0.pth", weights_only=True)
        random = torch.Generator().manual_seed(4)
        for name in {"model", mask_type} & state.keys():
            for value in state[name].values():
                value.add_(torch.randn(value.shape, generator=random), alpha=0.05)
        torch.save(state, run / "checkpoint-0.pth")
    return folder


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, shapes, pretrained):
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    flags = ["--epochs", 1, "--finetune", pretrained / "tube", "--output_dir", folder, "--init_scale", 1]
    run_class_finetuning.main(finetuning_flags(shapes, *flags))
    return folder


@pytest.mark.parametrize("mask_type", ["tube", "tats", "adamae"])
def test_a_pretraining_run_to_a_folder_and_back(mask_type, pretrained, tmp_path, capsys):
    source = torch.load(pretrained / mask_type / "checkpoint-0.pth", weights_only=True)
    folder = convert(pretrained / mask_type, tmp_path / "hub")
    assert_names(
        capsys.readouterr().out, folder, "VideoMAEForPreTraining", *([mask_type] if mask_type != "tube" else [])
    )
    theirs = transformers.VideoMAEForPreTraining.from_pretrained(folder).eval()
    ours = run_mae_vis.Trained(str(folder), [])  # reads a folder as it reads a run
    assert (ours.args.mask_type, ours.args.num_frames) == (mask_type, 4) and same(
        ours.mae.state_dict(), source["model"]
    )
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    mask = Mask(order[:, :8].sort(dim=1).values, order[:, 8:].sort(dim=1).values)
    with torch.no_grad():
        agree(ours.mae(a_clip(), mask), theirs(a_clip().transpose(1, 2), bool_masked_pos=mask.hidden()).logits)
        encoder = transformers.AutoModel.from_pretrained(folder).eval()
        everything = Mask(torch.arange(32).expand(2, -1), torch.empty(2, 0, dtype=torch.long))
        agree(ours.mae.encoder(a_clip(), everything), encoder(a_clip().transpose(1, 2)).last_hidden_state)
    said = json.loads((folder / "preprocessor_config.json").read_text())
    assert said["image_mean"] == said["image_std"] == [0.5] * 3 and (said["num_frames"], said["sampling_rate"]) == (
        4,
        2,
    )

    back = torch.load(convert(folder, tmp_path / "back.pth"), weights_only=True)
    assert same(back["model"], source["model"])
    assert (folder / "sampler.safetensors").exists() == (mask_type != "tube")
    if mask_type != "tube":
        assert same(back[mask_type], source[mask_type])
        flags = ["--data_path", "x", "--finetune", str(folder), "--mask_type", mask_type, *ARGUMENTS]
        args = run_mae_pretraining.get_parser().parse_args(flags)
        args.rank, args.world_size, args.distributed, args.amp = 0, 1, False, "none"
        run = run_mae_pretraining.Run(args, torch.device("cpu"))
        assert same(run.sampler.state_dict(), source[mask_type])
    kept = {name: value for name, value in source["args"].items() if name in back["args"]}
    assert {name: back["args"][name] for name in kept} == kept and kept["lr"] == 0.01
    text = (folder / "args.json").read_text() + (folder / "README.md").read_text()
    assert str(tmp_path.parent.parent) not in text  # no path of this machine


ARGUMENTS = ["--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--num_frames", "4",
             "--decoder_depth", "1", "--device", "cpu"]  # fmt: skip


def test_adamaes_own_file_to_a_folder_and_back(pretrained, tmp_path):
    """Its sampler inside the encoder, its flags in a Namespace."""
    state = torch.load(pretrained / "adamae/checkpoint-0.pth", weights_only=True)
    model = state["model"] | {f"encoder.{name}": value for name, value in state["adamae"].items()}
    args = argparse.Namespace(model=ARGUMENTS[1], decoder_depth=1, mask_type="learnable", input_size=32, num_frames=4,
                              patch_size=(8, 8), normlize_target=False, device="cuda")  # fmt: skip
    torch.save({"model": model, "args": args}, tmp_path / "ada.pth")
    folder = convert(tmp_path / "ada.pth", tmp_path / "hub")
    assert same(load_checkpoint(convert(folder, tmp_path / "a.pth", "--layout", "adamae"))["model"], model)
    back = load_checkpoint(convert(folder, tmp_path / "b.pth"))
    assert same(back["model"], state["model"]) and same(back["adamae"], state["adamae"])
    assert back["args"]["mask_type"] == "adamae" and back["args"]["normalize_target"] is False
    assert json.loads((folder / "config.json").read_text())["norm_pix_loss"] is False
    message = refusal(pretrained / "tube", tmp_path / "c.pth", "--layout", "adamae")
    assert_names(message, "--layout adamae", pretrained / "tube/checkpoint-0.pth")
    assert not (tmp_path / "c.pth").exists()
    assert_names(refusal(folder, tmp_path / "other", "--layout", "adamae"), "--layout adamae", ".pth")


def test_a_finetuned_run_opens_in_transformers(finetuned, shapes, tmp_path, capsys):
    folder = convert(finetuned, tmp_path / "hub")
    said = capsys.readouterr().out
    assert_names(said, folder, "VideoMAEForVideoClassification", "58 tensors")
    assert_names(said, transformers.__version__, "58 tensors")
    theirs = transformers.AutoModelForVideoClassification.from_pretrained(folder).eval()
    source = torch.load(finetuned / "checkpoint-0.pth", weights_only=True)
    assert same(from_huggingface(theirs.state_dict()), named_from_encoder(source["model"]))
    norms = [module for module in theirs.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * 8 + [1e-5]  # the last is fc_norm, whatever the folder says
    assert theirs.config.id2label == {**dict(enumerate(NAMES[:8])), 8: "twice (8)", 9: "twice (9)"}
    args = run_class_finetuning.get_parser().parse_args(finetuning_flags(shapes))
    run_class_finetuning.check_flags(args)
    ours = run_class_finetuning.build_classifier(args, None).eval()
    ours.load_state_dict(source["model"])
    with torch.no_grad():
        agree(ours(a_clip()), theirs(a_clip().transpose(1, 2)).logits)

    back = torch.load(convert(folder, tmp_path / "back.pth"), weights_only=True)
    assert same(back["model"], source["model"]) and back["class_names"] == theirs_names(theirs)
    saved = {"nb_classes": 10, "num_segments": 1, "sampling_rate": 2, "model": "vit_tiny_patch8_64", "mixup": 0.8}
    assert saved.items() <= back["args"].items()
    assert not {"data_path", "finetune", "output_dir"} & back["args"].keys()


def named_from_encoder(weights: dict) -> dict:
    return {n if n.startswith(("head.", "fc_norm.")) else f"encoder.{n}": value for n, value in weights.items()}


def theirs_names(model) -> list[str]:
    return [model.config.id2label[label] for label in range(model.config.num_labels)]


def test_a_folder_is_tested_as_the_run_was(finetuned, shapes, tmp_path):
    """--eval takes the flags of the folder, and gives the same scores bit for bit."""
    folder = convert(finetuned, tmp_path / "hub")
    flags = ["--data_path", shapes, "--num_workers", 0, "--device", "cpu", "--batch_size", 4, "--output_dir", tmp_path]
    run_class_finetuning.main([*map(str, flags), "--eval", "--finetune", str(folder)])
    before, after = (np.load(path / "scores.npz")["probability"] for path in (finetuned, tmp_path))
    assert np.array_equal(before, after)


def test_transformers_processor_gives_our_input(finetuned, tmp_path):
    folder = convert(finetuned, tmp_path / "hub")
    clip = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(list(clip.numpy()), return_tensors="pt")["pixel_values"]
    said = json.loads((folder / "preprocessor_config.json").read_text())
    assert said["labels"] == NAMES and said["num_segments"] == 1
    mean, std = (torch.tensor(said[name]) for name in ("image_mean", "image_std"))
    torch.testing.assert_close(theirs, normalize(clip[None], mean, std)[1].transpose(1, 2))


def test_the_card_has_what_the_runs_files_say(finetuned, pretrained, tmp_path):
    report = json.loads((finetuned / "test.json").read_text())
    card = (convert(finetuned, tmp_path / "hub") / "README.md").read_text()
    for words in (["top-1", f"{report['acc1']:.2f} %"], ["top-5", f"{report['acc5']:.2f} %"], ["lr", "0.1"],
                  ["10", "videos", "2 x 3"], ["library_name", "transformers"], ["pipeline_tag", "video-classification"],
                  ["10", "classes", "tube"], ["seed", "0"]):  # fmt: skip
        assert_names(card, *words)
    (tmp_path / "run").mkdir()
    for name in ("args.json", "test.json"):
        (tmp_path / "run" / name).write_text((finetuned / name).read_text())
    (tmp_path / "other.pth").write_bytes((finetuned / "checkpoint-0.pth").read_bytes())
    card = (convert(tmp_path / "other.pth", tmp_path / "b", "--run", tmp_path / "run") / "README.md").read_text()
    assert_names(card, "another checkpoint", "checkpoint-0.pth")
    assert f"{report['acc1']:.2f} %" not in card
    card = (convert(finetuned / "checkpoint-best.pth", tmp_path / "c") / "README.md").read_text()
    assert_names(card, "top-1", f"{report['acc1_best']:.2f} %")
    assert "2505.08561" in (convert(pretrained / "tats", tmp_path / "d") / "README.md").read_text()


def test_a_folder_of_transformers_is_finetuned_and_converted(shapes, tmp_path, capsys):
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384, num_labels=10, id2label=dict(enumerate("abcdefghij")), layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = randomize(transformers.VideoMAEForVideoClassification(config), seed=5).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    flags = ["--finetune", tmp_path / "theirs", "--epochs", 1, "--output_dir", tmp_path / "run", "--lr", 1e-9]
    run_class_finetuning.main(finetuning_flags(shapes, *flags))
    assert_names(capsys.readouterr().out, "theirs/model.safetensors", "58 tensors", 0)
    state = torch.load(convert(tmp_path / "theirs", tmp_path / "theirs.pth"), weights_only=True)
    assert same(named_from_encoder(state["model"]), from_huggingface(theirs.state_dict()))
    assert state["class_names"] == list("abcdefghij")
    assert state["args"]["model"] == "vit_tiny_patch8_64" and state["args"]["nb_classes"] == 10
    trained = torch.load(tmp_path / "run/checkpoint-0.pth", weights_only=True)["model"]
    for name, value in state["model"].items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)


def test_names_go_both_ways():
    for model, settings in ((transformers.VideoMAEForPreTraining, dict(use_mean_pooling=False)),
                            (transformers.VideoMAEForVideoClassification, dict(num_labels=5))):  # fmt: skip
        weights = from_huggingface(make_huggingface(model, **settings).state_dict())
        assert same(from_huggingface(to_huggingface(weights)), weights)


def test_a_release_that_reads_biases_as_zeros_is_noticed(finetuned, tmp_path, monkeypatch):
    load = transformers.VideoMAEForVideoClassification.from_pretrained

    def without_biases(folder):
        model = load(folder)
        for name, value in model.named_parameters():
            if name.endswith(("query.bias", "value.bias")):
                torch.nn.init.zeros_(value)
        return model

    monkeypatch.setattr(transformers.VideoMAEForVideoClassification, "from_pretrained", without_biases)
    message = refusal(finetuned, tmp_path / "hub")
    assert_names(message, transformers.__version__, 8, "encoder.blocks.0.attn.q_bias", "48675")
    assert list(tmp_path.iterdir()) == []  # neither the folder nor a part of it


def test_without_transformers_the_folder_is_not_called_checked(finetuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = convert(finetuned, tmp_path / "hub")
    assert_names(capsys.readouterr().out, "transformers", "cannot be imported")
    assert len(safetensors.torch.load_file(folder / "model.safetensors")) == 66  # 58, and q, k, v apart in 4 blocks


def test_a_bare_file_needs_its_flags(pretrained, tmp_path):
    state = torch.load(pretrained / "tube/checkpoint-0.pth", weights_only=True)
    torch.save({"model": state["model"]}, tmp_path / "bare.pth")
    message = refusal(tmp_path / "bare.pth", tmp_path / "hub")
    assert_names(message, tmp_path / "bare.pth", "--model", "--input_size", "--num_frames")
    folder = convert(tmp_path / "bare.pth", tmp_path / "hub", *ARGUMENTS)
    assert same(torch.load(convert(folder, tmp_path / "b.pth"), weights_only=True)["model"], state["model"])
    assert_names((folder / "README.md").read_text(), "Not known.")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m | {"pos_embed": torch.randn(1, 32, 96)}, ["pos_embed"]),
        (lambda m: {n: v for n, v in m.items() if not n.startswith("head.")}, ["decoder", "classifier"]),
        (lambda m: {f"encoder.{n}": v for n, v in m.items()} | {"pool.running_mean": torch.zeros(96)}, ["probe"]),
        (lambda m: m | {"blocks.0.gamma_1": torch.ones(96)}, ["blocks.0.gamma_1"]),
        (lambda m: m | {"patch_embed.proj.weight": torch.zeros(96, 3, 8, 8)}, ["image"]),
    ],
)
def test_what_has_no_counterpart_is_refused(change, words, finetuned, tmp_path):
    state = torch.load(finetuned / "checkpoint-0.pth", weights_only=True)
    torch.save(state | {"model": change(state["model"])}, tmp_path / "x.pth")
    assert_names(refusal(tmp_path / "x.pth", tmp_path / "hub"), tmp_path / "x.pth", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_nothing_is_written_over(finetuned, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/notes.txt").touch()
    for output in (tmp_path / "hub", finetuned / "checkpoint-0.pth"):
        before = output.stat().st_mtime_ns
        assert_names(refusal(finetuned, output), f"--output {output}")
        assert output.stat().st_mtime_ns == before
    assert_names(refusal(finetuned, tmp_path / "no/hub"), f"--output {tmp_path / 'no/hub'}")
    for flag, file in (("--lists", "classes.txt"), ("--run", "args.json")):
        assert_names(refusal(finetuned, tmp_path / "hub2", flag, tmp_path), f"{flag} {tmp_path}", file)
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    (tmp_path / "hub/notes.txt").unlink()
    config = (convert(finetuned, tmp_path / "hub", "--lists", tmp_path) / "config.json").read_text()  # it is empty now
    assert list(json.loads(config)["id2label"].values()) == list("abcdefghij")


def test_damaged_files_beside_the_weights_are_named(finetuned, tmp_path):
    folder = convert(finetuned, tmp_path / "hub")
    (folder / "config.json").write_text("{")
    assert_names(refusal(folder, tmp_path / "a.pth"), folder)
    (folder / "args.json").write_text("[]")
    assert_names(refusal(folder, tmp_path / "a.pth"), folder / "args.json")


def test_a_classifier_of_the_first_token(tmp_path):
    """--use_cls: a norm over the tokens, no mean."""
    model = random_classifier(img_size=32, embed_dim=96, depth=4, num_heads=4, use_mean_pooling=False)
    args = {"model": "vit_tiny_patch8_64", "input_size": 32, "num_frames": 4, "data_set": "SSV2", "nb_classes": 5}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "x.pth")
    folder = convert(tmp_path / "x.pth", tmp_path / "hub")
    theirs = transformers.AutoModelForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        agree(model(a_clip()), theirs(a_clip().transpose(1, 2)).logits)
    assert same(torch.load(convert(folder, tmp_path / "b.pth"), weights_only=True)["model"], model.state_dict())
