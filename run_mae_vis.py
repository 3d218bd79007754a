"""Draw what a pre-trained masked autoencoder and its sampler do with videos: one PNG per video, laid out as the paper's
figures: frames, reconstruction, error, sampling probability, mask, the mask of a second checkpoint, and the trajectory
attention of one token (--attention) and the optical flow (--flow); with --gif also an animation of the mask.

The checkpoint's own flags are used; any flag of run_mae_pretraining.py given here overrides them. VideoMAE's order of
places works too: [flags] VIDEO OUTPUT_DIR MODEL_PATH.
"""

import argparse
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from datasets.decoding import VideoError, read_frames
from datasets.lists import ListError, read_list
from datasets.transforms import mean_and_std, normalize
from masking_generator import Mask, motion_energy, motion_lift
from modeling_pretrain import normalize_patches, patchify, token_error, unpatchify
from run_mae_pretraining import (
    SAMPLERS,
    build_mae,
    build_sampler,
    check_flags,
    get_parser,
    load_pretrained,
    load_sampler,
)
from runtime.checkpoint import CheckpointError, open_checkpoint, saved_args
from runtime.convert import model_weights, split_samplers
from runtime.mask_pictures import darken
from runtime.resume import saved_defaults
from utils import UsageError, picture_text, tolerant_output


def parse_flags(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and the pre-training flags to override the checkpoint's with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_path", help="checkpoint of this project, VideoMAE's or AdaMAE's, or a run's folder")
    parser.add_argument("--compare_path", default="", help="second checkpoint, whose mask is added as the last row")
    parser.add_argument("--videos", nargs="+", default=[], help="video files")
    parser.add_argument("--data_path", default="", help="list file to take videos from instead")
    parser.add_argument("--num_videos", default=4, type=int, help="how many of --data_path, evenly spaced (default 4)")
    parser.add_argument("--output_dir", default="output/pictures", help="folder for the PNGs (default output/pictures)")
    parser.add_argument(
        "--attention", action="store_true", help="also the trajectory attention of a token of TATS (paper, figure 3)"
    )
    parser.add_argument("--token", nargs=3, type=int, metavar=("FRAME", "ROW", "COLUMN"),
                        help="of --attention, in tokens from 0 (default: the one that moves most)")  # fmt: skip
    parser.add_argument(
        "--flow", action="store_true", help="also the optical flow to the next frame (needs opencv-python, mmcv-lite)"
    )
    parser.add_argument(
        "--gif", action="store_true", help="also an animation: the video beside what the encoder sees of it"
    )
    parser.add_argument("--top_k", action="store_true", help="most probable tokens instead of a draw as in training")
    flags, overrides = parser.parse_known_args(arguments)
    theirs = get_parser()
    theirs.add_argument("places", nargs="*")
    places = theirs.parse_args(overrides).places
    if len(places) not in (0, 3):
        raise UsageError(f"{' '.join(places)}: give VIDEO OUTPUT_DIR MODEL_PATH, all three and last, or --model_path")
    if places:
        if flags.model_path or flags.videos or flags.data_path:
            raise UsageError(f"--model_path, --videos, --data_path: cannot be combined with {' '.join(places)}")
        flags.videos, flags.output_dir, flags.model_path = [places[0]], places[1], places[2]
        if overrides[-3:] != places:
            raise UsageError(f"{' '.join(places)}: put VIDEO OUTPUT_DIR MODEL_PATH behind all flags")
        overrides = overrides[:-3]
    if not flags.model_path:
        raise UsageError("give --model_path, the checkpoint to draw")
    return flags, overrides


class Trained:
    """A checkpoint's autoencoder and sampler, ready to look at clips."""

    def __init__(self, path: str, overrides: list[str]):
        path, state = open_checkpoint(path)
        self.path = path
        parser = get_parser()
        given = parser.parse_args(overrides)
        weights = model_weights(state, path, tuple(given.model_key.split("|")), (), given.model_prefix)
        weights, samplers = split_samplers(state, weights, SAMPLERS)
        known = [action.dest for action in parser._actions]
        if len(samplers) == 1:  # AdaMAE's file need not say so
            parser.set_defaults(mask_type=next(iter(samplers)))
        parser.set_defaults(**saved_defaults(parser, saved_args(state, path), known, path))
        self.args = parser.parse_args([*overrides, "--device", "cpu", "--amp", "none", "--decoder_mask_ratio", "0"])
        check_flags(self.args)
        self.mae = build_mae(self.args).eval()
        missing = load_pretrained(self.mae, weights, path).missing
        if missing:
            raise CheckpointError(
                f"{path}: an encoder without a decoder ({missing[0]}, ...), which reconstructs nothing"
            )
        self.sampler = build_sampler(self.args, self.mae).eval()
        if self.sampler.learned:
            if self.args.mask_type not in samplers:
                raise CheckpointError(f"{path}: has no {self.args.mask_type} sampler; give another --mask_type")
            load_sampler(self.sampler, samplers[self.args.mask_type], state, path, self.args)
        statistics = mean_and_std(self.args.imagenet_default_mean_and_std)
        self.mean, self.std = map(torch.tensor, statistics)

    def normalize(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, T, 3, S, S] -> pixels and video float32 [B, 3, T, S, S]."""
        return normalize(clips, self.mean, self.std)

    @torch.no_grad()
    def mask(self, clip: torch.Tensor, seed: int, top_k: bool) -> tuple[torch.Tensor, torch.Tensor, Mask]:
        """clip uint8 [T, 3, S, S] -> pixels, video [1, 3, T, S, S] and the mask."""
        pixels, video = self.normalize(clip.unsqueeze(0))
        tokens = self.mae.encoder.patch_embed(video) if self.sampler.needs_tokens else None
        seeds = None if top_k and self.sampler.needs_tokens else torch.tensor([seed])
        return pixels, video, self.sampler(video, seeds, tokens)


def middle_frames(length: int, args) -> list[int]:
    """Indices of the clip in the middle of a video of so many frames."""
    span = (args.num_frames - 1) * args.sampling_rate + 1
    start = max((length - span) // 2, 0)
    return [min(start + i * args.sampling_rate, length - 1) for i in range(args.num_frames)]


def read_clip(path: str, args) -> torch.Tensor:
    """The clip in the middle of a video, centre-cropped, uint8 [T, 3, S, S]."""
    frames = read_frames(path, lambda length: middle_frames(length, args), args.decoder)
    clip = frames.permute(0, 3, 1, 2)
    clip = TF.resize(clip, [args.input_size], antialias=True)
    return TF.center_crop(clip, [args.input_size, args.input_size])


@torch.no_grad()
def rows_of(trained: Trained, clip: torch.Tensor, top_k: bool) -> tuple[list[tuple[str, np.ndarray, str | None]], str]:
    """Rows (label, images [t, H, W(, 3)], colour map or None) for the figure, and its title. t token frames."""
    pixels, video, mask = trained.mask(clip, 0, top_k)
    args, grid = trained.args, trained.mae.grid
    prediction = trained.mae(video, mask)
    patches = patchify(pixels, grid)  # [1, N, k, 3]
    target = normalize_patches(patches) if args.normalize_target else patches
    hidden = mask.masked[0]
    error = token_error(prediction, target[:, hidden].flatten(2), args.loss)[0]
    painted = prediction.unflatten(-1, (-1, 3))[0]
    if args.normalize_target:
        truth = patches[0, hidden]
        painted = painted * (truth.std(dim=1, keepdim=True) + 1e-6) + truth.mean(dim=1, keepdim=True)
    reconstruction = patches.clone()
    reconstruction[0, hidden] = painted
    reconstruction = unpatchify(reconstruction, grid, pixels.shape[2:])
    tubelet = args.num_frames // grid[0]

    def images(frames: torch.Tensor) -> np.ndarray:
        return frames[0, :, ::tubelet].permute(1, 2, 3, 0).clamp(0, 1).numpy()

    def token_map(values: torch.Tensor) -> np.ndarray:
        return values.reshape(grid).float().numpy()

    error_map = torch.full((trained.sampler.num_tokens,), float("nan")).index_copy(0, hidden, error)
    note = "\n(true patch mean and\ndeviation added back)" if args.normalize_target else ""
    rows = [
        ("frames", images(pixels), None),
        (f"reconstruction{note}", images(reconstruction), None),
        ("error", token_map(error_map), "magma"),
    ]
    if mask.log_prob is not None:
        relative = mask.log_prob[0].exp() * trained.sampler.num_tokens
        rows.append(("sampling probability\n(1 = uniform)", token_map(relative), "viridis"))
    rows.append(mask_row(trained, pixels, mask, top_k))
    lift = motion_lift(motion_energy(video, grid), mask.visible).item()
    return rows, f"{args.mask_type}, {args.mask_ratio:.0%} masked, error {error.mean():.3f}, motion lift {lift:.2f}"


def mask_row(trained: Trained, pixels: torch.Tensor, mask: Mask, top_k: bool) -> tuple[str, np.ndarray, None]:
    """The frames with hidden tokens darkened."""
    grid = trained.mae.grid
    shown = darken(pixels[:, :, :: trained.args.num_frames // grid[0]], mask, grid)
    how = "top-k" if top_k and trained.sampler.needs_tokens else "as drawn"
    return f"{trained.args.mask_type} mask\n({how})", shown[0].permute(1, 2, 3, 0).numpy(), None


@torch.no_grad()
def attention_row(trained: Trained, clip: torch.Tensor, token: list[int] | None) -> tuple[str, np.ndarray, None]:
    """The frames in grey under the attention of one token, which is outlined in its own frame. Raises UsageError."""
    if not getattr(trained.sampler, "has_trajectories", False):
        raise UsageError(
            f"--attention: {trained.path} has no trajectory attention, it was trained with --mask_type "
            f"{trained.args.mask_type} --tats_attention {trained.args.tats_attention}"
        )
    pixels, video = trained.normalize(clip.unsqueeze(0))
    grid = trained.mae.grid
    if token is None:
        token = np.unravel_index(int(motion_energy(video, grid).argmax()), grid)
    if any(not 0 <= place < size for place, size in zip(token, grid, strict=True)):
        raise UsageError(
            f"--token {' '.join(map(str, token))}: the grid has {' x '.join(map(str, grid))} tokens, from 0"
        )
    frame, row, column = map(int, token)
    index = int(np.ravel_multi_index((frame, row, column), grid))
    weights = trained.sampler.trajectory_of(trained.mae.encoder.patch_embed(video), index).reshape(grid)
    side = [size // cells for size, cells in zip(pixels.shape[3:], grid[1:], strict=True)]
    heat = weights.repeat_interleave(side[0], 1).repeat_interleave(side[1], 2)
    heat = plt.get_cmap("inferno")((heat / heat.max()).numpy())[..., :3]
    grey = pixels[0, :, :: trained.args.num_frames // grid[0]].mean(dim=0).unsqueeze(-1).numpy()
    shown = 0.35 * grey + 0.65 * heat
    top, left = row * side[0], column * side[1]
    bottom, right = top + side[0] - 1, left + side[1] - 1
    shown[frame, [top, bottom], left : right + 1] = shown[frame, top : bottom + 1, [left, right]] = (0, 1, 1)
    return f"attention of the\noutlined token\n(frame {frame}, {row}, {column})", shown, None


def optical_flow(clip: torch.Tensor, frames: range) -> np.ndarray:
    """Farneback's dense flow of clip uint8 [T, 3, H, W] from each of these frames to the next one; from the last one,
    the flow before it. float32 [len(frames), H, W, 2], pixels right and down. Raises ImportError."""
    import cv2

    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip.permute(0, 2, 3, 1).contiguous().numpy()]
    starts = [min(frame, len(grey) - 2) for frame in frames]
    window = min(max(5, clip.shape[-1] // 8), 15)  # pixels; OpenCV's usual 15 would blur a small frame
    settings = dict(pyr_scale=0.5, levels=3, winsize=window, iterations=3, poly_n=5, poly_sigma=1.2, flags=0)
    return np.stack([cv2.calcOpticalFlowFarneback(grey[i], grey[i + 1], None, **settings) for i in starts])


def flow_row(trained: Trained, clip: torch.Tensor) -> tuple[str, np.ndarray, None]:
    """The flow of the shown frames in mmcv's colours, of one scale for the row. Raises UsageError."""
    if len(clip) < 2:
        raise UsageError("--flow: a clip of one frame has no motion")
    try:
        from mmcv import flow2rgb

        flow = optical_flow(clip, range(0, len(clip), trained.args.num_frames // trained.mae.grid[0]))
    except ImportError as error:
        raise UsageError(
            f"--flow: {error}: pip install -r requirements-extra.txt (opencv-python, mmcv-lite)"
        ) from error
    speed = np.linalg.norm(flow, axis=-1, keepdims=True)
    full = max(np.quantile(speed, 0.98), 1e-3)  # pixels in full colour: outliers at the edges would pale the rest
    flow = flow * np.minimum(1, full / np.maximum(speed, 1e-9))
    colours = flow2rgb(flow.reshape(-1, *flow.shape[2:])).reshape(*flow.shape[:3], 3)
    note = f"(up to {full:.1f} pixels per frame;\nright red, down yellow,\nleft cyan, up violet)"
    return f"optical flow\n{note}", colours.clip(0, 1), None


def write_gif(path: Path, trained: Trained, clip: torch.Tensor, masks: list[tuple[Trained, Mask]]) -> None:
    """The clip, and beside it the clip as each mask leaves it, every frame, at least 128 pixels high."""
    pixels = trained.normalize(clip.unsqueeze(0))[0]
    shown = [pixels] + [darken(pixels, mask, other.mae.grid) for other, mask in masks]
    gap = torch.ones_like(pixels[..., :2])
    strip = torch.cat([part for picture in shown for part in (gap, picture)][1:], dim=-1)[0]
    frames = (strip.permute(1, 2, 3, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    scale = max(1, -(-128 // frames.shape[1]))
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=150, loop=0)


def draw_figure(rows: list[tuple[str, np.ndarray, str | None]], title: str, path: Path) -> None:
    columns = len(rows[0][1])
    figure, axes = plt.subplots(
        len(rows),
        columns + 1,  # the last for colour bars
        figsize=(1.35 * columns + 2.6, 1.35 * len(rows) + 0.5),
        width_ratios=[1] * columns + [0.08],
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(picture_text(title), fontsize=10)
    for row, (label, frames, colours) in zip(axes, rows, strict=True):
        limits = {"vmin": 0, "vmax": np.nanmax(frames)} if colours else {}
        for axis, frame in zip(row[:-1], frames, strict=True):
            picture = axis.imshow(frame, cmap=colours, interpolation="nearest", **limits)
            axis.set(xticks=[], yticks=[], facecolor="0.85")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        if colours:
            figure.colorbar(picture, cax=row[-1]).ax.tick_params(labelsize=7)
        else:
            row[-1].axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_videos(flags: argparse.Namespace, overrides: list[str]) -> tuple[list[Path], int]:
    """Writes the figures; returns their paths, and how many videos could not be read, which are named."""
    trained = Trained(flags.model_path, overrides)
    other = Trained(flags.compare_path, []) if flags.compare_path else None
    videos = flags.videos
    if not videos:
        if not flags.data_path:
            raise UsageError("give --videos or --data_path")
        listed, _ = read_list(flags.data_path)
        count = min(flags.num_videos, len(listed))
        videos = [listed[i * len(listed) // count] for i in range(count)]
    if other and (other.args.input_size, other.args.num_frames) != (trained.args.input_size, trained.args.num_frames):
        raise UsageError("--compare_path: its --input_size or --num_frames is not that of --model_path")
    output = Path(flags.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    written, unreadable, first = [], 0, None
    for number, video in enumerate(videos):
        try:
            clip = read_clip(video, trained.args)
        except VideoError as error:
            if len(videos) > 1:
                print(f"error: {error}", file=sys.stderr, flush=True)
            unreadable, first = unreadable + 1, first or error
            continue
        rows, title = rows_of(trained, clip, flags.top_k)
        masks = []
        for model in filter(None, (trained, other)):
            pixels, _, mask = model.mask(clip, 0, flags.top_k)
            masks.append((model, mask))
        if other:
            rows.append(mask_row(other, pixels, mask, flags.top_k))
        if flags.attention:
            rows.append(attention_row(trained, clip, flags.token))
        if flags.flow:
            rows.append(flow_row(trained, clip))
        # file systems take names of 255 bytes
        stem = os.fsencode(Path(video).stem)[:200].decode(errors="ignore")
        path = output / f"{number:02d}-{stem}.png"
        draw_figure(rows, f"{Path(video).name}: {title}", path)
        written.append(path)
        if flags.gif:
            path = path.with_suffix(".gif")
            write_gif(path, trained, clip, masks)
            written.append(path)
    if first and not written:
        raise first
    return written, unreadable


def main(arguments: list[str] | None = None) -> None:
    tolerant_output()
    try:
        written, unreadable = draw_videos(*parse_flags(arguments))
        for path in written:
            print(f"wrote {path}")
    except (UsageError, ListError, VideoError) as error:
        sys.exit(f"error: {error}")
    if unreadable:
        sys.exit(1)


if __name__ == "__main__":
    main()
