"""The picture script on small checkpoints."""

import argparse
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import run_mae_pretraining
import run_mae_vis
from datasets.moving_shapes import write_dataset
from tests.helpers.runs import TINY, assert_names, naming


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with a tats, an adamae and a tube checkpoint and small clips."""
    folder = tmp_path_factory.mktemp("vis")
    shapes = write_dataset(folder / "shapes", train=10, val=10, size=32, frames=12)
    for mask_type in ("tats", "adamae", "tube"):
        run_mae_pretraining.main(
            ["--data_path", str(shapes / "train.csv"), *TINY, "--mask_type", mask_type, "--epochs", "1",
             "--tats_start_epoch", "0", "--output_dir", str(folder / mask_type), "--no-pin_mem"]
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["tats", "tube"])
def test_a_run_whose_decoder_is_spared_tokens_is_drawn_whole(trained, name, tmp_path):
    state = torch.load(trained / name / "checkpoint-0.pth", weights_only=True)
    state["args"]["decoder_mask_ratio"] = 0.5
    torch.save(state, tmp_path / "spared.pth")
    vis = run_mae_vis.Trained(str(tmp_path / "spared.pth"), [])
    clip = run_mae_vis.read_clip(str(next((trained / "shapes/videos").glob("*.mp4"))), vis.args)
    error = run_mae_vis.rows_of(vis, clip, top_k=False)[0][2][1]
    assert np.isnan(error).sum() == vis.sampler.num_visible


def test_figure_rows_follow_the_paper(trained):
    vis = run_mae_vis.Trained(str(trained / "tats/checkpoint-0.pth"), [])
    clip = run_mae_vis.read_clip(str(next((trained / "shapes/videos").glob("*.mp4"))), vis.args)
    rows, title = run_mae_vis.rows_of(vis, clip, top_k=False)
    labels = [label.split("\n")[0] for label, _, _ in rows]
    assert labels == ["frames", "reconstruction", "error", "sampling probability", "tats mask"]
    assert "added back" in rows[1][0] and "motion lift" in title
    frames, reconstruction, error, probability, masked = (row[1] for row in rows)
    assert frames.shape == (2, 32, 32, 3) and error.shape == probability.shape == (2, 4, 4)
    assert np.isnan(error).sum() == vis.sampler.num_visible
    assert probability.mean() == pytest.approx(1, abs=1e-5)
    visible = np.isnan(error).repeat(8, 1).repeat(8, 2)
    assert np.allclose(frames[visible], reconstruction[visible], atol=1e-6)  # what the encoder saw is shown as it is
    assert np.allclose(masked[visible], frames[visible], atol=1e-6)
    assert np.allclose(masked[~visible], 0.12 * frames[~visible], atol=1e-6)


def test_reconstruction_of_raw_targets_has_no_statistics_added_back(trained):
    vis = run_mae_vis.Trained(str(trained / "tube/checkpoint-0.pth"), ["--no-normalize_target"])
    clip = run_mae_vis.read_clip(str(next((trained / "shapes/videos").glob("*.mp4"))), vis.args)
    rows, _ = run_mae_vis.rows_of(vis, clip, top_k=False)
    assert [label for label, _, _ in rows][1] == "reconstruction"
    assert len(rows) == 4  # a tube mask has no probabilities to show


def test_pictures_of_a_list_with_a_second_mask(trained, capsys):
    output = trained / "pictures"
    run_mae_vis.main(
        ["--model_path", str(trained / "tats/checkpoint-0.pth"),
         "--compare_path", str(trained / "adamae/checkpoint-0.pth"),
         "--data_path", str(trained / "shapes/val.csv"), "--num_videos", "2", "--output_dir", str(output)]
    )  # fmt: skip
    pictures = sorted(output.glob("*.png"))
    assert len(pictures) == 2 and str(pictures[0]) in capsys.readouterr().out
    assert Image.open(pictures[0]).size[0] > 300


def test_videomae_checkpoint_with_a_namespace_is_drawn(trained, tmp_path):
    state = torch.load(trained / "tube/checkpoint-0.pth", weights_only=True)
    torch.save({"model": state["model"], "args": argparse.Namespace(**state["args"])}, tmp_path / "videomae.pth")
    video = str(next((trained / "shapes/videos").glob("*.mp4")))
    run_mae_vis.main(["--model_path", str(tmp_path / "videomae.pth"), "--videos", video, "--output_dir", str(tmp_path)])
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "flags,parts",
    [
        (["--model_path", "no.pth"], ["no.pth"]),
        (["--model_path", "TUBE", "--mask_type", "tats"], ["tube/checkpoint-0.pth", "tats"]),
        (["--model_path", "TUBE"], ["--videos"]),
        (["--model_path", "TUBE", "--videos", "no.mp4"], ["no.mp4"]),
        (["--model_path", "TUBE", "--data_path", "no.csv"], ["no.csv"]),
    ],
)
def test_bad_input_is_one_clear_error(trained, flags, parts, tmp_path):
    flags = [str(trained / "tube/checkpoint-0.pth") if flag == "TUBE" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_mae_vis.main([*flags, "--output_dir", str(tmp_path)])
    assert str(stop.value).startswith("error: ")
    assert_names(stop.value, *parts)


def clip_of(trained, name):
    vis = run_mae_vis.Trained(str(trained / name / "checkpoint-0.pth"), [])
    return vis, run_mae_vis.read_clip(str(next((trained / "shapes/videos").glob("*.mp4"))), vis.args)


def test_attention_is_drawn_over_the_frames_and_the_token_outlined(trained):
    vis, clip = clip_of(trained, "tats")
    label, shown, colours = run_mae_vis.attention_row(vis, clip, [1, 2, 3])
    assert "(frame 1, 2, 3)" in label and shown.shape == (2, 32, 32, 3) and colours is None
    outline = (shown == (0, 1, 1)).all(axis=-1)
    assert outline[1, 16, 24:32].all() and outline[1, 16:24, 31].all() and outline.sum() == 28
    _, video = run_mae_vis.normalize(clip.unsqueeze(0), vis.mean, vis.std)
    moving = int(run_mae_vis.motion_energy(video, vis.mae.grid).argmax())
    assert f"(frame {moving // 16}, {moving % 16 // 4}, {moving % 4})" in run_mae_vis.attention_row(vis, clip, None)[0]


def test_attention_errors_are_said(trained):
    vis, clip = clip_of(trained, "tats")
    with pytest.raises(run_mae_vis.UsageError, match=naming("--token 2 0 0", "2 x 4 x 4")):
        run_mae_vis.attention_row(vis, clip, [2, 0, 0])
    with pytest.raises(run_mae_vis.UsageError, match=naming("--attention", "adamae/checkpoint-0.pth")):
        run_mae_vis.attention_row(*clip_of(trained, "adamae"), None)


def test_everything_in_one_figure_and_an_animation(trained, tmp_path):
    run_mae_vis.main(
        ["--model_path", str(trained / "tats"), "--compare_path", str(trained / "adamae"), "--num_videos", "1",
         "--data_path", str(trained / "shapes/val.csv"), "--output_dir", str(tmp_path), "--attention", "--gif"]
    )  # fmt: skip
    (gif,) = tmp_path.glob("*.gif")
    assert gif.with_suffix(".png").is_file()
    with Image.open(gif) as animation:
        assert (animation.n_frames, animation.size) == (4, (4 * (3 * 32 + 2 * 2), 128))
        still = np.asarray(animation.convert("RGB"), dtype=float)
    video, masked = still[:, :128], still[:, 4 * 34 : 4 * 66]
    assert masked.mean() < 0.5 * video.mean()


def moving_texture(right, down, frames=4, size=32):
    """uint8 [T, 3, S, S] of a smooth random texture that moves by so many pixels per frame."""
    noise = torch.rand(1, 1, size + 40, size + 40, generator=torch.Generator().manual_seed(0))
    texture = TF.gaussian_blur(noise, 9, 2.0)[0, 0]
    texture = (texture - texture.min()) / (texture.max() - texture.min()) * 255
    clip = [texture[20 - i * down :, 20 - i * right :][:size, :size] for i in range(frames)]
    return torch.stack(clip).to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("right, down, colour", [(3, 0, "red"), (0, 2, "yellow"), (-3, 0, "cyan"), (0, -2, "violet")])
def test_flow_has_the_direction_and_the_speed_of_a_moving_texture(trained, right, down, colour):
    pytest.importorskip("mmcv")
    clip = moving_texture(right, down)
    flow = run_mae_vis.optical_flow(clip, range(0, 4))
    assert flow.shape == (4, 32, 32, 2)
    assert np.allclose(np.median(flow, axis=(1, 2)), (right, down), atol=0.1)
    vis = run_mae_vis.Trained(str(trained / "tube/checkpoint-0.pth"), [])
    label, shown, colours = run_mae_vis.flow_row(vis, clip)
    assert "optical flow" in label and shown.shape == (2, 32, 32, 3) and colours is None
    hue = {"red": (1, 0, 0), "yellow": (1, 0.9, 0), "cyan": (0, 0.8, 1), "violet": (0.35, 0, 1)}
    nearest = {name: np.abs(np.median(shown, axis=(0, 1, 2)) - value).sum() for name, value in hue.items()}
    assert min(nearest, key=nearest.get) == colour and colour in label


def test_flow_is_a_row_of_the_figure_and_says_what_is_missing(trained, tmp_path, monkeypatch):
    pytest.importorskip("mmcv")
    rows = []
    monkeypatch.setattr(run_mae_vis, "draw_figure", lambda found, title, path: rows.extend(found))
    video = str(next((trained / "shapes/videos").glob("*.mp4")))
    flags = ["--model_path", str(trained / "tube"), "--videos", video, "--output_dir", str(tmp_path), "--flow"]
    run_mae_vis.main(flags)
    assert rows[-1][0].startswith("optical flow") and rows[-1][1].shape == rows[0][1].shape
    for package in ("mmcv", "cv2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(SystemExit, match=naming("--flow", package, "opencv-python", "mmcv-lite")):
                run_mae_vis.main(flags)


def test_the_published_order_of_places(trained, tmp_path):
    """VideoMAE's vis.sh: flags, then the video, the folder and the checkpoint."""
    state = torch.load(trained / "tube/checkpoint-0.pth", weights_only=True)
    torch.save({"model": state["model"]}, tmp_path / "videomae.pth")
    video = str(next((trained / "shapes/videos").glob("*.mp4")))
    flags = (
        "--mask_ratio 0.9 --mask_type tube --decoder_depth 1 --model pretrain_videomae_tiny_patch8_64 --input_size 32"
    )
    places = [video, str(tmp_path / "demo"), str(tmp_path / "videomae.pth")]
    run_mae_vis.main([*flags.split(), *places])
    assert len(list((tmp_path / "demo").glob("*.png"))) == 1
    with pytest.raises(SystemExit, match=naming("error: ", video, "behind all flags")):
        run_mae_vis.main([*places, *flags.split()])
    for wrong in (places[:2], [*places, "--videos", video]):
        with pytest.raises(SystemExit, match=naming("error: ", "--model_path", video)):
            run_mae_vis.main([*flags.split(), *wrong])
