"""Flags that both programs have, and checks of their values."""

import argparse
import math

import torch

from datasets.decoding import DECODERS
from runtime.checkpoint import MODEL_KEYS
from utils import UsageError

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
