"""DeepSpeed: ZeRO behind the interface of Backend. The only file that imports deepspeed."""

import contextlib
import copy
import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.backend import Backend
from utils import first_line

# What a --deepspeed_config file may change. Buckets count elements and are allocated whole: DeepSpeed's own 5e8 would
# take 2 GB per process.
TUNABLE = {
    "steps_per_print": 10**9,
    "zero_optimization": {
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 25_000_000,
        "allgather_bucket_size": 25_000_000,
        "stage3_prefetch_bucket_size": 25_000_000,
        "stage3_param_persistence_threshold": 100_000,
    },
}
# Which flag decides an entry of the configuration.
DECIDED_BY = {
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--accum_iter",
    "train_batch_size": "--batch_size, --accum_iter and the number of processes",
    "gradient_clipping": "--clip_grad",
    "optimizer.type": "--opt",
    "optimizer.params.lr": "--lr",
    "optimizer.params.betas": "--opt_betas",
    "optimizer.params.eps": "--opt_eps",
    "optimizer.params.torch_adam": "--fused_adam",
    "zero_optimization.stage": "--zero_stage",
    "zero_optimization.offload_optimizer": "--offload",
    "torch_autocast": "--amp",
    "bf16": "--amp",
    "fp16": "--amp",
}


def deepspeed_config(
    *,
    zero_stage: int,
    offload: str,
    fused_adam: str,
    opt: str,
    lr: float,
    betas: Sequence[float],
    eps: float,
    batch_size: int,
    accum_iter: int,
    world_size: int,
    clip_grad: float | None,
    amp: str,
    file: str | None = None,
) -> dict:
    """DeepSpeed's configuration from flags: everything that decides what is computed is explicit.

    batch_size is of a process and micro-batch. Weights stay float32 and bf16 is autocast, as in Backend. file: a
    user's configuration, merged in; "auto" in it means what the flags say.
    Raises: ValueError that lists what the file and the flags say differently.
    """
    if len(betas) != 2:
        raise ValueError(f"--opt_betas {' '.join(map(str, betas))}: --opt {opt} has 2")
    adam = {"lr": lr, "betas": list(betas), "eps": eps, "weight_decay": 0.0, "adam_w_mode": opt == "adamw"}
    adam |= {"torch_adam": True, "fused": True} if fused_adam == "torch" else {"torch_adam": False}
    zero = {"stage": zero_stage, "compute_grad_norm": True}  # by which steps are skipped
    zero["offload_optimizer"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
    decided = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accum_iter,
        "train_batch_size": batch_size * accum_iter * world_size,
        "gradient_clipping": clip_grad or 0.0,  # left out it would be 1.0
        "optimizer": {"type": "AdamW" if opt == "adamw" else "Adam", "params": adam},
        "zero_optimization": zero,
        "torch_autocast": {"enabled": amp == "bf16", "dtype": "bfloat16"},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    conflicts: list[str] = []
    config = _merged(copy.deepcopy(TUNABLE), _read_config(file) if file else {}, [])
    config = _merged(config, decided, conflicts)
    if conflicts:
        raise ValueError(f"--deepspeed_config {file} and the flags differ: {'; '.join(conflicts)}")
    return config


def _read_config(file: str) -> dict:
    try:
        config = json.loads(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"--deepspeed_config {file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {file}: not a JSON file ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed_config {file}: is no JSON object")
    return config


def _merged(config: dict, more: dict, conflicts: list[str], place: str = "") -> dict:
    """config with more's entries in it; notes where both have one and they differ."""
    for name, value in more.items():
        here = f"{place}{name}"
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            _merged(config[name], value, conflicts, here + ".")
            continue
        if config.get(name, "auto") not in ("auto", value):
            flag = next((flag for entry, flag in DECIDED_BY.items() if (here + ".").startswith(entry + ".")), "flags")
            conflicts.append(f"{here} is {json.dumps(config[name])} there, {json.dumps(value)} by {flag}")
        config[name] = value
    return config


MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of a parameter, besides its step


class DeepSpeedBackend(Backend):
    """The same under DeepSpeed: what ZeRO (Rajbhandari 2020) spreads over the processes is decided by config.

    ZeRO stage 0 spreads nothing, 1 the optimizer's state, 2 also the gradients, 3 also the weights. Checkpoints are
    those of Backend: whole float32 weights and Adam's whole state, which any backend and any number of processes
    can resume. (DeepSpeed's own are folders of pickles that fit one number of processes.)

    groups: parameter groups; config: see deepspeed_config; keep_replica: whether replica() will be asked for.
    Raises: ImportError without deepspeed, or where its Adam cannot be compiled.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict],
        device: torch.device,
        config: dict,
        amp: str = "none",
        compile: bool = False,
        keep_replica: bool = False,
    ):
        self.config = config
        self.stage = config["zero_optimization"]["stage"]
        self._replica = copy.deepcopy(module).cpu() if keep_replica and self.stage == 3 else None
        groups = [group for group in groups if group["params"]]  # DeepSpeed drops the others
        self.group_sizes = [len(group["params"]) for group in groups]
        described = torch.optim.SGD(groups, lr=0.0)  # what Backend reads of an optimizer before there is one
        super().__init__(
            module, described, device, amp, config["gradient_accumulation_steps"], config["gradient_clipping"], compile
        )

    def _wrap(self, amp: str) -> None:
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # it would take a GPU where there is one
        deepspeed = import_deepspeed()
        if not dist.is_initialized():  # DeepSpeed has no other way; this group needs no network
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        groups = [{k: v for k, v in g.items() if k in ("params", "weight_decay", "lr_scale")}
                  for g in self.optimizer.param_groups]  # fmt: skip
        try:
            self.module, _, _, _ = deepspeed.initialize(
                model=self.unwrapped, model_parameters=groups, config=self.config, dist_init_required=False
            )
        except Exception as error:  # compilers fail in many ways
            if self.config["optimizer"]["params"]["torch_adam"]:
                raise
            reason = first_line(error)
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
            if re.search(r"\d[a-z]", architectures):  # measured with 9.0a: "invalid literal for int(): '0a'"
                reason += f"; TORCH_CUDA_ARCH_LIST is {architectures}, DeepSpeed reads plain numbers only, as 9.0"
            raise ImportError(
                f"--fused_adam deepspeed cannot be compiled here ({reason}): use --fused_adam torch"
            ) from error
        self.optimizer = self.module.basic_optimizer
        self.zero = self.module.optimizer if self.stage else None

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)
        self.micro_batches += 1

    def step(self) -> bool:
        boundary = self.micro_batches % self.accum_iter == 0
        if boundary and not self.stage:  # ZeRO looks at the gradient itself, plain data parallelism does not
            self._guard_step()
        self.module.step()
        if boundary and self.stage:
            self._count(torch.as_tensor(float(self.module.get_global_grad_norm()), device=self.device))
        return boundary

    def _guard_step(self) -> None:
        bad = self._count(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = bad
        elif bad:  # DeepSpeed's Adam passes over parameters without a gradient
            self.optimizer.zero_grad()

    def gathered(self, module: nn.Module):
        if self.stage < 3:
            return contextlib.nullcontext()
        return import_deepspeed().zero.GatheredParameters(list(module.parameters()))

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        if self.stage < 3:
            return module.state_dict()
        with self.gathered(module):
            return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def replica(self) -> nn.Module:
        if self.stage < 3:
            return self.unwrapped
        self._replica.load_state_dict(self.weights(self.unwrapped))
        return self._replica.to(self.device)

    def offload_replica(self) -> None:
        if self._replica is not None:
            self._replica.cpu()

    def state_dict(self) -> dict:
        state = {}
        if self.optimizer.state:
            # one for all; DeepSpeed's Adam counts in the last parameter of a group only
            step = max(float(kept["step"]) for kept in self.optimizer.state.values() if "step" in kept)
            for i, parameter in enumerate(self.parameters):
                state[i] = {"step": torch.tensor(step)}
                for name in MOMENTS:
                    whole = self._gather(parameter, name)
                    if dist.get_rank() == 0:  # the others help to gather it, and let it go
                        state[i][name] = whole.cpu()
        groups, start = [], 0
        for group, size in zip(self.optimizer.param_groups, self.group_sizes, strict=True):
            settings = {name: value for name, value in group.items() if name not in ("params", "step")}
            groups.append(settings | {"params": list(range(start, start + size))})
            start += size
        return {"optimizer": {"state": state, "param_groups": groups}, "scaler": {}}

    def load_state_dict(self, state: dict) -> None:
        saved = state["optimizer"]
        counts = [sum(len(g["params"]) for g in saved["param_groups"]), len(self.parameters)]
        if counts[0] != counts[1]:
            raise ValueError(f"it has {counts[0]} parameters, the model {counts[1]}")
        if not saved["state"]:
            return
        step = saved["state"][0]["step"]
        is_torch = isinstance(self.optimizer, torch.optim.Adam)  # DeepSpeed's count in plain numbers
        for i, parameter in enumerate(self.parameters):
            owner, start, begin, size = self._fragment(parameter)
            kept = self.optimizer.state[owner]
            kept["step"] = step.to(owner.device, copy=True) if is_torch else int(step)
            for name in MOMENTS:
                value = saved["state"][i][name]
                if value.shape != _shape(parameter):
                    raise ValueError(f"parameter {i} is {tuple(value.shape)}, the model's {tuple(_shape(parameter))}")
                if name not in kept:
                    kept[name] = torch.zeros_like(owner)
                kept[name].flatten()[start : start + size] = value.flatten()[begin : begin + size].to(owner.device)

    def _fragment(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        """The part of a parameter that this process steps: the tensor the optimizer knows (all parameters of a group in
        one row), where the part begins in it and in the parameter, and its length."""
        if not self.stage:
            return parameter, 0, 0, parameter.numel()
        if self.stage == 3:
            group, start, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            begin = dist.get_rank() * size
            size = max(min(size, _shape(parameter).numel() - begin), 0)  # the last ones are padded
            return self.zero.fp32_partitioned_groups_flat[group], start, begin, size
        group = next(i for i, g in enumerate(self.zero.bit16_groups) if any(p is parameter for p in g))
        owner, here = self.zero.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if here is None:  # all of it is another process's
            return owner, 0, 0, 0
        address = here.lp_fragment_address
        return owner, here.get_hp_fragment_address().start, address.start, address.numel

    def _gather(self, parameter: nn.Parameter, name: str) -> Tensor:
        """A whole moment, on rank 0."""
        owner, start, begin, size = self._fragment(parameter)
        kept = self.optimizer.state[owner][name].flatten()
        if not self.stage:
            return kept.view(parameter.shape)
        whole = torch.zeros(_shape(parameter).numel(), device=self.device)
        whole[begin : begin + size] = kept[start : start + size]
        dist.reduce(whole, 0)
        return whole.view(_shape(parameter))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves an empty tensor in between


def import_deepspeed():
    """The package, saying only what it warns of. Raises ImportError."""
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(f"--enable_deepspeed needs the package deepspeed ({error}): pip install deepspeed") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names DeepSpeed still uses
    # on a CPU it would compile all-reduce over shared memory first, for more than a minute: gloo's serves
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
