"""From flags to models, recipes and backends."""

import timm
import torch

from datasets.transforms import mean_and_std
from optim_factory import create_optimizer
from runtime.backend import Backend
from runtime.zero import DeepSpeedBackend, deepspeed_config
from utils import UsageError


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
