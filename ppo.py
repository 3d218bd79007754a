"""PPO for a token sampler, as pure functions on tensors (paper eq. 7-8; Schulman 2017, arXiv 1707.06347).

An episode is one clip: the action is the set of masked tokens I_m (those the decoder predicts), the reward of masked
token i its reconstruction error R_i, the baseline one value V a clip. All tensors float32.

Shapes: B clips, N tokens, N_m masked. log_prob [B, N] of the current policy; old_log_prob, reward [B, N_m]; value [B].
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Episode(NamedTuple):
    """What phase 1 records of one batch; nothing here carries a graph."""

    tokens: Tensor | None  # [B, N, D] patch embeddings, the agent's input X before its position table
    masked: Tensor  # int64 [B, N_m]
    old_log_prob: Tensor  # [B, N_m], log p_i of the masked tokens when they were drawn
    reward: Tensor  # [B, N_m], reconstruction error e_i
    value: Tensor | None  # [B], the critic's estimate when the mask was drawn


def record(tokens: Tensor | None, mask, error: Tensor) -> Episode:
    """The episode of a mask (log_prob [B, N], masked [B, N_m], value [B] or None) and its errors [B, N_m]."""
    old_log_prob = mask.log_prob.detach().gather(1, mask.masked)
    value = None if mask.value is None else mask.value.detach()
    return Episode(tokens, mask.masked, old_log_prob, error.detach(), value)


def advantage(reward: Tensor, value: Tensor | None, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """A_i = R_i - V [B, N_m], without gradient; R_i where there is no critic.

    moments: mean and deviation of the advantages of the whole optimizer step, all micro-batches of all ranks, which
    become 0 and 1. A batch's own would make the update depend on how its clips are shared out.
    """
    advantages = reward.detach() if value is None else (reward - value.unsqueeze(1)).detach()
    if moments is not None:
        mean, deviation = moments
        advantages = ((advantages - mean) / (deviation + 1e-8)).to(reward.dtype)
    return advantages


def clipped_objective(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Eq. 7: mean of min(r A, clip(r, 1 - clip, 1 + clip) A), to be maximised."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def entropy(log_prob: Tensor) -> Tensor:
    """H = -sum over tokens of p log p, mean over clips; nats, at most log N."""
    return -(log_prob.exp() * log_prob).sum(dim=-1).mean()


def uniform_kl(log_prob: Tensor) -> Tensor:
    """KL(uniform || p) = -log N - mean over tokens of log p, mean over clips; nats, 0 = uniform. Unlike entropy it
    grows without bound as any p goes to 0, so that no token is given up (docs/SAMPLER.md)."""
    return -(log_prob.mean(dim=-1) + math.log(log_prob.shape[-1])).mean()


def value_loss(value: Tensor, reward: Tensor) -> Tensor:
    """Mean over clips of (V - mean over I_m of R_i)^2."""
    return (value - reward.mean(dim=1)).square().mean()


def explained_variance(value: Tensor, reward: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) of the clips' mean rewards: 1 = perfect critic, 0 = as good as a constant, < 0 worse.

    Not finite where the rewards do not vary (one clip): the metrics leave it out."""
    returns = reward.mean(dim=1)
    return 1 - (returns - value).var(unbiased=False) / returns.var(unbiased=False)


def sampling_loss(
    log_prob: Tensor,
    value: Tensor,
    episode: Episode,
    *,
    clip: float = 0.2,
    policy_coef: float = 1e-4,
    value_coef: float = 1e-4,
    entropy_coef: float = 1e-4,
    entropy_form: str = "bonus",
    moments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 8: L_sampling = -(c_p L_clip - c_v L_value + c_e H) of the current policy on a recorded batch.

    entropy_form: "bonus" is H; "uniform_kl" takes -KL(uniform || p) in its place.

    moments: see advantage; None leaves the advantages as they are.
    Returns the loss and 0-d diagnostics without gradient. approx_kl is mean((r - 1) - log r) over the masked tokens,
    nonnegative (Schulman, "Approximating KL Divergence", 2020); clip_fraction the share of ratios outside the clip.
    """
    log_ratio = log_prob.gather(1, episode.masked) - episode.old_log_prob
    ratio = log_ratio.exp()
    objective = clipped_objective(ratio, advantage(episode.reward, episode.value, moments), clip)
    critic_loss = value_loss(value, episode.reward)
    bonus = entropy(log_prob) if entropy_form == "bonus" else -uniform_kl(log_prob)
    loss = -(policy_coef * objective - value_coef * critic_loss + entropy_coef * bonus)
    with torch.no_grad():
        diagnostics = {
            "policy_loss": -objective,
            "value_loss": critic_loss,
            "approx_kl": (ratio - 1 - log_ratio).mean(),
            "clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
            "explained_variance": explained_variance(episode.value, episode.reward),
        }
    return loss, {name: value.detach() for name, value in diagnostics.items()}


def listwise_loss(log_prob: Tensor, episode: Episode, tau: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the policy restricted to the masked tokens against softmax(R / tau) over them, mean over clips
    (ListNet, Cao 2007). tau in units of error; tau < 0 prefers tokens of low error.

    Convex in the logits; for every set of masked tokens its minimum is at p proportional to exp(R / tau), so it needs
    no baseline and no bound. Returns the loss and its diagnostic: the KL divergence of the two, 0 where p follows the
    errors.
    """
    target = torch.log_softmax(episode.reward / tau, dim=1)
    restricted = torch.log_softmax(log_prob.gather(1, episode.masked), dim=1)
    weight = target.exp()
    loss = -(weight * restricted).sum(dim=1).mean()
    with torch.no_grad():
        divergence = (weight * (target - restricted)).sum(dim=1).mean()
    return loss, {"policy_loss": divergence}
