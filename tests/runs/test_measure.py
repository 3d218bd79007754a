"""tools/measure.py: ridge, neighbours, ROC and errors against other libraries and closed forms, and whole runs."""

import json

import numpy as np
import pytest
import torch

from datasets.moving_shapes import write_dataset
from masking_generator import RandomMask
from tests.helpers.runs import naming, run_here
from tools import measure


def make_features(n=200, d=12, classes=4, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    return centres[label] + noise * torch.randn(n, d, generator=generator), label


def test_ridge_solves_the_normal_equations():
    """Against numpy's least squares on the rows that a penalty is: sqrt(penalty) times the identity, target 0."""
    features, label = make_features()
    target = torch.nn.functional.one_hot(label, 4).double()
    for penalty in (0.1, 10.0):
        rows = np.concatenate([features.double().numpy(), np.sqrt(penalty) * np.eye(12)])
        expected = np.linalg.lstsq(rows, np.concatenate([target.numpy(), np.zeros((12, 4))]), rcond=None)[0]
        found = measure.fit_ridge(features.double(), target, penalty)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("accuracy", [measure.ridge_accuracy, measure.knn_accuracy])
def test_accuracies_of_easy_hopeless_and_shifted_features(accuracy):
    (train, label), (test, truth) = make_features(), make_features(100, seed=1)
    easy = accuracy(train, label, test, truth, 4)
    assert easy > 80
    assert accuracy(5 + 100 * train, label, 5 + 100 * test, truth, 4) == pytest.approx(easy, abs=1)  # standardised
    noise = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)) for n in (200, 400)]
    assert 15 < accuracy(noise[0], label, noise[1], torch.arange(400) % 4, 4) < 35  # chance is 25


def test_area_under_roc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 5, (60,), generator=generator).double()  # with ties
    positive = torch.rand(60, generator=generator) < 0.3
    pairs = [float(a > b) + 0.5 * float(a == b) for a in score[positive] for b in score[~positive]]
    assert measure.area_under_roc(score, positive) == pytest.approx(np.mean(pairs), rel=1e-12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    shapes = write_dataset(folder / "shapes", train=40, val=20, size=32, frames=12)
    for mask_type in ("tube", "tats"):
        run_here(shapes / "train.csv", "--mask_type", mask_type, "--epochs", 1, "--output_dir", folder / mask_type)
    return folder


def test_runs_are_measured_once_and_alike(trained, capsys):
    arguments = [str(trained), "--data_path", str(trained / "shapes")]
    measure.main(arguments)
    found = json.loads((trained / "tats/measures.json").read_text())
    assert {"ridge", "ridge_frames", "knn", "motion_auc", "motion_r2", "error_moving", "error_still"} <= found.keys()
    assert found["checkpoint"] == "checkpoint-0.pth" and 0.3 < found["motion_auc"] <= 1
    capsys.readouterr()
    measure.main(arguments)
    assert capsys.readouterr().out.count("measured before") == 2
    (trained / "tats/measures.json").unlink()
    measure.main(arguments)
    assert json.loads((trained / "tats/measures.json").read_text()) == found  # the same to the last digit


def test_errors_are_those_of_the_same_masks_for_every_run(trained, monkeypatch):
    """Of moving and still masked tokens apart; their weighted mean is the plain mean error of the masked tokens."""
    vis = measure.Trained(str(trained / "tube"), [])
    paths = sorted(str(path) for path in (trained / "shapes/videos").glob("val*"))[:6]
    clips = measure.read_clips(paths, vis.args)
    moving, still = measure.reconstruction_errors(vis, clips, 0.75)
    monkeypatch.setattr(measure, "BATCH", 4)  # batches change nothing
    assert measure.reconstruction_errors(vis, clips, 0.75) == pytest.approx((moving, still), rel=1e-6)
    pixels, video = vis.normalize(clips)
    mask = RandomMask(vis.mae.grid, 0.75)(video, torch.arange(6))
    energy = measure.motion_energy(video, vis.mae.grid)
    share = (energy > energy.mean(1, keepdim=True)).gather(1, mask.masked).double().mean().item()
    target = measure.reconstruction_target(clips.transpose(1, 2), mask, vis.mae.grid, True)
    with torch.no_grad():
        whole = measure.token_error(vis.mae(video, mask), target, "mse").mean().item()
    assert share * moving + (1 - share) * still == pytest.approx(whole, rel=1e-5)


def test_coverage_is_the_share_of_a_tokens_pixels(trained):
    vis = measure.Trained(str(trained / "tube"), [])
    (path,) = sorted(str(path) for path in (trained / "shapes/videos").glob("val_00003*"))
    mask = np.load(trained / "shapes/masks/val_00003.npz")["mask"]
    frames = measure.middle_frames(len(mask), vis.args)
    expected = [mask[frames[2 * t : 2 * t + 2], 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean()
                for t in range(2) for y in range(4) for x in range(4)]  # fmt: skip
    found = measure.coverage(measure.read_masks([path], vis), vis)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def test_displacement_is_that_of_a_disc_across_the_border(trained):
    vis = measure.Trained(str(trained / "tube"), [])
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    masks = torch.stack([
        ((y - cy + 16) % 32 - 16) ** 2 + ((x - cx + 16) % 32 - 16) ** 2 <= 25
        for cy, cx in [(4, 30), (6, 33), (20, 1), (15, 1)]  # two tokens of two frames; the first crosses the border
    ])[None]  # fmt: skip
    found = measure.displacement(masks, vis).unflatten(1, (2, 16))
    expected = torch.tensor([[2.0, 3.0], [-5.0, 0.0]], dtype=torch.float64) / 32
    torch.testing.assert_close(found[0], expected[:, None].expand(2, 16, 2), rtol=0, atol=1e-9)


def test_the_motion_probe_finds_what_features_say(trained):
    """Features that are the answers, and features that are noise."""
    vis = measure.Trained(str(trained / "tube"), [])
    sides, blind = [], []
    for split, count in (("train", 40), ("val", 20)):
        paths = sorted(str(path) for path in (trained / "shapes/videos").glob(f"{split}*"))
        masks = measure.read_masks(paths, vis)
        answers = torch.cat([measure.displacement(masks, vis), measure.coverage(masks, vis)[..., None]], dim=2)
        noise = torch.randn(count, 32, 3, generator=torch.Generator().manual_seed(count))
        sides.append((answers + 1e-4 * noise, masks))
        blind.append((noise, masks))
    found, chance = measure.probe_motion(sides, vis), measure.probe_motion(blind, vis)
    assert found["motion_auc"] > 0.99 and found["motion_r2"] > 0.9
    assert abs(chance["motion_auc"] - 0.5) < 0.15 and chance["motion_r2"] < 0.1


def test_what_cannot_be_measured_is_said(trained, tmp_path):
    broken = {"torn": '{"args": {', "list": "[1]"}
    for name, text in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/args.json").write_text('{"args": null}')  # of another program
    for arguments, parts in (
        *(([str(tmp_path / name), "--data_path", "x"], [str(tmp_path / name / "args.json")]) for name in broken),
        (["no/such", "--data_path", "x"], ["no/such"]),
        ([str(tmp_path / "empty"), "--data_path", "x"], [str(tmp_path / "empty")]),
        ([str(trained), "--data_path", str(tmp_path)], [str(tmp_path / "train.csv")]),
        ([str(trained), "--data_path", "x", "--mask_ratio", "1.5"], ["--mask_ratio 1.5"]),
    ):
        with pytest.raises(SystemExit, match=naming(*parts)):
            measure.main(arguments)
