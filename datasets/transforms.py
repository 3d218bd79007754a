"""Augmentation of clips uint8 [T, 3, H, W], the same for all frames of a clip; randomness from a random.Random."""

import math
import random

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SCALES = (1, 0.875, 0.75, 0.66)


def mean_and_std(imagenet: bool):
    """Input statistics of --imagenet_default_mean_and_std: mean and deviation of the channels of pixels in [0, 1]."""
    return (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (HALF_MEAN, HALF_STD)


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
        clip = resize(clip[..., top : top + h, left : left + w], self.size, pick_interpolation(self.interpolation, rng))
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        if self.color_jitter > 0:
            clip = jitter_colors(clip, self.color_jitter, rng)
        return clip.contiguous()


def pick_interpolation(interpolation, rng):
    """ "random" is one of the two kernels a clip."""
    return rng.choice(("bilinear", "bicubic")) if interpolation == "random" else interpolation


def auto_augmentation(config, interpolation="bicubic"):
    """timm's augmentation of PIL images that a string such as rand-m7-n4-mstd0.5-inc1 describes.

    Args: config, RandAugment ("rand-..."), AugMix ("augmix-...") or an AutoAugment policy ("v0", "original", "3a");
    interpolation of rotations and shears.
    Returns: a function of PIL images, drawing from random and numpy.random. Raises ValueError.
    """
    hparams = {}
    if interpolation != "random":
        hparams["interpolation"] = getattr(Image.Resampling, interpolation.upper())
    makers = {"rand": auto_augment.rand_augment_transform, "augmix": auto_augment.augment_and_mix_transform}
    make = makers.get(config.split("-")[0], auto_augment.auto_augment_transform)
    try:
        augment = make(config, hparams)
        operations = augment.ops if hasattr(augment, "ops") else [op for pair in augment.policy for op in pair]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
        return augment
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"--aa {config}: no augmentation of timm ({error or 'unknown part'}); for example rand-m7-n4-mstd0.5-inc1, "
            "augmix-m5-w4-d2, v0, or none"
        ) from error


def _posterize(image, bits, **unused):
    """timm's goes down to 0 bits at the strongest magnitude, an error in current Pillow."""
    return auto_augment.posterize(image, max(bits, 1))


def augment_frames(clip, augment, rng):
    """The same draw of timm's augmentation on every frame of uint8 [T, 3, H, W]: its two global generators are wound
    back before each frame, and are left as they were found."""
    seed = rng.getrandbits(32)
    states = random.getstate(), np.random.get_state()
    frames = []
    try:
        for frame in clip.permute(0, 2, 3, 1).contiguous().numpy():
            random.seed(seed)
            np.random.seed(seed)
            frames.append(np.asarray(augment(Image.fromarray(frame))))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def erase_box(height, width, rng, count=1, area=(0.02, 1 / 3), ratio=(0.3, 10 / 3)):
    """A box of random erasing (Zhong 2020): a share of the area divided by the number of boxes, log-uniform aspect
    ratio h / w. Returns: (top, left, h, w), or None after ten boxes that do not fit."""
    for _ in range(10):
        target = rng.uniform(*area) * height * width / count
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if h < height and w < width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


def random_erase(clip, rng, probability, mode="pixel", max_count=1, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """With a probability, fills the same 1 to max_count boxes in every frame of a clip uint8 [T, 3, H, W], in place.

    mode: "pixel", normal noise with the input's statistics, new in every frame; "rand", one such colour a box; "const",
    the mean (zero after normalisation). Noise is clipped to valid pixels.
    """
    if rng.random() >= probability:
        return clip
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    count = rng.randint(1, max_count)
    for _ in range(count):
        box = erase_box(*clip.shape[-2:], rng, count)
        if box is None:
            continue
        top, left, h, w = box
        shape = {"pixel": (len(clip), 3, h, w), "rand": (3, 1, 1), "const": None}[mode]
        noise = 0 if shape is None else torch.randn(shape, generator=generator)
        clip[..., top : top + h, left : left + w] = ((mean + std * noise) * 255).round().clamp(0, 255).byte()
    return clip


class FinetuneTransform:
    """Random resized crop, horizontal flip, RandAugment or colour jitter, random erasing: drawn once a clip.

    Unlike VideoMAE's, RandAugment sees the cropped clip (timm's order), 3 times fewer pixels of a 320 x 256 frame.
    Args: size in pixels; scale, share of the frame's area in the crop; augment, from auto_augmentation (None: colour
    jitter of the given strength); flip, with probability a half; erase_*: see random_erase.
    """

    def __init__(
        self,
        size,
        scale=(0.08, 1.0),
        interpolation="bicubic",
        augment=None,
        color_jitter=0.0,
        flip=True,
        erase_probability=0.0,
        erase_mode="pixel",
        erase_count=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ):
        self.size, self.scale, self.interpolation, self.augment = size, scale, interpolation, augment
        self.color_jitter, self.flip = color_jitter, flip
        self.erase = dict(probability=erase_probability, mode=erase_mode, max_count=erase_count, mean=mean, std=std)

    def __call__(self, clip, rng):
        """clip uint8 [T, 3, H, W], rng a random.Random -> uint8 [T, 3, size, size], contiguous."""
        top, left, h, w = random_resized_crop_box(*clip.shape[-2:], rng, self.scale)
        clip = resize(clip[..., top : top + h, left : left + w], self.size, pick_interpolation(self.interpolation, rng))
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        if self.augment is not None:
            clip = augment_frames(clip, self.augment, rng)
        elif self.color_jitter > 0:
            clip = jitter_colors(clip, self.color_jitter, rng)
        return random_erase(clip.contiguous(), rng, **self.erase)


def spatial_crops(frames, size, short_side, num_crops):
    """The evaluation's crops: short side resized (bilinear, antialias), then squares evenly along the long side.

    Args: frames uint8 [n, 3, H, W]; size and short_side in pixels, short_side >= size. One crop is the central one,
    several reach from edge to edge. Returns: uint8 [num_crops, n, 3, size, size], a view where possible.
    """
    height, width = frames.shape[-2:]
    scale = short_side / min(height, width)
    height, width = (max(short_side, round(side * scale)) for side in (height, width))
    frames = resize(frames, (height, width), "bilinear")
    crops = []
    for number in range(num_crops):
        place = number / (num_crops - 1) if num_crops > 1 else 0.5
        along_height, along_width = (place, 0.5) if height > width else (0.5, place)
        top, left = round((height - size) * along_height), round((width - size) * along_width)
        crops.append(frames[..., top : top + size, left : left + size])
    return torch.stack(crops)


def normalize(clips, mean, std):
    """Clips for the model, on their device.

    Args: clips uint8 [B, T, 3, H, W]; mean and std of the three channels (sequences, or tensors already on the device,
    which saves a copy from the host at each call).
    Returns: pixels in [0, 1] and video = (pixels - mean) / std, both float32 [B, 3, T, H, W].
    """
    mean, std = (torch.as_tensor(c, dtype=torch.float32, device=clips.device).view(3, 1, 1, 1) for c in (mean, std))
    pixels = clips.transpose(1, 2).float() / 255
    return pixels, (pixels - mean) / std
