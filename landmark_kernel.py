"""The landmark search of trajectory_attention.orthogonal_landmarks as one Triton kernel for NVIDIA GPUs.

The plain form launches six small kernels for each landmark and reads all queries from memory each time. Here a program
per clip and head does all rounds, and its queries stay in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tokens(q, row, column, stride_token, num_tokens, dim):
    """float32 [BLOCK, DIM], zero beyond the last token and the last column; offsets in 64 bits."""
    mask = (row < num_tokens)[:, None] & (column < dim)[None, :]
    return tl.load(q + row[:, None].to(tl.int64) * stride_token + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _search(q, stride_head, stride_token, inverse, similarity, index, num_tokens, num_landmarks, dim,
            DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """q [heads, num_tokens, dim] with unit stride in dim; inverse, similarity float32 [heads, num_tokens]; index int64
    [heads, num_landmarks]."""
    head = tl.program_id(0).to(tl.int64)
    q += head * stride_head
    inverse += head * num_tokens
    similarity += head * num_tokens
    index += head * num_landmarks
    column = tl.arange(0, DIM)
    inside = column < dim
    for start in range(0, num_tokens, BLOCK):  # 1 / norm, and nothing similar yet
        row = start + tl.arange(0, BLOCK)
        kept = row < num_tokens
        x = _tokens(q, row, column, stride_token, num_tokens, dim)
        norm = tl.sqrt(tl.sum(x * x, axis=1))
        tl.store(inverse + row, 1.0 / tl.maximum(norm, 1e-12), mask=kept)  # as F.normalize
        tl.store(similarity + row, tl.zeros([BLOCK], tl.float32), mask=kept)
    tl.debug_barrier()
    pick = tl.full([], 0, tl.int32)
    for number in range(0, num_landmarks):
        tl.store(index + number, pick.to(tl.int64))
        latest = tl.load(q + pick.to(tl.int64) * stride_token + column, mask=inside, other=0.0).to(tl.float32)
        latest = latest * tl.load(inverse + pick)
        lowest = tl.full([], float("inf"), tl.float32)
        chosen = tl.full([], 0, tl.int32)
        for start in range(0, num_tokens, BLOCK):
            row = start + tl.arange(0, BLOCK)
            kept = row < num_tokens
            x = _tokens(q, row, column, stride_token, num_tokens, dim)
            cosine = tl.sum(x * latest[None, :], axis=1) * tl.load(inverse + row, mask=kept, other=0.0)
            largest = tl.load(similarity + row, mask=kept, other=float("inf"))
            largest = tl.maximum(largest, tl.abs(cosine))
            largest = tl.where(row == pick, float("inf"), largest)  # equal queries are not picked twice
            tl.store(similarity + row, largest, mask=kept)
            value, place = tl.min(largest, axis=0, return_indices=True)
            chosen = tl.where(value < lowest, start + place, chosen)
            lowest = tl.minimum(value, lowest)
        pick = chosen


def search(q: Tensor, num_landmarks: int) -> Tensor:
    """q [B, h, N, d] of a floating dtype -> int64 [B, h, R], R = min(num_landmarks, N), picks as the plain form's but
    for ties within float32 rounding."""
    flat = q.flatten(0, 1)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    heads, num_tokens, dim = flat.shape
    count = min(num_landmarks, num_tokens)
    index = torch.empty(heads, count, dtype=torch.int64, device=q.device)
    inverse, similarity = torch.empty(2, heads, num_tokens, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _search[(heads,)](
            flat, flat.stride(0), flat.stride(1), inverse, similarity, index, num_tokens, count, dim,
            DIM=triton.next_power_of_2(dim), BLOCK=256, num_warps=8,
        )  # fmt: skip
    return index.unflatten(0, q.shape[:2])
