"""The method once more, naively: loops and float64, each line a line of the papers' equations. For the tests only."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor


def softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.max()).exp()
    return weights / weights.sum()


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"].double())
    return y + state[f"{name}.bias"].double() if f"{name}.bias" in state else y


def greedy_landmarks(q: Tensor, num_landmarks: int) -> list[int]:
    """q [N, d]: starting from query 0, always the query whose largest |cosine| to the picked ones is smallest."""
    picked = [0]
    while len(picked) < num_landmarks:
        worst = {}
        for i in set(range(len(q))) - set(picked):
            worst[i] = max(abs(float(q[i] @ q[j] / (q[i].norm() * q[j].norm()))) for j in picked)
        picked.append(min(worst, key=worst.get))
    return picked


def trajectory_tokens(q: Tensor, k: Tensor, v: Tensor, num_frames: int, landmarks: list[int] | None = None) -> Tensor:
    """Eq. 1 for one head: q, k, v [N, d] -> y~ [N, t, d]; through the queries landmarks where they are given."""
    tokens_per_frame = len(q) // num_frames
    y = torch.zeros(len(q), num_frames, q.shape[1], dtype=torch.float64)
    for st, t in itertools.product(range(len(q)), range(num_frames)):
        frame = range(t * tokens_per_frame, (t + 1) * tokens_per_frame)

        def pool(query, frame=frame):
            weights = softmax(torch.stack([query @ k[s] for s in frame]) / math.sqrt(q.shape[1]))
            return sum(weight * v[s] for weight, s in zip(weights, frame, strict=True))

        if landmarks is None:
            y[st, t] = pool(q[st])
        else:
            weights = softmax(torch.stack([q[st] @ q[i] for i in landmarks]) / math.sqrt(q.shape[1]))
            y[st, t] = sum(weight * pool(q[i]) for weight, i in zip(weights, landmarks, strict=True))
    return y


def trajectory_attention(
    x: Tensor,
    state: dict[str, Tensor],
    num_heads: int,
    num_frames: int,
    project_value: bool = True,
    num_landmarks: int | None = None,
) -> Tensor:
    """The whole layer, eq. 1 and 2: x [B, N, D] -> [B, N, D]; num_landmarks: through Orthoformer's landmarks."""
    num_tokens, width = x.shape[1:]
    dim = width // num_heads
    heads = [slice(i * dim, (i + 1) * dim) for i in range(num_heads)]
    clips = []
    for clip in x.double():
        q, k, v = linear(clip, state, "qkv").split(width, dim=-1)
        y = torch.zeros(num_tokens, num_frames, width, dtype=torch.float64)
        for head in heads:
            landmarks = None if num_landmarks is None else greedy_landmarks(q[:, head], num_landmarks)
            y[:, :, head] = trajectory_tokens(q[:, head], k[:, head], v[:, head], num_frames, landmarks)
        k2, v2 = linear(y, state, "proj_kv").split(width, dim=-1)
        v2 = v2 if project_value else y
        out = torch.zeros(num_tokens, width, dtype=torch.float64)
        for st in range(num_tokens):
            q2 = linear(y[st, st // (num_tokens // num_frames)], state, "proj_q")
            for head in heads:
                scores = torch.stack([q2[head] @ k2[st, t, head] for t in range(num_frames)])
                weights = softmax(scores / math.sqrt(dim))
                out[st, head] = sum(weights[t] * v2[st, t, head] for t in range(num_frames))
        clips.append(linear(out, state, "proj"))
    return torch.stack(clips)


def ppo_loss(
    log_prob, value, masked, old_log_prob, reward, old_value, clip=0.2, coef=(1e-4, 1e-4, 1e-4), normalize=False
) -> float:
    """Eq. 7 and 8 clip by clip and token by token. Arguments are nested lists or tensors, coef = (c_p, c_v, c_e)."""
    log_prob, value, masked, old_log_prob, reward, old_value = (
        torch.as_tensor(x).tolist() for x in (log_prob, value, masked, old_log_prob, reward, old_value)
    )
    clips = range(len(masked))
    advantages = [[r - old_value[b] for r in reward[b]] for b in clips]
    if normalize:
        flat = [a for row in advantages for a in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((a - mean) ** 2 for a in flat) / (len(flat) - 1))
        advantages = [[(a - mean) / (std + 1e-8) for a in row] for row in advantages]
    surrogate, value_errors, entropies = [], [], []
    for b in clips:
        for i, old, a in zip(masked[b], old_log_prob[b], advantages[b], strict=True):
            ratio = math.exp(log_prob[b][i]) / math.exp(old)
            surrogate.append(min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
        value_errors.append((value[b] - sum(reward[b]) / len(reward[b])) ** 2)
        entropies.append(-sum(math.exp(lp) * lp for lp in log_prob[b]))
    l_clip, l_value, h = (sum(x) / len(x) for x in (surrogate, value_errors, entropies))
    return -(coef[0] * l_clip - coef[1] * l_value + coef[2] * h)


def patch_targets(pixels: Tensor, masked: Tensor, tubelet: int, patch: tuple[int, int], normalize: bool) -> np.ndarray:
    """pixels [B, C, T, H, W], masked [B, N_m] -> [B, N_m, P], each token ordered (frame, row, column, channel)."""
    video = pixels.double().numpy()
    channels, _, height, width = video.shape[1:]
    rows, columns = height // patch[0], width // patch[1]
    targets = []
    for b, tokens in enumerate(masked.tolist()):
        targets.append([])
        for token in tokens:
            t, row, column = token // (rows * columns), token // columns % rows, token % columns
            values = []
            for f, y, x in itertools.product(range(tubelet), range(patch[0]), range(patch[1])):
                values.append([video[b, c, t * tubelet + f, row * patch[0] + y, column * patch[1] + x]
                               for c in range(channels)])  # fmt: skip
            values = np.array(values)
            if normalize:
                for c in range(channels):
                    mean = sum(values[:, c]) / len(values)
                    variance = sum((values[:, c] - mean) ** 2) / (len(values) - 1)
                    values[:, c] = (values[:, c] - mean) / (math.sqrt(variance) + 1e-6)
            targets[-1].append(values.ravel())
    return np.array(targets)


def set_probabilities(p: list[float], size: int) -> dict[tuple[int, ...], float]:
    """Probability of every set of that size when its members are drawn one by one from p without replacement."""
    total = dict.fromkeys(itertools.combinations(range(len(p)), size), 0.0)
    for draws in itertools.permutations(range(len(p)), size):
        probability, left = 1.0, sum(p)
        for i in draws:
            probability *= p[i] / left
            left -= p[i]
        total[tuple(sorted(draws))] += probability
    return total


def inclusion_probabilities(p: list[float], size: int) -> list[float]:
    """Probability of every item to be among size draws from p without replacement."""
    sets = set_probabilities(p, size)
    return [sum(probability for members, probability in sets.items() if i in members) for i in range(len(p))]
