"""Optimizers, parameter groups and step-wise schedules."""

import math
import re

import timm.optim
import torch
from torch import nn


def layer_of(name: str, num_layers: int) -> int:
    """Depth of a parameter of the classifier: 0 for the patch embedding and position table, k + 1 for block k, and
    num_layers + 1 for what comes after the blocks."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith(("patch_embed.", "pos_embed", "cls_token")) else num_layers + 1


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Biases, norms and the module's no_weight_decay() names without decay, the rest with it; frozen ones left out.

    layer_decay other than 1 makes a pair of groups a layer, with lr_scale = layer_decay ** (L + 1 - layer) of the
    module's L blocks (BEiT, Bao 2022): 1 for the head, smallest for the patch embedding.
    """
    skip = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
    if layer_decay == 1:
        return timm.optim.param_groups_weight_decay(module, weight_decay, no_weight_decay_list=skip)
    num_layers = module.get_num_layers()
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_layers)
        decays = parameter.ndim > 1 and name not in skip
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": layer_decay ** (num_layers + 1 - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def create_optimizer(
    groups: list[dict],
    opt: str = "adamw",
    lr: float = 1e-3,
    betas: list[float] | None = None,
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Any optimizer timm knows by name; Adam and AdamW are torch's fused kernels.

    betas None leaves the optimizer's own default. Raises ValueError for an unknown name, or another number of betas.
    """
    known = timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*"])  # those need apex or bitsandbytes
    if opt not in known:
        raise ValueError(f"--opt {opt}: unknown; one of {', '.join(known)}")
    kwargs = {"betas": tuple(betas)} if betas else {}
    if opt in ("adam", "adamw"):
        kwargs["fused"] = True
    info = timm.optim.get_optimizer_info(opt)
    if betas and info.has_betas and len(betas) != info.num_betas:
        raise ValueError(f"--opt_betas {' '.join(map(str, betas))}: --opt {opt} has {info.num_betas}")
    if info.has_eps:
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
