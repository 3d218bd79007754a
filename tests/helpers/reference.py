"""The method once more, naively: loops and float64, each line a line of the papers' equations. For the tests only."""

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
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


# The networks in full, in a few einsums: float64 and differentiable, where loops would be too slow to train.


def inner(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of the module name, under its own names."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float = 1e-6) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def time_attention(y: Tensor, own: Tensor, w_q: Tensor, b_q: Tensor | None, w_k: Tensor, w_v: Tensor | None) -> Tensor:
    """Eq. 2 for n queries: y [t, n, D], own [n] each one's frame, w_k and w_v [h, d, D] (None: identity) -> [n, D]."""
    heads, dim, _ = w_k.shape
    q = y[own, torch.arange(len(own))] @ w_q.T + (0 if b_q is None else b_q)
    k = torch.einsum("tnc,hdc->tnhd", y, w_k)
    v = y.unflatten(-1, (heads, dim)) if w_v is None else torch.einsum("tnc,hdc->tnhd", y, w_v)
    weights = torch.einsum("nhd,tnhd->tnh", q.unflatten(-1, (heads, dim)), k).div(math.sqrt(dim)).softmax(dim=0)
    return torch.einsum("tnh,tnhd->nhd", weights, v).flatten(1)


def trajectory_attention_at_once(
    x: Tensor,
    state: dict[str, Tensor],
    num_heads: int,
    num_frames: int,
    project_value=True,
    num_landmarks=None,
    landmark_gradient=False,
) -> Tensor:
    """trajectory_attention, x float64. landmark_gradient: landmarks are queries to autograd, not constants."""
    width = x.shape[-1]
    own = torch.arange(num_frames).repeat_interleave(x.shape[1] // num_frames)
    bias_v = state["proj_kv.bias"][width:] if project_value and "proj_kv.bias" in state else 0
    w_k, w_v = (w.unflatten(0, (num_heads, -1)) for w in state["proj_kv.weight"].split(width))
    clips = []
    for clip in x:
        qkv = linear(clip, state, "qkv").split(width, dim=-1)
        q, k, v = (z.unflatten(-1, (num_heads, -1)) for z in qkv)  # [N, h, d]
        k, v = (z.unflatten(0, (num_frames, -1)) for z in (k, v))  # [t, S, h, d]
        asking = q
        if num_landmarks is not None:
            index = [greedy_landmarks(head.detach(), num_landmarks) for head in q.unbind(1)]
            asking = torch.stack([head[i] for head, i in zip(q.unbind(1), index, strict=True)], dim=1)  # [R, h, d]
            asking = asking if landmark_gradient else asking.detach()
        weights = torch.einsum("nhd,tshd->nhts", asking, k).div(math.sqrt(q.shape[-1])).softmax(dim=-1)
        y = torch.einsum("nhts,tshd->tnhd", weights, v)
        if num_landmarks is not None:
            weights = torch.einsum("nhd,rhd->nhr", q, asking).div(math.sqrt(q.shape[-1])).softmax(dim=-1)
            y = torch.einsum("nhr,trhd->tnhd", weights, y)
        w_q, b_q = state["proj_q.weight"], state.get("proj_q.bias")
        out = time_attention(y.flatten(2), own, w_q, b_q, w_k, w_v if project_value else None)
        clips.append(linear(out + bias_v, state, "proj"))
    return torch.stack(clips)


def self_attention(x: Tensor, state: dict[str, Tensor], num_heads: int, scale: float | None = None) -> Tensor:
    """VideoMAE's: queries and values have a bias where the state has one."""
    q, k, v = linear(x, state, "qkv").chunk(3, dim=-1)
    q, v = q + state.get("q_bias", 0), v + state.get("v_bias", 0)
    q, k, v = (z.unflatten(-1, (num_heads, -1)) for z in (q, k, v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(scale or q.shape[-1] ** -0.5).softmax(dim=-1)
    return linear(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2), state, "proj")


def block(x: Tensor, state: dict[str, Tensor], attention, eps: float = 1e-6) -> Tensor:
    """Pre-norm residual block around attention(x, its state)."""
    x = x + state.get("gamma_1", 1) * attention(layer_norm(x, state, "norm1", eps), inner(state, "attn"))
    hidden = linear(layer_norm(x, state, "norm2", eps), state, "mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + state.get("gamma_2", 1) * linear(hidden, state, "mlp.fc2")


@functools.cache
def sine_table(size: int, width: int) -> Tensor:
    angles = [[position / 10000 ** (i // 2 * 2 / width) for i in range(width)] for position in range(size)]
    return torch.tensor([[math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(row)] for row in angles]).double()


def embed(video: Tensor, state: dict[str, Tensor]) -> Tensor:
    """video [B, 3, T, H, W] -> [B, N, D], without positions."""
    weight = state["encoder.patch_embed.proj.weight"]
    tokens = F.conv3d(video, weight, state["encoder.patch_embed.proj.bias"], stride=weight.shape[2:])
    return tokens.flatten(2).transpose(1, 2)


def videomae(tokens: Tensor, visible: Tensor, masked: Tensor, state: dict[str, Tensor], heads: tuple) -> Tensor:
    """Predictions [B, K, P] of the tokens masked [B, K] by a decoder that sees visible and masked; heads of both."""

    def run_blocks(x, name, num_heads):
        own = inner(state, f"{name}.blocks")
        for i in sorted({int(key.split(".")[0]) for key in own}):
            x = block(x, inner(own, str(i)), lambda y, s: self_attention(y, s, num_heads))
        return layer_norm(x, state, f"{name}.norm")

    rows = torch.arange(len(tokens)).unsqueeze(1)
    x = (tokens + sine_table(*tokens.shape[1:]))[rows, visible]
    x = linear(run_blocks(x, "encoder", heads[0]), state, "encoder_to_decoder")
    table = sine_table(tokens.shape[1], x.shape[-1])
    x = torch.cat((x + table[visible], state["mask_token"] + table[masked]), dim=1)
    return linear(run_blocks(x, "decoder", heads[1]), state, "decoder.head")[:, visible.shape[1] :]


def tats(tokens: Tensor, state: dict[str, Tensor], attention, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log_prob [B, N] and value [B] of a sampler of one block."""
    x = tokens.detach() + sine_table(*tokens.shape[1:])
    hidden = linear(x.mean(dim=1), state, "critic.0").clamp_min(0)
    logits = linear(block(x, inner(state, "blocks.0"), attention), state, "actor").squeeze(-1)
    return (logits / temperature).log_softmax(dim=-1), linear(hidden, state, "critic.2").squeeze(-1)


def running_cell(masked: list[int], grid: tuple[int, int, int], ratio: float, start: int, noise: list[float]) -> list:
    """The masked tokens of one clip left to the decoder: the cells' places, row by row, take turns frame by frame from
    the place start on; equal turns by noise."""
    _, rows, columns = grid
    position = {(0, 0): 4, (0, 1): 3, (1, 0): 2, (1, 1): 1}
    order = []
    for token, chance in zip(masked, noise, strict=True):
        frame, row, column = token // (rows * columns), token // columns % rows, token % columns
        order.append(((position[row % 2, column % 2] - frame - start) % 4, chance, token))
    return sorted(token for _, _, token in sorted(order)[: len(masked) - int(ratio * len(masked))])


def published_running_cell(grid: tuple[int, int, int], ratio: float, start: int) -> list[int]:
    """Tokens that VideoMAE V2's running cell leaves to the decoder, visible ones too: a cell of 2 x 2 places is a row
    of int(4 ratio) hidden and then shown places, which is turned by one place per frame; start: its turn in frame 0."""
    hidden = int(4 * ratio)
    cell = [False] * hidden + [True] * (4 - hidden)
    return [
        (frame * grid[1] + row) * grid[2] + column
        for frame in range(grid[0])
        for row in range(grid[1])
        for column in range(grid[2])
        if cell[(2 * (row % 2) + column % 2 + start + frame) % 4]
    ]


def tats_attention(kind: str, num_heads: int, num_frames: int, num_landmarks: int, landmark_gradient: bool = False):
    """attention(x, its state) of block, by the names of --tats_attention."""
    if kind == "mha":
        return lambda x, state: self_attention(x, state, num_heads)
    landmarks = num_landmarks if kind == "orthoformer" else None
    return lambda x, state: trajectory_attention_at_once(
        x, state, num_heads, num_frames, num_landmarks=landmarks, landmark_gradient=landmark_gradient
    )


class PlainTraining:
    """Steps of an autoencoder and its sampler with every token through every layer, autograd's own gradients, float64
    and torch's simplest AdamW. args: flags; grid in tokens; heads of encoder and decoder."""

    def __init__(self, mae, sampler, args, grid: tuple[int, int, int], heads: tuple[int, int]):
        self.args, self.grid, self.heads = args, grid, heads
        self.mae, self.sampler = (
            {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
            for module in (mae, sampler)
        )
        joint = self.mae | ({f"sampler.{k}": p for k, p in self.sampler.items()} if args.mask_type == "adamae" else {})
        self.optimizer = self._adamw(joint, args.lr, args.opt_eps)
        self.tats = self._adamw(self.sampler, args.tats_lr, args.tats_eps) if args.mask_type == "tats" else None

    def _adamw(self, state: dict[str, Tensor], lr: float, eps: float) -> torch.optim.AdamW:
        groups = {self.args.weight_decay: [], 0.0: []}
        for name, p in state.items():
            groups[self.args.weight_decay if p.dim() > 1 and name != "mask_token" else 0.0].append(p)
        groups = [dict(params=params, weight_decay=decay) for decay, params in groups.items()]
        betas = self.args.opt_betas or (0.9, 0.999)
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, foreach=False, fused=False)

    def _update(self, optimizer, loss: Tensor, clip_grad: float | None) -> float:
        optimizer.zero_grad()
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
        optimizer.step()
        return norm.item()

    def choose(self, scores: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The highest scores [B, N] stay visible; noise [B, 1 + N_m] decides what the decoder is spared."""
        num_visible = scores.shape[1] + 1 - noise.shape[1]
        order = scores.argsort(dim=1, descending=True)
        kept = [
            running_cell(sorted(hidden), self.grid, self.args.decoder_mask_ratio, int(4 * start), chances)
            for hidden, (start, *chances) in zip(order[:, num_visible:].tolist(), noise.tolist(), strict=True)
        ]
        return order[:, :num_visible], torch.tensor(kept)

    def step(self, clips: Tensor, scores: Tensor, noise: Tensor) -> dict:
        """clips uint8 [B, T, 3, H, W]; the others as choose has them, without the policy. Returns what a step logs."""
        args = self.args
        pixels = clips.transpose(1, 2).double() / 255
        tokens = embed((pixels - 0.5) / 0.5, self.mae)
        log_prob = None
        if args.mask_type == "tats":
            attention = tats_attention(
                args.tats_attention, self.heads[0], self.grid[0], args.num_landmarks, args.landmark_gradient
            )
            log_prob, value = tats(tokens, self.sampler, attention, args.softmax_temp)
        elif args.mask_type == "adamae":
            x = tokens + self.sampler["pos_embed_probs"]
            x = block(x, inner(self.sampler, "get_token_probs.0"), lambda y, s: self_attention(y, s, 8), 1e-5)
            log_prob = linear(x, self.sampler, "get_token_probs.1").squeeze(-1).log_softmax(dim=-1)
        policy = 0 if log_prob is None else log_prob.detach().float()
        visible, masked = self.choose(scores + policy, noise)
        prediction = videomae(tokens, visible, masked, self.mae, self.heads)
        kernel = self.mae["encoder.patch_embed.proj.weight"].shape[2:]
        target = patch_targets(pixels, masked, kernel[0], tuple(kernel[1:]), args.normalize_target)
        function = {"mse": F.mse_loss, "l1": F.l1_loss}[args.loss]
        error = function(prediction, torch.from_numpy(target), reduction="none").mean(dim=-1)
        logged = {"loss": error.mean().item(), "masked": masked, "log_prob": log_prob}
        reward = error.detach()
        if args.mask_type == "adamae":
            sampling = -args.adamae_coef * (log_prob.gather(1, masked) * reward).mean()
            logged["sampling_loss"] = sampling.item()
            logged["grad_norm"] = self._update(self.optimizer, error.mean() + sampling, args.clip_grad)
            return logged
        logged["grad_norm"] = self._update(self.optimizer, error.mean(), args.clip_grad)
        if args.mask_type == "tats":  # the policy is the recorded one: ratios are 1, and nothing is clipped
            drawn = log_prob.gather(1, masked)
            advantage = reward - value.detach().unsqueeze(1)
            if args.normalize_advantage:
                advantage = (advantage - advantage.mean()) / advantage.std()
            objective = ((drawn - drawn.detach()).exp() * advantage).mean()
            value_loss = (value - reward.mean(dim=1)).square().mean()
            entropy = -(log_prob.exp() * log_prob).sum(dim=1).mean()
            loss = -(args.policy_coef * objective - args.value_coef * value_loss + args.entropy_coef * entropy)
            logged |= {"policy_loss": -objective.item(), "value_loss": value_loss.item(), "value": value.mean().item()}
            logged["sampler_grad_norm"] = self._update(self.tats, loss, None)
        return logged


def resize_table(table, old, new):
    """Trilinear between the centres of cells, one axis at a time; beyond the outermost centres constant."""
    volume = table[0].double().reshape(*old, -1)
    for axis in range(3):
        slices = []
        for i in range(new[axis]):
            place = min(max((i + 0.5) * old[axis] / new[axis] - 0.5, 0), old[axis] - 1)
            low = min(int(place), old[axis] - 1)
            high, part = min(low + 1, old[axis] - 1), place - int(place)
            slices.append((1 - part) * volume.select(axis, low) + part * volume.select(axis, high))
        volume = torch.stack(slices, dim=axis)
    return volume.reshape(1, -1, volume.shape[-1])
