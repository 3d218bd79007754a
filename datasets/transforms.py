"""Augmentation of clips uint8 [T, 3, H, W], the same for all frames of a clip; randomness from a random.Random."""

import math

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SCALES = (1, 0.875, 0.75, 0.66)


def multi_scale_crop_box(height, width, size, rng, scales=SCALES):
    """The crop of TSN (Wang 2016) and VideoMAE: sides from a short table, at one of 13 fixed places.

    A side is the short side times a scale, or `size` itself where the two differ by less than 3 pixels; the scales of
    h and w are at most one step apart. Places: corners, mid-edges, centre, and the four quarter points.
    Returns: (top, left, h, w) in pixels.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 and size <= min(height, width) else side for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = rng.choice(pairs)
    row, column = (height - h) // 4, (width - w) // 4
    places = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]
    i, j = rng.choice(places)
    return i * row, j * column, h, w


def random_resized_crop_box(height, width, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """A box of `scale` of the area and a log-uniform aspect ratio w / h; after ten misfits the largest central one.

    Returns: (top, left, h, w) in pixels.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(clip, size, interpolation):
    """Resizes uint8 [T, 3, H, W] to size (an int: square; or (h, w)) with antialias; "bilinear" or "bicubic"."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    return F.resize(clip, size, InterpolationMode(interpolation), antialias=True)


def jitter_colors(clip, strength, rng):
    """Brightness, contrast and saturation of all frames times factors in [1 - strength, 1 + strength], random order."""
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    rng.shuffle(changes)
    for change in changes:
        clip = change(clip, rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return clip


class PretrainTransform:
    """Random crop, resize to size x size, horizontal flip and colour jitter, drawn once a clip.

    Args: size in pixels; crop "multiscale" or "random_resized"; interpolation "bicubic", "bilinear" or "random" (one of
    the two a clip); color_jitter, strength (0: none); flip, with probability a half.
    """

    def __init__(self, size, crop="multiscale", interpolation="bicubic", color_jitter=0.0, flip=True):
        if crop not in ("multiscale", "random_resized"):
            raise ValueError(f"unknown crop {crop!r}: choose multiscale or random_resized")
        if interpolation not in ("bicubic", "bilinear", "random"):
            raise ValueError(f"unknown interpolation {interpolation!r}: choose bicubic, bilinear or random")
        self.size, self.crop, self.interpolation = size, crop, interpolation
        self.color_jitter, self.flip = color_jitter, flip

    def __call__(self, clip, rng):
        """clip uint8 [T, 3, H, W], rng a random.Random -> uint8 [T, 3, size, size], contiguous."""
        height, width = clip.shape[-2:]
        if self.crop == "multiscale":
            top, left, h, w = multi_scale_crop_box(height, width, self.size, rng)
        else:
            top, left, h, w = random_resized_crop_box(height, width, rng)
        interpolation = rng.choice(("bilinear", "bicubic")) if self.interpolation == "random" else self.interpolation
        clip = resize(clip[..., top : top + h, left : left + w], self.size, interpolation)
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        if self.color_jitter > 0:
            clip = jitter_colors(clip, self.color_jitter, rng)
        return clip.contiguous()


def normalize(clips, mean, std):
    """Clips for the model, on their device.

    Args: clips uint8 [B, T, 3, H, W]; mean and std of the three channels (sequences, or tensors already on the device,
    which saves a copy from the host at each call).
    Returns: pixels in [0, 1] and video = (pixels - mean) / std, both float32 [B, 3, T, H, W].
    """
    mean, std = (torch.as_tensor(c, dtype=torch.float32, device=clips.device).view(3, 1, 1, 1) for c in (mean, std))
    pixels = clips.transpose(1, 2).float() / 255
    return pixels, (pixels - mean) / std
