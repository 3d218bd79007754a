"""bench/fixed_point.py: the solution of u log u = pull, and what is measured of a policy that was made by hand."""

import numpy as np
import pytest
import torch

import run_mae_pretraining
from bench import fixed_point
from datasets.moving_shapes import write_dataset
from tests.test_run_pretraining import TINY


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


def test_the_command_runs_and_says_what_it_needs(trained, capsys):
    flags = ["--data_path", str(trained / "shapes/val.csv"), "--num_videos", "3", "--draws", "4"]
    fixed_point.main(["--model_path", str(trained / "tats"), *flags])
    assert "does the reward follow motion?" in capsys.readouterr().out
