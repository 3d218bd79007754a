"""Checkpoints: atomic files that load without running code, exact resume, and names from other codebases."""

import argparse
import contextlib
import io
import itertools
import math
import numbers
import os
import re
import warnings
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
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise CheckpointError(f"{path}: not a regular file")  # a pipe or a device would be waited for
    try:
        if verify and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("checksum")
        if str(path).endswith(".safetensors"):
            return {"model": safetensors.torch.load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that a damaged file seems to have
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
    """The newest checkpoint of a folder that can be read; one that is damaged is named and passed over. None where the
    folder has none at all. Raises CheckpointError where none can be read: starting afresh would write over the run."""
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, load_run(path)
        except CheckpointError as error:
            print(f"warning: {error}; trying the one before it", flush=True)
    if files:
        raise CheckpointError(
            f"{folder}: none of its checkpoints can be read ({', '.join(path.name for path in files)}); to start over "
            "there use --no-auto_resume"
        )
    return None


def load_run(path: str | Path) -> dict:
    """load_checkpoint of a file that a run of this project wrote, its checksums and content checked."""
    state = load_checkpoint(path, verify=True)
    check_run_state(state, path)
    return state


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
    weights = {
        name.removeprefix("module."): value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise CheckpointError(f"{path}: holds no weights under {', '.join(map(repr, keys))} or at its top level")
    if any(name.startswith("videomae.") for name in weights):
        with restoring("Hugging Face weights", path, "names missing or shapes that do not go together"):
            weights = from_huggingface(weights)
    for table in filter(lambda x: x is not None, map(weights.get, ("pos_embed", "encoder.pos_embed"))):
        check_position_table(table, path)
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


def check_position_table(table: Tensor, path: str | Path) -> None:
    """Raises CheckpointError where it is not one float table [1, N, D] with memory for all its values."""
    if (
        not isinstance(table, Tensor)
        or (table.ndim, table.layout, table.is_floating_point(), table.is_meta) != (3, torch.strided, True, False)
        or len(table) != 1
        or not 0 < table.nbytes <= table.untyped_storage().nbytes()
    ):
        kind = f"{_kind(table)} {tuple(table.shape)}" if isinstance(table, Tensor) else _kind(table)
        raise CheckpointError(f"{path}: its pos_embed is {kind}, not a table of positions [1, N, D]")


def position_grid(state: dict, table: Tensor, grid: tuple[int, int, int], tubelet: int, path: str | Path):
    """(t, h, w) of a position table [1, N, D]: frames from the checkpoint's args where it has them, else as many as
    `grid`; square in space. Raises CheckpointError where that does not come out."""
    frames = saved_args(state, path).get("num_frames", grid[0] * tubelet)
    t = frames // tubelet if isinstance(frames, int) else 0
    side = math.isqrt(table.shape[1] // t) if t > 0 else 0
    if t * side * side != table.shape[1] or not side:
        raise CheckpointError(f"{path}: its {table.shape[1]} positions are not {t or repr(frames)} frames of a square")
    return t, side, side


# What the entries of a run's checkpoint are.
KINDS = {name: dict for name in ("model", "model_ema", "adamae", "tats", "optimizer", "scaler", "tats_optimizer",
                                 "tats_scaler", "best")}  # fmt: skip
KINDS |= {"rng": list, "epoch": int, "step": int, "unvalidated": dict | None, "midway": dict | None}


def check_run_state(state: dict, path: str | Path) -> None:
    """Raises CheckpointError where an entry that is there is not of its kind."""
    for name, kind in KINDS.items():
        if name in state and (not isinstance(state[name], kind) or isinstance(state[name], bool)):
            wanted = getattr(kind, "__name__", kind)
            raise CheckpointError(f"{path}: its {name} is a {type(state[name]).__name__}, not a {wanted}")
    if not -1 <= state.get("epoch", 0) < 2**31:
        raise CheckpointError(f"{path}: its epoch is {state['epoch']}")
    best = state.get("best", {"acc1": 0.0, "epoch": 0})
    if not all(isinstance(best.get(name), numbers.Real) for name in ("acc1", "epoch")):
        raise CheckpointError(f"{path}: its best holds no numbers acc1 and epoch")
    if not all(value is None or isinstance(value, numbers.Real) for value in (state.get("unvalidated") or {}).values()):
        raise CheckpointError(f"{path}: its unvalidated epoch holds more than numbers")
    midway = state.get("midway")
    counts = ("steps", "steps_per_epoch", "micro_batches_a_step", "num_failed")
    if midway and not (
        all(isinstance(midway.get(name), int) and midway[name] >= 0 for name in counts)
        and all(isinstance(midway.get(name), dict) for name in ("metrics", "skipped", "unreadable"))
        and isinstance(midway.get("seconds"), list)
    ):
        raise CheckpointError(f"{path}: its midway does not say where in an epoch it is")
    saved_args(state, path)


def saved_args(state: dict, path: str | Path) -> dict:
    """The flags in a checkpoint, of this project or VideoMAE's Namespace, as far as they are plain values: {} where
    there are none. Raises CheckpointError."""
    args = state.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        raise CheckpointError(f"{path}: its args are a {type(args).__name__}, not flags and their values")
    args = {name: value for name, value in args.items() if isinstance(name, str) and _plain(value)}
    sides = args.get("patch_size")
    if isinstance(sides, list | tuple) and len(set(sides)) == 1:  # VideoMAE's holds height and width
        args["patch_size"] = sides[0]
    return args


def _plain(value) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | int | float) for item in value)
    return value is None or isinstance(value, str | int | float)


@contextlib.contextmanager
def restoring(part: str, path: str | Path, hint: str = "damaged, or not written by this project"):
    """What goes wrong in restoring a part of a checkpoint of any content is a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"{path}: its {part} does not fit ({hint}): {type(error).__name__} {' '.join(reason)}"
        ) from error


MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def check_moments(optimizer: torch.optim.Optimizer, path: str | Path) -> None:
    """Raises CheckpointError where what an optimizer has just loaded would make its next step fail or spoil weights."""
    if not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed's, which lays its state out by itself
        return
    adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    for parameter, moments in optimizer.state.items():
        if not isinstance(moments, dict):
            raise CheckpointError(f"{path}: its optimizer's state of a weight is a {type(moments).__name__}")
        for name, value in moments.items():
            if name == "step":
                value = torch.as_tensor(value)
            if name in ("step", *MOMENTS) and not isinstance(value, Tensor):
                raise CheckpointError(f"{path}: its optimizer's {name} is a {type(value).__name__}")
            if isinstance(value, Tensor) and not value.isfinite().all():
                raise CheckpointError(f"{path}: its optimizer's {name} holds values that are not finite")
            shape = () if name == "step" else parameter.shape
            if name in ("step", *MOMENTS) and value.shape != shape:
                raise CheckpointError(f"{path}: its optimizer's {name} is {tuple(value.shape)}, not {tuple(shape)}")
        if adam and moments and not {"step", "exp_avg", "exp_avg_sq"} <= moments.keys():
            raise CheckpointError(f"{path}: its optimizer has only {', '.join(map(str, moments))} of a weight")


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Strict load; raises CheckpointError that lists what does not fit."""
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: holds a {type(weights).__name__} in place of weights by name")
    _check_fit(module.state_dict(), weights, path)
    module.load_state_dict(weights)


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path) -> None:
    both = {name: (weights[name], own[name]) for name in own if name in weights}
    odd = [
        f"{name} is {_kind(value)}, the model has {_kind(mine)}"
        for name, (value, mine) in both.items()
        if not isinstance(value, Tensor)
        or value.is_floating_point() != mine.is_floating_point()
        or value.is_complex()
        or value.is_meta
        or value.layout != mine.layout
    ]
    if odd:
        raise CheckpointError(f"{path}: holds what are no weights of this model: {_few(odd)}")
    missing = [name for name in own if name not in weights]
    unknown = [str(name) for name in weights if name not in own]
    wrong = [
        f"{name} is {tuple(value.shape)}, the model has {tuple(mine.shape)}"
        for name, (value, mine) in both.items()
        if value.shape != mine.shape
    ]
    if missing or unknown or wrong:
        problems = [
            f"{len(names)} {what}: {_few(names)}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise CheckpointError(
            f"{path} does not fit this model (check --model, --input_size, --num_frames, --patch_size, --tubelet_size; "
            "in pre-training --decoder_depth, --mask_type; in fine-tuning --nb_classes, --use_cls, --linear_probe, "
            f"--attentive_probe): {'; '.join(problems)}"
        )
    spoilt = [name for name, (value, mine) in both.items() if not value.to(mine.dtype).isfinite().all()]
    if spoilt:
        raise CheckpointError(
            f"{path}: {len(spoilt)} of its {len(both)} weights are not finite ({_few(spoilt)}): the run that wrote it "
            "had diverged, or the file is damaged; take an earlier one"
        )


def _kind(value) -> str:
    return f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


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
