"""The one place that knows DDP, DeepSpeed, mixed precision, gradient accumulation and how a step is taken."""

import contextlib
import copy
import inspect
import json
import logging
import os
import re
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# torch 2.13 renamed it
BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
# fullgraph: what cannot be compiled is an error rather than a slower step that nobody notices
COMPILE = dict(fullgraph=True, dynamic=False)
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


class Backend:
    """One module and its optimizer, in one process or under DDP. A training step is

        with backend.autocast():
            loss = ... backend.module(...)
        backend.backward(loss)
        backend.step()                  # does nothing until accum_iter micro-batches are in

    Frozen means that step() is not called. Losses are divided by accum_iter here and nowhere else.
    A step whose gradient is not finite leaves the weights as they were, without asking the device, on all processes
    alike: `skipped` counts them, `skipped_in_a_row` says whether training still moves, `grad_norm` is the last finite
    one before clipping (0-d tensors on the device).
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: str = "none",
        accum_iter: int = 1,
        clip_grad: float | None = None,
        compile: bool = False,
    ):
        self.raw = module.to(device)
        self.compile = compile
        if compile:
            self.raw.compile(**COMPILE)
        self.optimizer = optimizer
        self.device = device
        self.dtype = AMP_DTYPES[amp]
        self.accum_iter = accum_iter
        self.clip_grad = clip_grad
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.micro_batches = 0
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._wrap(amp)

    def _wrap(self, amp: str) -> None:
        """Sets `module`, what training calls."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.module = self.raw
        if dist.is_initialized():
            self.module = DistributedDataParallel(
                self.raw,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # or each gradient would lie in memory twice
                **{BUFFER_SYNC: False},  # position tables, the same everywhere
            )

    @contextlib.contextmanager
    def autocast(self):
        """Mixed precision for the forward pass; between steps DDP keeps gradients to itself."""
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = (self.micro_batches + 1) % self.accum_iter == 0
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            yield

    def compiled(self, function):
        """function, or its compiled form with --compile; compiled once however often this is called."""
        return torch.compile(function, **COMPILE) if self.compile else function

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.accum_iter).backward()
        self.micro_batches += 1

    def step(self) -> bool:
        """Whether this micro-batch completed an optimizer step."""
        if self.micro_batches % self.accum_iter:
            return False
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        if self.clip_grad:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, grad_norm)
        bad = self._count(grad_norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = bad  # the fused kernels look at it on the device
            self.optimizer.step()
        elif not bad:  # other optimizers have to ask
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _count(self, grad_norm: Tensor) -> Tensor:
        """Takes note of a step with this gradient; 1.0 where it is to be skipped."""
        finite = torch.isfinite(grad_norm)
        self.grad_norm = torch.where(finite, grad_norm, self.grad_norm)
        bad = (~finite).float()
        self.skipped = self.skipped + bad  # a new tensor: the epoch's runner keeps earlier ones
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        return bad

    def set_schedule(self, lr: float, weight_decay: float | None = None) -> None:
        """lr times each group's lr_scale; weight_decay for the groups that decay at all."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if weight_decay is not None and group["weight_decay"] > 0:
                group["weight_decay"] = weight_decay

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The state dict of self.raw or of a part of it, whole; every process has to ask."""
        return module.state_dict()

    def whole(self, module: nn.Module):
        """A context in which a part of self.raw may be called by itself; every process has to enter it."""
        return contextlib.nullcontext()

    def replica(self) -> nn.Module:
        """A module with the current weights that each process may run on its own, as often as it likes; every process
        has to ask."""
        return self.raw

    def put_away(self) -> None:
        """The replica is not needed for a while."""

    def state_dict(self) -> dict:
        """The optimizer's state in torch's format, keyed by the parameters' places in the groups, whatever the backend
        and the number of processes; every process has to ask, the main one gets it whole."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Of either backend, from any number of processes. Weights are not in it: load them before wrapping."""
        own = [{name: value for name, value in g.items() if name != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)  # learning rate, betas, eps and decay are this run's flags, not the file's
        if self.scaler.is_enabled() and state["scaler"]:  # empty in a run without fp16
            self.scaler.load_state_dict(state["scaler"])


# --- DeepSpeed ---------------------------------------------------------------------------------------------------

# What a --deepspeed_config file may change. Buckets count elements and are allocated whole: DeepSpeed's own 5e8 would
# take 2 GB a process.
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
    betas: tuple[float, float],
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
        raise ValueError(f"--deepspeed_config {file}: holds no JSON object")
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
    those of Backend: whole float32 weights and Adam's whole state, so that any backend and any number of processes
    goes on from them. (DeepSpeed's own are folders of pickles that fit one number of processes.)

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
                model=self.raw, model_parameters=groups, config=self.config, dist_init_required=False
            )
        except Exception as error:  # compilers fail in many ways
            if self.config["optimizer"]["params"]["torch_adam"]:
                raise
            reason = str(error).strip().splitlines()[0]
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

    def whole(self, module: nn.Module):
        if self.stage < 3:
            return contextlib.nullcontext()
        return import_deepspeed().zero.GatheredParameters(list(module.parameters()))

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        if self.stage < 3:
            return module.state_dict()
        with self.whole(module):
            return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def replica(self) -> nn.Module:
        if self.stage < 3:
            return self.raw
        self._replica.load_state_dict(self.weights(self.raw))
        return self._replica.to(self.device)

    def put_away(self) -> None:
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
    return deepspeed
