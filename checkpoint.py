"""Checkpoints: atomic files that load without running code, exact resume, and names from other codebases."""

import argparse
import contextlib
import io
import itertools
import math
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAMAE_SAMPLER = ("encoder.get_token_probs.", "encoder.pos_embed_probs")


class CheckpointError(RuntimeError):
    """Names the file and what is wrong with it."""


class _File(io.BufferedWriter):
    """Remembers why a write failed: torch's writer makes an error of its own of it, which does not say so."""

    error: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes to a temporary name, flushes to disk and renames: a killed save leaves the older file whole.

    Raises CheckpointError where the disk is full or the folder is gone; then too, what was there before is whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    file = None
    try:
        with _File(io.FileIO(temporary, "wb")) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk gets its space back
        if isinstance(error, (OSError, RuntimeError)):  # torch's writer turns some of the first into the second
            cause = (file and file.error) or error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise CheckpointError(f"{path}: cannot be written ({reason}); older checkpoints are whole") from error
        raise


def _flush_folder(folder: Path) -> None:
    """The new name too outlives a power cut; not all file systems can do this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: str | Path, verify: bool = False) -> dict:
    """Reads a checkpoint on the CPU with weights_only=True; of other classes only argparse's Namespace is allowed,
    which VideoMAE stores. A .safetensors file is {"model": its tensors}.

    verify: compare the checksums too, which torch writes and does not read (others can leave them out).
    Raises CheckpointError.
    """
    try:
        if verify and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("checksum")
        if str(path).endswith(".safetensors"):
            return {"model": safetensors.torch.load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint (file or folder)") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; give the checkpoint file inside it") from None
    except Exception as error:  # a damaged or foreign file can make the unpickler raise anything
        raise CheckpointError(
            f"{path}: not a readable checkpoint: damaged, or holding more than tensors, numbers, text and "
            f"argparse.Namespace ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a dictionary of weights")
    return state


def checkpoint_name(epoch: int, steps: int | None = None) -> str:
    """Of the state after an epoch, or after so many steps of it."""
    return f"checkpoint-{epoch}.pth" if steps is None else f"checkpoint-{epoch}-step{steps}.pth"


def checkpoint_files(folder: str | Path) -> list[Path]:
    """checkpoint-N.pth and checkpoint-N-stepS.pth in a folder, newest first."""
    found = [(_place(path), path) for path in Path(folder).glob("checkpoint-*.pth")]
    return [path for place, path in sorted(found, key=lambda x: x[0] or (), reverse=True) if place]


def _place(path: Path) -> tuple[int, float] | None:
    """(epoch, steps) of a checkpoint of a run, by its name."""
    match = re.fullmatch(r"checkpoint-(\d+)(?:-step(\d+))?\.pth", path.name)
    return match and (int(match[1]), int(match[2]) if match[2] else math.inf)


def prune_checkpoints(folder: Path, every: int, keep_last: int = 0) -> None:
    """Deletes checkpoints that newer ones replace.

    The two newest stay (should one prove damaged), further those after each `every`-th epoch: all of them, or with
    keep_last those among the keep_last newest files.
    """
    for age, path in enumerate(checkpoint_files(folder)):
        epoch, steps = _place(path)
        regular = steps == math.inf and (epoch + 1) % every == 0
        if age >= max(keep_last, 2) and not (regular and keep_last == 0):
            path.unlink(missing_ok=True)


def latest_checkpoint(folder: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder that can be read; an unreadable one is named and passed over. None where the
    folder has none at all. Raises CheckpointError where none can be read: starting afresh would write over the run."""
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, load_checkpoint(path, verify=True)
        except CheckpointError as error:
            print(f"warning: {error}; trying the one before it", flush=True)
    if files:
        raise CheckpointError(
            f"{folder}: none of its checkpoints can be read ({', '.join(path.name for path in files)}): choose another "
            "--output_dir, or start over here with --no-auto_resume"
        )
    return None


def set_aside_later(folder: Path, epoch: int, steps: float, found: Path | None) -> list[Path]:
    """Renames checkpoints of a later state than (epoch, steps), where a run goes on from, to NAME.old and returns them:
    damaged, or of a run that is begun again, they would outlive its own as the newest. Deletes what killed saves left.

    steps: inf after a whole epoch; found: the file the run goes on from, which stays.
    """
    later = [path for path in checkpoint_files(folder) if _place(path) > (epoch, steps) and path != found]
    for path in later:
        names = (path.with_name(f"{path.name}.old{number or ''}") for number in itertools.count())
        os.replace(path, next(name for name in names if not name.exists()))
    for path in Path(folder).glob("checkpoint-*.pth.tmp"):
        path.unlink()
    return later


def model_weights(
    state: dict,
    path: str | Path,
    keys: tuple[str, ...] = ("model", "module", "state_dict"),
    drop: tuple[str, ...] = ADAMAE_SAMPLER,
) -> dict[str, Tensor]:
    """The weights in a checkpoint of this project, VideoMAE, AdaMAE, DeepSpeed or Hugging Face, under VideoMAE's names.

    keys: where to look, in order, before the top level; drop: beginnings of names to leave out (AdaMAE keeps its
    sampler inside the encoder). Raises CheckpointError.
    """
    for key in keys:
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    weights = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path}: holds no weights under {', '.join(map(repr, keys))} or at its top level")
    if any(name.startswith("videomae.") for name in weights):
        weights = from_huggingface(weights)
    return {name: value for name, value in weights.items() if not name.startswith(drop)}


def encoder_weights(state: dict, path: str | Path, keys: tuple[str, ...], prefix: str = "") -> dict[str, Tensor]:
    """As model_weights, under the classifier's names: `prefix`, or else "encoder." or "backbone.", is taken off.

    What is not under the prefix (a decoder, a head) keeps its name.
    """
    weights = model_weights(state, path, keys, drop=())
    for start in [prefix] if prefix else ["encoder.", "backbone."]:
        inside = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        if inside:
            outside = {name: value for name, value in weights.items() if not name.startswith(start)}
            return {name: value for name, value in outside.items() if name not in inside} | inside
    if prefix:
        raise CheckpointError(f"{path}: no weight's name begins with --model_prefix {prefix}")
    return weights


class LoadReport(NamedTuple):
    """Names of tensors: taken over, missing in the file (they keep their fresh start), and left over in it."""

    loaded: list[str]
    missing: list[str]
    left_over: list[str]

    def __str__(self):
        return (
            f"{len(self.loaded)} tensors taken over; {len(self.missing)} start fresh: {_summary(self.missing)}; "
            f"{len(self.left_over)} left over: {_summary(self.left_over)}"
        )


def _summary(names: list[str]) -> str:
    """Names by their first part: "decoder.* (46), mask_token"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(f"{first}.* ({len(n)})" if len(n) > 1 else n[0] for first, n in groups.items()) or "none"


def load_encoder(encoder: nn.Module, weights: dict[str, Tensor], path: str | Path, grid=None) -> LoadReport:
    """Loads what a pre-training or fine-tuning checkpoint has for a classifier: all of its patch embedding and blocks;
    norms and the head where they are there and fit.

    encoder: a VisionTransformer; weights: see encoder_weights. A learned position table of another length is
    interpolated between `grid`, its (t, h, w) tokens, and the encoder's. A fixed one is not in checkpoints.
    Raises CheckpointError where a block is missing, of another shape, or one too many.
    """
    own = encoder.state_dict()
    taken = {name: value for name, value in weights.items() if name in own}
    if any(name.startswith("pool.") for name in weights):  # a probe's head reads other features
        taken = {name: value for name, value in taken.items() if not name.startswith("head.")}
    if "pos_embed" in taken and grid is not None:
        taken["pos_embed"] = resize_position_table(taken["pos_embed"], grid, encoder.patch_embed.grid)
    if "head.weight" in taken and taken["head.weight"].shape != own["head.weight"].shape:  # of other classes
        taken = {name: value for name, value in taken.items() if not name.startswith("head.")}
    trunk = ("patch_embed.", "blocks.")
    needed = {name: own[name] for name in own if name in taken or name.startswith((*trunk, "pos_embed"))}
    _check_fit(needed, taken | {name: value for name, value in weights.items() if name.startswith(trunk)}, path)
    encoder.load_state_dict(taken, strict=False)
    return LoadReport(list(taken), [n for n in own if n not in taken], [n for n in weights if n not in taken])


def resize_position_table(table: Tensor, old_grid: tuple[int, int, int], new_grid: tuple[int, int, int]) -> Tensor:
    """A learned position table [1, N, D] of (t, h, w) tokens for another grid, trilinear."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    volume = table.float().transpose(1, 2).unflatten(2, tuple(old_grid))
    volume = F.interpolate(volume, size=tuple(new_grid), mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2).to(table.dtype)


def position_grid(state: dict, table: Tensor, grid: tuple[int, int, int], tubelet: int, path: str | Path):
    """(t, h, w) of a position table [1, N, D]: frames from the checkpoint's args where it has them, else as many as
    `grid`; square in space. Raises CheckpointError where that does not come out."""
    args = state.get("args", {})
    args = args if isinstance(args, dict) else vars(args)
    t = args["num_frames"] // tubelet if "num_frames" in args else grid[0]
    side = math.isqrt(table.shape[1] // t)
    if t * side * side != table.shape[1]:
        raise CheckpointError(f"{path}: its {table.shape[1]} positions are not {t} frames of a square")
    return t, side, side


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Strict load; raises CheckpointError that lists what does not fit."""
    _check_fit(module.state_dict(), weights, path)
    module.load_state_dict(weights)


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path) -> None:
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if missing or unknown or wrong:
        problems = [
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise CheckpointError(
            f"{path} does not fit this model (check --model, --input_size, --num_frames, --patch_size, --tubelet_size; "
            "in pre-training --decoder_depth, --mask_type; in fine-tuning --nb_classes, --use_cls, --linear_probe, "
            f"--attentive_probe): {'; '.join(problems)}"
        )


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' VideoMAE models (pre-training or classification) to VideoMAE's own."""
    renames = (
        (r"^videomae\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
        (r"^videomae\.encoder\.layer\.", "encoder.blocks."),
        (r"^videomae\.layernorm", "encoder.norm"),
        (r"^decoder\.decoder_layers\.", "decoder.blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^classifier\.", "head."),
    )
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in [name for name in renamed if name.endswith("attn.query.weight")]:
        prefix = name.removesuffix("query.weight")
        parts = [renamed.pop(f"{prefix}{part}.weight") for part in ("query", "key", "value")]
        renamed[f"{prefix}qkv.weight"] = torch.cat(parts)
        for part in ("q", "v"):
            full = {"q": "query", "v": "value"}[part]
            if f"{prefix}{full}.bias" in renamed:
                renamed[f"{prefix}{part}_bias"] = renamed.pop(f"{prefix}{full}.bias")
        renamed.pop(f"{prefix}key.bias", None)
    return {name: value for name, value in renamed.items() if not name.endswith("position_embeddings")}
