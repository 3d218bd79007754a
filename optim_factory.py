"""Optimizers, parameter groups and step-wise schedules."""

import math

import timm.optim
import torch
from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: biases, norms and the module's no_weight_decay() names without decay, the rest with it."""
    skip = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
    return timm.optim.param_groups_weight_decay(module, weight_decay, no_weight_decay_list=skip)


def create_optimizer(
    groups: list[dict],
    opt: str = "adamw",
    lr: float = 1e-3,
    betas: list[float] | None = None,
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Any optimizer timm knows by name; Adam and AdamW are torch's fused kernels.

    betas None leaves the optimizer's own default. Raises ValueError for an unknown name.
    """
    if opt not in timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*"]):  # those need apex or bitsandbytes
        known = timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*"])
        raise ValueError(f"--opt {opt}: unknown; one of {', '.join(known)}")
    kwargs = {"betas": tuple(betas)} if betas else {}
    if opt in ("adam", "adamw"):
        kwargs["fused"] = True
    if timm.optim.get_optimizer_info(opt).has_eps:
        kwargs["eps"] = eps
    return timm.optim.create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=0.0, momentum=momentum, **kwargs)


def cosine_schedule(
    step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Value at a step: linear from warmup_start to base over warmup_steps, then half a cosine towards final.

    VideoMAE's curve: the warm-up reaches base at its last step, the cosine starts from base again.
    """
    if step < warmup_steps:
        return warmup_start + (base - warmup_start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))
