"""Checkpoints: atomic files that load without running code, exact resume, and names from other codebases."""

import argparse
import contextlib
import io
import itertools
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.foreign_files import CheckpointError, load_checkpoint, weights_in

MODEL_KEYS = ("model", "module")  # where weights are looked for first, as VideoMAE does
ADAMAE_SAMPLER = ("encoder.get_token_probs.", "encoder.pos_embed_probs")


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


def latest_checkpoint(folder: str | Path, load: Callable[[Path], dict] | None = None) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder that can be read; one that is damaged is named and passed over. None where the
    folder has none at all. Raises CheckpointError where none can be read: starting afresh would write over the run.

    load: load_checked for the weights of anyone's run; default load_run."""
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, (load or load_run)(path)
        except CheckpointError as error:
            print(f"warning: {error}; trying the one before it", flush=True)
    if files:
        advice = "" if load else "; to start over there use --no-auto_resume"
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder}: none of its checkpoints can be read ({names}){advice}")
    return None


def open_checkpoint(path: str | Path, last_resort: str = "") -> tuple[Path, dict]:
    """(file, content) of a checkpoint, or of a folder that holds one: of a run its newest, else what weights_in finds.
    Wherever weights are named by a flag, this decides.

    last_resort: name of a file of a run's folder that is read where nothing else is there. Raises CheckpointError.
    """
    for _ in range(3):  # a folder of DeepSpeed lies in a run's folder; links may lead round
        if not os.path.isdir(path):
            return Path(path), _inner(load_checkpoint(path))
        newest = latest_checkpoint(path, load_checked)
        if newest:
            return newest
        if last_resort and Path(path, last_resort).is_file():
            return Path(path, last_resort), load_checkpoint(Path(path, last_resort))
        path = weights_in(path)
    raise CheckpointError(f"{path}: no checkpoint in this folder, only further ones")


def _inner(state: dict) -> dict:
    """{"checkpoint": {"model": ..., "args": ...}} -> what is inside."""
    for _ in range(4):
        inside = [value for value in state.values() if isinstance(value, dict) and _has_weights_key(value)]
        if _has_weights_key(state) or len(inside) != 1:
            break
        state = inside[0]
    return state


def _has_weights_key(state: dict) -> bool:
    return any(isinstance(state.get(key), dict) for key in (*MODEL_KEYS, "state_dict"))


def load_checked(path: str | Path) -> dict:
    """load_checkpoint of a run's file, its checksums checked."""
    return load_checkpoint(path, verify=True)


def load_run(path: str | Path) -> dict:
    """load_checked of a file that a run of this project wrote, its content checked too."""
    state = load_checked(path)
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


# --- weights of any codebase, under VideoMAE's names ---------------------------------------------------------------


def model_weights(
    state: dict,
    path: str | Path,
    keys: tuple[str, ...] = MODEL_KEYS,
    drop: tuple[str, ...] = ADAMAE_SAMPLER,
    prefix: str = "",
) -> dict[str, Tensor]:
    """The weights in a checkpoint of this project, VideoMAE, AdaMAE, DeepSpeed or Hugging Face, under the names of
    VideoMAE's autoencoder, float32: "encoder." and the encoder's tensors; the others as they are called.

    keys: where to look, in order, before the top level; drop: beginnings of names to leave out (AdaMAE keeps its
    sampler inside the encoder); prefix: see split_names. Raises CheckpointError.
    """
    encoder, others = split_names(named_weights(state, path, keys), path, prefix)
    weights = others | {f"encoder.{name}": value for name, value in encoder.items()}
    return {name: value for name, value in weights.items() if not name.startswith(drop)}


def encoder_weights(state: dict, path: str | Path, keys: tuple[str, ...], prefix: str = "") -> dict[str, Tensor]:
    """As model_weights, under the classifier's names: the encoder's have no prefix. What lies outside the encoder (a
    decoder, a head) keeps its name; a table of positions there is the decoder's."""
    encoder, others = split_names(named_weights(state, path, keys), path, prefix)
    if encoder and "pos_embed" in others:
        others["decoder.pos_embed"] = others.pop("pos_embed")
    return {name: value for name, value in others.items() if name not in encoder} | encoder


def named_weights(state: dict, path: str | Path, keys: tuple[str, ...] = MODEL_KEYS) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names there, in float32 where they are floating-point numbers.

    Looks under the keys, then at the top level; with the default keys also under "state_dict", then in the only
    dictionary that holds tensors. Raises CheckpointError where there are none, or several dictionaries of them.
    """
    found = _find_weights(state, path, keys)
    if not found:
        holds = ", ".join(f"{str(key)[:40]} ({type(value).__name__})" for key, value in list(state.items())[:5])
        raise CheckpointError(
            f"{path}: holds no weights under {', '.join(map(repr, keys))} or at its top level, but {holds or 'nothing'}"
        )
    return {name: _float32(value) for name, value in found.items()}


def _find_weights(state: dict, path: str | Path, keys: tuple[str, ...], depth: int = 0) -> dict[str, Tensor]:
    if depth > 4:
        return {}
    for key in keys:
        if isinstance(state.get(key), dict) and (found := _find_weights(state[key], path, MODEL_KEYS, depth + 1)):
            return found
    own = {name: value for name, value in state.items() if isinstance(name, str) and _is_array(value)}
    if keys != MODEL_KEYS or any("." in name for name in own):  # a loss may lie beside the weights
        return own
    inside = {
        str(key): _find_weights(value, path, MODEL_KEYS, depth + 1)
        for key, value in state.items()
        if isinstance(value, dict) and "optim" not in str(key)
    }
    inside = {key: found for key, found in inside.items() if found}
    if len(inside) > 1 and "state_dict" not in inside:
        raise CheckpointError(f"{path}: holds weights under {', '.join(inside)}: choose one with --model_key")
    return inside.get("state_dict") or next(iter(inside.values()), own)


def _is_array(value) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _float32(value: Tensor | np.ndarray) -> Tensor:
    value = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach()
    return value.float() if value.is_floating_point() else value


# Parts of names that DDP, torch.compile, FSDP, activation checkpointing, DeepSpeed and Lightning's modules put in.
WRAPPERS = {"module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# (what stands before the encoder's names, VideoMAE's or Hugging Face's names of its first layers)
FIRST_LAYER = re.compile(
    r"(|.*\.)(patch_embed\.proj|embeddings\.patch_embeddings\.projection|encoder\.layer\.0\.attention\.attention\.query)\.weight"
)


def split_names(
    weights: dict[str, Tensor], path: str | Path, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the encoder's tensors under the names of VideoMAE's encoder, all others under theirs). A file without an encoder
    has only others.

    Wrappers' parts of the names are taken off; what stands before the encoder's names is found by its first layer, or
    given as `prefix`; Hugging Face's names are translated. Raises CheckpointError, for image weights too.
    """
    inside, outside = {}, {}
    for name, value in weights.items():
        short = _unwrapped(name)
        if not prefix or name.startswith(prefix) or short.startswith(prefix):
            short = _unwrapped(name.removeprefix(prefix)) if name.startswith(prefix) else short.removeprefix(prefix)
            if short in inside:
                raise CheckpointError(f"{path}: holds {short} twice, once as {name}: choose with --model_prefix")
            inside[short] = value
        else:
            outside[name] = value
    if not inside:
        raise CheckpointError(f"{path}: no weight's name begins with --model_prefix {prefix}")
    first = [match for match in map(FIRST_LAYER.fullmatch, inside) if match]
    _refuse_images([inside[match[0]] for match in first if "query" not in match[0]] or list(inside.values()), path)
    starts = sorted({match[1] for match in first}) or [s for s in ENCODERS if any(n.startswith(s) for n in inside)][:1]
    if len(starts) > 1:
        raise CheckpointError(
            f"{path}: holds {len(starts)} encoders, {', '.join(start + '*' for start in starts)}: choose one with "
            "--model_prefix"
        )
    if not starts and not prefix:
        return {}, inside
    start = starts[0] if starts else ""
    if first and first[0][2] != "patch_embed.proj":
        with restoring("Hugging Face weights", path, "names missing or shapes that do not go together"):
            inside = from_huggingface(_below(inside, start, "videomae.", start.removesuffix("videomae.")))
        start = "encoder."
    encoder = {name.removeprefix(start): value for name, value in inside.items() if name.startswith(start)}
    around = next((start.removesuffix(end) for end in ENCODERS if start.endswith(end)), start)
    others = {name.removeprefix(around): value for name, value in inside.items() if not name.startswith(start)}
    for table in filter(lambda x: x is not None, (encoder.get("pos_embed"), others.get("pos_embed"))):
        check_position_table(table, path)
    return encoder, outside | others


ENCODERS = ("encoder.", "backbone.")  # what an encoder is called inside a model


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _below(weights: dict[str, Tensor], start: str, new_start: str, around: str) -> dict[str, Tensor]:
    """Names with `start` replaced, and without what is `around` elsewhere."""
    return {
        new_start + name.removeprefix(start) if name.startswith(start) else name.removeprefix(around): value
        for name, value in weights.items()
    }


def _refuse_images(weights: list[Tensor], path: str | Path) -> None:
    """Raises CheckpointError where colours come in without time: a convolution over [D, 3, rows, columns]."""
    flat = [value for value in weights if value.ndim == 4 and value.shape[1] in (1, 3)]
    if flat and not any(value.ndim == 5 for value in weights):
        raise CheckpointError(
            f"{path}: holds image weights (its first layer is {tuple(flat[0].shape)}, without time), not a video "
            "model's; taking those over is not supported yet"
        )


def split_samplers(
    state: dict, weights: dict[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(the autoencoder's of model_weights without drop, {name: the sampler's tensors} of those learned samplers that
    the checkpoint has). This project keeps samplers beside the model under their names, AdaMAE inside the encoder."""
    inside = {name: value for name, value in weights.items() if name.startswith(ADAMAE_SAMPLER)}
    samplers = {"adamae": {n.removeprefix("encoder."): v for n, v in inside.items()}} if inside else {}
    samplers |= {name: state[name] for name in names if isinstance(state.get(name), dict)}
    return {name: value for name, value in weights.items() if name not in inside}, samplers


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
    return _load_part(encoder, weights, taken, (*TRUNK, "pos_embed"), TRUNK, path)


TRUNK = ("patch_embed.", "blocks.")
ENCODER_TRUNK = ("encoder.patch_embed.", "encoder.blocks.")


def load_autoencoder(mae: nn.Module, weights: dict[str, Tensor], path: str | Path) -> LoadReport:
    """Loads what a checkpoint has for an autoencoder: all of the encoder's patch embedding and blocks, and all of the
    decoder, which only a file without any of it leaves fresh (a classifier's, say).

    mae: a PretrainVisionTransformer; weights: see model_weights. Raises CheckpointError as load_encoder does.
    """
    own = mae.state_dict()
    taken = {name: value for name, value in weights.items() if name in own}
    whole = any(not name.startswith("encoder.") for name in taken)
    return _load_part(mae, weights, taken, ("",) if whole else ENCODER_TRUNK, (*ENCODER_TRUNK, "decoder."), path)


def _load_part(
    module: nn.Module,
    weights: dict[str, Tensor],
    taken: dict[str, Tensor],
    needed: tuple[str, ...],
    layers: tuple[str, ...],
    path: str | Path,
) -> LoadReport:
    """Loads `taken`, a part of the weights. All of the module whose names begin with `needed` has to be there, and no
    more names of `layers` than the module has."""
    own = module.state_dict()
    wanted = {name: value for name, value in own.items() if name in taken or name.startswith(needed)}
    beyond = {name: value for name, value in weights.items() if name.startswith(layers) and name not in taken}
    holds = "" if any(name.startswith(layers) for name in taken) else f"; it holds {_summary(list(weights))}"
    _check_fit(wanted, taken | beyond, path, holds)
    module.load_state_dict(taken, strict=False)
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
KINDS = {name: dict for name in ("model", "model_ema", "optimizer", "scaler", "best")}
KINDS |= {"rng": list, "epoch": int, "step": int, "unvalidated": dict | None, "midway": dict | None}


def check_run_state(state: dict, path: str | Path) -> None:
    """Raises CheckpointError where an entry that is there is not of its kind."""
    mask_type = saved_args(state, path).get("mask_type")
    sampler = {f"{mask_type}{part}": dict for part in ("", "_optimizer", "_scaler")}
    for name, kind in (KINDS | sampler).items():
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


def saved_args(state: dict, path: str | Path) -> dict:
    """The flags in a checkpoint, of this project or VideoMAE's Namespace, as far as they are plain values: {} where
    there are none. Raises CheckpointError."""
    args = state.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        raise CheckpointError(f"{path}: its args are a {type(args).__name__}, not flags and their values")
    args = {name: str(value) if isinstance(value, PurePath) else value for name, value in args.items()}
    args = {name: value for name, value in args.items() if isinstance(name, str) and _plain(value)}
    if isinstance(args.get("normlize_target"), bool):  # VideoMAE's spelling
        args.setdefault("normalize_target", args["normlize_target"])
    if args.get("mask_type") == "learnable":  # AdaMAE's name
        args["mask_type"] = "adamae"
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


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path, note: str = "") -> None:
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
            "in pre-training --decoder_depth, --mask_type, --tats_attention, --tats_blocks; in fine-tuning "
            f"--nb_classes, --use_cls, --linear_probe, --attentive_probe): {'; '.join(problems)}{note}"
        )
    spoilt = [name for name, (value, mine) in both.items() if not value.to(mine.dtype).isfinite().all()]
    if spoilt:
        raise CheckpointError(
            f"{path}: {len(spoilt)} of its {len(both)} weights are not finite ({_few(spoilt)}): the run that wrote it "
            "had diverged, or the file is damaged; take an earlier one"
        )


def _kind(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {value.layout}{' without values (meta)' if value.is_meta else ''}"


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' VideoMAE models (pre-training or classification) to VideoMAE's own."""
    renames = (
        (r"^videomae\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
        (r"^videomae\.encoder\.layer\.", "encoder.blocks."),
        (r"^videomae\.embeddings\.position_embeddings$", "encoder.pos_embed"),
        (r"^position_embeddings$", "pos_embed"),
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
    return renamed
