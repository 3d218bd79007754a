"""Trajectory attention of Motionformer (Patrick 2021, arXiv 2106.05392): exact, and its Orthoformer approximation.

Shapes: B clips, t token frames, S tokens a frame, N = t*S in (time, row, column) order, D width, h heads, d = D/h,
R landmarks. "Frame" means token frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _full(x: Tensor) -> Tensor:
    """At least float32: softmaxes and cosines keep their precision under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def trajectory_tokens(q: Tensor, k: Tensor, v: Tensor, num_frames: int) -> Tensor:
    """Eq. 1: q, k, v [B, h, N, d] -> y~ [B, N, t, D], one trajectory token a frame for every query, heads concatenated.

    The softmax runs inside one frame, so this is t fused attention calls; no N x N weights are stored.
    """
    frames = zip(k.chunk(num_frames, dim=2), v.chunk(num_frames, dim=2), strict=True)
    y = [F.scaled_dot_product_attention(q, k_frame, v_frame) for k_frame, v_frame in frames]  # t of [B, h, N, d]
    return torch.stack([y_frame.transpose(1, 2).flatten(2) for y_frame in y], dim=2)


@torch.no_grad()
def orthogonal_landmarks(q: Tensor, num_landmarks: int) -> Tensor:
    """Indices int64 [B, h, R] of queries picked greedily, each with the smallest largest |cosine| to those before it.

    The first is query 0 rather than a random one, so that a policy evaluated twice on the same tokens is the same
    policy (a PPO ratio compares like with like).
    """
    unit = F.normalize(_full(q), dim=-1)
    index = torch.zeros(*q.shape[:2], 1, dtype=torch.int64, device=q.device)
    picked = [index]
    similarity = unit.new_zeros(q.shape[:3])  # largest |cosine| to the picked ones so far
    for _ in range(min(num_landmarks, q.shape[2]) - 1):
        latest = unit.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1]))  # [B, h, 1, d]
        similarity = torch.maximum(similarity, (unit @ latest.transpose(-1, -2)).squeeze(-1).abs())
        similarity.scatter_(2, index, torch.inf)  # equal queries are not picked twice
        index = similarity.argmin(dim=2, keepdim=True)
        picked.append(index)
    return torch.cat(picked, dim=2)


def orthoformer_tokens(q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_landmarks: int) -> Tensor:
    """Eq. 1 through R landmarks shared by all frames, linear in N: y~_t' = softmax(q L') softmax(L k_t'') v_t'.

    Shapes as trajectory_tokens.
    """
    batch, heads, _, dim = q.shape
    index = orthogonal_landmarks(q, num_landmarks)
    landmarks = q.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, dim))  # [B, h, R, d]
    k, v = (x.unflatten(2, (num_frames, -1)).flatten(1, 2) for x in (k, v))  # [B, h*t, S, d]: fused kernels take 4-D
    summary = F.scaled_dot_product_attention(landmarks.repeat_interleave(num_frames, dim=1), k, v)
    summary = summary.unflatten(1, (heads, num_frames)).transpose(2, 3).flatten(3)  # [B, h, R, t*d]
    weights = _full(q @ landmarks.transpose(-1, -2)).mul(dim**-0.5).softmax(dim=-1)  # [B, h, N, R]
    y = (weights.to(q.dtype) @ summary).unflatten(3, (num_frames, dim))  # [B, h, N, t, d]
    return y.permute(0, 2, 3, 1, 4).flatten(3)


class TrajectoryAttention(nn.Module):
    """forward(x [B, N, D], num_frames) -> [B, N, D]. Parameter names are those of Motionformer's layer.

    approx: "none" (exact) or "orthoformer". project_value=False leaves out W_v2 of eq. 2, as Motionformer's released
    code does (the equation has it): only for weights trained that way. Raises ValueError where N is no multiple of
    num_frames.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, approx="none", num_landmarks=128, project_value=True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        if approx not in ("none", "orthoformer"):
            raise ValueError(f'approx must be "none" or "orthoformer", got {approx!r}')
        self.num_heads, self.approx, self.num_landmarks = num_heads, approx, num_landmarks
        self.project_value = project_value
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        if x.shape[1] % num_frames:
            raise ValueError(f"{x.shape[1]} tokens are no multiple of {num_frames} frames")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
        if self.approx == "none":
            y = trajectory_tokens(q, k, v, num_frames)
        else:
            y = orthoformer_tokens(q, k, v, num_frames, self.num_landmarks)
        return self.proj(self.attend_over_time(y))

    def attend_over_time(self, y: Tensor) -> Tensor:
        """Eq. 2: trajectory tokens y [B, N, t, D] -> [B, N, D].

        <W_k2 y, q2> = <y, W_k2' q2> and sum_t a W_v2 y = W_v2 (sum_t a y): one query and one sum a token are projected
        instead of t trajectory tokens. The key bias adds the same to every frame's score and falls out of the softmax.
        """
        heads, num_frames = self.num_heads, y.shape[2]
        own_frame = torch.stack([y_s[:, :, i] for i, y_s in enumerate(y.chunk(num_frames, dim=1))], dim=1)
        q = self.proj_q(own_frame.flatten(1, 2)).unflatten(-1, (heads, -1))  # [B, N, h, d]
        w_k, w_v = self.proj_kv.weight.to(q.dtype).unflatten(0, (2, heads, -1))  # each [h, d, D]
        y = y.to(q.dtype)
        scores = torch.einsum("bnhd,hdc->bnhc", q, w_k) @ y.transpose(-1, -2)  # [B, N, h, t]
        weights = _full(scores).mul(q.shape[-1] ** -0.5).softmax(dim=-1).to(q.dtype)
        if not self.project_value:
            return torch.einsum("bnht,bnthd->bnhd", weights, y.unflatten(-1, (heads, -1))).flatten(2)
        out = torch.einsum("bnhc,hdc->bnhd", weights @ y, w_v).flatten(2)
        if self.proj_kv.bias is not None:
            out = out + self.proj_kv.bias[out.shape[-1] :].to(out.dtype)
        return out
