"""Pre-train a video masked autoencoder with tube, random, frame, motion, AdaMAE or TATS masks."""

import argparse
import sys
import time
from pathlib import Path

import timm
import torch

import engine_for_pretraining
import engine_for_tats
import modeling_pretrain  # noqa: F401  registers the models
from backend import Backend
from checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    model_weights,
    save_checkpoint,
)
from datasets.build import build_pretraining_loader
from datasets.transforms import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD
from datasets.video import DECODERS, ListError, VideoError
from engine_for_pretraining import Recipe
from engine_for_tats import PPOSettings
from masking_generator import FrameMask, MaskSampler, MotionMask, RandomMask, TubeMask
from modeling_adamae import AdaMAE, AdaMAESampler
from modeling_tats import ATTENTIONS, TATS
from optim_factory import create_optimizer, parameter_groups
from utils import (
    UsageError,
    append_json_line,
    drop_epochs_from,
    format_time,
    init_distributed,
    is_main_process,
    log,
    rng_state,
    seed_everything,
    set_rng_state,
    write_run_description,
)

# A new mask strategy is one class and one line here. (grid, args, MAE) -> MaskSampler
SAMPLERS = {
    "tube": lambda grid, args, mae: TubeMask(grid, args.mask_ratio),
    "random": lambda grid, args, mae: RandomMask(grid, args.mask_ratio),
    "frame": lambda grid, args, mae: FrameMask(grid, args.mask_ratio),
    "motion": lambda grid, args, mae: MotionMask(grid, args.mask_ratio),
    "adamae": lambda grid, args, mae: AdaMAESampler(grid, args.mask_ratio, mae.encoder.embed_dim),
    "tats": lambda grid, args, mae: TATS(
        grid,
        args.mask_ratio,
        mae.encoder.embed_dim,
        mae.encoder.blocks[0].attn.num_heads,
        args.tats_attention,
        args.tats_blocks,
        args.num_landmarks,
        args.softmax_temp,
    ),
}


def parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", default=64, type=int, help="clips a process and micro-batch")
    group.add_argument("--epochs", default=800, type=int, help="passes over the list of videos")
    group.add_argument(
        "--accum_iter",
        default=1,
        type=int,
        help="micro-batches an optimizer step: effective batch = all clips of a step",
    )
    group.add_argument(
        "--save_ckpt_freq", default=50, type=int, help="epochs between checkpoints (the last is kept too)"
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
    group.add_argument("--seed", default=0, type=int, help="decides weights, data order, crops and masks")
    group.add_argument("--resume", default="", help="checkpoint of this script to go on from")
    group.add_argument(
        "--auto_resume", default=True, action=switch, help="go on from the newest checkpoint in --output_dir"
    )
    group.add_argument("--no_auto_resume", dest="auto_resume", action="store_false", help=argparse.SUPPRESS)
    group.add_argument("--start_epoch", default=0, type=int, help="first epoch; set by a resume")
    group.add_argument("--finetune", default="", help="checkpoint to take the autoencoder's weights from at the start")
    group.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "none"],
                       help="mixed precision; auto: bf16 on a GPU that has it, none elsewhere")  # fmt: skip

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="pretrain_videomae_base_patch16_224", help="pretrain_videomae_SIZE_...")
    group.add_argument("--decoder_depth", default=4, type=int, help="decoder blocks")
    group.add_argument("--input_size", default=224, type=int, help="height and width of a clip in pixels")
    group.add_argument("--num_frames", default=16, type=int, help="frames of a clip")
    group.add_argument("--patch_size", default=None, type=int, help="pixels; default: the model's")
    group.add_argument("--tubelet_size", default=2, type=int, help="frames of a token")
    group.add_argument("--drop_path", default=0.0, type=float, help="stochastic depth rate of the last block")
    group.add_argument("--use_checkpoint", default=False, action=switch, help="recompute blocks: less memory, slower")

    group = parser.add_argument_group("masks and target")
    group.add_argument("--mask_type", default="tube", choices=list(SAMPLERS),
                       type=lambda name: "adamae" if name == "learnable" else name,
                       help="learnable, AdaMAE's own name, means adamae")  # fmt: skip
    group.add_argument("--mask_ratio", default=0.75, type=float, help="share of the tokens hidden from the encoder")
    group.add_argument("--loss", default="mse", choices=["mse", "l1"], help="of prediction and target")
    group.add_argument(
        "--normalize_target", default=True, action=switch, help="each colour of each token to mean 0, deviation 1"
    )
    group.add_argument("--normlize_target", dest="normalize_target", type=parse_bool, help=argparse.SUPPRESS)
    group.add_argument("--adamae_coef", default=1e-4, type=float, help="weight of AdaMAE's sampling loss")

    group = parser.add_argument_group("TATS and PPO")
    group.add_argument(
        "--tats_attention", default="orthoformer", choices=list(ATTENTIONS), help="trajectory is exact, mha plain"
    )
    group.add_argument("--tats_blocks", default=1, type=int, help="transformer blocks of TATS")
    group.add_argument("--num_landmarks", default=128, type=int, help="Orthoformer landmarks a head")
    group.add_argument("--softmax_temp", default=1.0, type=float, help="temperature of TATS's token probabilities")
    group.add_argument("--tats_lr", default=1.5e-6, type=float, help="constant, not scaled by the batch size")
    group.add_argument(
        "--tats_eps",
        default=1e-12,
        type=float,
        help="AdamW's eps for TATS: 1e-8 times the coefficients' 1e-4, lest eps outweigh gradients of that size",
    )
    group.add_argument("--tats_start_epoch", default=10, type=int, help="e: epochs of random masks before TATS")
    group.add_argument("--tats_rollout_steps", default=1, type=int, help="k: steps of the autoencoder a phase 1")
    group.add_argument("--ppo_epochs", default=1, type=int, help="passes over the recorded episodes a phase 2")
    group.add_argument("--ppo_clip", default=0.2, type=float, help="of the probability ratio")
    group.add_argument("--policy_coef", default=1e-4, type=float, help="c_p")
    group.add_argument("--value_coef", default=1e-4, type=float, help="c_v")
    group.add_argument("--entropy_coef", default=1e-4, type=float, help="c_e")
    group.add_argument("--normalize_advantage", default=False, action=switch, help="over the batch")

    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="an optimizer of timm")
    group.add_argument("--opt_eps", default=1e-8, type=float, help="of the autoencoder's optimizer")
    group.add_argument("--opt_betas", default=None, type=float, nargs="+", help="default: the optimizer's own")
    group.add_argument("--clip_grad", default=None, type=float, help="gradient norm; default: no clipping")
    group.add_argument("--momentum", default=0.9, type=float, help="of SGD and its kin")
    group.add_argument("--weight_decay", default=0.05, type=float, help="of matrices; biases and norms have none")
    group.add_argument("--weight_decay_end", default=None, type=float, help="cosine to this value; default: constant")
    group.add_argument("--lr", default=1.5e-4, type=float, help="for 256 clips a step; scaled by effective batch / 256")
    group.add_argument("--warmup_lr", default=1e-6, type=float, help="at the first step; scaled like --lr")
    group.add_argument("--min_lr", default=1e-5, type=float, help="at the end; scaled like --lr")
    group.add_argument("--warmup_epochs", default=40, type=int, help="of linearly rising learning rate")
    group.add_argument("--warmup_steps", default=-1, type=int, help="0 or more: overrides --warmup_epochs")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", default="/path/to/list_kinetics-400", help="list file, a line a video: path label"
    )
    group.add_argument("--sampling_rate", default=4, type=int, help="frames between two frames of a clip")
    group.add_argument("--num_sample", default=1, type=int, help="clips from one decode of a video")
    group.add_argument(
        "--crop", default="multiscale", choices=["multiscale", "random_resized"], help="random crop of a clip"
    )
    group.add_argument(
        "--train_interpolation", default="bicubic", choices=["random", "bilinear", "bicubic"], help="of the resize"
    )
    group.add_argument("--color_jitter", default=0.0, type=float, help="strength; 0: none")
    group.add_argument(
        "--imagenet_default_mean_and_std", default=True, action=switch, help="input statistics; else 0.5 and 0.5"
    )
    group.add_argument(
        "--decoder",
        default="auto",
        choices=["auto", *DECODERS],
        help="auto: the faster one that is installed, then the other",
    )
    group.add_argument("--num_workers", default=10, type=int, help="loader processes")
    group.add_argument("--pin_mem", default=True, action=switch, help="page-locked batches for faster copies to a GPU")
    group.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)

    group = parser.add_argument_group("processes (set by torchrun, mpirun or srun)")
    group.add_argument("--world_size", default=1, type=int, help="read where RANK is set and WORLD_SIZE is not")
    group.add_argument("--local_rank", "--local-rank", default=-1, type=int, help="read where LOCAL_RANK is not set")
    group.add_argument("--dist_on_itp", default=False, action=switch, help="read Open MPI's variables")
    group.add_argument("--dist_url", default="env://", help="rendezvous")
    return parser


def check_flags(args) -> None:
    """Raises UsageError for values that make no sense alone or together."""
    for name in ("batch_size", "epochs", "accum_iter", "save_ckpt_freq", "print_freq", "decoder_depth", "input_size",
                 "num_frames", "tubelet_size", "tats_blocks", "num_landmarks", "tats_rollout_steps", "ppo_epochs",
                 "sampling_rate", "num_sample"):  # fmt: skip
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("lr", "tats_lr", "softmax_temp", "ppo_clip"):
        if getattr(args, name) <= 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must be greater than 0")
    for name in ("min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "tats_start_epoch", "num_workers",
                 "policy_coef", "value_coef", "entropy_coef", "adamae_coef", "color_jitter", "seed", "start_epoch",
                 "opt_eps", "tats_eps"):  # fmt: skip
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("patch_size", "clip_grad"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must be greater than 0; leave it out for the default")
    if args.opt_betas is not None and not (len(args.opt_betas) == 2 and all(0 <= b < 1 for b in args.opt_betas)):
        raise UsageError(f"--opt_betas {args.opt_betas}: two numbers of at least 0 and less than 1")
    if not 0 <= args.drop_path < 1:
        raise UsageError(f"--drop_path {args.drop_path}: must be at least 0 and less than 1")
    if not 0 < args.mask_ratio < 1:  # also true of nan
        raise UsageError(f"--mask_ratio {args.mask_ratio}: must lie between 0 and 1, both excluded")
    if args.finetune and args.resume:
        raise UsageError("--finetune starts a run from weights, --resume goes on with one: give one of them")
    if args.device == "cpu" and args.amp == "fp16":
        raise UsageError("--amp fp16 needs a GPU; on the CPU use bf16 or none")


def build_mae(args) -> torch.nn.Module:
    """The autoencoder the flags describe. Raises UsageError."""
    kwargs = {"patch_size": args.patch_size} if args.patch_size else {}
    if not (args.model.startswith("pretrain_") and timm.is_model(args.model)):
        names = [name for name in timm.list_models("pretrain_*") if timm.is_model(name)]
        raise UsageError(f"--model {args.model}: unknown; one of {', '.join(names)}")
    try:
        return timm.create_model(
            args.model,
            img_size=args.input_size,
            all_frames=args.num_frames,
            tubelet_size=args.tubelet_size,
            decoder_depth=args.decoder_depth,
            drop_path_rate=args.drop_path,
            use_checkpoint=args.use_checkpoint,
            **kwargs,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def build_sampler(args, mae: torch.nn.Module) -> MaskSampler:
    try:
        return SAMPLERS[args.mask_type](mae.grid, args, mae)
    except ValueError as error:
        raise UsageError(str(error)) from error


def ppo_settings(args) -> PPOSettings:
    return PPOSettings(
        rollout_steps=args.tats_rollout_steps,
        epochs=args.ppo_epochs,
        clip=args.ppo_clip,
        policy_coef=args.policy_coef,
        value_coef=args.value_coef,
        entropy_coef=args.entropy_coef,
        normalize_advantage=args.normalize_advantage,
    )


def resolve_amp(args) -> None:
    if args.amp == "auto":
        args.amp = (
            "bf16" if args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "none"
        )


class Run:
    """Models, backends and the state that a checkpoint holds."""

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.mae = build_mae(args)
        self.sampler = build_sampler(args, self.mae)
        self.warmup_sampler = RandomMask(self.mae.grid, args.mask_ratio) if args.mask_type == "tats" else None
        if args.finetune:
            load_weights(self.mae, model_weights(load_checkpoint(args.finetune), args.finetune), args.finetune)
            log(f"autoencoder initialised from {args.finetune}")
        joint = AdaMAE(self.mae, self.sampler) if args.mask_type == "adamae" else self.mae
        self.backend = self._backend(joint, args.lr, args.opt_eps, args.clip_grad, args.amp)
        self.tats_backend = None
        if args.mask_type == "tats":
            # A ratio of two evaluations would be mostly rounding in bf16: only the one-pass form may use it.
            one_pass = args.tats_rollout_steps == args.ppo_epochs == 1
            amp = args.amp if one_pass else "none"
            self.tats_backend = self._backend(self.sampler, args.tats_lr, args.tats_eps, None, amp)
        self.sampler.to(device)

    def _backend(self, module: torch.nn.Module, lr: float, eps: float, clip_grad: float | None, amp: str) -> Backend:
        args = self.args
        try:
            optimizer = create_optimizer(
                parameter_groups(module.to(self.device), args.weight_decay),
                args.opt, lr, args.opt_betas, eps, args.momentum,
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from error
        return Backend(module, optimizer, self.device, amp, args.accum_iter, clip_grad)

    def state(self, epoch: int, step: int) -> dict:
        """What checkpoint-N.pth holds; `model` has VideoMAE's names and nothing of the sampler."""
        state = {
            "model": self.mae.state_dict(),
            **self.backend.state_dict(),
            "rng": rng_state(self.device),
            "epoch": epoch,
            "step": step,
            "args": vars(self.args),
        }
        if self.args.mask_type in ("adamae", "tats"):
            state[self.args.mask_type] = self.sampler.state_dict()
        if self.tats_backend is not None:
            tats = self.tats_backend.state_dict()
            state |= {"tats_optimizer": tats["optimizer"], "tats_scaler": tats["scaler"]}
        return state

    def load(self, path: Path, state: dict) -> int:
        """Restores everything; returns the next epoch. Raises CheckpointError."""
        needed = ["model", "optimizer", "scaler", "rng", "epoch", "args"]
        if self.args.mask_type in ("adamae", "tats"):
            needed.append(self.args.mask_type)
        missing = [key for key in needed if key not in state]
        if missing:
            raise CheckpointError(
                f"{path}: cannot be resumed with --mask_type {self.args.mask_type}, it has no {', '.join(missing)}; "
                "to start from its weights alone use --finetune"
            )
        load_weights(self.mae, state["model"], path)
        if self.args.mask_type in ("adamae", "tats"):
            load_weights(self.sampler, state[self.args.mask_type], path)
        try:
            self.backend.load_state_dict(state)
            if self.tats_backend is not None:
                self.tats_backend.load_state_dict(
                    {"optimizer": state["tats_optimizer"], "scaler": state["tats_scaler"]}
                )
        except ValueError as error:
            raise CheckpointError(f"{path}: its optimizer does not fit (--opt, --mask_type): {error}") from error
        set_rng_state(state["rng"], self.device)
        return state["epoch"] + 1


# Flags that may change between a run and its resume without changing what is computed.
FREE_ON_RESUME = {
    "resume", "auto_resume", "start_epoch", "output_dir", "log_dir", "num_workers", "pin_mem", "print_freq", "rank",
    "local_rank", "world_size", "distributed", "dist_url", "dist_on_itp", "save_ckpt_freq", "finetune",
    "use_checkpoint",
}  # fmt: skip


def resume(run: Run, args) -> int:
    """The epoch to start with: after --resume's checkpoint, after the newest in --output_dir, or --start_epoch."""
    if args.resume:
        found = Path(args.resume), load_checkpoint(args.resume)
    elif args.auto_resume and args.output_dir:
        found = latest_checkpoint(args.output_dir)
    else:
        found = None
    if found is None:
        return args.start_epoch
    path, state = found
    saved = state.get("args", {})
    changed = [
        f"--{name} {saved[name]} -> {value}"
        for name, value in vars(args).items()
        if name in saved and saved[name] != value and name not in FREE_ON_RESUME
    ]
    next_epoch = run.load(path, state)
    log(f"resumed after epoch {next_epoch - 1} from {path}")
    if changed:
        log(f"note: flags differ from the run that wrote it: {', '.join(changed)}")
    return next_epoch


def train(args) -> None:
    check_flags(args)
    init_distributed(args)
    resolve_amp(args)
    device = torch.device(args.device, args.local_rank) if args.device == "cuda" else torch.device("cpu")
    seed_everything(args.seed)  # the same weights on every rank
    try:
        loader = build_pretraining_loader(args, args.rank, args.world_size)
    except (ValueError, ImportError) as error:  # the list, the batch size, a decoder that is not installed
        raise UsageError(str(error)) from error
    steps_per_epoch = len(loader) // args.accum_iter
    if not steps_per_epoch:
        raise UsageError(
            f"--accum_iter {args.accum_iter} needs as many batches an epoch, the list gives {len(loader)}; "
            "lower it or --batch_size"
        )
    effective_batch = args.batch_size * args.accum_iter * args.world_size
    scale = effective_batch / 256
    run = Run(args, device)
    seed_everything(args.seed + args.rank)  # dropout and stochastic depth differ between ranks

    output = Path(args.output_dir) if args.output_dir else None
    log_writer = None
    if is_main_process():
        if output:
            try:
                output.mkdir(parents=True, exist_ok=True)
                write_run_description(output, args)
            except OSError as error:
                raise UsageError(f"--output_dir {output}: cannot be written ({error.strerror})") from error
        if args.log_dir:
            from tensorboardX import SummaryWriter

            log_writer = SummaryWriter(args.log_dir)

    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if args.imagenet_default_mean_and_std else (HALF_MEAN, HALF_STD)
    warmup_steps = args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * steps_per_epoch
    recipe = Recipe(
        grid=run.mae.grid,
        mean=torch.tensor(mean, device=device),
        std=torch.tensor(std, device=device),
        loss=args.loss,
        normalize_target=args.normalize_target,
        lr=args.lr * scale,
        min_lr=args.min_lr * scale,
        warmup_lr=args.warmup_lr * scale,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end,
        warmup_steps=warmup_steps,
        steps_per_epoch=steps_per_epoch,
        epochs=args.epochs,
        print_freq=args.print_freq,
        log_writer=log_writer,
    )
    num_parameters, sampler_parameters = (
        sum(p.numel() for p in module.parameters()) for module in (run.mae, run.sampler)
    )
    log(
        f"{args.model}: {num_parameters / 1e6:.1f} M parameters, {args.mask_type}: {sampler_parameters / 1e6:.1f} M"
        f"\n{run.sampler.num_tokens} tokens a clip {run.mae.grid}, {run.sampler.num_visible} visible"
        f"\n{args.world_size} process(es) x {args.batch_size} clips x {args.accum_iter} = {effective_batch} a step, "
        f"{steps_per_epoch} steps an epoch, {args.epochs} epochs"
        f"\nlearning rate {args.lr:.3g} x {effective_batch} / 256 = {recipe.lr:.3g}, {warmup_steps} warm-up steps"
        f"{' (longer than the run)' if warmup_steps > recipe.total_steps else ''}; {args.device}, --amp {args.amp}"
    )

    first_epoch = resume(run, args)
    if output and is_main_process():
        drop_epochs_from(output / "log.txt", first_epoch)
    if first_epoch >= args.epochs:
        log(f"nothing to do: {args.epochs} epochs are finished")
        return
    start = time.time()
    for epoch in range(first_epoch, args.epochs):
        loader.sampler.set_epoch(epoch)
        if args.mask_type != "tats":
            stats = engine_for_pretraining.train_one_epoch(
                run.backend, run.sampler, loader, recipe, epoch, args.adamae_coef
            )
        elif epoch < args.tats_start_epoch:
            stats = engine_for_pretraining.train_one_epoch(run.backend, run.warmup_sampler, loader, recipe, epoch)
        else:
            stats = engine_for_tats.train_one_epoch(
                run.backend, run.tats_backend, loader, recipe, ppo_settings(args), epoch
            )
        last = epoch + 1 == args.epochs
        if output and (last or (epoch + 1) % args.save_ckpt_freq == 0):
            state = run.state(epoch, (epoch + 1) * steps_per_epoch)  # every rank gives its random state
            if is_main_process():
                save_checkpoint(output / f"checkpoint-{epoch}.pth", state)
        if output and is_main_process():
            record = {f"train_{name}": value for name, value in stats.items()}
            append_json_line(output / "log.txt", record | {"epoch": epoch, "n_parameters": num_parameters})
    if log_writer is not None:
        log_writer.close()
    log(f"training took {format_time(time.time() - start)}")


def main(arguments: list[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    try:
        train(args)
    except (UsageError, ListError, VideoError, CheckpointError) as error:
        # an error from a loader process comes with that process's traceback around it
        sys.exit(f"error: {str(error).rsplit('VideoError: ', 1)[-1].strip()}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
