"""Finding the checkpoint of a run, resuming from it, saving."""

import argparse
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from runtime.build import effective_batch
from runtime.checkpoint import (
    CheckpointError,
    checkpoint_name,
    latest_checkpoint,
    load_run,
    open_checkpoint,
    prune_checkpoints,
    restoring,
    save_checkpoint,
    saved_args,
    set_aside_later,
)
from runtime.flags import SWITCH
from utils import UsageError, all_gather_object, check_same_on_all_ranks, is_main_process, log

# Flags that may change between a run and its resume without changing what is computed.
FREE_ON_RESUME = {
    "resume", "auto_resume", "start_epoch", "output_dir", "log_dir", "num_workers", "pin_mem", "print_freq", "rank",
    "local_rank", "world_size", "distributed", "dist_url", "dist_on_itp", "save_ckpt_freq", "finetune", "model_key",
    "model_prefix", "inflate",
    "use_checkpoint", "checkpoint_modules",
    "eval", "test_num_segment", "test_num_crop", "allow_missing", "test_data_path", "save_ckpt",
    "save_ckpt_minutes", "keep_last",
    "picture_freq", "enable_deepspeed", "zero_stage", "offload", "fused_adam", "deepspeed_config",
}  # fmt: skip


def find_resume(args) -> tuple[Path, dict] | None:
    """The newest checkpoint in --output_dir, or --resume's where none there comes of it, the same on every process.

    Raises: CheckpointError; UsageError where the folder holds another run, or processes see different files.
    """
    found = latest_checkpoint(args.output_dir) if args.auto_resume and args.output_dir else None
    if args.resume:
        own = found and saved_args(found[1], found[0]).get("resume") == args.resume  # stopped, and started once more
        if not own and os.path.isdir(args.resume):
            found = latest_checkpoint(args.resume)
            if found is None:
                raise CheckpointError(f"{args.resume}: no checkpoint-N.pth in this folder to resume from")
        elif not own:
            found = Path(args.resume), load_run(args.resume)
        check_same_on_all_ranks(str(found[0]), "checkpoints to resume from")
        return found
    check_same_on_all_ranks(found and str(found[0]), "checkpoints to resume from")
    if found is None:
        return None
    source = saved_args(found[1], found[0]).get("finetune", "")
    if args.finetune and args.finetune != source:
        raise UsageError(
            f"{args.output_dir} contains a run that started from {source or 'random weights'}, not from --finetune "
            f"{args.finetune}: choose another --output_dir, or start over with --no-auto_resume"
        )
    return found


def open_finetune(args, last_resort: str = "") -> tuple[Path, dict]:
    """open_checkpoint of --finetune, the same on every process. Raises CheckpointError, UsageError."""
    path, state = open_checkpoint(args.finetune, last_resort)
    check_same_on_all_ranks(str(path), "checkpoints to start from")
    return path, state


def saved_defaults(parser: argparse.ArgumentParser, saved: dict, names: Iterable[str], path: str | Path) -> dict:
    """Those of the named flags that a checkpoint has saved, for parser.set_defaults. Raises CheckpointError for a value
    that the flag cannot have."""
    actions = {action.dest: action for action in reversed(parser._actions)}
    defaults = {name: saved[name] for name in names if name in saved}
    for name, value in defaults.items():
        action = actions[name]
        kind = bool if isinstance(action, SWITCH) else {int: int, float: int | float}.get(action.type, str)
        items = value if isinstance(value, list | tuple) and action.nargs else [value]
        right = all(isinstance(item, kind) and (kind is bool or not isinstance(item, bool)) for item in items)
        if value is not None and not (right and (action.choices is None or set(items) <= set(action.choices))):
            raise CheckpointError(f"{path}: its args hold --{name} {value!r}, which that flag cannot be")
    return defaults


def resume(run, args, found: tuple[Path, dict] | None, steps_per_epoch: int) -> tuple[int, dict | None]:
    """The epoch to start with, after the checkpoint found, else --start_epoch; and where in it (EpochRunner.where).

    run.load(path, state) restores the optimizer and the rest, not the weights, and returns the epoch after the last
    whole one. Raises CheckpointError, UsageError.
    """
    _set_aside_later(args, found)
    if found is None:
        if args.output_dir and Path(args.output_dir, "log.txt").exists():
            place = f"over an earlier run in {args.output_dir}, no checkpoint used"
            log(f"note: starting at epoch {args.start_epoch} {place}")
        return args.start_epoch, None
    path, state = found
    saved = _videos_counted(args, saved_args(state, path), path)
    changed = [
        f"--{name} {saved[name]} -> {value}"
        for name, value in vars(args).items()
        if name in saved and saved[name] != value and name not in FREE_ON_RESUME
    ]
    if saved.get("opt", args.opt) != args.opt:
        raise UsageError(f"--opt {args.opt}: {path} was written with {saved['opt']}, whose state does not carry over")
    next_epoch, midway = run.load(path, state), state.get("midway")
    done = f"{midway['steps']} of {midway['steps_per_epoch']} steps of epoch {next_epoch}" if midway else ""
    log(f"resumed after {done or f'epoch {next_epoch - 1}'} from {path}")
    if changed:
        log(f"note: flags differ from the run that wrote it: {', '.join(changed)}")
    unknown = [f"--{name} {value}" for name, value in vars(args).items() if name not in saved.keys() | FREE_ON_RESUME]
    if saved and unknown:  # an older version: what it did may be another value than today's default
        log(f"note: the run that wrote it did not have these flags: {', '.join(unknown)}")
    with restoring("args", path):
        before = effective_batch(argparse.Namespace(**vars(args) | saved)) if midway else 0
    if midway and (midway["steps_per_epoch"], before) != (steps_per_epoch, effective_batch(args)):
        log(
            f"note: it had {before} videos a step, this run has {effective_batch(args)}: epoch {next_epoch} starts over"
        )
        midway = None
        if is_main_process() and args.output_dir and path.parent.resolve() == Path(args.output_dir).resolve():
            os.replace(path, path.with_name(checkpoint_name(next_epoch, 0)))  # older than what this run will write
    return next_epoch, midway


def _videos_counted(args, saved: dict, path: Path) -> dict:
    """saved, of a run that may be older than --batch_size of videos. Raises UsageError where the flags of this run are
    not the translated ones."""
    with restoring("args", path):
        if "batch_counts" in saved or saved.get("num_sample", 1) == 1:
            return saved
        count = saved["num_sample"]
        now = saved | {"batch_size": saved["batch_size"] // count}
        now |= {name: saved[name] * count for name in ("lr", "min_lr", "warmup_lr")}
    names = ("batch_size", "num_sample", "lr", "min_lr", "warmup_lr")
    if any(not math.isclose(getattr(args, name), now[name], rel_tol=1e-6) for name in names):
        flags = " ".join(f"--{name} {now[name]:g}" for name in names)
        raise UsageError(
            f"{path}: written when --batch_size counted clips; it counts videos now, as VideoMAE's does. "
            f"To resume this run as it was: {flags}"
        )
    return now


def _set_aside_later(args, found: tuple[Path, dict] | None) -> None:
    """Makes the checkpoint that the run resumes from the newest of its folder."""
    if not args.output_dir or not is_main_process():
        return
    path, epoch, steps = None, args.start_epoch - 1, math.inf
    if found:
        path, state = found
        epoch, midway = state["epoch"], state.get("midway")
        epoch, steps = (epoch + 1, midway["steps"]) if midway else (epoch, math.inf)
    for later, new in set_aside_later(Path(args.output_dir), epoch, steps, path).items():
        log(f"note: {later} is later than where this run resumes; it is renamed to {new.name}")


def save(args, output: Path, state: dict, epoch: int, where: dict | None = None, must: bool = False) -> bool:
    """Writes checkpoint-N.pth, or checkpoint-N-stepS.pth in mid-epoch, and deletes what it replaces; every process has
    to call it. Returns whether it was written: a full disk is a warning, and training continues.

    must: raise UsageError instead. Weights that are not finite are one in any case: a checkpoint of them is worse than
    the one before.
    """
    problem, diverged = "", is_main_process() and not is_finite(state)
    if all_gather_object(diverged)[0]:
        raise UsageError(
            f"weights that are not finite in epoch {epoch}, no checkpoint is written: lower --lr or --tats_lr, set "
            "--clip_grad, and start again; with the last checkpoint where there is one"
        )
    if is_main_process():
        try:
            save_checkpoint(output / checkpoint_name(epoch, where and where["steps"]), state)
        except CheckpointError as error:
            problem = str(error)
        else:
            try:
                prune_checkpoints(output, args.save_ckpt_freq, args.keep_last)
            except OSError as error:
                log(f"warning: {error.filename} is no longer needed and cannot be deleted ({error.strerror})")
    problem = all_gather_object(problem)[0]
    if problem and must:
        raise UsageError(f"{problem}. Put that right, and start the same command again")
    if problem:
        log(f"warning: {problem}; training continues")
    return not problem


def is_finite(state: dict) -> bool:
    """Whether all weights in a checkpoint's state are, those of a learned sampler too."""
    parts = ("model", state["args"].get("mask_type"))
    weights = [value for part in parts for value in state.get(part, {}).values()]
    return bool(torch.stack([value.isfinite().all() for value in weights]).all())
