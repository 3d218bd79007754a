"""Draw what a pre-trained masked autoencoder and its sampler do with videos: one PNG a video, laid out as the paper's
figures: frames, reconstruction, error, sampling probability, mask, and the mask of a second checkpoint.

The checkpoint's own flags are used; any flag of run_mae_pretraining.py given here overrides them.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF

from checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, load_weights, model_weights, saved_args
from datasets.transforms import mean_and_std, normalize
from datasets.video import ListError, VideoError, read_frames, read_list
from masking_generator import Mask, motion_energy, motion_lift
from modeling_pretrain import normalize_patches, patchify, token_error, unpatchify
from run_common import saved_defaults
from run_mae_pretraining import build_mae, build_sampler, check_flags, get_parser
from utils import UsageError


def parse_flags(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and the pre-training flags to override the checkpoint's with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model_path", required=True, help="checkpoint of this project or VideoMAE's, or a run's folder"
    )
    parser.add_argument("--compare_path", default="", help="second checkpoint, whose mask is added as the last row")
    parser.add_argument("--videos", nargs="+", default=[], help="video files")
    parser.add_argument("--data_path", default="", help="list file to take videos from instead")
    parser.add_argument("--num_videos", default=4, type=int, help="how many of --data_path, evenly spaced (default 4)")
    parser.add_argument("--output_dir", default="output/pictures", help="folder for the PNGs (default output/pictures)")
    parser.add_argument("--top_k", action="store_true", help="most probable tokens instead of a draw as in training")
    return parser.parse_known_args(arguments)


class Trained:
    """A checkpoint's autoencoder and sampler, ready to look at clips."""

    def __init__(self, path: str, overrides: list[str]):
        if Path(path).is_dir():
            newest = latest_checkpoint(path)
            if newest is None:
                raise CheckpointError(f"{path}: no checkpoint-N.pth in this folder")
            path, state = newest
        else:
            state = load_checkpoint(path)
        parser = get_parser()
        known = [action.dest for action in parser._actions]
        parser.set_defaults(**saved_defaults(parser, saved_args(state, path), known, path))
        self.args = parser.parse_args([*overrides, "--device", "cpu", "--amp", "none"])
        check_flags(self.args)
        self.mae = build_mae(self.args).eval()
        weights = model_weights(state, path)
        load_weights(self.mae, weights, path)
        self.sampler = build_sampler(self.args, self.mae).eval()
        if self.args.mask_type in ("adamae", "tats"):
            if self.args.mask_type not in state:
                raise CheckpointError(f"{path}: holds no {self.args.mask_type} sampler; give another --mask_type")
            load_weights(self.sampler, state[self.args.mask_type], path)
        statistics = mean_and_std(self.args.imagenet_default_mean_and_std)
        self.mean, self.std = map(torch.tensor, statistics)

    @torch.no_grad()
    def mask(self, clip: torch.Tensor, seed: int, top_k: bool) -> tuple[torch.Tensor, torch.Tensor, Mask]:
        """clip uint8 [T, 3, S, S] -> pixels, video [1, 3, T, S, S] and the mask."""
        pixels, video = normalize(clip.unsqueeze(0), self.mean, self.std)
        tokens = self.mae.encoder.patch_embed(video) if self.sampler.needs_tokens else None
        seeds = None if top_k and self.sampler.needs_tokens else torch.tensor([seed])
        return pixels, video, self.sampler(video, seeds, tokens)


def read_clip(path: str, args) -> torch.Tensor:
    """The clip in the middle of a video, centre-cropped, uint8 [T, 3, S, S]."""

    def choose(length: int) -> list[int]:
        span = (args.num_frames - 1) * args.sampling_rate + 1
        start = max((length - span) // 2, 0)
        return [min(start + i * args.sampling_rate, length - 1) for i in range(args.num_frames)]

    frames = read_frames(path, choose, args.decoder)
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
    tubelet = trained.args.num_frames // grid[0]
    keep = (~mask.hidden()).float().reshape(1, 1, *grid)
    keep = torch.nn.functional.interpolate(keep, size=(grid[0], *pixels.shape[3:]), mode="nearest")
    shown = pixels[:, :, ::tubelet] * (0.12 + 0.88 * keep)
    how = "top-k" if top_k and trained.sampler.needs_tokens else "as drawn"
    return f"{trained.args.mask_type} mask\n({how})", shown[0].permute(1, 2, 3, 0).numpy(), None


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
    figure.suptitle(title, fontsize=10)
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


def draw_videos(flags: argparse.Namespace, overrides: list[str]) -> list[Path]:
    """Writes the figures and returns their paths."""
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
    written = []
    for number, video in enumerate(videos):
        clip = read_clip(video, trained.args)
        rows, title = rows_of(trained, clip, flags.top_k)
        if other:
            pixels, _, mask = other.mask(clip, 0, flags.top_k)
            rows.append(mask_row(other, pixels, mask, flags.top_k))
        path = output / f"{number:02d}-{Path(video).stem}.png"
        draw_figure(rows, f"{Path(video).name}: {title}", path)
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> None:
    try:
        for path in draw_videos(*parse_flags(arguments)):
            print(f"wrote {path}")
    except (UsageError, ListError, VideoError, CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
