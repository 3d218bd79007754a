"""One epoch of training as every engine sees it: the recipe's schedule, progress, metrics, and what goes wrong."""

from dataclasses import dataclass

from torch import Tensor

from backend import Backend
from optim_factory import cosine_schedule
from utils import Metrics, Progress, UsageError, log

MAX_SKIPPED_IN_A_ROW = 20


@dataclass(kw_only=True)
class Recipe:
    """What an epoch needs besides models and data; steps count optimizer steps over the whole run."""

    mean: Tensor  # of the input's channels, float32 [3] on the device
    std: Tensor
    lr: float
    min_lr: float
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    warmup_steps: int = 0
    steps_per_epoch: int = 1
    epochs: int = 1
    print_freq: int = 20
    log_writer: object = None

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def apply_schedule(self, backend: Backend, step: int) -> float:
        """Sets learning rate and weight decay of an optimizer step; returns the learning rate."""
        lr = cosine_schedule(step, self.total_steps, self.lr, self.min_lr, self.warmup_steps, self.warmup_lr)
        decay_end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        backend.set_schedule(lr, cosine_schedule(step, self.total_steps, self.weight_decay, decay_end))
        return lr


class EpochRunner:
    """The frame all engines share: progress, metrics, unreadable videos, and the check that training still moves."""

    def __init__(self, recipe: Recipe, backend: Backend, epoch: int, tats: Backend | None = None):
        self.recipe, self.backend = recipe, backend
        self.watched = {"": backend} | ({"sampler_": tats} if tats else {})
        self.skipped_before = {name: float(b.skipped) for name, b in self.watched.items()}
        self.metrics = Metrics()
        self.steps = recipe.steps_per_epoch * backend.accum_iter
        remaining = (recipe.epochs - epoch) * self.steps
        self.progress = Progress(f"epoch {epoch}", self.steps, recipe.print_freq, remaining)
        self.first_step = epoch * recipe.steps_per_epoch
        self.unreadable: dict[str, str] = {}
        self.num_failed = 0

    def batches(self, loader):
        """Yields (micro-batch index, optimizer step of the run, batch)."""
        for index, batch in enumerate(self.progress.watch(loader)):
            for failure in batch["failed"]:
                self.num_failed += 1
                path, reason = failure.split(": ", 1)
                if path not in self.unreadable:
                    self.unreadable[path] = reason
                    print(f"warning: unreadable video replaced by another: {failure}", flush=True)
            yield index, self.first_step + index // self.backend.accum_iter, batch

    def log_step(self, index: int, step: int, lr: float) -> None:
        if (index + 1) % self.recipe.print_freq and index + 1 != self.steps:
            return
        values = self.progress.report(index, self.metrics, lr)
        if self.recipe.log_writer is not None:
            for name, value in {**values, "lr": lr}.items():
                self.recipe.log_writer.add_scalar(f"train/{name}", value, step)
        in_a_row = int(max(backend.skipped_in_a_row for backend in self.watched.values()))
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UsageError(
                f"the gradient was not finite for the last {in_a_row} optimizer steps; training cannot go on. "
                "Lower --lr, set --clip_grad, or use --amp bf16 or none; resume from the last checkpoint"
            )

    def finish(self) -> dict[str, float]:
        if self.num_failed:
            log(f"{self.num_failed} times a video of {len(self.unreadable)} unreadable ones was replaced")
        return {
            **self.metrics.read_epoch(),
            **self.progress.epoch_times(),
            **{f"{n}skipped_steps": float(b.skipped) - self.skipped_before[n] for n, b in self.watched.items()},
            "unreadable_videos": self.num_failed,
        }
