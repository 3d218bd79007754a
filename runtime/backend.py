"""The one place that knows DDP, mixed precision, gradient accumulation and how a step is taken."""

import contextlib
import inspect

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

        with backend.autocast(), backend.no_sync():
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
        self.unwrapped = module.to(device)
        self.compile = compile
        if compile:
            self.unwrapped.compile(**COMPILE)
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
        self.module = self.unwrapped
        if dist.is_initialized():
            self.module = DistributedDataParallel(
                self.unwrapped,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # or each gradient would lie in memory twice
                **{BUFFER_SYNC: False},  # position tables, the same everywhere
            )

    def autocast(self) -> torch.autocast:
        """Mixed precision for the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @contextlib.contextmanager
    def no_sync(self):
        """Around the forward pass of a micro-batch: DDP keeps its gradients on the rank, but for a step's last one."""
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = (self.micro_batches + 1) % self.accum_iter == 0
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
        elif not bad:  # other optimizers do not look at it
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
        """The state dict of self.unwrapped or of a part of it, whole; every rank calls it."""
        return module.state_dict()

    def gathered(self, module: nn.Module):
        """A context in which a part of self.unwrapped may be called by itself; every process has to enter it."""
        return contextlib.nullcontext()

    def replica(self) -> nn.Module:
        """A module with the current weights that each process may run on its own, as often as it likes; every rank
        calls it."""
        return self.unwrapped

    def offload_replica(self) -> None:
        """The replica is not needed for a while."""

    def state_dict(self) -> dict:
        """The optimizer's state in torch's format, keyed by the parameters' places in the groups, whatever the backend
        and the number of processes; every rank calls it, the main one gets it whole."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Of either backend, from any number of processes. Weights are not in it: load them before wrapping."""
        own, saved = self.optimizer.param_groups, state["optimizer"]["param_groups"]
        if len(own) != len(saved):
            raise ValueError(f"it has {len(saved)} groups of parameters, the model {len(own)}")
        # learning rate, betas, eps, decay and whether the kernel is fused are this run's; what else is there, as the
        # step count of some optimizers, is the file's
        groups = [s | o | {"params": s["params"]} for o, s in zip(own, saved, strict=True)]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        if self.scaler.is_enabled() and state["scaler"]:  # empty in a run without fp16
            self.scaler.load_state_dict(state["scaler"])
