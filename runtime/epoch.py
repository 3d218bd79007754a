"""One epoch of training as every engine sees it: the recipe's schedule, progress, metrics, and what goes wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optim_factory import cosine_schedule
from runtime.backend import Backend
from runtime.metrics import Metrics, Progress
from runtime.preemption import SAVE, STOP, Preempted, PreemptionWatch
from utils import UsageError, all_gather_object, append_json_line, is_main_process, log, peak_memory, total, world_size

MAX_SKIPPED_IN_A_ROW = 20
SKIPPED_STEPS = "skipped_steps.jsonl"  # in the output folder


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an epoch needs besides models and data, the same during a whole run; steps count optimizer steps over it."""

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

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def apply_schedule(self, backend: Backend, step: int) -> float:
        """Sets learning rate and weight decay of an optimizer step; returns the learning rate."""
        lr = cosine_schedule(step, self.total_steps, self.lr, self.min_lr, self.warmup_steps, self.warmup_lr)
        decay_end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        backend.set_schedule(lr, cosine_schedule(step, self.total_steps, self.weight_decay, decay_end))
        return lr


@dataclass(kw_only=True)
class RunState:
    """What belongs to a run under way rather than to its recipe; the default is a run that writes nothing."""

    output: Path | None = None  # the run's folder
    log_writer: object = None  # SummaryWriter
    watch: PreemptionWatch | None = None  # signals and clock, while there is something to save
    save: Callable[[int, dict], bool] | None = None  # (epoch, where in it) -> written; called by all ranks
    midway: dict | None = None  # where in its first epoch a resumed run continues, see EpochRunner.where


class EpochRunner:
    """The frame all engines share: progress, metrics, unreadable videos, skipped steps, saves in mid-epoch, and the
    check that training still moves."""

    def __init__(
        self,
        recipe: Recipe,
        backend: Backend,
        epoch: int,
        state: RunState | None = None,
        agent: Backend | None = None,  # the sampler's own, where there is one
    ):
        self.recipe, self.backend, self.epoch = recipe, backend, epoch
        self.state = state or RunState()
        self.watched = {"": backend} | ({"sampler_": agent} if agent else {})
        self.metrics = Metrics()
        self.steps = recipe.steps_per_epoch * backend.accum_iter
        self.start = 0  # micro-batches of this epoch that a run before this one has done
        remaining = (recipe.epochs - epoch) * self.steps
        self.progress = Progress(f"epoch {epoch}", self.steps, recipe.print_freq, remaining)
        self.first_step = epoch * recipe.steps_per_epoch
        self.unreadable: dict[str, str] = {}
        self.num_failed = 0
        skipped = {name: 0.0 for name in self.watched}
        if self.state.midway is not None:
            skipped |= self._continue(self.state.midway)
            self.state.midway = None
        self.skipped_before = {name: b.skipped - skipped[name] for name, b in self.watched.items()}  # not read yet
        self._open_window()

    def _open_window(self) -> None:
        self.window: list[tuple] = []  # (step, loss, skipped so far) of each micro-batch
        self.window_videos: list[Tensor | None] = []  # their indices
        self.skipped_at_window = [b.skipped for b in self.watched.values()]

    def batches(self, loader):
        """Yields (micro-batch index, optimizer step of the run, batch)."""
        self.dataset = getattr(loader, "dataset", None)  # stored features have none
        for index, batch in enumerate(self.progress.watch(loader, self.start), self.start):
            for failure in batch["failed"]:
                self.num_failed += 1
                path, reason = failure.split(": ", 1)
                if path not in self.unreadable:
                    self.unreadable[path] = reason
                    print(f"warning: unreadable video replaced by another: {failure}", flush=True)
            self.window_videos.append(batch.get("index"))
            yield index, self.first_step + index // self.backend.accum_iter, batch

    def end_micro_batch(self, index: int, step: int, lr: float, loss: Tensor, complete: bool) -> None:
        """Last of all for a micro-batch. complete: nothing is pending, neither gradients nor recorded episodes.

        Raises: Preempted, having saved; UsageError where training no longer moves.
        """
        self.window.append((step, loss.detach(), *(b.skipped for b in self.watched.values())))
        last = index + 1 == self.steps
        if last or (index + 1) % self.recipe.print_freq == 0:
            self._report(index, step, lr, complete)
        if not complete or last or self.state.watch is None:
            return
        decision = self.state.watch.decide()
        if decision in (SAVE, STOP):
            if self.progress.window_steps:
                self._report(index, step, lr, complete)
            where = self.where(index + 1)  # every process
            written = self.state.save is not None and self.state.save(self.epoch, where)
            if decision == STOP:
                raise Preempted(f"stopped in epoch {self.epoch} after {index + 1} of {self.steps} batches", written)

    def _report(self, index: int, step: int, lr: float, complete: bool) -> None:
        values = self.progress.report(index, self.metrics, lr)
        if self.state.log_writer is not None:
            for name, value in {**values, "lr": lr}.items():
                self.state.log_writer.add_scalar(f"train/{name}", value, step)
        if complete:  # or a skipped step's micro-batches would be in two windows
            self._record_skipped_steps()
        in_a_row = int(max(backend.skipped_in_a_row for backend in self.watched.values()))
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UsageError(
                f"the gradient was not finite for the last {in_a_row} optimizer steps; training stops. "
                "Lower --lr, set --clip_grad, or use --amp bf16 or none; resume from the last checkpoint"
            )

    def _record_skipped_steps(self) -> None:
        """Names the videos of steps that were skipped since the last report. All processes skip the same steps."""
        window, videos, before = self.window, self.window_videos, self.skipped_at_window
        self._open_window()
        now, before = torch.stack([torch.stack(self.skipped_at_window), torch.stack(before)]).tolist()
        if now == before or not window:
            return
        counts = torch.stack([torch.stack(entry[2:]) for entry in window]).tolist()
        bad = {
            entry[0]
            for entry, now, earlier in zip(window, counts, [before, *counts[:-1]], strict=True)
            if now != earlier
        }
        losses = torch.stack([entry[1] for entry in window]).float().tolist()
        mine = [
            {
                "step": entry[0],
                "loss": str(loss),
                "videos": [self.dataset.paths[i] for i in indices.tolist()] if self.dataset is not None else [],
            }
            for entry, loss, indices in zip(window, losses, videos, strict=True)
            if entry[0] in bad
        ]
        reports = [entry | {"rank": rank} for rank, entries in enumerate(all_gather_object(mine)) for entry in entries]
        culprits = [entry for entry in reports if entry["loss"] in ("nan", "inf", "-inf")] or reports
        log(
            f"warning: {len(bad)} step(s) skipped, their loss or gradient was not finite"
            + (f"; their videos: {self.state.output / SKIPPED_STEPS}" if self.state.output else "")
        )
        if self.state.output and is_main_process():
            try:
                for entry in culprits:
                    append_json_line(self.state.output / SKIPPED_STEPS, {"epoch": self.epoch} | entry)
            except OSError as error:
                log(f"warning: {self.state.output / SKIPPED_STEPS} cannot be written ({error.strerror}): {culprits}")

    def where(self, micro_batches: int) -> dict:
        """What a resume needs to continue after this many micro-batches, of all ranks together."""
        return {
            "epoch": self.epoch,
            "steps": micro_batches // self.backend.accum_iter,
            "steps_per_epoch": self.recipe.steps_per_epoch,
            "micro_batches_a_step": self._micro_batches_a_step(),
            "metrics": self.metrics.state(),
            "seconds": [self.progress.seconds, self.progress.data_seconds],
            "skipped": {name: float(b.skipped - self.skipped_before[name]) for name, b in self.watched.items()},
            "num_failed": total(self.num_failed, self.recipe.mean.device),
            "unreadable": self.unreadable,
        }

    def _micro_batches_a_step(self) -> int:
        return self.backend.accum_iter * world_size()

    def _continue(self, midway: dict) -> dict[str, float]:
        """Restores what `where` says; returns the number of steps skipped in this epoch, per backend."""
        self.start = midway["steps"] * self.backend.accum_iter
        weight = self._micro_batches_a_step() / midway["micro_batches_a_step"]  # a step counts as much on any number
        self.metrics.load(midway["metrics"], self.recipe.mean.device, weight)
        self.progress.seconds, self.progress.data_seconds = midway["seconds"]
        if is_main_process():
            self.num_failed, self.unreadable = midway["num_failed"], midway["unreadable"]
        return midway["skipped"]

    def finish(self) -> dict[str, float]:
        num_failed = total(self.num_failed, self.recipe.mean.device)
        if num_failed:
            log(f"{num_failed} times a video was replaced that could not be read")
        return {
            **self.metrics.read_epoch(),
            **self.progress.epoch_times(),
            "peak_memory": peak_memory(self.recipe.mean.device),
            **{f"{n}skipped_steps": float(b.skipped - self.skipped_before[n]) for n, b in self.watched.items()},
            "unreadable_videos": num_failed,
        }
