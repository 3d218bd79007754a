"""The examples, in this process: TATS beside other libraries' models, and samplers of one's own."""

import shutil

import pytest
import torch

import run_class_finetuning
import run_mae_pretraining
import run_mae_vis
from examples import new_learned_sampler, new_mask_sampler, tats_on_timm_mae, tats_on_transformers
from examples.loop import shapes, train
from masking_generator import Mask, uniform_noise
from tests.helpers.runs import TINY, finetuning_flags, read_log


@pytest.fixture
def samplers(monkeypatch):
    """What the examples register is gone after the test."""
    monkeypatch.setattr(run_mae_pretraining, "SAMPLERS", dict(run_mae_pretraining.SAMPLERS))


def run_example(example, data_path, *flags):
    example.main(["--data_path", str(data_path), *TINY, *map(str, flags)])


@pytest.mark.parametrize("kind", ["linear", "linear_alone"])
def test_a_learned_sampler_of_ones_own(kind, shapes, labelled, tmp_path, samplers, monkeypatch, capsys):
    """It trains, resumes, is drawn and started from."""
    flags = ["--mask_type", kind, "--tats_start_epoch", 1, "--tats_rollout_steps", 2, "--softmax_temp", 0.5,
             "--save_ckpt_freq", 1, "--normalize_advantage"]  # fmt: skip
    run_example(new_learned_sampler, shapes, *flags, "--epochs", 3, "--output_dir", tmp_path / "whole")
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-1.pth", tmp_path / "two")
    run_example(new_learned_sampler, shapes, *flags, "--epochs", 3, "--output_dir", tmp_path / "two")

    whole, two = (torch.load(tmp_path / name / "checkpoint-2.pth") for name in ("whole", "two"))
    assert whole[kind].keys() == {"head.weight", "head.bias"}
    assert (f"{kind}_optimizer" in whole) == (kind == "linear_alone")
    for part in ("model", kind):
        for name, value in whole[part].items():
            assert torch.equal(value, two[part][name]), name
    first, *_, last = (torch.load(tmp_path / "whole" / f"checkpoint-{epoch}.pth")[kind] for epoch in range(3))
    assert not torch.equal(first["head.weight"], last["head.weight"])
    assert {"train_easy", "train_entropy", "train_reward"} <= read_log(tmp_path / "whole")[-1].keys()

    monkeypatch.setattr(
        run_mae_vis, "SAMPLERS", run_mae_pretraining.SAMPLERS
    )  # it stays registered, where one keeps it
    checkpoint = str(tmp_path / "whole/checkpoint-2.pth")
    trained = run_mae_vis.Trained(checkpoint, [])
    assert torch.equal(trained.sampler.head.weight, whole[kind]["head.weight"])
    capsys.readouterr()
    run_example(new_learned_sampler, shapes, *flags, "--epochs", 1, "--finetune", checkpoint)
    assert f"{kind} sampler: 2 tensors" in capsys.readouterr().out
    run_class_finetuning.main(finetuning_flags(labelled, "--finetune", checkpoint, "--epochs", 1))
    assert "left over" in capsys.readouterr().out


def test_a_mask_of_ones_own_trains(shapes, tmp_path, samplers):
    run_example(new_mask_sampler, shapes, "--mask_type", "blocks", "--epochs", 1, "--output_dir", tmp_path)
    assert read_log(tmp_path)[-1]["train_loss"] > 0


def test_block_mask_hides_what_is_nearest_to_three_places():
    frames, rows, columns = grid = (3, 5, 6)
    sampler, seeds = new_mask_sampler.BlockMask(grid, 0.6), torch.tensor([0, 3, -9, 2**60])
    noise = uniform_noise(seeds, 6 + rows * columns)
    for draw, visible, masked in zip(noise.tolist(), *sampler(None, seeds)[:2], strict=True):
        places = [(draw[2 * i] * rows, draw[2 * i + 1] * columns) for i in range(3)]
        distance = [
            min(max(abs(y - row - 0.5), abs(x - column - 0.5)) for y, x in places)
            for _ in range(frames)
            for row in range(rows)
            for column in range(columns)
        ]
        assert visible.shape == (36,) and sorted([*visible.tolist(), *masked.tolist()]) == list(range(90))
        assert min(distance[i] for i in visible) >= max(distance[i] for i in masked) - 1e-5


@pytest.mark.parametrize("example, frames, size", [(tats_on_transformers, 8, 32), (tats_on_timm_mae, 1, 64)])
def test_tats_beside_another_autoencoder(example, frames, size, capsys):
    """Random masks train the autoencoder alone, then both learn."""
    torch.manual_seed(0)
    model, sampler = example.build()
    own = example.Errors(model, sampler.grid) if example is tats_on_transformers else model
    batches = shapes_of(frames, size)
    start = {name: p.clone() for name, p in (*model.named_parameters(), *sampler.named_parameters())}

    def changed(module):
        return {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}

    train(model, sampler, own.tokens_of, own.error_of, batches, 0.75, steps=1, warmup=1)
    assert changed(model) and not changed(sampler)
    train(model, sampler, own.tokens_of, own.error_of, batches, 0.75, steps=2, warmup=0)
    assert {"actor.weight", "blocks.0.mlp.fc1.weight"} <= changed(sampler)

    pixels = next(batches)
    mask = sampler(None, torch.arange(4), own.tokens_of(pixels))
    assert mask.visible.shape[1] == sampler.num_tokens // 4


def shapes_of(frames, size):
    return shapes(4, frames, size, seed=0, num_clips=8)


def test_error_of_transformers_model_is_its_own_loss():
    torch.manual_seed(0)
    model, sampler = tats_on_transformers.build()
    own, pixels = tats_on_transformers.Errors(model, sampler.grid), next(shapes_of(8, 32))
    mask = sampler(None, torch.arange(4), own.tokens_of(pixels))
    expected = model(own.video(pixels), bool_masked_pos=mask.hidden()).loss
    error = own.error_of(pixels, mask, None)
    assert error.shape == mask.masked.shape and error.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    tokens = own.tokens_of(pixels) + model.videomae.embeddings.position_embeddings
    nothing_hidden = torch.zeros(4, sampler.num_tokens, dtype=torch.bool)
    assert torch.allclose(tokens, model.videomae.embeddings(own.video(pixels), nothing_hidden), atol=1e-6)


def test_timm_mae_is_timms_vit_on_the_visible_tokens():
    torch.manual_seed(0)
    model, sampler = tats_on_timm_mae.build()
    model.eval()
    pixels = next(shapes_of(1, 64))
    tokens = model.tokens_of(pixels)
    every = torch.arange(sampler.num_tokens).expand(4, -1)
    features = model.vit.forward_features(pixels[:, :, 0] / 127.5 - 1)
    assert torch.allclose(model.encode(tokens, Mask(every, every[:, :0])), features, atol=1e-5)
    mask = sampler(None, torch.arange(4), tokens)
    prediction, changed = model(tokens, mask), tokens.scatter(1, mask.masked[..., None].expand(-1, -1, 96), 7.0)
    assert prediction.shape == (4, mask.masked.shape[1], 192) and torch.equal(model(changed, mask), prediction)


def test_examples_run_as_scripts_do(capsys):
    for example in (tats_on_transformers, tats_on_timm_mae):
        (record,) = example.main(["--steps", "2", "--warmup", "1", "--batch_size", "2"])
        assert record["step"] == 2 and record["loss"] > 0 and "lift" in capsys.readouterr().out
