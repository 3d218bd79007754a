"""Pre-train a video masked autoencoder with tube, random, frame, motion, AdaMAE or TATS masks."""

import argparse
import time
from pathlib import Path

import torch

import engine_for_pretraining
import engine_for_tats
from datasets.build import build_pretraining_loader
from datasets.transforms import normalize
from engine_for_pretraining import PretrainRecipe
from engine_for_tats import Phases
from masking_generator import DECODER_MASKS, FrameMask, MaskSampler, MotionMask, Policy, RandomMask, TubeMask
from modeling_adamae import AdaMAESampler
from modeling_finetune import is_sinusoid_encoding_table
from modeling_pretrain import JointModel
from modeling_tats import ATTENTIONS, ENTROPIES, OBJECTIVES, TATS
from optim_factory import parameter_groups
from runtime.backend import Backend
from runtime.build import create_model, describe_schedule, make_backend, optimizer_steps, recipe_settings
from runtime.checkpoint import CheckpointError, check_moments, restoring, saved_args
from runtime.convert import (
    LoadReport,
    check_position_table,
    load_autoencoder,
    load_weights,
    model_weights,
    position_grid,
    resize_position_table,
    split_samplers,
)
from runtime.epoch import RunState
from runtime.flags import (
    AT_LEAST_1,
    AT_MOST_1000,
    NOT_NEGATIVE,
    NOT_ZERO_IN_FLOAT32,
    POSITIVE,
    RATE,
    SWITCH,
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
from runtime.mask_pictures import mask_picture
from runtime.outputs import closing, open_output, write_deepspeed_configs
from runtime.preemption import GO_ON, STOP, Preempted, PreemptionWatch, stop_at_once
from runtime.resume import find_resume, open_finetune, resume, save
from runtime.sampler_guard import SamplerGuard
from utils import (
    UsageError,
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

# A new mask strategy, learned or not, is one class and one line here.
SAMPLERS: dict[str, type[MaskSampler]] = {
    "tube": TubeMask,
    "random": RandomMask,
    "frame": FrameMask,
    "motion": MotionMask,
    "adamae": AdaMAESampler,
    "tats": TATS,
}
CHECKPOINTED = ("encoder", "decoder", "sampler")


def recomputes(args, module: str) -> bool:
    """Whether the backward pass computes the activations of this part of CHECKPOINTED again."""
    return args.use_checkpoint or module in args.checkpoint_modules


def parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_run_flags(parser)

    group = add_model_flags(parser)
    group.add_argument("--decoder_depth", default=4, type=int, help="blocks of the decoder")
    group.add_argument(
        "--checkpoint_modules",
        default=[],
        nargs="+",
        choices=CHECKPOINTED,
        metavar="MODULE",
        help=f"parts with activation checkpointing: some of {', '.join(CHECKPOINTED)}",
    )
    group.add_argument(
        "--compile", default=False, action=SWITCH, help="torch.compile: faster steps, after minutes of compiling"
    )

    group = parser.add_argument_group("masks and target")
    group.add_argument(
        "--mask_type",
        default="tube",
        choices=list(SAMPLERS),
        type=lambda name: "adamae" if name == "learnable" else name,
        help="how masks are chosen; AdaMAE's name learnable means adamae",
    )
    group.add_argument("--mask_ratio", default=0.75, type=float, help="share of tokens that the encoder does not see")
    group.add_argument(
        "--decoder_mask_ratio",
        default=0.0,
        type=float,
        help="share of masked tokens that the decoder does not predict (VideoMAE V2's dual masking)",
    )
    group.add_argument(
        "--decoder_mask_type",
        default="run_cell",
        choices=list(DECODER_MASKS),
        help="which tokens --decoder_mask_ratio removes: in turns within cells of 2 x 2 tokens, or random ones",
    )
    group.add_argument("--loss", default="mse", choices=["mse", "l1"], help="reconstruction loss")
    group.add_argument(
        "--normalize_target",
        default=True,
        action=SWITCH,
        help="normalise the target per token and colour to mean 0, deviation 1",
    )
    group.add_argument("--normlize_target", dest="normalize_target", type=parse_bool, help=argparse.SUPPRESS)
    group.add_argument(
        "--finetune_sampler",
        default=True,
        action=SWITCH,
        help="load the sampler of --finetune too, if --mask_type has one",
    )
    group.add_argument(
        "--picture_freq", default=0, type=int, help="epochs between pictures of masks in tensorboard; 0: none"
    )
    group.add_argument("--adamae_coef", default=1e-4, type=float, help="weight of the sampling loss of AdaMAE")

    group = parser.add_argument_group("TATS and PPO")
    group.add_argument(
        "--tats_attention",
        default="orthoformer",
        choices=list(ATTENTIONS),
        help="attention of TATS: Orthoformer (approximate), exact trajectory attention, or plain",
    )
    group.add_argument("--tats_blocks", default=1, type=int, help="transformer blocks of TATS")
    group.add_argument("--num_landmarks", default=128, type=int, help="Orthoformer landmarks per head")
    group.add_argument(
        "--landmark_gradient",
        default=False,
        action=SWITCH,
        help="gradient of W_q through the landmarks too; Motionformer has none",
    )
    group.add_argument("--softmax_temp", default=1.0, type=float, help="temperature of the token probabilities")
    group.add_argument(
        "--tats_logit_cap",
        default=0.0,
        type=float,
        help="C > 0 bounds the logits to +-C, against collapse; 0: no bound, as in the paper",
    )
    group.add_argument(
        "--tats_objective",
        default="ppo",
        choices=list(OBJECTIVES),
        help="what TATS learns from: ppo (the paper), or listwise, which has an end point (docs/SAMPLER.md)",
    )
    group.add_argument(
        "--tats_tau",
        default=0.1,
        type=float,
        help="temperature of listwise in units of error; below 0: hide hard tokens",
    )
    group.add_argument(
        "--tats_lr", default=1.5e-6, type=float, help="learning rate of TATS: constant, not scaled by the batch size"
    )
    group.add_argument(
        "--tats_eps",
        default=1e-12,
        type=float,
        help="epsilon of AdamW for TATS: gradients are about 1e-4 of usual ones",
    )
    group.add_argument(
        "--tats_start_epoch", default=10, type=int, help="epochs of random masks before TATS starts (the paper's e)"
    )
    group.add_argument(
        "--tats_rollout_steps", default=1, type=int, help="autoencoder steps per phase 1 (the paper's k)"
    )
    group.add_argument("--ppo_epochs", default=1, type=int, help="passes over the recorded episodes per phase 2")
    group.add_argument("--ppo_clip", default=0.2, type=float, help="clip range of the probability ratio")
    group.add_argument("--policy_coef", default=1e-4, type=float, help="weight of the clipped objective (c_p)")
    group.add_argument("--value_coef", default=1e-4, type=float, help="weight of the value loss (c_v)")
    group.add_argument("--entropy_coef", default=1e-4, type=float, help="weight of the entropy bonus (c_e)")
    group.add_argument(
        "--entropy",
        default="bonus",
        choices=list(ENTROPIES),
        help="what --entropy_coef weighs: the entropy of p, or -KL(uniform || p)",
    )
    group.add_argument(
        "--normalize_advantage",
        default=False,
        action=SWITCH,
        help="advantages to mean 0, deviation 1 over an optimizer step; with --accum_iter above 1 it "
        "costs one more forward pass of TATS",
    )

    add_optimizer_flags(parser)

    group = add_data_flags(parser, "list file with one line per video: path label")
    group.add_argument(
        "--crop", default="multiscale", choices=["multiscale", "random_resized"], help="kind of random crop"
    )

    add_deepspeed_flags(parser)
    add_process_flags(parser)
    parser.set_defaults(
        epochs=800, save_ckpt_freq=50, model="pretrain_videomae_base_patch16_224", drop_path=0.0, lr=1.5e-4,
        min_lr=1e-5, warmup_epochs=40, num_sample=1, color_jitter=0.0,
        train_interpolation="bilinear",  # VideoMAE's crops are, whatever its flag says
    )  # fmt: skip
    return parser


RANGES: Ranges = [
    (AT_LEAST_1, "decoder_depth tats_blocks num_landmarks tats_rollout_steps ppo_epochs"),
    (AT_MOST_1000, "decoder_depth tats_blocks ppo_epochs"),
    (POSITIVE, "tats_lr ppo_clip"),
    (Range(lambda x: x >= 1e-6, "must be at least 1e-6"), "softmax_temp"),  # float32 logits over it would overflow
    (Range(lambda x: abs(x) >= 1e-6, "must be at least 1e-6 away from 0"), "tats_tau"),
    (NOT_NEGATIVE, "picture_freq tats_logit_cap tats_start_epoch policy_coef value_coef entropy_coef adamae_coef"),
    (Range(lambda x: 0 < x < 1, "must be between 0 and 1, both excluded"), "mask_ratio"),
    (RATE, "decoder_mask_ratio"),
    (NOT_ZERO_IN_FLOAT32, "tats_eps"),
]
REFUSALS: Refusals = [
    (
        "normalize_advantage",
        lambda args: args.normalize_advantage and args.tats_objective == "listwise",
        "--tats_objective listwise has no advantages, remove the flag",
    ),
    (
        "checkpoint_modules",
        lambda args: "sampler" in args.checkpoint_modules and not SAMPLERS[args.mask_type].learned,
        "--mask_type {mask_type} has no sampler to recompute, adamae and tats have",
    ),
    ("zero_stage", lambda args: args.compile and zero_3(args), "cannot be combined with --compile: use 2"),
    ("picture_freq", lambda args: args.picture_freq and not args.log_dir, "needs --log_dir for the pictures"),
    (
        "zero_stage",
        lambda args: args.picture_freq and zero_3(args),
        "cannot be combined with --picture_freq: use 2, or draw checkpoints with run_mae_vis.py",
    ),
]


def zero_3(args) -> bool:
    """Whether weights are sharded."""
    return args.enable_deepspeed and args.zero_stage == 3


def check_flags(args) -> None:
    """Raises UsageError for values that make no sense alone or together."""
    check_values(args, RANGES, REFUSALS)


def build_mae(args) -> torch.nn.Module:
    """The autoencoder the flags describe. Raises UsageError."""
    mae = create_model(args, "modeling_pretrain", decoder_depth=args.decoder_depth)
    mae.encoder.use_checkpoint = recomputes(args, "encoder")
    mae.decoder.use_checkpoint = recomputes(args, "decoder")
    return mae


def build_sampler(args, mae: torch.nn.Module) -> MaskSampler:
    """The --mask_type, with the flags its class names. Raises UsageError."""
    kind = SAMPLERS[args.mask_type]
    settings = {name: getattr(args, flag) for name, flag in kind.flags.items()}
    if kind.learned:
        settings["use_checkpoint"] = recomputes(args, "sampler")
    try:
        sampler = kind.for_encoder(mae.encoder, mae.grid, args.mask_ratio, **settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return spared(sampler, args)


def spared(sampler: MaskSampler, args) -> MaskSampler:
    """The sampler, with what the flags spare the decoder."""
    sampler.decoder_mask_ratio, sampler.decoder_mask_type = args.decoder_mask_ratio, args.decoder_mask_type
    return sampler


def load_pretrained(
    mae: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path, how: str = "mean"
) -> LoadReport:
    """load_autoencoder, for encoders of the fixed positions that all autoencoders here have. Raises CheckpointError."""
    table = weights.get("encoder.pos_embed")
    if table is not None and not is_sinusoid_encoding_table(table):
        raise CheckpointError(f"{path}: its encoder learned its positions (pos_embed), this autoencoder's are fixed")
    return load_autoencoder(mae, weights, path, how)


def load_sampler(sampler: MaskSampler, weights: dict, state: dict, path: Path, args) -> LoadReport:
    """A learned sampler's weights, all of them; a learned table of positions is interpolated for another grid. Raises
    CheckpointError where they do not fit."""
    for name in sampler.position_tables:
        if isinstance(weights.get(name), torch.Tensor):
            with restoring("sampler", path):
                check_position_table(weights[name], path)
                grid = position_grid(state, weights[name], sampler.grid, args.tubelet_size, path)
                weights = weights | {name: resize_position_table(weights[name], grid, sampler.grid)}
    load_weights(sampler, weights, path)
    saved = saved_args(state, path)
    changed = [
        f"--{name} {saved[name]} -> {getattr(args, name)}"
        for name in sampler.flags.values()
        if name in saved and saved[name] != getattr(args, name)
    ]
    if changed:
        log(f"note: its sampler was trained with other flags: {', '.join(changed)}")
    return LoadReport(list(weights), [], [])


def phases(args) -> Phases:
    return Phases(args.tats_rollout_steps, args.ppo_epochs, args.normalize_advantage)


class Run:
    """Models, backends and the state that a checkpoint contains. found: the checkpoint to resume from."""

    def __init__(self, args, device: torch.device, found: tuple[Path, dict] | None = None):
        self.args, self.device = args, device
        self.mae = build_mae(args)
        self.sampler = build_sampler(args, self.mae)
        self.warmup_sampler = None  # of the epochs before --tats_start_epoch
        if self.sampler.own_optimizer:
            self.warmup_sampler = spared(RandomMask(self.mae.grid, args.mask_ratio), args)
        self.learned = args.mask_type if self.sampler.learned else ""  # the sampler's key in checkpoints
        if found:
            self._load_weights(*found)
        elif args.finetune:
            self._start_from_weights()
        self.num_parameters, self.num_sampler_parameters = (
            sum(p.numel() for p in module.parameters()) for module in (self.mae, self.sampler)
        )
        joint = self.sampler.learned and not self.sampler.own_optimizer
        module = JointModel(self.mae, self.sampler) if joint else self.mae
        self.backend = self._backend(module, args.lr, args.opt_eps, args.clip_grad, args.amp)
        self.agent = None  # the backend of a sampler with an optimizer of its own
        if self.sampler.own_optimizer:
            # A ratio of two evaluations would be mostly rounding in bf16: only the one-pass form may use it.
            amp = args.amp if phases(args).one_pass(args.accum_iter) else "none"
            self.agent = self._backend(Policy(self.sampler), args.tats_lr, args.tats_eps, None, amp)
        self.sampler.to(device)

    def _backend(self, module: torch.nn.Module, lr: float, eps: float, clip_grad: float | None, amp: str) -> Backend:
        groups = parameter_groups(module.to(self.device), self.args.weight_decay)
        return make_backend(
            self.args, module, groups, self.device, lr=lr, eps=eps, amp=amp, clip_grad=clip_grad,
            compile=self.args.compile,
        )  # fmt: skip

    def backends(self) -> dict[str, Backend]:
        """By the names they have in output files."""
        return {"mae": self.backend} | ({self.learned: self.agent} if self.agent else {})

    def recipe(self, steps_per_epoch: int) -> PretrainRecipe:
        return PretrainRecipe(
            grid=self.mae.grid, loss=self.args.loss, normalize_target=self.args.normalize_target,
            **recipe_settings(self.args, self.device, steps_per_epoch),
        )  # fmt: skip

    def warming_up(self, epoch: int) -> bool:
        """Whether masks are still random in this epoch."""
        return self.sampler.own_optimizer and epoch < self.args.tats_start_epoch

    def train_one_epoch(
        self, loader, recipe: PretrainRecipe, epoch: int, state: RunState | None = None
    ) -> dict[str, float]:
        """By the engine that the sampler needs; returns epoch means."""
        if self.agent and not self.warming_up(epoch):
            return engine_for_tats.train_one_epoch(
                self.backend, self.agent, self.sampler, loader, recipe, phases(self.args), epoch, state
            )
        sampler = self.warmup_sampler if self.agent else self.sampler
        return engine_for_pretraining.train_one_epoch(self.backend, sampler, loader, recipe, epoch, state)

    def state(self, epoch: int, step: int, midway: dict | None = None) -> dict:
        """What checkpoint-N.pth contains; `model` has VideoMAE's names and nothing of the sampler. epoch: the last full
        one; midway: where in the next one training is. Every rank calls it."""
        state = {
            "model": self.backend.weights(self.mae),
            **self.backend.state_dict(),
            "rng": rng_state(self.device),
            "epoch": epoch,
            "step": step,
            "args": vars(self.args),
        }
        if self.learned:
            owner = self.agent or self.backend
            state[self.learned] = owner.weights(self.sampler)
        if self.agent is not None:
            state |= {f"{self.learned}_{name}": value for name, value in self.agent.state_dict().items()}
        return state | ({"midway": midway} if midway else {})

    @torch.no_grad()
    def draw_masks(self, dataset, recipe: PretrainRecipe, epoch: int) -> torch.Tensor:
        """Picture uint8 [3, H, W] of the masks of a few clips, the same in every epoch. Training does not notice."""
        items = [dataset[index, index] for index in range(min(4, len(dataset)))]
        clips = torch.stack([item["video"][0] for item in items]).to(self.device)
        seed = torch.stack([item["seed"][0] for item in items]).to(self.device)
        pixels, video = normalize(clips, recipe.mean, recipe.std)
        sampler = self.warmup_sampler if self.warming_up(epoch) else self.sampler
        sampler.eval()
        tokens = self.mae.encoder.patch_embed(video) if sampler.needs_tokens else None
        mask = sampler.draw_mask(video, seed, tokens)
        sampler.train()
        return mask_picture(pixels, mask, self.mae.grid)

    def _start_from_weights(self) -> None:
        """--finetune, with a line each on what autoencoder and sampler take. Raises CheckpointError."""
        args = self.args
        path, state = open_finetune(args)
        weights = model_weights(state, path, tuple(args.model_key.split("|")), (), args.model_prefix)
        weights, samplers = split_samplers(state, weights, SAMPLERS)
        log(f"{path}: autoencoder: {load_pretrained(self.mae, weights, path, args.inflate)}")
        if self.learned and self.learned in samplers and args.finetune_sampler:
            try:
                report = load_sampler(self.sampler, samplers.pop(self.learned), state, path, args)
            except CheckpointError as error:
                raise CheckpointError(
                    f"its {self.learned} sampler: {error}. Give the flags it was trained with, or start it fresh with "
                    "--no-finetune_sampler"
                ) from error
            log(f"{path}: {self.learned} sampler: {report}")
        elif self.learned:
            why = "--no-finetune_sampler" if self.learned in samplers else "the file has none"
            log(f"{path}: {self.learned} sampler: starts fresh, {why}")
        for kind, tensors in samplers.items():
            log(f"{path}: {kind} sampler: {len(tensors)} tensors left over, not used by --mask_type {args.mask_type}")

    def _load_weights(self, path: Path, state: dict) -> None:
        needed = ["model", "optimizer", "scaler", "rng", "epoch", "args"] + [self.learned] * bool(self.learned)
        missing = [key for key in needed if key not in state]
        if missing:
            raise CheckpointError(
                f"{path}: cannot be resumed with --mask_type {self.args.mask_type}, it has no {', '.join(missing)}; "
                "to start from its weights alone use --finetune"
            )
        load_weights(self.mae, state["model"], path)
        if self.learned:
            load_weights(self.sampler, state[self.learned], path)

    def load(self, path: Path, state: dict) -> int:
        """Restores all but the weights; returns the epoch after the last whole one. Raises CheckpointError."""
        with restoring("optimizer", path, "--opt, --mask_type, or damaged"):
            self.backend.load_state_dict(state)
            if self.agent is not None:
                own = {name: state[f"{self.learned}_{name}"] for name in ("optimizer", "scaler")}
                self.agent.load_state_dict(own)
            for backend in self.backends().values():
                check_moments(backend.optimizer, path)
        with restoring("random state", path):
            set_rng_state(state["rng"], self.device)
        return state["epoch"] + 1


def train(args) -> None:
    check_flags(args)
    init_distributed(args)
    stop_at_once(saves=bool(args.output_dir))
    resolve_amp(args)
    device = torch.device(args.device, args.local_rank) if args.device == "cuda" else torch.device("cpu")
    seed_everything(args.seed)  # the same weights on every rank
    try:
        loader = build_pretraining_loader(args, args.rank, args.world_size)
    except (ValueError, ImportError) as error:  # the list, the batch size, a decoder that is not installed
        raise UsageError(str(error)) from error
    steps_per_epoch = optimizer_steps(args, len(loader))
    found = find_resume(args)
    if found is None and args.start_epoch >= args.epochs:
        raise UsageError(f"--start_epoch {args.start_epoch}: there is no such epoch in --epochs {args.epochs}")
    run = Run(args, device, found)
    seed_everything(args.seed, args.rank)  # dropout and stochastic depth differ between ranks

    output, log_writer = open_output(args)
    write_deepspeed_configs(output, run.backends())
    recipe = run.recipe(steps_per_epoch)
    log(
        f"{args.model}: {run.num_parameters / 1e6:.1f} M parameters, {args.mask_type}: "
        f"{run.num_sampler_parameters / 1e6:.1f} M"
        f"\n{run.sampler.num_tokens} tokens per clip {run.mae.grid}, {run.sampler.num_visible} visible"
        f"\n{describe_schedule(args, recipe)}"
    )
    if run.warming_up(args.epochs - 1):
        log(
            f"warning: --tats_start_epoch {args.tats_start_epoch} is not below --epochs {args.epochs}: all masks are "
            "random, TATS learns nothing"
        )

    first_epoch, midway = resume(run, args, found, steps_per_epoch)
    found = None  # or every process would hold it during the whole run
    if output and is_main_process():
        drop_epochs_from(output / "log.txt", first_epoch)
    if first_epoch >= args.epochs:
        log(f"nothing to do: {args.epochs} epochs are finished")
        return
    start = time.time()
    with PreemptionWatch(args.save_ckpt_minutes if output else 0) as watch, closing(log_writer):
        state = RunState(output=output, log_writer=log_writer, watch=watch, midway=midway)
        train_epochs(run, loader, recipe, state, first_epoch)
    log(f"training took {format_time(time.time() - start)}")


def train_epochs(run: Run, loader, recipe: PretrainRecipe, state: RunState, first_epoch: int) -> None:
    """Epochs from first_epoch to the last, each logged and, where --save_ckpt_freq says so, saved. Raises Preempted."""
    args, output = run.args, state.output

    def save_midway(epoch: int, where: dict) -> bool:
        checkpoint = run.state(epoch - 1, epoch * recipe.steps_per_epoch + where["steps"], where)
        return save(args, output, checkpoint, epoch, where)

    state.save = save_midway if output else None
    guard = SamplerGuard()
    for epoch in range(first_epoch, args.epochs):
        done = state.midway["steps"] * args.accum_iter if state.midway else 0
        loader.sampler.set_epoch(epoch, done * loader.batch_size)
        stats = run.train_one_epoch(loader, recipe, epoch, state)
        if state.log_writer is not None and args.picture_freq and (epoch + 1) % args.picture_freq == 0:
            picture = run.draw_masks(loader.dataset, recipe, epoch)
            state.log_writer.add_image("masks", picture, (epoch + 1) * recipe.steps_per_epoch)
        for warning in guard.check(stats):
            log(f"warning: {warning}")
        # before the checkpoint: a resume takes away lines, it cannot add one
        record = {f"train_{name}": value for name, value in stats.items()}
        write_log(output, record | {"epoch": epoch, "n_parameters": run.num_parameters})
        last, decision = epoch + 1 == args.epochs, state.watch.decide_now()
        written = False
        if output and (last or decision != GO_ON or (epoch + 1) % args.save_ckpt_freq == 0):
            written = save(args, output, run.state(epoch, (epoch + 1) * recipe.steps_per_epoch), epoch, must=last)
        if decision == STOP and not last:
            raise Preempted(f"stopped after epoch {epoch}", written)


def main(arguments: list[str] | None = None) -> None:
    run_script(train, get_parser().parse_args(arguments))


if __name__ == "__main__":
    end_with_status(main)
