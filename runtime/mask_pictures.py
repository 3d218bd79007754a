"""Masks as pictures, made with torch alone, for training processes and for run_mae_vis.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from masking_generator import Mask

DARK = 0.12  # what is left of a hidden token's brightness


def darken(frames: Tensor, mask: Mask, grid: tuple[int, int, int]) -> Tensor:
    """frames [B, 3, F, H, W], F a multiple of the t token frames, with the tokens hidden from the encoder darkened."""
    keep = (~mask.hidden()).to(frames.dtype).unflatten(1, grid).unsqueeze(1)
    return frames * (DARK + (1 - DARK) * F.interpolate(keep, size=frames.shape[2:], mode="nearest"))


@torch.no_grad()
def mask_picture(pixels: Tensor, mask: Mask, grid: tuple[int, int, int]) -> Tensor:
    """Rows of clips: the first frame of every tubelet, under it the same as the encoder sees it, and for a learned
    sampler the probability of the tokens, white = the clip's highest. pixels [B, 3, T, H, W] in [0, 1] -> uint8
    [3, B * rows * H, t * W].
    """
    frames = pixels[:, :, :: pixels.shape[2] // grid[0]]
    rows = [frames, darken(frames, mask, grid)]
    if mask.log_prob is not None:
        probability = (mask.log_prob - mask.log_prob.amax(dim=1, keepdim=True)).exp().unflatten(1, grid).unsqueeze(1)
        rows.append(F.interpolate(probability, size=frames.shape[2:], mode="nearest").expand_as(frames))
    picture = torch.stack(rows, dim=1)  # [B, rows, 3, t, H, W]
    picture = picture.permute(2, 0, 1, 4, 3, 5).flatten(4, 5).flatten(1, 3)  # [3, B * rows * H, t * W]
    return (picture * 255).round().clamp(0, 255).to(torch.uint8).cpu()
