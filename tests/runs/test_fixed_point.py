"""tools/fixed_point.py: the solution of u log u = pull, and what is measured of a policy that was made by hand."""

import numpy as np
import pytest
import torch

import run_mae_pretraining
from datasets.moving_shapes import write_dataset
from engine_for_pretraining import PretrainRecipe, masked_error
from tests.helpers.runs import TINY, naming
from tools import fixed_point


def test_the_stable_solution_is_found():
    pull = np.array([-0.36, -0.1, 0.0, 0.3, 5.0])
    u = fixed_point.fixed_point(pull)
    np.testing.assert_allclose(u * np.log(u), pull, atol=1e-9)
    assert (u >= 1 / np.e).all() and u[2] == 1
    assert fixed_point.fixed_point(np.array([-0.5]))[0] == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixed")
    shapes = write_dataset(folder / "shapes", train=10, val=10, size=32, frames=12)
    run_mae_pretraining.main(
        ["--data_path", str(shapes / "train.csv"), *TINY, "--mask_type", "tats", "--epochs", "1",
         "--tats_start_epoch", "0", "--output_dir", str(folder / "tats"), "--entropy_coef", "5e-5", "--no-pin_mem"]
    )  # fmt: skip
    return folder


def test_a_uniform_policy_is_reported_as_such(trained, capsys):
    model = fixed_point.Trained(str(trained / "tats"), [])
    for parameter in model.sampler.actor.parameters():
        torch.nn.init.zeros_(parameter)
    clips = torch.randint(256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    measured = fixed_point.measure(model, clips, 8)
    np.testing.assert_allclose(measured["u"], 1, atol=1e-5)
    tokens, visible = model.sampler.num_tokens, model.sampler.num_visible
    assert measured["kappa"] == pytest.approx(2 * tokens / (tokens - visible))
    assert abs(measured["pull"].sum()) < 1e-3  # advantages are centred on each clip
    assert "contrast, mean u^2                1.00" in fixed_point.report(measured)


def test_the_command_runs_and_says_what_it_needs(trained, capsys, tmp_path):
    flags = ["--data_path", str(trained / "shapes/val.csv"), "--num_videos", "3", "--draws", "4"]
    fixed_point.main(["--model_path", str(trained / "tats"), *flags])
    assert "kappa" in capsys.readouterr().out
    for name, value in (("tats_objective", "listwise"), ("entropy", "uniform_kl"), ("entropy_coef", 0)):
        state = torch.load(trained / "tats/checkpoint-0.pth", weights_only=True)
        if value == "listwise":
            state["tats"] = {name: tensor for name, tensor in state["tats"].items() if not name.startswith("critic.")}
        torch.save(state | {"args": state["args"] | {name: value}}, tmp_path / "other.pth")
        with pytest.raises(SystemExit, match=naming("error: ", tmp_path / "other.pth", f"--{name} {value}")):
            fixed_point.main(["--model_path", str(tmp_path / "other.pth"), *flags])


@pytest.mark.parametrize("normalize", [False, True])
def test_slopes_are_the_derivative_along_the_scale_of_the_logits(trained, normalize):
    """Central differences of c_p mean(A log p) and of c_e H under logits (1 + h) z, for the same masks and errors."""
    model = fixed_point.Trained(str(trained / "tats"), [])
    args, step, draws = model.args, 1e-3, 6
    args.normalize_advantage = normalize
    torch.manual_seed(0)
    torch.nn.init.normal_(model.sampler.actor.weight)
    clips = torch.randint(256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    measured = fixed_point.measure(model, clips, draws)
    _, video = model.normalize(clips)
    recipe = PretrainRecipe(mean=model.mean, std=model.std, lr=0, min_lr=0, grid=model.mae.grid)
    masks, errors = [], []
    with torch.no_grad():
        tokens = model.mae.encoder.patch_embed(video)
        for draw in range(draws):
            masks.append(model.sampler(video, 3 * draw + torch.arange(3), tokens))
            prediction = model.mae(video, masks[-1])
            errors.append(masked_error(prediction, clips.transpose(1, 2), masks[-1], recipe).double())
    errors = torch.stack(errors)  # [draws, clips, N_m]
    advantages = errors - errors.mean(dim=(0, 2), keepdim=True)
    scale = advantages.std().item() if normalize else 1.0

    def objective(h):
        log_prob = ((1 + h) * masks[0].log_prob.double()).log_softmax(dim=1)
        chosen = torch.stack([log_prob.gather(1, mask.masked) for mask in masks])
        bonus = -(log_prob.exp() * log_prob).sum(dim=1).mean()
        return args.policy_coef * (advantages / scale * chosen).mean().item(), args.entropy_coef * bonus.item()

    slopes = [(more - less) / (2 * step) for more, less in zip(objective(step), objective(-step), strict=True)]
    assert measured["sharpens"] == pytest.approx(slopes[0], rel=1e-3)
    assert measured["holds"] == pytest.approx(-slopes[1], rel=1e-3)
    tokens, visible = model.sampler.num_tokens, model.sampler.num_visible
    assert measured["kappa"] == pytest.approx(2 * tokens / (tokens - visible) / scale, rel=1e-4)
