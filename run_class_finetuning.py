"""Fine-tune, probe or train from scratch a video classifier, and test it over several views of each video."""

import argparse
import copy
import math
import os
import time
from pathlib import Path

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3

import modeling_finetune
from datasets.build import DATA_SETS, build_evaluation_loader, build_finetuning_loader, find_list
from datasets.decoding import VideoError
from engine_for_finetuning import (
    FeatureLoader,
    FinetuneRecipe,
    Scores,
    StoredViews,
    average_batch_norm,
    evaluate,
    evaluate_neighbours,
    store_features,
    train_one_epoch,
)
from optim_factory import parameter_groups
from runtime.build import (
    clips_per_batch,
    create_model,
    describe_schedule,
    make_backend,
    optimizer_steps,
    recipe_settings,
)
from runtime.checkpoint import (
    CheckpointError,
    check_moments,
    checkpoint_files,
    checkpoint_name,
    load_run,
    open_checkpoint,
    restoring,
    save_checkpoint,
    saved_args,
)
from runtime.convert import encoder_weights, load_encoder, load_weights, model_weights, position_grid
from runtime.epoch import RunState
from runtime.flags import (
    AT_LEAST_1,
    AT_MOST_1000,
    NOT_NEGATIVE,
    PROBABILITY,
    RATE,
    SWITCH,
    NoEffect,
    Range,
    Ranges,
    Refusals,
    add_data_flags,
    add_deepspeed_flags,
    add_model_flags,
    add_optimizer_flags,
    add_process_flags,
    add_run_flags,
    check_values,
    new_parser,
    resolve_amp,
)
from runtime.launch import end_with_status, run_script
from runtime.outputs import closing, open_output, write_deepspeed_configs
from runtime.preemption import STOP, Preempted, PreemptionWatch, stop_at_once
from runtime.reports import CLASSES, add_best_epoch, class_names, read_report, saved_class_names, write_report
from runtime.resume import find_resume, open_finetune, resume, save, saved_defaults
from runtime.tasks import SINGLE_LABEL, TASKS, in_words, macro_f1
from utils import (
    UsageError,
    all_gather_object,
    barrier,
    check_same_on_all_ranks,
    drop_epochs_from,
    format_time,
    init_distributed,
    is_main_process,
    log,
    rng_state,
    seed_everything,
    set_rng_state,
    write_log,
)

BEST = "checkpoint-best.pth"  # of the best validation: the highest top-1, see runtime.tasks for other tasks
# What --eval takes from the checkpoint where the command line does not say it.
TEST_FLAGS = (
    "model", "input_size", "num_frames", "patch_size", "tubelet_size", "sampling_rate", "num_segments", "data_set",
    "task", "nb_classes", "imagenet_default_mean_and_std", "linear_probe", "attentive_probe", "use_mean_pooling",
    "model_ema", "short_side_size", "test_num_segment", "test_num_crop",
)  # fmt: skip
# What a probe's defaults are instead: crops and flips alone, as in MAE's protocol (He 2022).
PROBE_DEFAULTS = dict(
    layer_decay=1.0, mixup=0.0, cutmix=0.0, smoothing=0.0, aa="none", color_jitter=0.0, reprob=0.0, weight_decay=0.0,
    drop_path=0.0,
)  # fmt: skip
NOT_MIXED = dict(mixup=0.0, cutmix=0.0, smoothing=0.0)  # the defaults where a video has several labels, or values


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        __doc__,
        epilog="A probe's defaults: " + ", ".join(f"--{name} {value}" for name, value in PROBE_DEFAULTS.items()),
    )
    add_run_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval",
        default=False,
        action=SWITCH,
        help="only test: --finetune or --resume, otherwise the newest checkpoint of --output_dir",
    )
    group.add_argument("--test_num_segment", default=5, type=int, help="temporal clips per video in the test")
    group.add_argument("--test_num_crop", default=3, type=int, help="spatial crops per temporal clip in the test")
    group.add_argument(
        "--short_side_size", default=None, type=int, help="short side in pixels for evaluation; default: --input_size"
    )
    group.add_argument(
        "--crop_pct", default=None, type=float, help="the same as a ratio: short side = --input_size / crop_pct"
    )
    group.add_argument(
        "--allow_missing", default=False, action=SWITCH, help="count an unreadable video as wrong instead of stopping"
    )
    group.add_argument(
        "--disable_eval_during_finetuning", default=False, action=SWITCH, help="no validation, and no best checkpoint"
    )
    group.add_argument(
        "--test_best", default=True, action=SWITCH, help="test the best epoch of the validation too, not only the last"
    )
    group.add_argument(
        "--dist_eval",
        nargs=0,
        action=NoEffect,
        help="accepted for VideoMAE's commands, no effect: evaluation is always distributed",
    )
    group.add_argument("--save_ckpt", default=True, action=SWITCH, help="write checkpoints")
    group.add_argument("--no_save_ckpt", dest="save_ckpt", action="store_false", help=argparse.SUPPRESS)

    group = add_model_flags(parser)
    group.add_argument(
        "--linear_probe", default=False, action=SWITCH, help="train a linear classifier on the frozen encoder"
    )
    group.add_argument(
        "--attentive_probe",
        default=False,
        action=SWITCH,
        help="train attention pooling and a classifier on the frozen encoder",
    )
    group.add_argument(
        "--cache_features",
        default=True,
        action=SWITCH,
        help="a probe computes features once; --no-cache_features: new clips in every epoch",
    )
    group.add_argument(
        "--knn",
        default=None,
        type=int,
        metavar="K",
        help="no training: classify the test videos by the K nearest training videos in features of the frozen encoder",
    )
    group.add_argument("--init_scale", default=0.001, type=float, help="scale of the initial weights of the classifier")
    group.add_argument("--use_mean_pooling", default=True, action=SWITCH, help="mean of the tokens, then a norm")
    group.add_argument(
        "--use_cls", dest="use_mean_pooling", action="store_false", help="classify the first token instead of the mean"
    )
    group.add_argument(
        "--fc_drop_rate", "--head_drop_rate", default=0.0, type=float, help="dropout before the classifier"
    )
    group.add_argument("--drop", default=0.0, type=float, help="dropout after positions, attention and MLP")
    group.add_argument("--attn_drop_rate", default=0.0, type=float, help="dropout of attention weights")
    group.add_argument(
        "--model_ema", default=False, action=SWITCH, help="evaluate an exponential moving average of the weights"
    )
    group.add_argument("--model_ema_decay", default=0.9999, type=float, help="decay of the average per step")
    group.add_argument("--model_ema_force_cpu", default=False, action=SWITCH, help="keep the average in host memory")

    group = add_optimizer_flags(parser)
    group.add_argument(
        "--layer_decay", default=0.75, type=float, help="learning rate of a layer, relative to the next layer"
    )
    group.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")

    group = add_data_flags(
        parser, "folder with train.csv and val.csv (one line per video: path label), or a training list"
    )
    group.add_argument(
        "--data_set",
        default="Kinetics-400",
        choices=list(DATA_SETS),
        help="sets classes, sampling and flips; custom: any lists, with --nb_classes",
    )
    group.add_argument(
        "--task",
        default=SINGLE_LABEL.name,
        choices=list(TASKS),
        help="lists have a label per line; or several, joined by commas; or values, which are fitted",
    )
    group.add_argument(
        "--nb_classes", default=None, type=int, help="number of classes, or of values; default: the data set's, or 1"
    )
    group.add_argument("--start_idx", action=NoEffect, help=argparse.SUPPRESS)  # of frames as files
    group.add_argument("--eval_data_path", default=None, help="validation list; default: val.csv in --data_path")
    group.add_argument(
        "--test_data_path",
        default=None,
        help="test list; default: test.csv in --data_path, if there is one and no --eval_data_path, "
        "otherwise the validation list",
    )
    group.add_argument(
        "--num_segments",
        default=None,
        type=int,
        help="segments of a video that frames are sampled from; 1: a dense clip; default: the data "
        "set's (SSV2: --num_frames)",
    )

    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--crop_scale",
        default=[0.08, 1.0],
        type=float,
        nargs=2,
        help="range of the crop's area, as a share of the frame",
    )
    group.add_argument(
        "--flip",
        default=None,
        action=SWITCH,
        help="flip half of the clips horizontally; default: the data set's (SSV2: no)",
    )
    group.add_argument(
        "--aa", default="rand-m7-n4-mstd0.5-inc1", help="RandAugment in timm's notation; none: colour jitter instead"
    )
    group.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    group.add_argument(
        "--remode",
        default="pixel",
        choices=["pixel", "rand", "const"],
        help="random erasing fills with noise, a random colour, or the mean",
    )
    group.add_argument("--recount", default=1, type=int, help="largest number of erased boxes per clip")
    group.add_argument("--resplit", default=False, action=SWITCH, help="no random erasing in the first clip of a video")
    group.add_argument("--mixup", default=0.8, type=float, help="alpha; 0: off")
    group.add_argument("--cutmix", default=1.0, type=float, help="alpha; 0: off")
    group.add_argument(
        "--cutmix_minmax", default=None, type=float, nargs=2, help="range of the sides of the CutMix box, as shares"
    )
    group.add_argument("--mixup_prob", default=1.0, type=float, help="probability that a batch is mixed")
    group.add_argument("--mixup_switch_prob", default=0.5, type=float, help="probability of CutMix, if both are on")
    group.add_argument("--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="one draw per ...")

    add_deepspeed_flags(parser)
    add_process_flags(parser)
    parser.set_defaults(
        epochs=30, save_ckpt_freq=100, model="vit_base_patch16_224", drop_path=0.1, lr=1e-3, min_lr=1e-6,
        warmup_epochs=5, num_sample=2, color_jitter=0.4,
    )  # fmt: skip
    return parser


def parse_args(arguments: list[str] | None = None, described: dict | None = None) -> argparse.Namespace:
    """A test takes its defaults from the checkpoint, a probe has its own; what the command line says stays.

    described: flags of a checkpoint that the caller has read. Raises: CheckpointError, UsageError.
    """
    parser = get_parser()
    args = parser.parse_args(arguments)
    if described is not None:
        parser.set_defaults(**described)
        args = parser.parse_args(arguments)
    elif args.eval:
        path, state = find_finished(args)
        saved = saved_args(state, path)
        if isinstance(state.get("args"), dict) and "nb_classes" in saved:  # written by this script
            parser.set_defaults(**saved_defaults(parser, saved, TEST_FLAGS, path))
            args = parser.parse_args(arguments)
            if (
                args.crop_pct is not None or (args.short_side_size or 0) < args.input_size
            ):  # not the saved size of the crops
                parser.set_defaults(short_side_size=None)
    if probe_kind(args):
        parser.set_defaults(**PROBE_DEFAULTS | (described or {}))
    if args.task != SINGLE_LABEL.name:
        parser.set_defaults(**NOT_MIXED)
    if args.knn:
        parser.set_defaults(test_num_segment=1, test_num_crop=1)
    return parser.parse_args(arguments)


RANGES: Ranges = [
    (AT_LEAST_1, "test_num_segment test_num_crop recount knn"),
    (AT_MOST_1000, "test_num_segment test_num_crop recount"),
    (NOT_NEGATIVE, "init_scale"),
    # between, the beta distribution's draws would not be numbers
    (Range(lambda x: x == 0 or x >= 1e-6, "must be 0 or at least 1e-6"), "mixup cutmix"),
    (RATE, "drop fc_drop_rate attn_drop_rate smoothing model_ema_decay"),
    (PROBABILITY, "reprob mixup_prob mixup_switch_prob"),
    (Range(lambda x: 0 < x <= 1, "must be greater than 0 and at most 1 (1: none)"), "layer_decay"),
    (Range(lambda x: 0.01 <= x <= 1, "must be at least 0.01 and at most 1"), "crop_pct"),
]
NOT_OF_A_PROBE = {
    "fc_drop_rate": 0,
    "drop": 0,
    "attn_drop_rate": 0,
    "drop_path": 0,
    "use_checkpoint": False,
    "init_scale": 0.001,
}
REFUSALS: Refusals = [
    ("crop_scale", lambda args: not are_shares(args.crop_scale), "must be two shares, 0 < least <= most <= 1"),
    (
        "cutmix_minmax",
        lambda args: (
            args.cutmix_minmax is not None
            and not (
                are_shares(args.cutmix_minmax)
                and int(args.cutmix_minmax[1] * args.input_size) > int(args.cutmix_minmax[0] * args.input_size)
            )
        ),
        "must be two shares, 0 < least <= most <= 1, at least a pixel apart",
    ),
    (
        "attentive_probe",
        lambda args: args.linear_probe and args.attentive_probe,
        "cannot be combined with --linear_probe: give one of them",
    ),
    (
        "task",
        lambda args: args.task != SINGLE_LABEL.name and mixing(args),
        "the labels cannot be mixed: set --mixup 0 and --cutmix 0, and leave --cutmix_minmax out",
    ),
    (
        "smoothing",
        lambda args: args.task != SINGLE_LABEL.name and args.smoothing,
        "smooths one label per video, which --task {task} does not have: set it to 0",
    ),
    (
        "data_set",
        lambda args: args.task != SINGLE_LABEL.name and args.data_set != "custom",
        "has one label per video: with --task {task} use --data_set custom",
    ),
    (
        "allow_missing",
        lambda args: args.task == "regression" and args.allow_missing,
        "with --task regression no value is the wrong one: repair the list with tools/check_videos.py",
    ),
    (
        "knn",
        lambda args: args.knn and (args.linear_probe or args.attentive_probe),
        "cannot be combined with --linear_probe or --attentive_probe: it is a probe of its own",
    ),
    (
        "knn",
        lambda args: args.knn and (args.eval or args.resume),
        "tests --finetune's encoder and trains nothing: remove --eval and --resume",
    ),
    (
        "knn",
        lambda args: args.knn and args.task != SINGLE_LABEL.name,
        "votes for one label per video, which --task {task} does not have",
    ),
    (
        "knn",
        lambda args: args.knn and args.test_num_segment * args.test_num_crop > 1,
        "takes the central view of each video: remove --test_num_segment and --test_num_crop",
    ),
    (
        "layer_decay",
        lambda args: probe_kind(args) and args.layer_decay != 1,
        "must be 1 for a probe, which trains no layers",
    ),
    (
        "cache_features",
        lambda args: probe_kind(args) and args.cache_features and mixing(args),
        "a probe stores features, not clips: set --mixup 0 and --cutmix 0, or use --no-cache_features",
    ),
    *(
        (
            name,
            lambda args, name=name, default=default: probe_kind(args) and getattr(args, name) != default,
            "has no effect on a probe, whose encoder is frozen and whose head is its own: remove the flag",
        )
        for name, default in NOT_OF_A_PROBE.items()
    ),
    (
        "batch_size",
        lambda args: args.linear_probe and clips_per_batch(args) < 2 and not args.eval,
        "a linear probe standardises its features over the batch, which needs at least 2 clips",
    ),
    (
        "use_cls",
        lambda args: probe_kind(args) and not args.use_mean_pooling,
        "a linear probe averages the tokens, an attentive probe attends to them: remove the flag",
    ),
    (
        "cache_features",
        lambda args: not probe_kind(args) and not args.cache_features,
        "only a probe stores features: remove --no-cache_features",
    ),
    (
        "resplit",
        lambda args: args.resplit and args.num_sample == 1 and not args.eval,
        "erases in all but the first clip of a video, and --num_sample {num_sample} has no other",
    ),
    (
        "batch_size",
        lambda args: mixing(args) and clips_per_batch(args) % 2 and not args.eval,
        "times --num_sample {num_sample} must be even, because --mixup and --cutmix pair clips",
    ),
    (
        "zero_stage",
        lambda args: args.enable_deepspeed and args.zero_stage == 3 and probe_kind(args),
        "cannot train a probe, whose encoder runs on each rank alone: use 2 or less",
    ),
    (
        "zero_stage",
        lambda args: args.enable_deepspeed and args.zero_stage == 3 and args.model_ema,
        "cannot be combined with --model_ema, which would gather all weights at every step: use 2 or less",
    ),
]


def are_shares(pair: list[float]) -> bool:
    least, most = pair
    return 0 < least <= most <= 1


def check_flags(args) -> None:
    """Raises UsageError for values that make no sense alone or together; fills in the data set's defaults."""
    if args.eval:
        args.num_sample = 1  # a test takes no training clips
    check_values(args, RANGES, REFUSALS)
    data_set = DATA_SETS[args.data_set]
    if args.nb_classes is None:
        args.nb_classes = 1 if args.task == "regression" else data_set.num_classes
    least = 2 if args.task == SINGLE_LABEL.name else 1
    if args.nb_classes is None or args.nb_classes < least:
        raise UsageError(f"--data_set {args.data_set} needs --nb_classes, the number of classes, at least {least}")
    if args.nb_classes > 10_000:  # the test's table of confusions has its square
        raise UsageError(f"--nb_classes {args.nb_classes}: at most 10000")
    if data_set.num_classes not in (None, args.nb_classes):
        raise UsageError(
            f"--nb_classes {args.nb_classes}: {args.data_set} has {data_set.num_classes}; for other lists use "
            "--data_set custom"
        )
    if args.flip is None:
        args.flip = data_set.flip
    if args.num_segments is None:
        args.num_segments = args.num_frames if data_set.segments else 1
    if args.num_segments < 1 or args.num_frames % args.num_segments:
        raise UsageError(f"--num_segments {args.num_segments}: must divide --num_frames {args.num_frames}")
    if args.short_side_size is None:
        args.short_side_size = math.ceil(args.input_size / (args.crop_pct or 1))
    elif args.crop_pct is not None:
        raise UsageError("--short_side_size and --crop_pct say the same: give one of them")
    if args.short_side_size < args.input_size:
        raise UsageError(
            f"--short_side_size {args.short_side_size} is less than --input_size {args.input_size}: crops do not fit"
        )
    if args.short_side_size > 100 * args.input_size:
        raise UsageError(f"--short_side_size {args.short_side_size}: at most 100 times --input_size {args.input_size}")


def probe_kind(args) -> str:
    return "linear" if args.linear_probe or args.knn else "attentive" if args.attentive_probe else ""


def mixing(args) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


# --- model -------------------------------------------------------------------------------------------------------


def build_classifier(args, position_table: torch.Tensor | None) -> torch.nn.Module:
    """The classifier, or the probe, that the flags describe.

    position_table: of the checkpoint to come, or None; where it is not the fixed one, the model learns its own.
    """
    learned = position_table is not None and not modeling_finetune.is_sinusoid_encoding_table(position_table)
    probe = probe_kind(args)
    model = create_model(
        args,
        "modeling_finetune",
        num_classes=0 if probe else args.nb_classes,
        fc_drop_rate=args.fc_drop_rate,
        drop_rate=args.drop,
        attn_drop_rate=args.attn_drop_rate,
        init_scale=args.init_scale,
        use_mean_pooling=args.use_mean_pooling and not probe,
        use_learnable_pos_emb=learned,
    )
    return modeling_finetune.Probe(model, probe, args.nb_classes) if probe else model


def load_finetune(args, opened: tuple[Path, dict] | None = None) -> torch.nn.Module:
    """A classifier that starts from --finetune's encoder, with a line on what was taken. opened: what open_finetune
    gave, if it was called before. Raises CheckpointError."""
    path, state = opened or open_finetune(args, BEST)
    weights = encoder_weights(state, path, tuple(args.model_key.split("|")), args.model_prefix)
    kind = saved_args(state, path).get("mask_type")
    if isinstance(state.get(kind), dict):  # its sampler, to be named as left over
        weights |= {f"{kind}.{name}": value for name, value in state[kind].items()}
    table = weights.get("pos_embed")
    model = build_classifier(args, table)
    encoder = model.encoder if probe_kind(args) else model
    grid = None
    if table is not None:
        grid = position_grid(state, table, encoder.patch_embed.grid, args.tubelet_size, path)
    log(f"{path}: {load_encoder(encoder, weights, path, grid, args.inflate)}")
    return model


def load_finished(args, path: str | Path, state: dict, keys: str = "model") -> torch.nn.Module:
    """The classifier of a checkpoint of this script, or of VideoMAE's fine-tuning, whole. Raises CheckpointError."""
    if args.model_ema and "model_ema" not in state:
        raise CheckpointError(f"{path}: has no moving average of the weights: leave --model_ema out")
    keys = ("model_ema",) * args.model_ema + tuple(keys.split("|"))
    if probe_kind(args):
        weights = model_weights(state, path, keys, drop=())
    else:
        weights = encoder_weights(state, path, keys, args.model_prefix)
    name = "encoder.pos_embed" if probe_kind(args) else "pos_embed"
    model = build_classifier(args, weights.get(name))
    if name not in model.state_dict():  # the fixed table, which others store
        weights.pop(name, None)
    if "head.weight" not in weights:
        raise CheckpointError(f"{path}: has no classifier (a pre-training checkpoint?), so it cannot be tested")
    load_weights(model, weights, path)
    return model


class Run:
    """Model, optimizer, moving average and the best validation so far: the state that a checkpoint contains.

    found: the checkpoint to resume from; its weights are loaded here, the rest by load(). names: of the classes.
    """

    def __init__(
        self,
        args,
        model: torch.nn.Module,
        device: torch.device,
        found: tuple[Path, dict] | None = None,
        names: list[str] | None = None,
    ):
        self.args, self.device, self.task, self.names = args, device, TASKS[args.task], names or []
        if found:
            self._check(*found)
            load_weights(model, found[1]["model"], found[0])
        self.num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        groups = parameter_groups(model.to(device), args.weight_decay, args.layer_decay)
        self.backend = make_backend(
            args, model, groups, device, lr=args.lr, eps=args.opt_eps, amp=args.amp, clip_grad=args.clip_grad,
            keep_replica=True,
        )  # fmt: skip
        self.ema = None
        if args.model_ema:
            ema_device = torch.device("cpu") if args.model_ema_force_cpu else None
            self.ema = ModelEmaV3(model, args.model_ema_decay, device=ema_device)
        self.best = {self.task.metric: self.task.worst, "epoch": -1}
        self.unvalidated: dict | None = None  # what an epoch logged whose validation failed

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model whose accuracy counts: the moving average where there is one."""
        if self.ema is None:
            return self.backend.replica()
        return copy.deepcopy(self.ema.module).to(self.device) if self.args.model_ema_force_cpu else self.ema.module

    def weights(self, epoch: int) -> dict:
        """What checkpoint-best.pth contains; `model` has VideoMAE's names. Every rank calls it."""
        model = self.backend.weights(self.backend.unwrapped)
        state = {"model": model, "epoch": epoch, "best": self.best, "args": vars(self.args)}
        state["class_names"] = self.names
        return state | ({"model_ema": self.ema.module.state_dict()} if self.ema else {})

    def state(self, epoch: int, midway: dict | None = None) -> dict:
        """What checkpoint-N.pth contains. epoch: the last whole one; midway: where in the next one training is."""
        rest = {"rng": rng_state(self.device), "unvalidated": self.unvalidated} | ({"midway": midway} if midway else {})
        return self.weights(epoch) | self.backend.state_dict() | rest

    def _check(self, path: Path, state: dict) -> None:
        needed = ["model", "optimizer", "scaler", "rng", "epoch", "best"] + ["model_ema"] * self.args.model_ema
        missing = [key for key in needed if key not in state]
        if missing:
            raise CheckpointError(
                f"{path}: cannot be resumed, it has no {', '.join(missing)}; to start from its weights use --finetune"
            )
        if self.task.metric not in state["best"]:
            raise CheckpointError(f"{path}: was not trained with --task {self.task.name}; use --finetune instead")

    def load(self, path: Path, state: dict) -> int:
        """Restores all but the weights; returns the epoch after the last whole one. Raises CheckpointError."""
        if self.ema:
            load_weights(self.ema.module, state["model_ema"], path)
        with restoring("optimizer", path, "--opt, --layer_decay, or damaged"):
            self.backend.load_state_dict(state)
            check_moments(self.backend.optimizer, path)
        with restoring("random state", path):
            set_rng_state(state["rng"], self.device)
        self.best, self.unvalidated = state["best"], state.get("unvalidated")
        return state["epoch"] + 1


# --- the run -----------------------------------------------------------------------------------------------------


def build_loaders(args) -> dict:
    """Loaders "train" (unless --eval), "val" (unless disabled) and "test". Raises UsageError, ListError."""
    try:
        loaders = {}
        if args.knn:
            loaders["train"] = build_evaluation_loader(args, "train", args.rank, args.world_size)
        elif not args.eval:
            loaders["train"] = build_finetuning_loader(args, args.rank, args.world_size)
        for split in ("val", "test"):
            if split == "test" or not (args.eval or args.knn or args.disable_eval_during_finetuning):
                loaders[split] = build_evaluation_loader(args, split, args.rank, args.world_size)
    except (ValueError, ImportError) as error:  # the lists, the batch size, --aa, a decoder that is not installed
        raise UsageError(str(error)) from error
    for split in ("val", "test"):  # a missing file would only show after an epoch of training
        dataset = loaders[split].dataset if split in loaders and not args.allow_missing else None
        absent = [path for path in dataset.paths if not os.path.isfile(path)] if dataset else []
        if absent:
            raise UsageError(
                f"{dataset.list_path}: {len(absent)} of {len(dataset)} videos do not exist, {absent[0]} for one: "
                "correct the list, or count them as wrong with --allow_missing"
            )
    return loaders


def build_recipe(args, device: torch.device, loaders: dict) -> FinetuneRecipe:
    steps_per_epoch = 1
    if "train" in loaders:
        clips = len(loaders["train"].sampler) * args.num_sample
        batches = clips // clips_per_batch(args) if stores_features(args) else len(loaders["train"])
        steps_per_epoch = optimizer_steps(args, batches)
    mixup = Mixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=args.nb_classes,
    ) if mixing(args) else None  # fmt: skip
    settings = recipe_settings(args, device, steps_per_epoch)
    return FinetuneRecipe(task=TASKS[args.task], smoothing=args.smoothing, mixup=mixup, **settings)


def store_probe_features(run: Run, loaders: dict, recipe: FinetuneRecipe) -> None:
    """Puts features of the frozen encoder in the place of the clips of "train" and "val"."""
    args, probe = run.args, run.backend.unwrapped
    train = build_finetuning_loader(args, args.rank, args.world_size, drop_last=False)
    train.sampler.set_epoch(0)
    clips = len(train.sampler) * args.num_sample
    beside = len(loaders["val"].sampler) if "val" in loaders else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share this machine's memory
    log(f"the frozen encoder reads {clips} clips for training")
    batches = store_features(probe, train, recipe, args.amp, (clips + beside) * local)
    loaders["train"] = FeatureLoader.of(batches, clips, clips_per_batch(args), args.seed)
    if "val" in loaders:
        batches = list(store_features(probe, loaders["val"], recipe, args.amp, beside))
        loaders["val"] = StoredViews(loaders["val"], batches)


def test_settings(args, loader, source: str) -> dict:
    """What test.json says besides the accuracies."""
    return {
        "list": str(loader.dataset.list_path),
        "checkpoint": source,
        "temporal_clips": args.test_num_segment,
        "spatial_crops": args.test_num_crop,
    }


def test(
    model: torch.nn.Module, loader, recipe: FinetuneRecipe, args, source: str, output: Path | None, names: list[str]
) -> Scores:
    """The multi-view test; prints the accuracies and writes the report's files into the output folder."""
    views = f"{args.test_num_segment} x {args.test_num_crop} views"
    log(f"testing {source}: {len(loader.dataset)} videos, {views}")
    scores = evaluate(model, loader, recipe, args.amp, args.batch_size, args.allow_missing, "test")
    log(f"test: {recipe.task.text(scores.measures(recipe.task))}, {len(scores.label)} videos, {views}")
    if output and is_main_process():
        write_report(output, scores, loader.dataset.paths, names, test_settings(args, loader, source), recipe.task)
        log(f"wrote test.json, predictions.csv, scores.npz and tables to {output}")
    return scores


def run_knn(args, device: torch.device, loaders: dict, recipe: FinetuneRecipe, names: list[str]) -> None:
    """--knn: stores features of the frozen encoder, lets the nearest training videos vote, and writes the report."""
    args.epochs = 0  # what args.json says: nothing is trained
    opened = open_finetune(args, BEST) if args.finetune else None
    probe = (load_finetune(args, opened) if opened else build_classifier(args, None)).to(device)
    output = Path(args.output_dir) if args.output_dir else None
    source = str(opened[0]) if opened else "random weights"
    settings = test_settings(args, loaders["test"], source) | {"knn": args.knn}
    done = output and (is_tested(output, settings), checkpoint_files(output) != [])
    tested, trained = all_gather_object(done)[0] or (False, False)
    if trained:
        raise UsageError(f"--output_dir {output}: contains a run that was trained; give --knn a folder of its own")
    if tested:
        return log(f"nothing to do: tested ({output / 'test.json'})")
    open_output(args)
    log(f"the frozen encoder reads {len(loaders['train'].dataset)} + {len(loaders['test'].dataset)} videos")
    scores = evaluate_neighbours(probe, loaders, recipe, args.amp, args.knn, args.nb_classes, args.allow_missing)
    measures = scores.measures()
    if output and is_main_process():
        drop_epochs_from(output / "log.txt", -1)
        write_report(output, scores, loaders["test"].dataset.paths, names, settings)
        write_log(output, {"epoch": -1, "n_parameters": 0})  # for tools/compare_runs.py
    f1 = macro_f1(scores.predicted(), scores.label, args.nb_classes)
    log(f"{args.knn} nearest neighbours: {recipe.task.text(measures)}, macro-F1 {f1:.2f} %, {len(scores.label)} videos")


def names_of_classes(args, test_list: str, state: dict | None = None) -> list[str]:
    """Of classes.txt beside the test list or the training list, else those a checkpoint has, else numbers."""
    for folder in map(os.path.dirname, (test_list, find_list(args, "train"))):
        if os.path.isfile(os.path.join(folder, CLASSES)):
            return class_names(folder, args.nb_classes)
    return saved_class_names(state or {}, args.nb_classes)


def run_finetuning(args) -> None:
    check_flags(args)
    init_distributed(args)
    stop_at_once(saves=bool(args.output_dir and args.save_ckpt))
    resolve_amp(args)
    device = torch.device(args.device, args.local_rank) if args.device == "cuda" else torch.device("cpu")
    seed_everything(args.seed)  # the same weights on every rank
    loaders = build_loaders(args)
    test_list = loaders["test"].dataset.list_path
    recipe = build_recipe(args, device, {} if args.knn else loaders)
    if args.knn:
        return run_knn(args, device, loaders, recipe, names_of_classes(args, test_list))
    if args.eval:
        path, state = find_finished(args)
        names = names_of_classes(args, test_list, state)
        model = load_finished(args, path, state, args.model_key).to(device)
        output, _ = open_output(args, "eval_args.json")
        test(model, loaders["test"], recipe, args, str(path), output, names)
        return

    found = find_resume(args)
    if found:
        weights = model_weights(found[1], found[0], ("model",), drop=())
        model = build_classifier(args, weights.get("encoder.pos_embed", weights.get("pos_embed")))
    elif args.start_epoch >= args.epochs:
        raise UsageError(f"--start_epoch {args.start_epoch}: there is no such epoch in --epochs {args.epochs}")
    else:
        model = load_finetune(args) if args.finetune else build_classifier(args, None)
    names = names_of_classes(args, test_list, found and found[1])
    run = Run(args, model, device, found, names)
    seed_everything(args.seed, args.rank)  # dropout, stochastic depth and mixup differ between ranks
    output, log_writer = open_output(args)
    run_state = RunState(output=output, log_writer=log_writer)
    write_deepspeed_configs(output, {"classifier": run.backend})
    log(
        f"{args.model}: {run.num_parameters / 1e6:.1f} M parameters to train, {args.nb_classes} classes, "
        f"{probe_kind(args) + ' probe' if probe_kind(args) else 'all layers'}"
        f"{'' if found or args.finetune else ', from random weights (no --finetune)'}"
        f"\n{args.data_set}: {args.num_frames} frames from {args.num_segments} segment(s), "
        f"stride {args.sampling_rate}, horizontal flip {'on' if args.flip else 'off'}"
        f"\n{describe_schedule(args, recipe)}"
    )
    first_epoch, run_state.midway = resume(run, args, found, recipe.steps_per_epoch)
    if found and output and found[0].parent.resolve() == output.resolve():
        best = read_best(output)  # a killed run may have got further than its newest checkpoint
        metric = run.task.metric
        if metric in best.get("best", {}) and run.task.better(best["best"][metric], run.best[metric]):
            run.best = best["best"]
    found = weights = best = None  # or every process would hold them during the whole run
    check_same_on_all_ranks(run.best, "best checkpoints")
    if output and is_main_process():
        drop_epochs_from(output / "log.txt", first_epoch - (run.unvalidated is not None))

    finished = first_epoch >= args.epochs
    if run.unvalidated is not None and "val" in loaders:
        stats = run.unvalidated | validate(run, loaders["val"], recipe, run_state, first_epoch - 1)
        log_epoch(output, run, stats, first_epoch - 1)
        run.unvalidated = None
    if not finished:
        train(run, loaders, recipe, run_state, first_epoch)
    chosen_on_test = same_videos(loaders.get("val"), loaders["test"])
    loaders = {"test": loaders["test"]}  # ends the worker processes of the others
    barrier()  # the best checkpoint is written
    last = max(first_epoch, args.epochs) - 1
    saved = output / checkpoint_name(last) if output else None
    source = str(saved) if saved and saved.exists() else f"the weights after epoch {last}"
    check_same_on_all_ranks(source, "checkpoints of the last epoch")
    best = read_best(output) if output and args.save_ckpt and args.test_best else {}
    if best.get("best") != run.best:
        best = {}
    check_same_on_all_ranks(bool(best), "best checkpoints")
    settings = test_settings(args, loaders["test"], source)
    expected = settings | ({"best_epoch": run.best["epoch"]} if best else {})
    if finished and all_gather_object(output and is_tested(output, expected))[0]:
        log(f"nothing to do: {args.epochs} epochs are finished and tested ({output / 'test.json'})")
        return
    scores = test(run.evaluated, loaders["test"], recipe, args, source, output, names)
    if not best:
        return
    if run.best["epoch"] != last:
        model = load_finished(args, output / BEST, best).to(device)
        scores = evaluate(model, loaders["test"], recipe, args.amp, args.batch_size, args.allow_missing, "best epoch")
    measures = scores.measures(run.task)
    note = ", which was chosen on the videos of the test: too high a figure" if chosen_on_test else ""
    log(f"the best epoch of the validation, {run.best['epoch']}: {run.task.text(measures)}{note}")
    if output and is_main_process():
        add_best_epoch(output, measures, run.best["epoch"], chosen_on_test, run.task)


def same_videos(val, test) -> bool:
    """Whether a video of the validation is one of the test."""
    return val is not None and not set(val.dataset.paths).isdisjoint(test.dataset.paths)


def read_best(output: Path) -> dict:
    """checkpoint-best.pth of a folder; {} where there is none that can be read."""
    if not (output / BEST).exists():
        return {}
    try:
        return load_run(output / BEST)
    except CheckpointError as error:
        log(f"warning: {error}; continuing without it")
        return {}


def is_tested(output: Path, settings: dict) -> bool:
    """Whether test.json is there and about these settings."""
    return settings.items() <= read_report(output).items()


def log_epoch(output: Path | None, run: Run, stats: dict, epoch: int) -> None:
    write_log(output, stats | {"epoch": epoch, "n_parameters": run.num_parameters})


def stores_features(args) -> bool:
    return bool(probe_kind(args)) and args.cache_features


def find_finished(args) -> tuple[str | Path, dict]:
    """The checkpoint --eval tests: --finetune, --resume, the newest in --output_dir, or the best there, alone."""
    if args.finetune:
        return open_finetune(args, BEST)
    found = find_resume(args)
    if found is None and args.output_dir and Path(args.output_dir, BEST).exists():
        return open_checkpoint(args.output_dir, BEST)
    if found is None:
        raise UsageError(
            "--eval: nothing to test; name a fine-tuned checkpoint with --finetune, or a finished run with --output_dir"
        )
    return found


def validate(run: Run, loader, recipe: FinetuneRecipe, state: RunState, epoch: int) -> dict[str, float]:
    """Measures of the central view of each video; writes checkpoint-best.pth when the first of them is the best."""
    args, metric = run.args, run.task.metric
    scores = evaluate(run.evaluated, loader, recipe, args.amp, args.batch_size, args.allow_missing)
    run.backend.offload_replica()
    measures = scores.measures(run.task)
    stats = {f"val_{name}": value for name, value in measures.items()}
    if run.task.better(measures[metric], run.best[metric]):
        run.best = {metric: measures[metric], "epoch": epoch}
        if state.output and args.save_ckpt:
            save_best(state.output / BEST, run.weights(epoch))
    log(
        f"epoch {epoch} validation: {run.task.text(measures)}, loss {measures['loss']:.4g}; best "
        f"{in_words(metric, run.best[metric])} in epoch {run.best['epoch']}"
    )
    if state.log_writer is not None:
        for name, value in stats.items():
            state.log_writer.add_scalar(name.replace("_", "/"), value, (epoch + 1) * recipe.steps_per_epoch)
    return stats


def save_best(path: Path, state: dict) -> None:
    if is_main_process():
        try:
            save_checkpoint(path, state)
        except CheckpointError as error:
            log(f"warning: {error}; training continues, and its last weights will be tested")


def train(run: Run, loaders: dict, recipe: FinetuneRecipe, state: RunState, first_epoch: int) -> None:
    """All epochs from first_epoch on. Raises Preempted."""
    args, output = run.args, state.output
    start = time.time()
    if output and is_main_process():
        (output / "test.json").unlink(missing_ok=True)  # it is about other weights
    if stores_features(args):
        store_probe_features(run, loaders, recipe)
    minutes = args.save_ckpt_minutes if output and args.save_ckpt else 0
    with PreemptionWatch(minutes) as state.watch, closing(state.log_writer):  # now there is something to save
        train_epochs(run, loaders, recipe, state, first_epoch)
    log(f"training took {format_time(time.time() - start)}")


def train_epochs(run: Run, loaders: dict, recipe: FinetuneRecipe, state: RunState, first_epoch: int) -> None:
    """Epochs from first_epoch to the last, each followed by validation ("val" in loaders) and a checkpoint.

    Every save_ckpt_freq-th checkpoint and the last are kept, the others replaced by newer ones. Raises Preempted.
    """
    args, output = run.args, state.output
    saves = output and args.save_ckpt

    def save_midway(epoch: int, where: dict) -> bool:
        for model in [run.backend.unwrapped] + ([run.ema.module] if run.ema else []):
            average_batch_norm(model, run.device)  # one file for all processes
        return save(args, output, run.state(epoch - 1, where), epoch, where)

    state.save = save_midway if saves else None
    for epoch in range(first_epoch, args.epochs):
        done = state.midway["steps"] * args.accum_iter if state.midway else 0
        loaders["train"].sampler.set_epoch(epoch, done * loaders["train"].batch_size)
        stats = train_one_epoch(run.backend, loaders["train"], recipe, epoch, run.ema, state)
        stats = {f"train_{name}": value for name, value in stats.items()}
        run.unvalidated, problem = None, None
        last, stop = epoch + 1 == args.epochs, state.watch.decide_now() == STOP
        try:
            if stop and saves and "val" in loaders:  # there may be no time to validate: a resume does
                run.unvalidated = stats
            else:
                if "val" in loaders:
                    stats |= validate(run, loaders["val"], recipe, state, epoch)
                log_epoch(
                    output, run, stats, epoch
                )  # before the checkpoint: a resume takes away lines, it cannot add one
        except VideoError as error:  # on every process: save what was trained, then stop; a resume validates first
            run.unvalidated, problem = stats, error
        stop = stop or state.watch.decide_now() == STOP
        written = saves and save(args, output, run.state(epoch), epoch, must=last)
        if problem:
            raise problem
        if stop and not (last and run.unvalidated is None):
            raise Preempted(f"stopped after epoch {epoch}", bool(written))


def main(arguments: list[str] | None = None) -> None:
    run_script(lambda arguments: run_finetuning(parse_args(arguments)), arguments)


if __name__ == "__main__":
    end_with_status(main)
