"""Writes features of videos, by the encoder of a checkpoint of this project, VideoMAE, VideoMAE V2, AdaMAE or Hugging
Face, into one .npz or .safetensors file.

    python tools/extract_features.py --list lists/ucf101/train.csv --model_path output/ucf101_tats --output train.npz
    python tools/extract_features.py long.mp4 --model_path videomae.pth --output long.npz --window 64 --stride 16

Without --window a video has one row, its central view: what a linear probe stores for it, bit for bit. With --window
and --stride, both in frames, there is a row for each window from the start on, until one reaches the end of the video;
the model's frames lie evenly in the window, and beyond the end the last frame is repeated. The file contains

    features      float32 [rows, D]: the mean of the tokens after the norm, or after the mean for a fine-tuned model;
                  with --tokens float16 [rows, N, D], as an attentive probe stores them
    video         int64 [rows]: place in paths
    start, end    float64 [rows]: seconds from the video's first frame
    label         int64, of all videos; with --list
    paths         of all videos
    settings      JSON: the checkpoint and the flags

    failed        JSON: why each other video has no row

A safetensors file has the last three in one JSON text, its metadata "about". Each video is decoded once. Results are
kept beside the output, in OUTPUT.parts, until all are there. A run that was killed resumes when it is started again,
and gives the same file. A video that cannot be read has no row and is named; the others are written, and the exit
status is 1.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datasets.decoding import VideoError, VideoReader, decoders_for, first_reading, open_video
from datasets.lists import read_list
from datasets.transforms import spatial_crops
from datasets.video import view_indices
from engine_for_finetuning import store_features
from run_class_finetuning import build_recipe, check_flags, load_finetune
from runtime.convert import encoder_weights
from runtime.flags import resolve_amp
from tools.common import LOG_SECONDS, Formatter, replacing, run_tool, write_text
from tools.trained import SHARED_FLAGS, add_shared_flags, open_trained, quiet_worker
from utils import UsageError, available_memory, format_time

Row = tuple[int, float, float]  # place of the video, start and end in seconds


class Encoder(nn.Module):
    """A VisionTransformer without its head, for engine_for_finetuning.store_features."""

    def __init__(self, model: nn.Module, tokens: bool):
        super().__init__()
        self.model, self.tokens = model, tokens

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """float32 [B, 3, T, H, W] -> [B, D], or [B, N, D]."""
        tokens = self.model.forward_tokens(video)
        if self.tokens:
            return tokens
        pooled = tokens.mean(dim=1)
        return pooled if self.model.fc_norm is None else self.model.fc_norm(pooled)


class Clips(IterableDataset):
    """Clips of groups of videos. Which clips go through the model together depends on the group alone, so that a run
    that was killed computes the rest as it would have. Without window a group is a batch of videos, with one clip
    each; with window it is one video.

    Yields: dict(group, video=uint8 [b, T, 3, S, S] or None, rows=list of Row, unreadable=list of "path: reason",
    last=whether the group is complete, failed=[], see store_features, which would print them).
    """

    def __init__(self, paths: list[str], groups: dict[int, list[int]], flags: argparse.Namespace, window: int | None,
                 stride: int | None):  # fmt: skip
        self.paths, self.groups, self.flags, self.window, self.stride = paths, groups, flags, window, stride

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for group in list(self.groups)[first::step]:
            chunks = self.windows_of if self.window else self.views_of
            for chunk in chunks(self.groups[group]):
                yield dict(group=group, unreadable=[], last=False, failed=[]) | chunk

    def crop(self, frames: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> uint8 [n, 3, S, S], as the test's central view."""
        size, short_side = self.flags.input_size, self.flags.short_side_size
        return spatial_crops(frames.permute(0, 3, 1, 2), size, short_side, 1)[0]

    def views_of(self, group: list[int]) -> Iterator[dict]:
        """The central view of each video, in one chunk."""
        clips, rows, failed = [], [], []
        for place in group:
            try:
                clip, *times = first_reading(self.paths[place], self.flags.decoder, self.central_view)
            except VideoError as error:
                failed.append(str(error))
                continue
            clips.append(clip)
            rows.append((place, *times))
        yield dict(video=torch.stack(clips) if clips else None, rows=rows, unreadable=failed, last=True)

    def central_view(self, video: VideoReader) -> tuple[Tensor, float, float]:
        """uint8 [T, 3, S, S]; when its first frame begins and its last one ends, in seconds."""
        chosen = []

        def choose(length: int) -> list[int]:
            flags = self.flags
            chosen[:] = view_indices(length, flags.num_frames, flags.sampling_rate, flags.num_segments, 0, 1)
            return chosen

        frames = video.read(choose)
        return self.crop(frames), video.time(chosen[0]), video.time(chosen[-1] + 1)

    def windows_of(self, group: list[int]) -> Iterator[dict]:
        """The windows of the group's video, batch_size at a time."""
        (place,) = group
        clips, rows = [], []
        try:
            for clip, start, end in self.windows(self.paths[place]):
                if len(clips) == self.flags.batch_size:
                    yield dict(video=torch.stack(clips), rows=rows)
                    clips, rows = [], []
                clips.append(clip)
                rows.append((place, start, end))
        except VideoError as error:
            yield dict(video=None, rows=[], unreadable=[str(error)], last=True)
        else:
            yield dict(video=torch.stack(clips), rows=rows, last=True)

    def windows(self, path: str) -> Iterator[tuple[Tensor, float, float]]:
        """(clip uint8 [T, 3, S, S], start and end in seconds) of each window, from one decode. Raises: VideoError."""
        length, stride, count = self.window, self.stride, self.flags.num_frames
        offsets = [i * length // count for i in range(count)]  # of the model's frames in a window
        frames: dict[int, Tensor] = {}  # cropped
        begin = index = 0  # of the window to come; of the frame
        with first_opened(path, self.flags.decoder) as video:

            def clip() -> Tensor:
                return torch.stack([frames[min(begin + offset, index)] for offset in offsets])

            for index, image in video.decode_all():
                if index == begin + length:  # the window ends before this frame
                    yield clip(), video.time(begin), video.time(index)
                    begin += stride
                    frames = {i: frame for i, frame in frames.items() if i >= begin}
                if any(index - start in offsets for start in range(begin, index + 1, stride)):
                    frames[index] = self.crop(torch.from_numpy(image()[None].copy()))[0]
            if begin <= index:  # the window that reaches the end
                frames[index] = self.crop(torch.from_numpy(image()[None].copy()))[0]
                yield clip(), video.time(begin), video.time(index + 1)


def first_opened(path: str, decoder: str) -> VideoReader:
    """The video by the first back end that opens it. Raises: VideoError with the first one's reason."""
    errors = []
    for name in decoders_for(path, decoder):
        try:
            return open_video(path, name)
        except VideoError as error:
            errors.append(error)
    raise errors[0]


# ------------------------------------------------------------------------------------------------------------ files


def save_part(path: Path, features: Tensor | None, rows: list[Row], failed: list[str]) -> None:
    """A group's results, replaced as a whole. features: None where there are no rows."""
    tensors = {} if features is None else {"features": features}
    tensors["video"] = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    tensors["start"], tensors["end"] = torch.tensor([row[1:] for row in rows], dtype=torch.float64).view(-1, 2).T
    with replacing(path) as temporary:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, temporary, {"failed": json.dumps(failed)})


def read_part(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors, failed) of save_part."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["failed"])


def merge(parts: list[Path], output: str, paths: list[str], labels: list[int] | None, settings: dict) -> list[str]:
    """Writes the output from the parts; returns the failures. Raises: UsageError where nothing could be read."""
    rows, shape, failed = 0, None, []
    for part in parts:
        tensors, reasons = read_part(part)
        failed += reasons
        if "features" in tensors:
            shape, dtype = tensors["features"].shape[1:], tensors["features"].dtype
            rows += len(tensors["features"])
    if shape is None:
        raise UsageError(f"no video can be read; the first: {failed[0]}")
    needed, free = rows * shape.numel() * dtype.itemsize, available_memory()
    if free is not None and needed > 0.8 * free:
        raise UsageError(
            f"--output {output}: its features take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free; they are in "
            f"{output}.parts, in files of their own"
        )
    whole = {"features": torch.empty(rows, *shape, dtype=dtype)}
    whole |= {name: torch.empty(rows, dtype=kind) for name, kind in
              (("video", torch.int64), ("start", torch.float64), ("end", torch.float64))}  # fmt: skip
    begin = 0
    for part in parts:
        tensors, _ = read_part(part)
        end = begin + len(tensors["video"])
        for name, tensor in tensors.items():
            whole[name][begin:end] = tensor
        begin = end
    if labels is not None:
        whole["label"] = torch.tensor(labels)
    about = {"paths": paths, "settings": settings, "failed": failed}
    with replacing(output) as temporary:
        if output.endswith(".npz"):
            arrays = {name: tensor.numpy() for name, tensor in whole.items()}
            arrays |= {name: np.array(json.dumps(about[name])) for name in ("settings", "failed")}
            with open(temporary, "wb") as file:
                np.savez(file, **arrays, paths=np.array(paths))
        else:  # one entry: safetensors writes several in any order
            safetensors.torch.save_file(whole, temporary, {"about": json.dumps(about)})
    return failed


def read_settings(output: str) -> tuple[dict, list[str]]:
    """(settings, failed) of a finished output. Raises: UsageError where it is none."""
    try:
        if output.endswith(".npz"):
            with np.load(output) as file:
                return json.loads(str(file["settings"])), json.loads(str(file["failed"]))
        with safetensors.safe_open(output, "pt") as file:
            about = json.loads(file.metadata()["about"])
            return about["settings"], about["failed"]
    except Exception as error:  # anything may lie there
        raise UsageError(f"--output {output}: exists and is not of this tool: choose another name") from error


# -------------------------------------------------------------------------------------------------------------- run


def build_encoder(args: argparse.Namespace) -> tuple[Encoder, argparse.Namespace, Path]:
    """The encoder of --model_path on its device, all flags, and the file. Raises: CheckpointError, UsageError."""
    workers = min(8, os.cpu_count() or 1)
    flags, path, state = open_trained(
        args.model_path, args, linear_probe=True, attentive_probe=False, num_workers=workers
    )
    if flags.nb_classes is None and flags.data_set == "custom":
        flags.nb_classes = 2  # of a head that is not used
    check_flags(flags)
    resolve_amp(flags)
    weights = encoder_weights(state, path, tuple(flags.model_key.split("|")), flags.model_prefix)
    flags.linear_probe = "fc_norm.weight" not in weights  # else fine-tuned: the norm comes after the mean
    model = load_finetune(flags, (path, state))
    model = model.encoder if flags.linear_probe else model
    return Encoder(model, args.tokens).to(flags.device), flags, path


def extract(args: argparse.Namespace) -> int:
    """Returns 1 if a video could not be read, else 0. Raises: UsageError, ListError, CheckpointError."""
    if not args.output.endswith((".npz", ".safetensors")):
        raise UsageError(f"--output {args.output}: must end with .npz or .safetensors")
    if bool(args.videos) == bool(args.list):
        raise UsageError("give VIDEOs, or a list with --list")
    paths, labels = read_list(args.list) if args.list else (list(dict.fromkeys(args.videos)), None)
    encoder, flags, path = build_encoder(args)
    window, stride = args.window, args.stride
    if window or stride:
        window = window or flags.num_frames * flags.sampling_rate
        stride = stride or window
        if window < flags.num_frames or stride < 1:
            raise UsageError(f"--window {window} --stride {stride}: at least {flags.num_frames} frames, and 1")
    settings = {
        "checkpoint": [str(path.resolve()), path.stat().st_size],
        "videos": [len(paths), hashlib.sha1("\n".join(paths).encode(errors="surrogateescape")).hexdigest()],
        "tokens": args.tokens, "window": window, "stride": stride,
    }  # fmt: skip
    settings |= {name: getattr(flags, name) for name in SHARED_FLAGS if name not in ("num_workers", "data_set")}
    if os.path.exists(args.output):
        found, failed = read_settings(args.output)
        if found != settings:
            differ = ", ".join(name for name in settings if settings[name] != found.get(name))
            raise UsageError(f"--output {args.output}: exists, of other settings ({differ}): choose another name")
        print(f"{args.output}: nothing to do")
        return say_failed(failed, len(paths))
    parts = Path(f"{args.output}.parts")
    record, text = parts / "settings.json", json.dumps(settings, indent=1) + "\n"
    if record.exists() and record.read_text() != text:
        raise UsageError(f"{parts}: of a run with other settings: delete it, or choose another --output")
    parts.mkdir(parents=True, exist_ok=True)
    write_text(record, text)
    size = 1 if window else flags.batch_size
    groups = {
        n: list(range(start, min(start + size, len(paths)))) for n, start in enumerate(range(0, len(paths), size))
    }
    files = {group: parts / f"{group:08d}.safetensors" for group in groups}
    todo = {group: places for group, places in groups.items() if not files[group].exists()}
    if len(todo) < len(groups):
        print(f"{len(groups) - len(todo)} of {len(groups)} groups of videos are done already")
    fill_parts(encoder, Clips(paths, todo, flags, window, stride), files, flags)
    failed = merge([files[group] for group in groups], args.output, paths, labels, settings)
    shutil.rmtree(parts)
    print(f"wrote {args.output}")
    return say_failed(failed, len(paths))


def fill_parts(encoder: Encoder, clips: Clips, files: dict[int, Path], flags: argparse.Namespace) -> None:
    """Computes the features of all groups of clips, and writes each group's when it is complete."""
    if not clips.groups:
        return
    loader = DataLoader(
        clips,
        batch_size=None,
        num_workers=min(flags.num_workers, len(clips.groups)),
        worker_init_fn=quiet_worker,
        pin_memory=flags.device == "cuda",
    )
    recipe = build_recipe(flags, torch.device(flags.device), {})
    held: dict[int, tuple[list[Tensor], list[Row]]] = {}  # of groups that are not complete
    total, done, rows = sum(map(len, clips.groups.values())), 0, 0
    start = shown = time.monotonic()
    for chunk in store_features(encoder, loader, recipe, flags.amp, 1):
        group = chunk["group"]
        features, found = held.setdefault(group, ([], []))
        if chunk["video"] is not None:
            features.append(chunk["video"])
            found += chunk["rows"]
            rows += len(chunk["rows"])
        if not chunk["last"]:
            continue
        if clips.window and chunk["unreadable"]:  # in the middle of the video
            features, found = [], []
        save_part(files[group], torch.cat(features) if features else None, found, chunk["unreadable"])
        del held[group]
        done += len(clips.groups[group])
        now = time.monotonic()
        if done == total or now - shown >= LOG_SECONDS:
            shown = now
            left = format_time((now - start) / done * (total - done))
            print(f"[{done}/{total} videos]  {rows / (now - start):.3g} clips/s  left {left}", flush=True)


def say_failed(failed: list[str], total: int) -> int:
    for failure in failed:
        print(f"error: {failure}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {total} videos cannot be read and have no features", file=sys.stderr)
    return 1 if failed else 0


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("videos", nargs="*", metavar="VIDEO")
    parser.add_argument("--list", help="a list instead: `path label` on each line")
    parser.add_argument("--model_path", required=True, help="checkpoint, a run's folder, or Hugging Face's")
    parser.add_argument("--output", required=True, metavar="FILE", help="ends with .npz or .safetensors")
    parser.add_argument("--tokens", action="store_true", help="features of each token instead of their mean")
    parser.add_argument("--window", type=int, help="frames; default with --stride: --num_frames x --sampling_rate")
    parser.add_argument("--stride", type=int, help="frames between two windows; default with --window: the window")
    add_shared_flags(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    run_tool(extract, args)


if __name__ == "__main__":
    main()
