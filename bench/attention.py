"""The project's attention layers with their projections: time, memory and operations, as ratios of one run.

    python bench/attention.py [--dtype fp32 bf16] [--sweep] [--frames 8 --tokens 196 --dim 768 --heads 12 --batch 1]

    plain            fused self-attention over all tokens, as in the autoencoder's blocks
    exact            trajectory attention
    exact-recompute  the same with recomputation in the backward pass
    orthoformer      trajectory attention through --landmarks landmarks
    naive            exact as the paper's equations are written: all N x N weights stored, all N x t trajectory tokens
                     projected. It has exact's weights; if the two disagree nothing is timed.

Forward is that of training (it keeps what the backward pass needs); both is forward and backward, with gradients of the
input and all weights. memory: the peak of both over input and weights. GFLOP, of both: matrix products and fused
attention, without the search for landmarks; of peak: that many a second over the rate of one big matrix product in the
same rounds. --sweep: a second table, of more frames and of more tokens per frame. Left out, "-": naive where its N x N
weights exceed --naive_limit.
"""

import argparse
import functools
import math
import statistics
import sys

import torch
from common import (
    Product,
    autocast,
    choose_rows,
    count_flop,
    fresh_process,
    header,
    new_parser,
    peak_growth,
    print_table,
    ratio,
    start,
    time_rounds,
)
from torch import Tensor, nn

from modeling_finetune import Attention
from trajectory_attention import TrajectoryAttention


class Naive(nn.Module):
    """Eqs. 1 and 2 of Motionformer as they are written, with the weights of an exact layer."""

    def __init__(self, exact: TrajectoryAttention):
        super().__init__()
        self.exact = exact

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        layer, heads = self.exact, self.exact.num_heads
        scale = (x.shape[-1] // heads) ** -0.5
        q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)  # each [B, N, h, d]
        k, v = (part.unflatten(1, (num_frames, -1)) for part in (k, v))  # [B, t, S, h, d]
        weights = torch.einsum("bnhd,btshd->bnhts", q * scale, k).softmax(dim=-1)
        y = torch.einsum("bnhts,btshd->bnthd", weights.to(v.dtype), v).flatten(3)  # [B, N, t, D]
        own = y.unflatten(1, (num_frames, -1)).diagonal(dim1=1, dim2=3)  # of the query's own frame, [B, S, D, t]
        q = layer.proj_q(own.permute(0, 3, 1, 2).flatten(1, 2)).unflatten(-1, (heads, -1))  # [B, N, h, d]
        k, v = layer.proj_kv(y).unflatten(-1, (2, heads, -1)).unbind(3)  # each [B, N, t, h, d]
        weights = torch.einsum("bnhd,bnthd->bnht", q * scale, k).softmax(dim=-1)
        return layer.proj(torch.einsum("bnht,bnthd->bnhd", weights.to(v.dtype), v).flatten(2))


def build_layers(flags: argparse.Namespace) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    make = functools.partial(TrajectoryAttention, flags.dim, flags.heads, qkv_bias=True, num_landmarks=flags.landmarks)
    layers = {"plain": Attention(flags.dim, flags.heads, qkv_bias=True), "exact": make(approx="none")}
    layers["exact-recompute"] = make(approx="none")
    layers["exact-recompute"].recompute = True
    return layers | {"orthoformer": make(approx="orthoformer"), "naive": Naive(layers["exact"])}


def check_naive(layers: dict[str, nn.Module], flags: argparse.Namespace, device: torch.device) -> None:
    x = torch.randn(1, flags.frames * min(flags.tokens, 49), flags.dim, device=device)
    with torch.no_grad():
        exact, naive = (layers[name](x, flags.frames) for name in ("exact", "naive"))
    error = ((exact - naive).abs().max() / naive.abs().max()).item()
    if not error < 1e-4:
        sys.exit(f"error: exact and naive differ by {error:.2g} of the largest value in fp32: nothing was timed")


class Case:
    """One layer on one input."""

    def __init__(self, layer: nn.Module, flags: argparse.Namespace, size: tuple[int, int], dtype: str, device):
        frames, tokens = size
        self.layer, self.autocast = layer, lambda: autocast(device, dtype)
        self.frames = () if isinstance(layer, Attention) else (frames,)
        self.x = torch.randn(flags.batch, frames * tokens, flags.dim, device=device, requires_grad=True)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.layer(self.x, *self.frames)

    def both(self) -> None:
        y = self.forward()
        y.backward(y.detach())
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None


def sweep_sizes(flags: argparse.Namespace) -> list[tuple[int, int]]:
    """(frames, tokens per frame); 7, 14 and 24 patches per side are 112, 224 and 384 pixels."""
    side = math.isqrt(flags.tokens)
    longer = [(max(flags.frames * factor // 2, 1), flags.tokens) for factor in (1, 2, 4, 8)]
    return longer + [(flags.frames, max(s, 1) ** 2) for s in (side // 2, side * 12 // 7)]


def too_large(name: str, size: tuple[int, int], flags: argparse.Namespace) -> bool:
    return name == "naive" and 4 * flags.batch * flags.heads * (size[0] * size[1]) ** 2 > flags.naive_limit * 1e9


def memory(name: str, case: Case, size: tuple[int, int], dtype: str, device: torch.device) -> int | None:
    if device.type == "cuda":
        return peak_growth(case.both, device)
    found = fresh_process(name, ["--frames", str(size[0]), "--tokens", str(size[1]), "--dtype", dtype])
    return found and found[0]


def report(layers, sizes: list[tuple[int, int]], flags: argparse.Namespace, rounds: int, dtype: str, device) -> None:
    """One table: every layer at every size, each size with its own references."""
    names = choose_rows(flags, list(layers))
    cases = {
        (name, size): Case(layers[name], flags, size, dtype, device)
        for size in sizes
        for name in names
        if not too_large(name, size, flags)
    }
    flop = {key: count_flop(case.both) for key, case in cases.items()}
    calls = {(*key, what): getattr(case, what) for key, case in cases.items() for what in ("forward", "both")}
    product = Product(device, dtype)
    seconds = time_rounds(calls | {"product": product}, rounds, device)
    print(header(device, dtype, product.peak(seconds["product"])))
    print(f"width {flags.dim}, {flags.heads} heads, batch {flags.batch}, {flags.landmarks} landmarks, {rounds} rounds")
    columns = ["layer", "frames x tokens", "N", "forward ms", "x naive", "x plain", "both ms", "x naive", "x plain"]
    columns += ["GFLOP", "of peak"]
    if not flags.skip_memory:
        columns.append("memory MB")
    rows = []
    for size in sizes:
        for name in names:
            row = [name, f"{size[0]} x {size[1]}", str(size[0] * size[1])]
            if (name, size) not in cases:
                rows.append(row + ["-"] * (len(columns) - 3))
                continue
            for what in ("forward", "both"):
                times = seconds[name, size, what]
                row.append(f"{statistics.median(times) * 1e3:.1f}")
                row += [ratio(times, seconds.get((reference, size, what))) for reference in ("naive", "plain")]
            done = flop[name, size]
            row += [f"{done / 1e9:.4g}", product.share(done, seconds[name, size, "both"], seconds["product"])]
            if not flags.skip_memory:
                grown = memory(name, cases[name, size], size, dtype, device)
                row.append("-" if grown is None else f"{grown / 1e6:.1f}")
            rows.append(row)
    print_table(columns, rows)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--frames", default=8, type=int, help="token frames (8)")
    parser.add_argument("--tokens", default=196, type=int, help="a frame (196)")
    parser.add_argument("--dim", default=768, type=int, help="width (768)")
    parser.add_argument("--heads", default=12, type=int)
    parser.add_argument("--batch", default=32 if torch.cuda.is_available() else 1, type=int, help="1; on a GPU 32")
    parser.add_argument("--landmarks", default=128, type=int, help="of orthoformer (128)")
    parser.add_argument("--naive_limit", default=1.5, type=float, help="GB of N x N weights in fp32 (1.5)")
    flags = parser.parse_args()
    device = start(flags)
    layers = {name: layer.to(device) for name, layer in build_layers(flags).items()}
    if flags.memory_of:
        case = Case(layers[flags.memory_of], flags, (flags.frames, flags.tokens), flags.dtype[0], device)
        case.both()
        print(peak_growth(case.both, device))
        return
    check_naive(layers, flags, device)
    for dtype in flags.dtype:
        report(layers, [(flags.frames, flags.tokens)], flags, flags.rounds, dtype, device)
        if flags.sweep:
            report(layers, sweep_sizes(flags), flags, max(flags.rounds // 2, 1), dtype, device)


if __name__ == "__main__":
    main()
