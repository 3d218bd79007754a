"""What run_mae_pretraining.py and run_class_finetuning.py share: flags, their checks, output folder, resume, exit."""

import argparse
import contextlib
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch

from backend import Backend, DeepSpeedBackend, deepspeed_config
from checkpoint import (
    MODEL_KEYS,
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
from datasets.decoding import DECODERS, VideoError
from datasets.lists import ListError
from datasets.transforms import mean_and_std
from optim_factory import create_optimizer
from preemption import EXIT_STATUS, SIGNALS, Preempted, set_handlers
from utils import UsageError, agree, everyone, is_main_process, log, tolerant_output, write_run_description

SWITCH = argparse.BooleanOptionalAction


def new_parser(description: str, **kwargs) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", default=64, type=int,
                       help="videos per process and micro-batch; clips: times --num_sample")  # fmt: skip
    parser.set_defaults(batch_counts="videos")  # for checkpoints: earlier revisions counted clips
    group.add_argument("--epochs", type=int, help="passes over the list of videos")
    group.add_argument(
        "--accum_iter",
        "--update_freq",
        default=1,
        type=int,
        help="micro-batches an optimizer step: effective batch = all clips of a step",
    )
    group.add_argument("--save_ckpt_freq", type=int, help="epochs between checkpoints that are kept (so is the last)")
    group.add_argument("--save_ckpt_minutes", default=15.0, type=float,
                       help="between saves in mid-epoch, replaced by the next; 0: none")  # fmt: skip
    group.add_argument("--keep_last", default=0, type=int,
                       help="checkpoints to keep, the newest, at least 2; 0: all of --save_ckpt_freq")  # fmt: skip
    group.add_argument("--print_freq", default=20, type=int, help="micro-batches between progress lines")
    group.add_argument("--output_dir", default="", help="folder for checkpoints, log.txt and args.json; empty: none")
    group.add_argument("--log_dir", default=None, help="folder for tensorboard files")
    group.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cuda", "cpu"],
        help="cuda where torch sees a GPU",
    )
    group.add_argument("--seed", default=0, type=int, help="decides weights, data order, augmentation and masks")
    group.add_argument("--resume", default="", help="checkpoint of this script, or folder of its run, to go on from")
    group.add_argument(
        "--auto_resume", default=True, action=SWITCH, help="go on from the newest checkpoint in --output_dir"
    )
    group.add_argument("--no_auto_resume", dest="auto_resume", action="store_false", help=argparse.SUPPRESS)
    group.add_argument("--start_epoch", default=0, type=int, help="first epoch; set by a resume")
    group.add_argument("--finetune", default="",
                       help="weights to start from: a checkpoint, a run's folder (its newest) or "
                       "Hugging Face's")  # fmt: skip
    group.add_argument("--model_key", default="|".join(MODEL_KEYS),
                       help="where --finetune holds its weights, first found")  # fmt: skip
    group.add_argument("--model_prefix", default="",
                       help="of the encoder's names there; default: found by its first layer")  # fmt: skip
    group.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "none"],
                       help="mixed precision; auto: bf16 on a GPU that has it, none elsewhere")  # fmt: skip


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a model of this project, by timm's registry")
    group.add_argument("--input_size", default=224, type=int, help="height and width of a clip in pixels")
    group.add_argument("--num_frames", default=16, type=int, help="frames of a clip")
    group.add_argument("--patch_size", default=None, type=int, help="pixels; default: the model's")
    group.add_argument("--tubelet_size", default=2, type=int, help="frames of a token")
    group.add_argument("--drop_path", type=float, help="stochastic depth rate of the last block")
    group.add_argument("--use_checkpoint", default=False, action=SWITCH, help="recompute blocks: less memory, slower")
    return group


def add_optimizer_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="an optimizer of timm")
    group.add_argument("--opt_eps", default=1e-8, type=float, help="of Adam and its kin")
    group.add_argument("--opt_betas", default=None, type=float, nargs="+", help="default: the optimizer's own")
    group.add_argument("--clip_grad", default=None, type=float, help="gradient norm; default: no clipping")
    group.add_argument("--momentum", default=0.9, type=float, help="of SGD and its kin")
    group.add_argument("--weight_decay", default=0.05, type=float, help="of matrices; biases and norms have none")
    group.add_argument("--weight_decay_end", default=None, type=float, help="cosine to this value; default: constant")
    group.add_argument("--lr", type=float, help="for 256 videos a step; scaled by effective batch / 256")
    group.add_argument("--warmup_lr", default=0.0, type=float,
                       help="at the first step, scaled like --lr (in VideoMAE always 0)")  # fmt: skip
    group.add_argument("--min_lr", type=float, help="at the end; scaled like --lr")
    group.add_argument("--warmup_epochs", type=int, help="of linearly rising learning rate")
    group.add_argument("--warmup_steps", default=-1, type=int, help="0 or more: overrides --warmup_epochs")
    return group


def add_data_flags(parser: argparse.ArgumentParser, data_path_help: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="/path/to/list_kinetics-400", help=data_path_help)
    group.add_argument("--sampling_rate", default=4, type=int, help="frames between two frames of a clip")
    group.add_argument("--num_sample", type=int, help="clips of each video, from one decode")
    group.add_argument(
        "--train_interpolation", default="bicubic", choices=["random", "bilinear", "bicubic"], help="of the resize"
    )
    group.add_argument("--color_jitter", type=float, help="strength; 0: none")
    group.add_argument(
        "--imagenet_default_mean_and_std", default=True, action=SWITCH, help="input statistics; else 0.5 and 0.5"
    )
    group.add_argument(
        "--decoder",
        default="auto",
        choices=["auto", *DECODERS],
        help="auto: PyAV, and decord where PyAV cannot open a file",
    )
    group.add_argument("--max_short_side", default=0, type=int, help="larger frames are decoded down to it; 0: native")
    group.add_argument("--num_workers", default=10, type=int, help="loader processes")
    group.add_argument("--pin_mem", default=True, action=SWITCH, help="page-locked batches for faster copies to a GPU")
    group.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)
    return group


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes (set by torchrun, mpirun or srun)")
    group.add_argument("--world_size", default=1, type=int, help="read where RANK is set and WORLD_SIZE is not")
    group.add_argument("--local_rank", "--local-rank", default=-1, type=int, help="read where LOCAL_RANK is not set")
    group.add_argument("--dist_on_itp", default=False, action=SWITCH, help="read Open MPI's variables")
    group.add_argument("--dist_url", default="env://", help="rendezvous")


def add_deepspeed_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--enable_deepspeed", default=False, action=SWITCH, help="train through DeepSpeed's ZeRO")
    group.add_argument("--zero_stage", default=1, type=int, choices=[0, 1, 2, 3],
                       help="spread over the processes: 1 the optimizer's state, 2 also gradients, 3 also weights, "
                       "0 nothing")  # fmt: skip
    group.add_argument("--offload", default="none", choices=["none", "cpu"],
                       help="keep the optimizer's state, and step, in host memory")  # fmt: skip
    group.add_argument("--fused_adam", default="torch", choices=["torch", "deepspeed"],
                       help="torch's fused kernel, or DeepSpeed's own, compiled at first use")  # fmt: skip
    group.add_argument("--deepspeed_config", default=None,
                       help="JSON file merged into the configuration that the flags make")  # fmt: skip


def check_deepspeed(args) -> None:
    """Raises UsageError."""
    if not args.enable_deepspeed:
        for name, default in (("offload", "none"), ("fused_adam", "torch"), ("deepspeed_config", None)):
            if getattr(args, name) != default:
                raise UsageError(f"--{name} {getattr(args, name)} needs --enable_deepspeed")
        return
    if args.opt not in ("adam", "adamw"):
        raise UsageError(f"--opt {args.opt}: --enable_deepspeed trains with adam or adamw, whose steps ZeRO can cut up")
    if args.amp == "fp16":
        raise UsageError("--amp fp16: with --enable_deepspeed use bf16 or none (without it, fp16 works under DDP)")
    if args.offload == "cpu" and args.zero_stage == 0:
        raise UsageError("--offload cpu needs --zero_stage 1, 2 or 3: stage 0 keeps all on the device")


LARGEST = 1_000_000_000  # of a number: far above what makes sense, and within float32 and int32
LARGEST_CLIP = 1 << 26  # pixels: 1000 frames of 256 x 256


def check_ranges(
    args, at_least_1: str = "", positive: str = "", not_negative: str = "", rates: str = "", at_most_1000: str = ""
) -> None:
    """Checks the named flags (names split by spaces); the shared flags are always checked, and all numbers for being
    finite and of a sensible size. Raises UsageError."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{name} {number}: must be a finite number")
            if isinstance(number, int | float) and abs(number) > (2**63 - 1 if name == "seed" else LARGEST):
                raise UsageError(f"--{name} {number}: out of range")
    for name in ("batch_size epochs accum_iter save_ckpt_freq print_freq input_size num_frames tubelet_size "
                 "sampling_rate num_sample " + at_least_1).split():  # fmt: skip
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("lr " + positive).split():
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must be greater than 0")
    for name in ("min_lr warmup_lr warmup_epochs weight_decay num_workers color_jitter seed start_epoch "
                 "max_short_side save_ckpt_minutes keep_last " + not_negative).split():  # fmt: skip
        if not getattr(args, name) >= 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("patch_size", "clip_grad"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must be greater than 0; leave it out for the default")
    for name in ("num_workers " + at_most_1000).split():
        if getattr(args, name) > 1000:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at most 1000")
    if args.input_size**2 * args.num_frames > LARGEST_CLIP:
        raise UsageError(f"--input_size {args.input_size} and --num_frames {args.num_frames}: far too large")
    for name in ("opt_eps", "tats_eps"):  # 0 in float32 makes Adam divide 0 by 0 where a gradient is 0
        if getattr(args, name, 1) < 1e-30:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1e-30")
    if args.max_short_side == 1:
        raise UsageError("--max_short_side 1: must be at least 2 pixels, or 0 for the video's own size")
    if args.weight_decay_end is not None and args.weight_decay_end < 0:
        raise UsageError(f"--weight_decay_end {args.weight_decay_end}: must not be negative")
    for name in ("drop_path momentum " + rates).split():
        if not 0 <= getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 0 and less than 1")
    if args.opt_betas is not None and not (len(args.opt_betas) == 2 and all(0 <= b < 1 for b in args.opt_betas)):
        raise UsageError(f"--opt_betas {args.opt_betas}: two numbers of at least 0 and less than 1")
    if args.weight_decay == 0 and args.weight_decay_end:
        raise UsageError("--weight_decay 0 stays 0: --weight_decay_end has nothing to change")
    if args.device == "cpu" and args.amp == "fp16":
        raise UsageError("--amp fp16 needs a GPU; on the CPU use bf16 or none")
    check_deepspeed(args)


def resolve_amp(args) -> None:
    if args.amp == "auto":
        args.amp = (
            "bf16" if args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "none"
        )


def create_model(args, module: str, **kwargs) -> torch.nn.Module:
    """The --model of modeling_pretrain or modeling_finetune, with the flags all of them take. Raises UsageError."""
    names = timm.list_models(module=module)
    if args.model not in names:
        raise UsageError(f"--model {args.model}: unknown; one of {', '.join(names)}")
    if args.patch_size:
        kwargs["patch_size"] = args.patch_size
    try:
        return timm.create_model(
            args.model,
            img_size=args.input_size,
            all_frames=args.num_frames,
            tubelet_size=args.tubelet_size,
            drop_path_rate=args.drop_path,
            use_checkpoint=args.use_checkpoint,
            **kwargs,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def recipe_settings(args, device: torch.device, steps_per_epoch: int) -> dict:
    """What every Recipe takes from the flags; learning rates are scaled by the effective batch / 256."""
    mean, std = mean_and_std(args.imagenet_default_mean_and_std)
    scale = effective_batch(args) / 256
    return dict(
        mean=torch.tensor(mean, device=device),
        std=torch.tensor(std, device=device),
        lr=args.lr * scale,
        min_lr=args.min_lr * scale,
        warmup_lr=args.warmup_lr * scale,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end,
        warmup_steps=args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        epochs=args.epochs,
        print_freq=args.print_freq,
    )


def effective_batch(args) -> int:
    """Videos per optimizer step, by which VideoMAE scales learning rates, whatever --num_sample."""
    return args.batch_size * args.accum_iter * args.world_size


def clips_per_batch(args) -> int:
    """Clips per process and micro-batch."""
    return args.batch_size * args.num_sample


def describe_schedule(args, recipe) -> str:
    batch = effective_batch(args)
    return (
        f"{args.world_size} process(es) x {args.batch_size} videos x {args.accum_iter} micro-batch(es) = "
        f"{batch} videos ({batch * args.num_sample} clips) per step, {recipe.steps_per_epoch} steps per epoch, "
        f"{args.epochs} epochs"
        f"\nlearning rate {args.lr:.3g} x {batch} / 256 = {recipe.lr:.3g}, {recipe.warmup_steps} warm-up steps"
        f"{' (longer than the run)' if recipe.warmup_steps > recipe.total_steps else ''}; {args.device}, "
        f"--amp {args.amp}"
    )


def optimizer_steps(args, batches: int) -> int:
    """Optimizer steps an epoch of so many micro-batches. Raises UsageError where there is none."""
    if batches < args.accum_iter:
        raise UsageError(
            f"--accum_iter {args.accum_iter} needs as many batches an epoch, the list gives {batches}; lower it or "
            "--batch_size"
        )
    return batches // args.accum_iter


def make_backend(
    args,
    module: torch.nn.Module,
    groups: list[dict],
    device: torch.device,
    *,
    lr: float,
    eps: float,
    amp: str,
    clip_grad: float | None,
    compile: bool = False,
    keep_replica: bool = False,
) -> Backend:
    """module on parameter groups (of parameters that lie on the device), trained as the flags say; weights have to be
    in place. keep_replica: whether replica() will be asked for. Raises UsageError."""
    try:
        if not args.enable_deepspeed:
            optimizer = create_optimizer(groups, args.opt, lr, args.opt_betas, eps, args.momentum)
            return Backend(module, optimizer, device, amp, args.accum_iter, clip_grad, compile)
        config = deepspeed_config(
            zero_stage=args.zero_stage, offload=args.offload, fused_adam=args.fused_adam, opt=args.opt, lr=lr,
            betas=args.opt_betas or (0.9, 0.999), eps=eps, batch_size=clips_per_batch(args), accum_iter=args.accum_iter,
            world_size=args.world_size, clip_grad=clip_grad, amp=amp, file=args.deepspeed_config,
        )  # fmt: skip
        return DeepSpeedBackend(module, groups, device, config, amp, compile, keep_replica)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error


class Curves:
    """tensorboard's file of scalars in a folder, written by the training process itself: the thread of tensorboardX's
    SummaryWriter dies of a full disk, and training then waits for it forever. Here a full disk ends the curves with a
    warning. Raises ImportError, OSError."""

    FLUSH_SECONDS = 60

    def __init__(self, folder: str):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import image, scalar

        self.folder, self.event, self.scalar, self.image = folder, Event, scalar, image
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordWriter(os.path.join(folder, name))
        self.flushed = 0.0
        self._write(file_version="brain.Event:2")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(step=step, summary=self.scalar(name, value))

    def add_image(self, name: str, picture: torch.Tensor, step: int) -> None:
        """picture uint8 [3, H, W]."""
        self._write(step=step, summary=self.image(name, picture.numpy()))

    def close(self) -> None:
        if self.file is not None:
            self._attempt(self.file.close)
            self.file = None

    def _write(self, **content) -> None:
        if self.file is None:
            return
        record = self.event(wall_time=time.time(), **content).SerializeToString()
        self._attempt(lambda: self.file.write(record))
        if self.file is not None and time.monotonic() - self.flushed > self.FLUSH_SECONDS:
            self.flushed = time.monotonic()
            self._attempt(self.file.flush)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            log(f"warning: --log_dir {self.folder}: {error.strerror}; no more curves from this run, log.txt goes on")
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None


def closing(curves: Curves | None):
    """A context that closes them where there are any."""
    return contextlib.nullcontext() if curves is None else contextlib.closing(curves)


def open_output(args, description: str = "args.json") -> tuple[Path | None, Curves | None]:
    """The main process makes --output_dir, writes the description of the run there, and opens --log_dir.

    Returns: the output folder, or None; tensorboard's curves, or None. Raises UsageError.
    """
    output = Path(args.output_dir) if args.output_dir else None
    if not is_main_process():
        return output, None
    if output:
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_run_description(output / description, args)
        except OSError as error:
            raise UsageError(f"--output_dir {output}: cannot be written ({error.strerror})") from error
    if not args.log_dir:
        return output, None
    try:
        return output, Curves(args.log_dir)
    except ImportError:
        raise UsageError("--log_dir needs tensorboardX: pip install tensorboardX, or leave the flag out") from None
    except OSError as error:
        raise UsageError(f"--log_dir {args.log_dir}: cannot be written ({error.strerror})") from error


# Flags that may change between a run and its resume without changing what is computed.
FREE_ON_RESUME = {
    "resume", "auto_resume", "start_epoch", "output_dir", "log_dir", "num_workers", "pin_mem", "print_freq", "rank",
    "local_rank", "world_size", "distributed", "dist_url", "dist_on_itp", "save_ckpt_freq", "finetune", "model_key",
    "model_prefix",
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
                raise CheckpointError(f"{args.resume}: no checkpoint-N.pth in this folder to go on from")
        elif not own:
            found = Path(args.resume), load_run(args.resume)
        agree(str(found[0]), "checkpoints to go on from")
        return found
    agree(found and str(found[0]), "checkpoints to go on from")
    if found is None:
        return None
    source = saved_args(found[1], found[0]).get("finetune", "")
    if args.finetune and args.finetune != source:
        raise UsageError(
            f"{args.output_dir} holds a run that started from {source or 'random weights'}, not from --finetune "
            f"{args.finetune}: choose another --output_dir, or start over with --no-auto_resume"
        )
    return found


def open_finetune(args, last_resort: str = "") -> tuple[Path, dict]:
    """open_checkpoint of --finetune, the same on every process. Raises CheckpointError, UsageError."""
    path, state = open_checkpoint(args.finetune, last_resort)
    agree(str(path), "checkpoints to start from")
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
    """Makes what the run goes on from the newest checkpoint of its folder."""
    if not args.output_dir or not is_main_process():
        return
    path, epoch, steps = None, args.start_epoch - 1, math.inf
    if found:
        path, state = found
        epoch, midway = state["epoch"], state.get("midway")
        epoch, steps = (epoch + 1, midway["steps"]) if midway else (epoch, math.inf)
    for later in set_aside_later(Path(args.output_dir), epoch, steps, path):
        log(f"note: {later} is later than where this run goes on: it is now {later.name}.old")


def save(args, output: Path, state: dict, epoch: int, where: dict | None = None, must: bool = False) -> bool:
    """Writes checkpoint-N.pth, or checkpoint-N-stepS.pth in mid-epoch, and deletes what it replaces; every process has
    to call it. Returns whether it was written: a full disk is a warning, and training goes on.

    must: raise UsageError instead. Weights that are not finite are one in any case: a checkpoint of them is worse than
    the one before.
    """
    problem, diverged = "", is_main_process() and not is_finite(state)
    if everyone(diverged)[0]:
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
    problem = everyone(problem)[0]
    if problem and must:
        raise UsageError(f"{problem}. Put that right, and start the same command again")
    if problem:
        log(f"warning: {problem}; training goes on")
    return not problem


def is_finite(state: dict) -> bool:
    """Whether all weights in a checkpoint's state are."""
    weights = [value for part in ("model", "adamae", "tats") for value in state.get(part, {}).values()]
    return bool(torch.stack([value.isfinite().all() for value in weights]).all())


def write_deepspeed_configs(output: Path | None, backends: dict[str, Backend]) -> None:
    """deepspeed_config_NAME.json of each backend that has one."""
    for name, backend in backends.items():
        if output and is_main_process() and isinstance(backend, DeepSpeedBackend):
            (output / f"deepspeed_config_{name}.json").write_text(json.dumps(backend.config, indent=2) + "\n")


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ESTALE, errno.EIO)
# Beginnings of what torch, gloo and NCCL say, and what it means.
LOADER_DIED = (
    "a loader process died, for want of memory or by a crash of the decoder; lower --num_workers, and look for broken "
    "videos with tools/check_videos.py"
)
FAILURES = (
    (r"DataLoader worker .*(exited unexpectedly|killed by signal)", LOADER_DIED),
    (r"DataLoader timed out", "no batch came for half an hour: a loader process hangs, or the disk does"),
    (r"Connection (closed|reset) by|Broken pipe|NCCL error|NCCL communicator was aborted|gloo.*[Tt]imed out",
     "lost touch with another process, which has ended or hangs; its own output says why"),
    (r"CUDA out of memory", "the GPU has too little memory: lower --batch_size (and raise --accum_iter), or set "
     "--use_checkpoint"),
)  # fmt: skip


def run_script(train: Callable, args) -> None:
    """train(args), with what the user can put right as one line and a non-zero status; status 75 where training was
    told to stop and can go on, 130 after Ctrl-C."""
    tolerant_output()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        train(args)
    except (UsageError, ListError, VideoError, CheckpointError) as error:
        # an error from a loader process comes with that process's traceback around it
        sys.exit(f"error: {str(error).rsplit('VideoError: ', 1)[-1].strip()}")
    except (EOFError, ConnectionError) as error:  # it died while it handed over a batch
        sys.exit(f"error: {LOADER_DIED} ({type(error).__name__})")
    except OSError as error:  # a full or read-only disk, a quota, a lost mount
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(f"error: {error.filename or 'writing'}: {error.strerror}")
    except KeyboardInterrupt:
        set_handlers({signal.SIGINT: signal.SIG_IGN})
        if is_main_process():
            print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)  # as a shell has it
    except Preempted as stop:
        # one more while this process ends would change its status; Python would take back a handler of its own early
        handlers = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        set_handlers(handlers)
        log(str(stop))
        _leave_group()
        sys.exit(EXIT_STATUS if stop.saved else 1)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if getattr(args, "compile", False) and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            sys.exit(f"error: --compile failed: {reason}; leave it out to train uncompiled")  # no compiler, say
        for pattern, meaning in FAILURES:
            if re.search(pattern, str(error)):
                sys.exit(f"error: {meaning} ({reason})")
        raise
    finally:
        set_handlers(handlers)
        _end_loaders()
    _leave_group()


def end_with_status(main: Callable[[], None]) -> None:
    """main(), and the end of the process with its status.

    Where there were several processes, or DeepSpeed, it ends without the interpreter's own clearing up, in which
    threads of torch's process groups now and then abort it ("terminate called without an active exception"): a
    finished run would count as crashed, a stopped one would not go back into the queue.
    """
    status = 0
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and "deepspeed" not in sys.modules:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_loaders() -> None:
    """Loader processes ignore polite signals (datasets/build.py): one that hangs would keep this one from ending."""
    children = multiprocessing.active_children()
    if children and threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's takes their end for a failure
        for child in children:
            child.kill()
            child.join(5)  # one that waits for a dead mount does not even end by this
        signal.signal(signal.SIGCHLD, handler)


def _leave_group() -> None:
    """Where all processes end together. One that fails just ends: the others may be waiting for it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
