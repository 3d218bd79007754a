"""One epoch of masked-autoencoder training where one backward pass trains all there is: fixed masks and AdaMAE."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import modeling_adamae
from backend import Backend
from datasets.transforms import normalize
from masking_generator import Mask, MaskSampler, motion_energy, motion_lift
from modeling_pretrain import reconstruction_target, token_error
from optim_factory import cosine_schedule
from utils import Metrics, Progress, UsageError, log

MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class Recipe:
    """What an epoch needs besides models and data; steps count optimizer steps of the MAE over the whole run."""

    grid: tuple[int, int, int]
    mean: Tensor  # float32 [3] on the device
    std: Tensor
    loss: str = "mse"
    normalize_target: bool = True
    lr: float = 1.5e-4
    min_lr: float = 1e-5
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


def to_device(batch: dict, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Loader batch -> (pixels in [0, 1], normalised video) float32 [B, 3, T, H, W], seed int64 [B]; copies uint8."""
    device = recipe.mean.device
    clips = batch["video"].to(device, non_blocking=True)
    pixels, video = normalize(clips, recipe.mean, recipe.std)
    return pixels, video, batch["seed"].to(device, non_blocking=True)


def masked_error(prediction: Tensor, pixels: Tensor, mask: Mask, recipe: Recipe) -> Tensor:
    """e_i [B, N_m] float32, with the graph of the prediction."""
    target = reconstruction_target(pixels, mask, recipe.grid, recipe.normalize_target)
    return token_error(prediction, target, recipe.loss)


class EpochRunner:
    """The frame both engines share: progress, metrics, unreadable videos, and the check that training still moves."""

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


def train_one_epoch(
    backend: Backend, sampler: MaskSampler, loader, recipe: Recipe, epoch: int, sampling_coef: float = 1e-4
) -> dict[str, float]:
    """backend.raw is the MAE, or AdaMAE (MAE and sampler in one) where the sampler learns; returns epoch means."""
    backend.raw.train()
    runner = EpochRunner(recipe, backend, epoch)
    for index, step, batch in runner.batches(loader):
        lr = recipe.apply_schedule(backend, step)
        pixels, video, seed = to_device(batch, recipe)
        with backend.autocast():
            if isinstance(backend.raw, modeling_adamae.AdaMAE):
                prediction, mask = backend.module(video, seed)
            else:
                mask = sampler(video, seed)
                prediction = backend.module(video, mask)
        error = masked_error(prediction, pixels, mask, recipe)
        loss = error.mean()
        values = {"loss": loss, "motion_lift": motion_lift(motion_energy(video, recipe.grid), mask.visible)}
        if mask.log_prob is not None:
            sampling = modeling_adamae.sampling_loss(mask, error, sampling_coef)
            values |= sampler_metrics(mask, error) | {"sampling_loss": sampling}
            loss = loss + sampling
        backend.backward(loss)
        runner.metrics.update(**values)
        if backend.step():
            runner.metrics.update(grad_norm=backend.grad_norm)
        runner.log_step(index, step, lr)
    return runner.finish()


@torch.no_grad()
def sampler_metrics(mask: Mask, error: Tensor) -> dict[str, Tensor]:
    """For every learned sampler: mean reward; entropy over log N (1 = uniform); contrast N sum p^2 (1 = uniform), the
    expected probability of a drawn token in units of 1/N."""
    probability = mask.log_prob.exp()
    num_tokens = probability.shape[1]
    entropy = -(probability * mask.log_prob).sum(dim=1).mean()
    contrast = num_tokens * probability.square().sum(dim=1).mean()
    return {"reward": error.mean(), "entropy": entropy / math.log(num_tokens), "contrast": contrast}
