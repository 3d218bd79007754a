"""The loop of a sampler with an optimizer of its own beside any masked autoencoder, which needs two functions:

tokens_of(pixels) -> the embedded tokens of all N places, without positions, [B, N, D]
error_of(pixels, mask, tokens) -> the error of each masked token, float32 [B, N_m], with the graph of the prediction
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

import ppo
from datasets.moving_shapes import KINDS, render_clip
from masking_generator import LearnedSampler, Mask, RandomMask, motion_energy, motion_lift, texture_energy


def parse_args(description: str, batch_size: int, arguments: list[str] | None) -> argparse.Namespace:
    """The flags of an example; seeds torch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=200, type=int, help="optimizer steps (default 200)")
    parser.add_argument("--warmup", default=100, type=int, help="steps of random masks before TATS (default 100)")
    parser.add_argument("--batch_size", default=batch_size, type=int, help=f"clips per step (default {batch_size})")
    parser.add_argument("--seed", default=0, type=int, help="of weights and clips (default 0)")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    return args


def shapes(batch_size: int, frames: int, size: int, seed: int, num_clips: int = 320) -> Iterator[Tensor]:
    """Endless batches of moving shapes, drawn from num_clips clips, pixels uint8 [B, 3, T, S, S]."""
    rng = np.random.default_rng(seed)
    clips = [render_clip(KINDS[i % len(KINDS)], rng, size, frames)[0] for i in range(max(num_clips, batch_size))]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()
    while True:
        yield pixels[rng.permutation(len(pixels))[:batch_size]]


def train(
    model: nn.Module,
    sampler: LearnedSampler,
    tokens_of: Callable[[Tensor], Tensor],
    error_of: Callable[[Tensor, Mask, Tensor], Tensor],
    batches: Iterator[Tensor],
    mask_ratio: float,
    steps: int,
    warmup: int,
) -> list[dict[str, float]]:
    """Trains both; the first `warmup` steps have random masks, and train the autoencoder alone. Returns what it prints,
    means of every 50 steps: loss, and of the visible tokens the motion (one frame: texture), 1 = that of all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    agent = torch.optim.AdamW(sampler.parameters(), lr=1e-3, eps=1e-12)
    random, records, seen = RandomMask(sampler.grid, mask_ratio), [], []
    for step, pixels in zip(range(steps), batches, strict=False):
        tokens = tokens_of(pixels)
        seed = torch.arange(len(pixels)) + step * len(pixels)  # all the chance there is in a mask
        mask = (random if step < warmup else sampler)(None, seed, tokens)
        error = error_of(pixels, mask, tokens)
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
        if step >= warmup:
            sampling_loss, _ = sampler.loss(mask.log_prob, mask.value, ppo.record(None, mask, error))
            agent.zero_grad()
            sampling_loss.backward()
            agent.step()
        energy = (motion_energy if pixels.shape[2] > 1 else texture_energy)(pixels, sampler.grid)
        seen.append((error.mean().item(), motion_lift(energy, mask.visible).item()))
        if len(seen) == 50 or step + 1 == steps:
            loss, lift = np.mean(seen, axis=0)
            records.append({"step": step + 1, "loss": float(loss), "lift": float(lift)})
            print(f"step {step + 1}: loss {loss:.3f}, lift {lift:.2f}, {'random' if step < warmup else 'chosen'} masks")
            seen = []
    return records
