"""One epoch of joint training: the MAE by reconstruction, TATS by PPO on its errors (paper 3.3, Algorithm 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import ppo
from engine_for_pretraining import PretrainRecipe, masked_error, sampler_metrics, to_device
from masking_generator import motion_energy, motion_lift, texture_energy
from runtime.backend import Backend
from runtime.epoch import EpochRunner
from utils import mean_and_deviation


@dataclass
class PPOSettings:
    """Defaults of the paper's table 4; clip and epochs are not stated there."""

    rollout_steps: int = 1  # k, optimizer steps of the MAE between two phases 2
    epochs: int = 1  # passes over the recorded episodes in phase 2
    clip: float = 0.2
    policy_coef: float = 1e-4
    value_coef: float = 1e-4
    entropy_coef: float = 1e-4
    normalize_advantage: bool = False  # over all clips of an optimizer step: of its micro-batches, on all ranks

    def one_pass(self, accum_iter: int) -> bool:
        """Whether one forward pass of TATS serves both phases: the policy does not move between them, and the advantage
        does not wait for the rewards of later micro-batches."""
        return self.rollout_steps == self.epochs == 1 and not (self.normalize_advantage and accum_iter > 1)


def train_one_epoch(
    mae: Backend, tats: Backend, loader, recipe: PretrainRecipe, settings: PPOSettings, epoch: int
) -> dict[str, float]:
    """Alternates phase 1 (MAE step on TATS's masks, episodes recorded) and phase 2 (TATS steps); returns epoch means.

    With k = 1 and one pass the policy of phase 2 is the recorded one, so the forward pass of phase 1 keeps its graph
    and serves both: the same gradient for one forward pass less (PPOSettings.one_pass). Phase 2 never runs the MAE.
    """
    mae.unwrapped.train()
    tats.unwrapped.train()
    runner = EpochRunner(recipe, mae, epoch, tats)
    one_pass = settings.one_pass(tats.accum_iter)
    buffer: list[ppo.Episode] = []
    error_of = mae.compiled(masked_error)
    for index, step, batch in runner.batches(loader):
        lr = recipe.apply_schedule(mae, step)
        pixels, video, seed = to_device(batch, recipe)
        energy = motion_energy(video, recipe.grid)
        embed = mae.unwrapped.encoder.patch_embed
        with torch.no_grad(), mae.autocast(), mae.gathered(embed):
            tokens = embed(video)
        if tats.dtype is None:
            tokens = tokens.float()  # TATS in full precision beside an autoencoder that is not
        with torch.set_grad_enabled(one_pass), tats.autocast(), tats.no_sync():
            mask = (tats.module if one_pass else tats.unwrapped)(video, seed, tokens)
        with mae.autocast(), mae.no_sync():
            prediction = mae.module(video, mask)
        texture = texture_energy(video, recipe.grid)
        del video
        error = error_of(prediction, pixels, mask, recipe)
        del prediction
        loss = error.mean()
        mae.backward(loss)
        stepped = mae.step()
        if stepped:
            runner.metrics.update(grad_norm=mae.grad_norm)

        old_log_prob = mask.log_prob.detach().gather(1, mask.masked)
        episode = ppo.Episode(tokens, mask.masked, old_log_prob, error.detach(), mask.value.detach())
        runner.metrics.update(
            loss=loss,
            motion_lift=motion_lift(energy, mask.visible),
            value=mask.value.mean(),
            **sampler_metrics(mask, error, texture),
        )
        if one_pass:
            moments = _advantage_moments([episode]) if settings.normalize_advantage else None
            _update(tats, mask.log_prob, mask.value, episode, moments, settings, runner)
        else:
            buffer.append(episode)
            full = len(buffer) == settings.rollout_steps * mae.accum_iter
            if stepped and (full or index + 1 == runner.steps):
                _phase_two(tats, buffer, settings, runner)
                buffer = []
        runner.end_micro_batch(index, step, lr, loss, stepped and not buffer)
    return runner.finish()


def _phase_two(tats: Backend, buffer: list[ppo.Episode], settings: PPOSettings, runner: EpochRunner) -> None:
    """settings.epochs passes over the recorded micro-batches with the current policy."""
    steps = [buffer[i : i + tats.accum_iter] for i in range(0, len(buffer), tats.accum_iter)]
    moments = [_advantage_moments(episodes) if settings.normalize_advantage else None for episodes in steps]
    for _ in range(settings.epochs):
        for episodes, moments_of_step in zip(steps, moments, strict=True):
            for episode in episodes:
                with tats.autocast(), tats.no_sync():
                    mask = tats.module(None, None, episode.tokens)
                _update(tats, mask.log_prob, mask.value, episode, moments_of_step, settings, runner)


def _advantage_moments(episodes: list[ppo.Episode]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the advantages of one optimizer step: its micro-batches here and on the other ranks."""
    return mean_and_deviation(torch.cat([ppo.advantage(episode.reward, episode.value) for episode in episodes]))


def _update(
    tats: Backend,
    log_prob: Tensor,
    value: Tensor,
    episode: ppo.Episode,
    moments: tuple[Tensor, Tensor] | None,
    settings: PPOSettings,
    runner: EpochRunner,
) -> None:
    loss, diagnostics = ppo.sampling_loss(
        log_prob,
        value,
        episode,
        clip=settings.clip,
        policy_coef=settings.policy_coef,
        value_coef=settings.value_coef,
        entropy_coef=settings.entropy_coef,
        moments=moments,
    )
    tats.backward(loss)
    runner.metrics.update(**diagnostics)
    if tats.step():
        runner.metrics.update(sampler_grad_norm=tats.grad_norm)
