"""One epoch of masked-autoencoder training where one backward pass trains all there is: fixed masks, AdaMAE's."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import ppo
from datasets.transforms import normalize
from masking_generator import Mask, MaskSampler, motion_energy, motion_lift, texture_energy
from modeling_pretrain import reconstruction_target, token_error
from runtime.backend import Backend
from runtime.epoch import EpochRunner, Recipe, RunState


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    grid: tuple[int, int, int]
    loss: str = "mse"
    normalize_target: bool = True


def to_device(batch: dict, recipe: PretrainRecipe) -> tuple[Tensor, Tensor, Tensor]:
    """Loader batch -> pixels uint8 and normalised video float32, both [B, 3, T, H, W], seed int64 [B]; copies uint8."""
    device = recipe.mean.device
    clips = batch["video"].to(device, non_blocking=True)
    _, video = normalize(clips, recipe.mean, recipe.std)
    return clips.transpose(1, 2), video, batch["seed"].to(device, non_blocking=True)


def masked_error(prediction: Tensor, pixels: Tensor, mask: Mask, recipe: PretrainRecipe) -> Tensor:
    """e_i [B, N_m] float32, with the graph of the prediction; pixels uint8 [B, 3, T, H, W]."""
    target = reconstruction_target(pixels, mask, recipe.grid, recipe.normalize_target)
    return token_error(prediction, target, recipe.loss)


def train_one_epoch(
    backend: Backend, sampler: MaskSampler, loader, recipe: PretrainRecipe, epoch: int, state: RunState | None = None
) -> dict[str, float]:
    """backend.unwrapped: the MAE, or where the sampler is learned the JointModel of both. Returns epoch means."""
    backend.unwrapped.train()
    runner = EpochRunner(recipe, backend, epoch, state)
    error_of = backend.compiled(masked_error)
    for index, step, batch in runner.batches(loader):
        lr = recipe.apply_schedule(backend, step)
        pixels, video, seed = to_device(batch, recipe)
        energy = motion_energy(video, recipe.grid)  # here, where no activations are alive
        with backend.autocast(), backend.no_sync():
            if sampler.learned:
                prediction, mask = backend.module(video, seed)
            else:
                mask = sampler(video, seed)
                prediction = backend.module(video, mask)
        texture = texture_energy(video, recipe.grid) if sampler.learned else None
        del video
        error = error_of(prediction, pixels, mask, recipe)
        del prediction
        loss = error.mean()
        values = {"loss": loss, "motion_lift": motion_lift(energy, mask.visible)}
        if sampler.learned:
            sampling, diagnostics = sampler.loss(mask.log_prob, mask.value, ppo.record(None, mask, error))
            values |= sampler_metrics(mask, error, texture) | {"sampling_loss": sampling} | diagnostics
            loss = loss + sampling
        backend.backward(loss)
        runner.metrics.update(**values)
        stepped = backend.step()
        if stepped:
            runner.metrics.update(grad_norm=backend.grad_norm)
        runner.end_micro_batch(index, step, lr, values["loss"], stepped)
    return runner.finish()


@torch.no_grad()
def sampler_metrics(mask: Mask, error: Tensor, texture: Tensor) -> dict[str, Tensor]:
    """For every learned sampler: mean reward; entropy over log N (1 = uniform); contrast N sum p^2 (1 = uniform), the
    expected probability of a drawn token in units of 1/N; texture lift, 0 = it draws flat patches alone.

    texture: texture_energy of the clips, float32 [B, N]."""
    num_tokens = mask.log_prob.shape[1]
    contrast = num_tokens * mask.log_prob.exp().square().sum(dim=1).mean()
    return {
        "reward": error.mean(),
        "entropy": ppo.entropy(mask.log_prob) / math.log(num_tokens),
        "contrast": contrast,
        "texture_lift": motion_lift(texture, mask.visible),
    }
