"""Trajectory attention of Motionformer (Patrick 2021, arXiv 2106.05392): exact, and its Orthoformer approximation.

Shapes: B clips, t token frames, S tokens a frame, N = t*S in (time, row, column) order, D width, h heads, d = D/h,
R landmarks, n queries. "Frame" means token frame.

What is never stored: N x N weights (fused attention), the projections of all t trajectory tokens of a query (eq. 2 is
folded), copies for another memory order (tokens are kept as (time, space, batch), in which clips count as heads).
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def _full(x: Tensor) -> Tensor:
    """At least float32: softmaxes and cosines keep their precision under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_frame(x: Tensor, num_frames: int) -> Tensor:
    """[B, h, N, d] -> [t, B*h, S, d], a view where B is 1."""
    return x.flatten(0, 1).unflatten(1, (num_frames, -1)).transpose(0, 1)


def _tokens(y: Tensor, batch: int) -> Tensor:
    """[t, B*h, n, d] -> [B, n, t, h*d], a view where y lies in memory as fused attention leaves it: [t, n, B*h, d]."""
    return y.unflatten(1, (batch, -1)).permute(1, 3, 0, 2, 4).flatten(3)


def weights_in_frames(q: Tensor, k: Tensor, num_frames: int) -> Tensor:
    """The softmax of eq. 1, which no forward pass stores: q [B, h, n, d], k [B, h, N, d] -> [B, h, n, t, S]."""
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).unflatten(-1, (num_frames, -1)).softmax(dim=-1)


def trajectory_tokens(q: Tensor, k: Tensor, v: Tensor, num_frames: int) -> Tensor:
    """Eq. 1: q [B, h, n, d], k and v [B, h, N, d] -> y~ [B, n, t, D], one trajectory token a frame for every query.

    The softmax runs inside one frame, so this is fused attention with the frames as batch.
    """
    every_frame = q.flatten(0, 1).expand(num_frames, -1, -1, -1)
    y = F.scaled_dot_product_attention(every_frame, _by_frame(k, num_frames), _by_frame(v, num_frames))
    return _tokens(y, len(q))


@torch.library.custom_op("tats::orthogonal_landmarks", mutates_args=())  # one node for torch.compile, not 127 rounds
def orthogonal_landmarks(q: Tensor, num_landmarks: int) -> Tensor:
    """Indices int64 [B, h, R] of queries picked greedily, each with the smallest largest |cosine| to those before it.

    The first is query 0 rather than a random one, so that a policy evaluated twice on the same tokens is the same
    policy (a PPO ratio compares like with like).
    """
    if q.is_cuda and _kernel() is not None:
        return _kernel().search(q, num_landmarks)
    with torch.autocast(q.device.type, enabled=False):  # compiled code runs this without, eager code has to match
        unit = F.normalize(_full(q), dim=-1).flatten(0, 1)
        across = unit.transpose(1, 2).contiguous()  # [B*h, d, N]: 3 times faster than a product with a column
        index = torch.zeros(len(unit), 1, dtype=torch.int64, device=q.device)
        picked = [index]
        similarity = unit.new_zeros(unit.shape[:2])  # largest |cosine| to the picked ones so far
        for _ in range(min(num_landmarks, q.shape[2]) - 1):
            latest = unit.gather(1, index.unsqueeze(-1).expand(-1, -1, q.shape[-1]))  # [B*h, 1, d]
            similarity = torch.maximum(similarity, torch.bmm(latest, across).squeeze(1).abs())
            similarity.scatter_(1, index, torch.inf)  # equal queries are not picked twice
            index = similarity.argmin(dim=1, keepdim=True)
            picked.append(index)
        return torch.cat(picked, dim=1).unflatten(0, q.shape[:2])


@functools.cache
def _kernel():
    """The module with the search as one kernel, tried once on the GPU; None where it does not run."""
    try:
        import landmark_kernel

        landmark_kernel.search(torch.ones(1, 1, 2, 16, device="cuda"), 2)
    except ImportError:  # no Triton on this platform
        return None
    except Exception as error:  # no C compiler for Triton's launcher, a GPU it does not know: it fails in many ways
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"landmarks are searched without Triton, which is slower ({reason[0]})", stacklevel=2)
        return None
    return landmark_kernel


@orthogonal_landmarks.register_fake
def _(q: Tensor, num_landmarks: int) -> Tensor:
    return q.new_empty(*q.shape[:2], min(num_landmarks, q.shape[2]), dtype=torch.int64)


def summarize_frames(
    q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_landmarks: int, landmark_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """R landmarks L of the queries, [B*h, R, d], and what they find in a frame, softmax(L k_t') v_t [B*h, R, t, d].

    The landmarks are constants for the backward pass, as in Motionformer's released code; with landmark_gradient they
    are the queries themselves, and W_q is trained through them too.
    """
    index = orthogonal_landmarks(q.detach(), num_landmarks)
    source = q if landmark_gradient else q.detach()
    landmarks = source.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1])).flatten(0, 1)
    every_frame = landmarks.expand(num_frames, -1, -1, -1)
    found = F.scaled_dot_product_attention(every_frame, _by_frame(k, num_frames), _by_frame(v, num_frames))
    return landmarks, found.permute(1, 2, 0, 3).contiguous()


def tokens_by_landmarks(q: Tensor, landmarks: Tensor, summary: Tensor) -> Tensor:
    """softmax(q L') summary of summarize_frames: q [B, h, n, d] -> y~ [B, n, t, D]."""
    num_frames, dim = summary.shape[2:]
    weights = _full(q.flatten(0, 1) @ landmarks.transpose(1, 2)).mul(dim**-0.5).softmax(dim=-1)  # [B*h, n, R]
    y = weights.to(q.dtype) @ summary.flatten(2)  # [B*h, n, t*d]
    y = y.unflatten(2, (num_frames, dim)).permute(2, 1, 0, 3).contiguous()  # [t, n, B*h, d], as fused attention has it
    return _tokens(y.transpose(1, 2), len(q))


def orthoformer_tokens(
    q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_landmarks: int, landmark_gradient: bool = False
) -> Tensor:
    """Eq. 1 through R landmarks shared by all frames, linear in N: y~_t' = softmax(q L') softmax(L k_t'') v_t'.

    Shapes as trajectory_tokens, with n = N; landmark_gradient as in summarize_frames.
    """
    return tokens_by_landmarks(q, *summarize_frames(q, k, v, num_frames, num_landmarks, landmark_gradient))


class TimeAttention(torch.autograd.Function):
    """Eq. 2: every query attends over its own t trajectory tokens, asked by the one of its own frame.

    apply(y [t, n, D], first_frame, num_frames, w_q [D, D], b_q [D] or None, w_kv [2*h, d, D]) -> [n, D], one dtype;
    the queries are those of num_frames whole frames from first_frame on. W_k2's bias adds the same to every score and
    falls out of the softmax, W_v2's is added by the caller.

    <W_k2 y, q2> = <y, W_k2' q2> and sum_t a W_v2 y = W_v2 (sum_t a y): one query and one sum a token are projected
    instead of t tokens, n (3 D^2 + 2 t h D) products instead of n ((2 t + 1) D^2 + 2 t D): fewer for t > 1 wherever
    h t < (t - 1) D. The price, h vectors of width D a token, is paid for a piece of the queries at a time; the
    backward pass makes them again.
    """

    @staticmethod
    def forward(ctx, y, first_frame, num_frames, w_q, b_q, w_kv):
        heads = len(w_kv) // 2
        ctx.frames = (first_frame, num_frames)
        q = F.linear(_own_frame(y, *ctx.frames).flatten(0, 1), w_q, b_q).unflatten(1, (heads, -1))  # [n, h, d]
        weights, out = [], []
        for piece in _pieces(y, heads):
            y_piece = y[:, piece].transpose(0, 1)  # [m, t, D]
            asked = torch.bmm(q[piece].transpose(0, 1), w_kv[:heads]).transpose(0, 1)  # W_k2' q2, [m, h, D]
            scores = _full(torch.bmm(asked, y_piece.transpose(1, 2)))
            weights.append((scores * q.shape[-1] ** -0.5).softmax(dim=-1))  # [m, h, t]
            pooled = torch.bmm(weights[-1].to(y.dtype), y_piece)  # [m, h, D]
            out.append(torch.bmm(pooled.transpose(0, 1), w_kv[heads:].transpose(1, 2)).transpose(0, 1).flatten(1))
        ctx.save_for_backward(y, q, torch.cat(weights), w_q, w_kv)
        ctx.has_bias = b_q is not None
        return torch.cat(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, q, weights, w_q, w_kv = ctx.saved_tensors
        heads, scale = q.shape[1], q.shape[-1] ** -0.5
        grad = grad.unflatten(1, (heads, -1))
        grad_y, grad_q = torch.empty_like(y), torch.empty_like(q)
        grad_w = torch.zeros_like(w_kv, dtype=weights.dtype)
        for piece in _pieces(y, heads):
            y_piece = y[:, piece].transpose(0, 1)
            a = weights[piece]
            sides = torch.cat((q[piece], grad[piece]), dim=1).transpose(0, 1)  # [2h, m, d]
            wide = torch.bmm(sides, w_kv).transpose(0, 1)  # W_k2' q2 and W_v2' grad, [m, 2h, D]
            grad_a = _full(torch.bmm(wide[:, heads:], y_piece.transpose(1, 2)))
            grad_scores = a * (grad_a - (a * grad_a).sum(dim=-1, keepdim=True)) * scale
            both = torch.cat((grad_scores, a), dim=1).to(y.dtype)  # [m, 2h, t]
            grad_y[:, piece] = torch.bmm(both.transpose(1, 2), wide).transpose(0, 1)
            wide = torch.bmm(both, y_piece).transpose(0, 1)  # gradient of W_k2' q2, and the pooled tokens, [2h, m, D]
            grad_w += torch.bmm(sides.transpose(1, 2), wide)
            grad_q[piece] = torch.bmm(wide[:heads], w_kv[:heads].transpose(1, 2)).transpose(0, 1)
        grad_q = grad_q.flatten(1)
        own = _own_frame(y, *ctx.frames)
        _own_frame(grad_y, *ctx.frames).add_((grad_q @ w_q).view_as(own))
        grad_bias = grad_q.sum(dim=0) if ctx.has_bias else None
        return grad_y, None, None, grad_q.t() @ own.flatten(0, 1), grad_bias, grad_w.to(w_kv.dtype)


def _own_frame(y: Tensor, first_frame: int, num_frames: int) -> Tensor:
    """View [c, n/c, D] of y [t, n, D], queries of c whole frames: each one's token of the frame it lies in."""
    y = y[first_frame : first_frame + num_frames].unflatten(1, (num_frames, -1))  # [c, c, n/c, D]
    return y.diagonal(dim1=0, dim2=1).permute(2, 0, 1)


def _pieces(y: Tensor, heads: int) -> list[slice]:
    """Cuts the queries of y [t, n, D] so that h vectors of width D for each fit a cache, or fill a GPU."""
    num_queries, width = y.shape[1:]
    count = -(-num_queries * heads * width // (2**27 if y.is_cuda else 2**20))
    size = -(-num_queries // count)
    return [slice(start, start + size) for start in range(0, num_queries, size)]


class TrajectoryAttention(nn.Module):
    """forward(x [B, N, D], num_frames) -> [B, N, D]. Parameter names are those of Motionformer's layer.

    approx: "none" (exact) or "orthoformer". project_value=False leaves out W_v2 of eq. 2, as Motionformer's released
    code does (the equation has it): only for weights trained that way. landmark_gradient: see summarize_frames.
    recompute (attribute): the backward pass computes the trajectory tokens again, a few frames of queries at a time, so
    that t*N*D values are never stored.

    The biases of the keys are kept, because checkpoints have them, but never added: they add the same to every score of
    a softmax. Their gradient is exactly 0; computed, it would be rounding noise, which Adam with a tiny eps follows.
    Raises ValueError where N is no multiple of num_frames.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, approx="none", num_landmarks=128, project_value=True,
                 landmark_gradient=False):  # fmt: skip
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        if approx not in ("none", "orthoformer"):
            raise ValueError(f'approx must be "none" or "orthoformer", got {approx!r}')
        self.num_heads, self.approx, self.num_landmarks = num_heads, approx, num_landmarks
        self.project_value, self.landmark_gradient = project_value, landmark_gradient
        self.recompute = False
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        batch, num_tokens, width = x.shape
        if num_tokens % num_frames:
            raise ValueError(f"{num_tokens} tokens are no multiple of {num_frames} frames")
        x = x.transpose(0, 1).flatten(0, 1)  # [N*B, D]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # here, lest each of the three products keep its own copy
        bias_q, _, bias_v = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).view(1, num_tokens, batch * self.num_heads, -1).transpose(1, 2)
            for weight, bias in zip(self.qkv.weight.chunk(3), (bias_q, None, bias_v), strict=True)
        )  # each [1, B*h, N, d]
        if self.approx == "none":
            context = (k, v)
        else:
            context = summarize_frames(q, k, v, num_frames, self.num_landmarks, self.landmark_gradient)
        # A few frames of queries per call, enough for the fused kernel, so that gradients of trajectory tokens and of
        # the queries' copies for each frame exist for these alone. A GPU waits for launches: fewer calls there.
        frame = num_tokens // num_frames
        frames_a_call = -(-(640 if q.is_cuda else 256) // frame)
        out, weights = [], self._time_weights(q.dtype)
        for i, q_part in enumerate(q.split(frames_a_call * frame, dim=2)):
            arguments = (q_part, *context, *weights, i * frames_a_call, frame, batch)
            if self.recompute and torch.is_grad_enabled():
                out.append(checkpoint(self._attend, *arguments, use_reentrant=False))
            else:
                out.append(self._attend(*arguments))
        out = torch.cat(out)
        if self.project_value and self.proj_kv.bias is not None:
            out = out + self.proj_kv.bias[width:].to(out.dtype)
        return self.proj(out).view(num_tokens, batch, width).transpose(0, 1)

    def trajectory_of(self, x: Tensor, num_frames: int, token: int) -> Tensor:
        """Where a token goes, for pictures: its weights of eq. 1 as this layer has them, heads averaged, float32
        [B, t, S], which sum to 1 in each frame (paper, figure 3). x [B, N, D]; token in (time, row, column) order."""
        width = x.shape[-1]
        bias = None if self.qkv.bias is None else self.qkv.bias[: 2 * width]
        qk = F.linear(x, self.qkv.weight[: 2 * width], bias).unflatten(-1, (2, self.num_heads, -1))
        q, k = _full(qk.permute(2, 0, 3, 1, 4))  # [B, h, N, d]
        asked = q[:, :, token : token + 1]
        if self.approx == "none":
            return weights_in_frames(asked, k, num_frames).mean(dim=1).squeeze(1)
        index = orthogonal_landmarks(q, self.num_landmarks)
        landmarks = q.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1]))
        share = (asked @ landmarks.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [B, h, 1, R]
        found = weights_in_frames(landmarks, k, num_frames)  # [B, h, R, t, S]
        return torch.einsum("bhqr,bhrts->bhts", share, found).mean(dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, w_q, b_q, w_kv, first_frame: int, frame: int, batch: int):
        """Both equations for the queries [1, B*h, n, d] of whole frames of S tokens -> [n*B, D], without W_v2's bias.

        k and v are those of trajectory_tokens or the landmarks and summary of tokens_by_landmarks.
        """
        if self.approx == "none":
            y = trajectory_tokens(q, k, v, k.shape[2] // frame)
        else:
            y = tokens_by_landmarks(q, k, v)
        y = y.squeeze(0).unflatten(-1, (batch, -1)).transpose(0, 1).flatten(1, 2)  # [t, n*B, D]
        return TimeAttention.apply(y, first_frame, q.shape[2] // frame, w_q, b_q, w_kv)

    def _time_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """TimeAttention's w_q, b_q and w_kv."""
        w_q, w_kv = self.proj_q.weight.to(dtype), self.proj_kv.weight.to(dtype)
        w_kv = w_kv.unflatten(0, (2 * self.num_heads, -1))
        if not self.project_value:  # W_v2 = identity
            identity = torch.eye(len(w_q), dtype=dtype, device=w_q.device).unflatten(0, (self.num_heads, -1))
            w_kv = torch.cat((w_kv[: self.num_heads], identity))
        return w_q, None if self.proj_q.bias is None else self.proj_q.bias.to(dtype), w_kv
