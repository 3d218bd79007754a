"""Flags that both programs have, and checks of their values."""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from datasets.decoding import DECODERS
from runtime.checkpoint import MODEL_KEYS
from runtime.convert import INFLATIONS
from utils import UsageError

SWITCH = argparse.BooleanOptionalAction


# Few users need these: --help shows them last.
RARE = {
    "start_epoch", "model_key", "model_prefix", "patch_size", "tubelet_size", "warmup_lr", "warmup_steps", "opt_eps",
    "momentum", "weight_decay_end", "pin_mem", "max_short_side", "train_interpolation", "color_jitter", "world_size",
    "local_rank", "dist_on_itp", "dist_url", "deepspeed_config", "fused_adam", "tats_eps", "softmax_temp",
    "landmark_gradient", "finetune_sampler", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "remode",
    "recount", "resplit", "model_ema_force_cpu", "crop_pct", "dist_eval", "disable_eval_during_finetuning",
    "crop_scale",
}  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows those defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


class NoEffect(argparse.Action):
    """A flag of published commands that changes nothing here: its value is read and dropped."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        pass


# Flags of VideoMAE V2's scripts that are not here, and what to do instead.
INSTEAD = {
    "--data_root": "relative paths of a list start at the list's folder: move the list there, or write whole paths",
    "--sparse_sample": "give --num_segments the value of --num_frames",
    "--validation": "give --eval; validation runs after each epoch of training anyway",
}


class FlagParser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Unknown flags are an error, which says what to use in place of those of INSTEAD."""
        namespace, unknown = self.parse_known_args(args, namespace)
        for flag in (word.partition("=")[0] for word in unknown):
            if flag in INSTEAD:
                self.error(f"{flag} is not here: {INSTEAD[flag]} (docs/MIGRATING.md)")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace

    def format_help(self) -> str:
        """The help of all flags, those of RARE last."""
        rare = self.add_argument_group("rarely needed")
        for group in self._action_groups[:-1]:
            for action in [action for action in group._group_actions if action.dest in RARE]:
                group._group_actions.remove(action)
                rare._group_actions.append(action)
        return super().format_help()


def new_parser(description: str, **kwargs) -> argparse.ArgumentParser:
    return FlagParser(
        usage="%(prog)s --data_path LIST [flags]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        **kwargs,
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", default=64, type=int, help="videos per rank and micro-batch; --num_sample clips of each"
    )
    parser.set_defaults(batch_counts="videos")  # for checkpoints: earlier revisions counted clips
    group.add_argument("--epochs", type=int, help="passes over the list of videos")
    group.add_argument("--accum_iter", "--update_freq", default=1, type=int, help="micro-batches per optimizer step")
    group.add_argument("--save_ckpt_freq", type=int, help="epochs between kept checkpoints; the last is always kept")
    group.add_argument(
        "--save_ckpt_minutes",
        default=15.0,
        type=float,
        help="minutes between rolling checkpoints within an epoch; 0: none",
    )
    group.add_argument(
        "--keep_last",
        default=0,
        type=int,
        help="keep only this many newest checkpoints, at least 2; 0: keep all of --save_ckpt_freq",
    )
    group.add_argument("--print_freq", default=20, type=int, help="micro-batches between progress lines")
    group.add_argument("--output_dir", default="", help="folder for checkpoints, log.txt and args.json; empty: none")
    group.add_argument("--log_dir", default=None, help="folder for tensorboard files")
    group.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cuda", "cpu"],
        help="cuda where torch sees a GPU",
    )
    group.add_argument("--seed", default=0, type=int, help="of weights, data order, augmentation and masks")
    group.add_argument("--resume", default="", help="checkpoint of this script, or folder of a run, to resume from")
    group.add_argument(
        "--auto_resume", default=True, action=SWITCH, help="resume from the newest checkpoint in --output_dir"
    )
    group.add_argument("--no_auto_resume", dest="auto_resume", action="store_false", help=argparse.SUPPRESS)
    group.add_argument("--start_epoch", default=0, type=int, help="first epoch; a resume sets it")
    group.add_argument(
        "--finetune", default="", help="start from these weights: a checkpoint, a run's folder or a Hugging Face folder"
    )
    group.add_argument(
        "--model_key",
        default="|".join(MODEL_KEYS),
        help="keys of the weights in the --finetune file; the first found is read",
    )
    group.add_argument(
        "--model_prefix", default="", help="prefix of the encoder's names in the --finetune file; default: detected"
    )
    group.add_argument(
        "--inflate",
        default="mean",
        choices=INFLATIONS,
        help="how --finetune spreads an image model's patch embedding over the frames of a token: equal shares, or all "
        "on the centre frame",
    )
    group.add_argument(
        "--amp",
        default="auto",
        choices=["auto", "bf16", "fp16", "none"],
        help="mixed precision; auto: bf16 on a GPU that supports it, else none",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a registered model of this project")
    group.add_argument("--input_size", default=224, type=int, help="height and width of a clip in pixels")
    group.add_argument("--num_frames", default=16, type=int, help="frames per clip")
    group.add_argument("--patch_size", default=None, type=int, help="pixels; default: the model's")
    group.add_argument("--tubelet_size", default=2, type=int, help="frames per token")
    group.add_argument("--drop_path", type=float, help="stochastic depth rate of the last block")
    group.add_argument(
        "--use_checkpoint",
        "--with_checkpoint",
        default=False,
        action=SWITCH,
        help="activation checkpointing: less memory, slower",
    )
    return group


def add_optimizer_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="optimizer, by timm's name")
    group.add_argument("--opt_eps", default=1e-8, type=float, help="epsilon of Adam-like optimizers")
    group.add_argument("--opt_betas", default=None, type=float, nargs="+", help="default: the optimizer's own")
    group.add_argument("--clip_grad", default=None, type=float, help="largest gradient norm; default: no clipping")
    group.add_argument("--momentum", default=0.9, type=float, help="momentum of SGD-like optimizers")
    group.add_argument(
        "--weight_decay", default=0.05, type=float, help="weight decay of matrices; biases and norms have none"
    )
    group.add_argument(
        "--weight_decay_end",
        default=None,
        type=float,
        help="final weight decay, reached by a cosine; default: constant",
    )
    group.add_argument(
        "--lr", type=float, help="learning rate for 256 videos per step; scaled by effective batch / 256"
    )
    group.add_argument("--warmup_lr", default=0.0, type=float, help="learning rate of the first step, scaled like --lr")
    group.add_argument("--min_lr", type=float, help="final learning rate, scaled like --lr")
    group.add_argument("--warmup_epochs", type=int, help="epochs of linear warm-up")
    group.add_argument(
        "--warmup_steps", default=-1, type=int, help="steps of linear warm-up; 0 or more overrides --warmup_epochs"
    )
    return group


def add_data_flags(parser: argparse.ArgumentParser, data_path_help: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="/path/to/list_kinetics-400", help=data_path_help)
    group.add_argument("--sampling_rate", default=4, type=int, help="frames between two frames of a clip")
    group.add_argument("--num_sample", type=int, help="clips per video, from one decode")
    group.add_argument(
        "--train_interpolation",
        default="bicubic",
        choices=["random", "bilinear", "bicubic"],
        help="interpolation of the resize",
    )
    group.add_argument("--color_jitter", type=float, help="strength of colour jitter; 0: none")
    group.add_argument(
        "--imagenet_default_mean_and_std",
        default=True,
        action=SWITCH,
        help="normalise the input by ImageNet's mean and deviation; otherwise 0.5 and 0.5",
    )
    group.add_argument(
        "--decoder",
        default="auto",
        choices=["auto", *DECODERS],
        help="video decoder; auto: PyAV, or decord if PyAV cannot open the file",
    )
    group.add_argument(
        "--max_short_side",
        default=0,
        type=int,
        help="short side in pixels to which larger frames are decoded; 0: the video's own",
    )
    group.add_argument("--fname_tmpl", action=NoEffect, help=argparse.SUPPRESS)  # of frames as files, which V2 reads
    group.add_argument("--num_workers", default=10, type=int, help="loader processes per rank")
    group.add_argument("--pin_mem", default=True, action=SWITCH, help="pinned host memory for batches")
    group.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)
    return group


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes (set by torchrun, mpirun or srun)")
    group.add_argument(
        "--world_size", default=1, type=int, help="number of ranks, if RANK is set and WORLD_SIZE is not"
    )
    group.add_argument(
        "--local_rank", "--local-rank", default=-1, type=int, help="local rank, if LOCAL_RANK is not set"
    )
    group.add_argument("--dist_on_itp", default=False, action=SWITCH, help="read Open MPI's environment variables")
    group.add_argument("--dist_url", default="env://", help="address of the rendezvous")


def add_deepspeed_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--enable_deepspeed", default=False, action=SWITCH, help="train with DeepSpeed")
    group.add_argument(
        "--zero_stage",
        default=1,
        type=int,
        choices=[0, 1, 2, 3],
        help="sharded over ranks: 1 optimizer state, 2 also gradients, 3 also weights, 0 nothing",
    )
    group.add_argument(
        "--offload", default="none", choices=["none", "cpu"], help="keep optimizer state, and step, in host memory"
    )
    group.add_argument(
        "--fused_adam",
        default="torch",
        choices=["torch", "deepspeed"],
        help="torch's fused kernel, or DeepSpeed's, which is compiled at first use",
    )
    group.add_argument("--deepspeed_config", default=None, help="JSON file with further DeepSpeed settings")


def check_deepspeed(args) -> None:
    """Raises UsageError."""
    if not args.enable_deepspeed:
        for name, default in (("offload", "none"), ("fused_adam", "torch"), ("deepspeed_config", None)):
            if getattr(args, name) != default:
                raise UsageError(f"--{name} {getattr(args, name)} needs --enable_deepspeed")
        return
    if args.opt not in ("adam", "adamw"):
        raise UsageError(f"--opt {args.opt}: with --enable_deepspeed use adam or adamw")
    if args.amp == "fp16":
        raise UsageError("--amp fp16: with --enable_deepspeed use bf16 or none (without it, fp16 works under DDP)")
    if args.offload == "cpu" and args.zero_stage == 0:
        raise UsageError("--offload cpu needs --zero_stage 1, 2 or 3: stage 0 keeps all on the device")


LARGEST = 1_000_000_000  # of a number: far above what makes sense, and within float32 and int32
LARGEST_CLIP = 1 << 26  # pixels: 1000 frames of 256 x 256


class Range(NamedTuple):
    """What a number has to be; a flag that is None is at its default."""

    holds: Callable[[float], bool]
    text: str


AT_LEAST_1 = Range(lambda x: x >= 1, "must be at least 1")
POSITIVE = Range(lambda x: x > 0, "must be greater than 0")
NOT_NEGATIVE = Range(lambda x: x >= 0, "must not be negative")
RATE = Range(lambda x: 0 <= x < 1, "must be at least 0 and less than 1")
PROBABILITY = Range(lambda x: 0 <= x <= 1, "must be a probability, from 0 to 1")
AT_MOST_1000 = Range(lambda x: x <= 1000, "must be at most 1000")
NOT_ZERO_IN_FLOAT32 = Range(lambda x: x >= 1e-30, "must be at least 1e-30")  # Adam divides by it where a gradient is 0

Ranges = list[tuple[Range, str]]  # a range, and the flags it is about, split by spaces
SHARED_RANGES: Ranges = [
    (AT_LEAST_1, "batch_size epochs accum_iter save_ckpt_freq print_freq input_size num_frames tubelet_size"),
    (AT_LEAST_1, "sampling_rate num_sample"),
    (POSITIVE, "lr patch_size clip_grad"),
    (NOT_NEGATIVE, "min_lr warmup_lr warmup_epochs weight_decay weight_decay_end num_workers color_jitter seed"),
    (NOT_NEGATIVE, "start_epoch max_short_side save_ckpt_minutes keep_last"),
    (RATE, "drop_path momentum"),
    (AT_MOST_1000, "num_workers"),
    (NOT_ZERO_IN_FLOAT32, "opt_eps"),
]
# (flag, whether its value is refused, why): what a range does not say, or what two flags do not do together. {name} in
# the text is the value of another flag.
Refusals = list[tuple[str, Callable[[argparse.Namespace], bool], str]]
SHARED_REFUSALS: Refusals = [
    (
        "input_size",
        lambda args: args.input_size**2 * args.num_frames > LARGEST_CLIP,
        "with --num_frames {num_frames} a clip is far too large",
    ),
    (
        "max_short_side",
        lambda args: args.max_short_side == 1,
        "must be at least 2 pixels, or 0 for the video's own size",
    ),
    (
        "opt_betas",
        lambda args: (
            args.opt_betas is not None
            and not (len(args.opt_betas) in (2, 3) and all(0 <= beta < 1 for beta in args.opt_betas))
        ),
        "must be two numbers of at least 0 and less than 1, of some optimizers three",
    ),
    (
        "weight_decay_end",
        lambda args: args.weight_decay == 0 and args.weight_decay_end,
        "has no effect with --weight_decay 0",
    ),
    ("amp", lambda args: args.device == "cpu" and args.amp == "fp16", "needs a GPU; on the CPU use bf16 or none"),
    (
        "resume",
        lambda args: args.finetune and args.resume,
        "cannot be combined with --finetune, which starts a new run from weights: give one of them",
    ),
]


def check_values(args: argparse.Namespace, ranges: Ranges, refusals: Refusals) -> None:
    """Checks the shared flags and those in the tables, and that all numbers are finite and of a sensible size.

    Raises UsageError that names the flag, its value and what to do.
    """
    for name, value in vars(args).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{name} {number}: must be a finite number")
            if isinstance(number, int | float) and abs(number) > (2**63 - 1 if name == "seed" else LARGEST):
                raise UsageError(f"--{name} {number}: out of range")
    for (holds, text), names in SHARED_RANGES + ranges:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise UsageError(f"--{name} {value}: {text}")
    for name, refused, why in SHARED_REFUSALS + refusals:
        if refused(args):
            value = getattr(args, name)
            value = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            raise UsageError(f"--{name} {value}: {why.format_map(vars(args))}")
    check_deepspeed(args)


def resolve_amp(args) -> None:
    if args.amp == "auto":
        args.amp = (
            "bf16" if args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "none"
        )
