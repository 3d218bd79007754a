"""Checkpoints of a run: atomic files that load without running code, which to keep, and what a resume needs of them."""

import argparse
import contextlib
import io
import itertools
import math
import numbers
import os
import re
from pathlib import Path, PurePath

import torch
from torch import Tensor

from runtime.foreign_files import CheckpointError, load_beside, load_checkpoint, weights_in
from runtime.tasks import TASKS
from utils import first_line

MODEL_KEYS = ("model", "module")  # where weights are looked for first, as VideoMAE does


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
            reason = getattr(cause, "strerror", None) or first_line(cause)
            raise CheckpointError(f"{path}: cannot be written ({reason}); older checkpoints are intact") from error
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

    The two newest stay (should one prove damaged), further those after each `every`-th epoch; with keep_last in their
    place the keep_last newest files, of whatever epoch.
    """
    for age, path in enumerate(checkpoint_files(folder)):
        epoch, steps = _place(path)
        regular = steps == math.inf and (epoch + 1) % every == 0
        if age >= max(keep_last, 2) and not (regular and keep_last == 0):
            path.unlink(missing_ok=True)


def latest_checkpoint(folder: str | Path, own: bool = True) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder that can be read; one that is damaged is named and passed over. None where the
    folder has none at all. Raises CheckpointError where none can be read: starting afresh would write over the run.

    own: written by this project, see load_run; False: of anyone, for its weights."""
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, load_run(path) if own else load_checkpoint(path, verify=True)
        except CheckpointError as error:
            print(f"warning: {error}; trying the one before it", flush=True)
    if files:
        advice = "; to start over there use --no-auto_resume" if own else ""
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder}: none of its checkpoints can be read ({names}){advice}")
    return None


def open_checkpoint(path: str | Path, last_resort: str = "") -> tuple[Path, dict]:
    """(file, content) of a checkpoint, or of a folder that holds one: of a run its newest, else what weights_in finds.
    Wherever weights are named by a flag, this decides. A Hugging Face folder of tools/convert_checkpoint.py brings its
    flags and sampler along.

    last_resort: name of a file of a run's folder that is read where nothing else is there. Raises CheckpointError.
    """
    for _ in range(3):  # a folder of DeepSpeed lies in a run's folder; links may lead round
        if not os.path.isdir(path):
            return Path(path), _inner(load_checkpoint(path)) | load_beside(path)
        newest = latest_checkpoint(path, own=False)
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


def load_run(path: str | Path) -> dict:
    """A file that a run of this project wrote; its checksums and content are checked. Raises CheckpointError."""
    state = load_checkpoint(path, verify=True)
    check_run_state(state, path)
    return state


def set_aside_later(folder: Path, epoch: int, steps: float, found: Path | None) -> dict[Path, Path]:
    """Renames checkpoints of a later state than (epoch, steps), where a run resumes, to NAME.old; returns {path: new
    path}. Damaged, or of a run that is begun again, they would outlive its own as the newest. Deletes what killed saves
    left.

    steps: inf after a whole epoch; found: the file the run resumes from, which stays.
    """
    renamed = {}
    for path in checkpoint_files(folder):
        if _place(path) > (epoch, steps) and path != found:
            names = (path.with_name(f"{path.name}.old{number or ''}") for number in itertools.count())
            renamed[path] = path.rename(next(name for name in names if not name.exists()))
    for path in Path(folder).glob("checkpoint-*.pth.tmp"):
        path.unlink()
    return renamed


# What the entries of a run's checkpoint are.
KINDS = {name: dict for name in ("model", "model_ema", "optimizer", "scaler", "best")}
KINDS |= {name: dict | None for name in ("unvalidated", "midway")}
KINDS |= {"rng": list, "class_names": list, "epoch": int, "step": int}


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
    name = saved_args(state, path).get("task", "single_label")
    task = TASKS.get(name) if isinstance(name, str) else None
    if task is None:
        raise CheckpointError(f"{path}: its --task is none of {', '.join(TASKS)}")
    best = state.get("best", {task.metric: 0.0, "epoch": 0})
    if not all(isinstance(best.get(name), numbers.Real) for name in (task.metric, "epoch")):
        raise CheckpointError(f"{path}: its best has no numbers {task.metric} and epoch")
    if not all(value is None or isinstance(value, numbers.Real) for value in (state.get("unvalidated") or {}).values()):
        raise CheckpointError(f"{path}: its unvalidated epoch has other values than numbers")
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
                raise CheckpointError(f"{path}: its optimizer's {name} has values that are not finite")
            shape = () if name == "step" else parameter.shape
            if name in ("step", *MOMENTS) and value.shape != shape:
                raise CheckpointError(f"{path}: its optimizer's {name} is {tuple(value.shape)}, not {tuple(shape)}")
        if adam and moments and not {"step", "exp_avg", "exp_avg_sq"} <= moments.keys():
            raise CheckpointError(f"{path}: its optimizer has only {', '.join(map(str, moments))} of a weight")
