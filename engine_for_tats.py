"""One epoch of joint training: the MAE by reconstruction, its sampler by an optimizer of its own on the MAE's errors
(TATS by PPO: paper 3.3, Algorithm 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import ppo
from engine_for_pretraining import PretrainRecipe, masked_error, sampler_metrics, to_device
from masking_generator import LearnedSampler, motion_energy, motion_lift, texture_energy
from runtime.backend import Backend
from runtime.epoch import EpochRunner, RunState
from utils import mean_and_deviation


@dataclass(frozen=True)
class Phases:
    """How the two phases take turns; defaults of the paper's table 4, which does not state epochs."""

    rollout_steps: int = 1  # k, optimizer steps of the MAE between two phases 2
    epochs: int = 1  # passes over the recorded episodes in phase 2
    normalize_advantage: bool = False  # over all clips of an optimizer step: of its micro-batches, on all ranks

    def one_pass(self, accum_iter: int) -> bool:
        """Whether one forward pass of the sampler serves both phases: the policy does not move between them, and the
        advantage does not wait for the rewards of later micro-batches."""
        return self.rollout_steps == self.epochs == 1 and not (self.normalize_advantage and accum_iter > 1)


def train_one_epoch(
    mae: Backend,
    agent: Backend,
    sampler: LearnedSampler,
    loader,
    recipe: PretrainRecipe,
    phases: Phases,
    epoch: int,
    state: RunState | None = None,
) -> dict[str, float]:
    """Alternates phase 1 (MAE step on the sampler's masks, episodes recorded) and phase 2 (steps of the sampler);
    returns epoch means. agent.unwrapped: the Policy of the sampler.

    With k = 1 and one pass the policy of phase 2 is the recorded one, so the forward pass of phase 1 keeps its graph
    and serves both: the same gradient for one forward pass less (Phases.one_pass). Phase 2 never runs the MAE.
    """
    mae.unwrapped.train()
    agent.unwrapped.train()
    runner = EpochRunner(recipe, mae, epoch, state, agent)
    one_pass = phases.one_pass(agent.accum_iter)
    buffer: list[ppo.Episode] = []
    error_of = mae.compiled(masked_error)
    for index, step, batch in runner.batches(loader):
        lr = recipe.apply_schedule(mae, step)
        pixels, video, seed = to_device(batch, recipe)
        energy = motion_energy(video, recipe.grid)
        embed = mae.unwrapped.encoder.patch_embed
        with torch.no_grad(), mae.autocast(), mae.gathered(embed):
            tokens = embed(video)
        if agent.dtype is None:
            tokens = tokens.float()  # a sampler in full precision beside an autoencoder that is not
        with torch.set_grad_enabled(one_pass), agent.autocast(), agent.no_sync():
            policy = (agent.module if one_pass else agent.unwrapped)(tokens)
        mask = sampler.draw(*policy, seed)
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

        episode = ppo.record(tokens, mask, error)
        runner.metrics.update(
            loss=loss, motion_lift=motion_lift(energy, mask.visible), **sampler_metrics(mask, error, texture)
        )
        if mask.value is not None:
            runner.metrics.update(value=mask.value.mean())
        if one_pass:
            moments = _advantage_moments([episode]) if phases.normalize_advantage else None
            _update(agent, sampler, *policy, episode, moments, runner)
        else:
            buffer.append(episode)
            full = len(buffer) == phases.rollout_steps * mae.accum_iter
            if stepped and (full or index + 1 == runner.steps):
                _phase_two(agent, sampler, buffer, phases, runner)
                buffer = []
        runner.end_micro_batch(index, step, lr, loss, stepped and not buffer)
    return runner.finish()


def _phase_two(
    agent: Backend, sampler: LearnedSampler, buffer: list[ppo.Episode], phases: Phases, runner: EpochRunner
) -> None:
    """phases.epochs passes over the recorded micro-batches with the current policy."""
    steps = [buffer[i : i + agent.accum_iter] for i in range(0, len(buffer), agent.accum_iter)]
    moments = [_advantage_moments(episodes) if phases.normalize_advantage else None for episodes in steps]
    for _ in range(phases.epochs):
        for episodes, moments_of_step in zip(steps, moments, strict=True):
            for episode in episodes:
                with agent.autocast(), agent.no_sync():
                    policy = agent.module(episode.tokens)
                _update(agent, sampler, *policy, episode, moments_of_step, runner)


def _advantage_moments(episodes: list[ppo.Episode]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the advantages of one optimizer step: its micro-batches here and on the other ranks."""
    return mean_and_deviation(torch.cat([ppo.advantage(episode.reward, episode.value) for episode in episodes]))


def _update(
    agent: Backend,
    sampler: LearnedSampler,
    log_prob: Tensor,
    value: Tensor | None,
    episode: ppo.Episode,
    moments: tuple[Tensor, Tensor] | None,
    runner: EpochRunner,
) -> None:
    loss, diagnostics = sampler.loss(log_prob, value, episode, moments)
    agent.backward(loss)
    runner.metrics.update(**diagnostics)
    if agent.step():
        runner.metrics.update(sampler_grad_norm=agent.grad_norm)
