"""What frozen features and reconstructions of pre-trained autoencoders say, without training: the same checkpoint gives
the same numbers. For small data sets, as the embedded one (half a minute per run): all clips and tokens are in memory.

    python tools/measure.py output/compare/embedded --data_path output/shapes

for each pre-training run below the folders writes measures.json beside its newest checkpoint:

    ridge, ridge_frames   top-1 (%) of ridge regression on the mean token, and on the mean token of each frame
    ridge_N               the first of them with N labelled clips (100, 300, 1000)
    knn                   top-1 (%) of the 20 nearest training clips by cosine
    motion_auc            how well a ridge regression on a token's features tells whether a moving shape covers it, as
                          area under the ROC curve (0.5: not at all); only where --data_path has masks/
    motion_r2             how well it tells where the shape moves: share of the variance of the shape's displacement
                          (1: all, 0: none), over the tokens that it covers; as motion_auc
    error_moving, error_still   reconstruction error under the same random masks for every run: of the tokens whose
                          frame difference is above their clip's mean, and of the others
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.lists import read_list
from masking_generator import Mask, RandomMask, motion_energy
from modeling_pretrain import reconstruction_target, token_error
from run_mae_vis import Trained, middle_frames, read_clip
from runtime.checkpoint import checkpoint_files
from runtime.knn import knn_votes, standardized
from tools.common import Formatter, run_tool, write_text
from tools.run_folders import MEASURES, PRETRAINING, args_of, kind_of, read_json
from utils import UsageError

FEW_LABELS = (100, 300, 1000)
NEIGHBOURS = 20
BATCH = 50  # clips
PENALTIES = [10.0**exponent for exponent in range(-3, 6)]


def fit_ridge(features: Tensor, target: Tensor, penalty: float) -> Tensor:
    """Weights float64 [d, k] of argmin |features W - target|^2 + penalty |W|^2."""
    gram = features.T @ features
    gram.diagonal().add_(penalty)
    return torch.linalg.solve(gram, features.T @ target)


def ridge_accuracy(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor, classes: int) -> float:
    """Top-1 (%) of ridge regression on one-hot labels. The penalty is the best of PENALTIES on every fifth training
    clip, fitted to the others."""
    train, test = standardized(train, test)
    target = torch.nn.functional.one_hot(train_label, classes).double() - 1 / classes
    held_out = torch.arange(len(train)) % 5 == 0
    right = [
        (train[held_out] @ fit_ridge(train[~held_out], target[~held_out], penalty)).argmax(1)
        .eq(train_label[held_out]).sum().item()
        for penalty in PENALTIES
    ]  # fmt: skip
    weights = fit_ridge(train, target, PENALTIES[right.index(max(right))])
    return 100 * (test @ weights).argmax(1).eq(test_label).double().mean().item()


def knn_accuracy(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor, classes: int) -> float:
    """Top-1 (%) of a vote of the NEIGHBOURS nearest training clips: see runtime.knn."""
    votes = knn_votes(train, train_label, test, classes, NEIGHBOURS)
    return 100 * votes.argmax(1).eq(test_label).double().mean().item()


def area_under_roc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive has a higher score than a negative, ties half; score [n], positive bool [n]."""
    ordered = score.sort().values
    rank = (torch.searchsorted(ordered, score) + torch.searchsorted(ordered, score, right=True) + 1) / 2
    count, others = positive.sum(), (~positive).sum()
    return ((rank[positive].double().sum() - count * (count + 1) / 2) / (count * others)).item()


def read_clips(paths: list[str], args: argparse.Namespace) -> Tensor:
    """The middle clip of each video, uint8 [n, T, 3, S, S]."""
    return torch.stack([read_clip(path, args) for path in paths])


def read_masks(paths: list[str], trained: Trained) -> Tensor | None:
    """Where moving shapes are in the middle clips, bool [n, T, H, W], or None where there are no masks."""
    masks = [Path(path).parent.parent / "masks" / f"{Path(path).stem}.npz" for path in paths]
    if not all(path.is_file() for path in masks):
        return None
    found = []
    for path in masks:
        mask = np.load(path)["mask"]
        found.append(torch.from_numpy(mask[middle_frames(len(mask), trained.args)]))
    return torch.stack(found)


def coverage(masks: Tensor, trained: Trained) -> Tensor:
    """Share of each token's pixels that a moving shape covers, float32 [n, N]; masks as of read_masks."""
    covered = masks.float().unsqueeze(1)
    covered = torch.nn.functional.interpolate(covered, (covered.shape[2], *2 * [trained.args.input_size]))
    grid = trained.mae.grid
    kernel = tuple(size // cells for size, cells in zip(covered.shape[2:], grid, strict=True))
    return torch.nn.functional.avg_pool3d(covered, kernel).flatten(1)


def displacement(masks: Tensor, trained: Trained) -> Tensor:
    """Of the moving shape from the first to the last frame of each token, in sides of the frame, down and to the right:
    float64 [n, N, 2]; masks as of read_masks. The centres are means on the circle, as the shapes move on a torus."""
    shifts = []
    for axis in (2, 3):
        length = masks.shape[axis]
        profile = masks.sum(dim=5 - axis).to(torch.complex128)  # [n, T, length]
        turns = torch.exp(2j * torch.pi * torch.arange(length, dtype=torch.float64) / length)
        centre = (profile * turns).sum(-1).unflatten(1, (trained.mae.grid[0], -1))  # [n, t, frames of a token]
        shifts.append(torch.angle(centre[..., -1] * centre[..., 0].conj()) / (2 * torch.pi))
    _, height, width = trained.mae.grid
    return torch.stack(shifts, dim=-1).repeat_interleave(height * width, dim=1)


def probe_motion(sides: list[tuple[Tensor, Tensor]], trained: Trained) -> dict[str, float]:
    """motion_auc and motion_r2 of (features [n, N, D], masks) to train and to test on."""
    covered = [coverage(masks, trained).flatten() > 0.5 for _, masks in sides]
    inputs, outputs = standardized(*(features.flatten(0, 1) for features, _ in sides))
    seen = covered[0].double().unsqueeze(1)
    weights = fit_ridge(inputs, seen - seen.mean(), PENALTIES[4])
    auc = area_under_roc((outputs @ weights).squeeze(1), covered[1])
    inputs, outputs = standardized(
        *(features.flatten(0, 1)[c] for (features, _), c in zip(sides, covered, strict=True))
    )
    moved = [displacement(masks, trained).flatten(0, 1)[c] for (_, masks), c in zip(sides, covered, strict=True)]
    mean = moved[0].mean(0)
    predicted = mean + outputs @ fit_ridge(inputs, moved[0] - mean, PENALTIES[4])
    r2 = 1 - (moved[1] - predicted).square().sum() / (moved[1] - mean).square().sum()
    return {"motion_auc": auc, "motion_r2": r2.item()}


@torch.no_grad()
def token_features(trained: Trained, clips: Tensor) -> Tensor:
    """Tokens of the encoder that sees all of them, float32 [n, N, D]."""
    found = []
    everything = torch.arange(trained.sampler.num_tokens)
    for batch in clips.split(BATCH):
        _, video = trained.normalize(batch)
        visible = everything.expand(len(batch), -1)
        found.append(trained.mae.encoder(video, Mask(visible, visible[:, :0])))
    return torch.cat(found)


@torch.no_grad()
def reconstruction_errors(trained: Trained, clips: Tensor, mask_ratio: float) -> tuple[float, float]:
    """Mean error of moving and of still masked tokens, under masks that depend on the clip's place alone."""
    sampler, grid = RandomMask(trained.mae.grid, mask_ratio), trained.mae.grid
    sums = torch.zeros(2, 2, dtype=torch.float64)  # [moving or still, sum or count]
    for batch, places in zip(clips.split(BATCH), torch.arange(len(clips)).split(BATCH), strict=True):
        pixels, video = trained.normalize(batch)
        mask = sampler(video, places)
        target = reconstruction_target(batch.transpose(1, 2), mask, grid, trained.args.normalize_target)
        error = token_error(trained.mae(video, mask), target, trained.args.loss).double()
        energy = motion_energy(video, grid)
        moving = (energy > energy.mean(dim=1, keepdim=True)).gather(1, mask.masked)
        for row, chosen in enumerate((moving, ~moving)):
            sums[row] += torch.stack([error[chosen].sum(), chosen.sum().double()])
    moving, still = (sums[:, 0] / sums[:, 1]).tolist()
    return moving, still


def measure(trained: Trained, data_path: Path, mask_ratio: float) -> dict[str, float]:
    """All measures of a checkpoint. data_path: folder with train.csv and val.csv. Raises UsageError."""
    lists = [read_list(data_path / f"{split}.csv") for split in ("train", "val")]
    label, test_label = (torch.tensor(labels) for _, labels in lists)
    train = token_features(trained, read_clips(lists[0][0], trained.args))
    clips = read_clips(lists[1][0], trained.args)
    test = token_features(trained, clips)
    classes = int(max(label.max(), test_label.max())) + 1
    frames = trained.mae.grid[0]
    pooled = train.mean(1), label, test.mean(1), test_label, classes
    by_frame = [x.unflatten(1, (frames, -1)).mean(2).flatten(1) for x in (train, test)]
    found = {
        "ridge": ridge_accuracy(*pooled),
        "ridge_frames": ridge_accuracy(by_frame[0], label, by_frame[1], test_label, classes),
        "knn": knn_accuracy(*pooled),
    }
    for count in FEW_LABELS:
        if count < len(label):
            found[f"ridge_{count}"] = ridge_accuracy(train.mean(1)[:count], label[:count], *pooled[2:])
    masks = [read_masks(paths[:300], trained) for paths, _ in lists]
    if all(x is not None for x in masks):
        found |= probe_motion([(x[: len(m)], m) for x, m in zip((train, test), masks, strict=True)], trained)
    found["error_moving"], found["error_still"] = reconstruction_errors(trained, clips, mask_ratio)
    return found


def runs_below(folders: list[str]) -> list[Path]:
    """Folders of pre-training runs: those with checkpoints of an autoencoder, the folders themselves or below them."""
    found = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise UsageError(f"{folder}: no such folder")
        for path in sorted(Path(folder).rglob("args.json")):
            if kind_of(args_of(path)) == PRETRAINING and checkpoint_files(path.parent):
                found.append(path.parent)
    if not found:
        raise UsageError(f"{' '.join(folders)}: no pre-training run with a checkpoint in it")
    return found


@torch.no_grad()
def measure_runs(args: argparse.Namespace) -> None:
    """Writes measures.json of each run; one that is there, of the same checkpoint and settings, is left."""
    for folder in runs_below(args.runs):
        checkpoint = checkpoint_files(folder)[0]
        settings = {"checkpoint": checkpoint.name, "data_path": args.data_path, "mask_ratio": args.mask_ratio}
        path = folder / MEASURES
        if path.is_file():
            known = read_json(path)
            if all(known.get(name) == value for name, value in settings.items()):
                print(f"{folder}: measured before")
                continue
        found = measure(Trained(str(checkpoint), []), Path(args.data_path), args.mask_ratio)
        write_text(path, json.dumps(settings | found, indent=1) + "\n")
        print(f"{folder}: {', '.join(f'{name} {value:.3g}' for name, value in found.items())}", flush=True)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="a pre-training run, or a folder with some below it")
    parser.add_argument("--data_path", required=True, help="folder with train.csv and val.csv of labelled videos")
    parser.add_argument("--mask_ratio", default=0.85, type=float, help="of the masks for the reconstruction error")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    if not 0 < args.mask_ratio < 1:
        sys.exit(f"error: --mask_ratio {args.mask_ratio}: must be between 0 and 1")
    run_tool(measure_runs, args)


if __name__ == "__main__":
    main()
