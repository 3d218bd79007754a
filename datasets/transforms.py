"""Augmentation of clips uint8 [T, 3, H, W], the same for all frames of a clip; randomness from a random.Random."""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SCALES = (1, 0.875, 0.75, 0.66)  # VideoMAE's, of the short side

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
Channels = tuple[float, float, float]  # one number per colour


def mean_and_std(imagenet: bool) -> tuple[Channels, Channels]:
    """Input statistics of --imagenet_default_mean_and_std: mean and deviation of the channels of pixels in [0, 1]."""
    if imagenet:
        return IMAGENET_MEAN, IMAGENET_STD
    return HALF_MEAN, HALF_STD


def multi_scale_crop_box(
    height: int, width: int, size: int, rng: random.Random, scales: Sequence[float] = SCALES
) -> Box:
    """The crop of TSN (Wang 2016) and VideoMAE (GroupMultiScaleCrop): sides from a short table, 13 fixed places.

    A side is the short side times a scale, or `size` itself if the two differ by less than 3 pixels; the scales of
    h and w are at most one step apart. Places: corners, mid-edges, centre, and the four quarter points.
    Args: the frame's height and width and the output's size in pixels. Returns: (top, left, h, w) in pixels.
    """
    short_side = min(height, width)
    sides = [int(short_side * scale) for scale in scales]
    if size <= short_side:  # a crop of exactly the output's size needs no resize
        sides = [size if abs(side - size) < 3 else side for side in sides]
    # similar sides only, so that shapes are not stretched much
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = rng.choice(pairs)
    row, column = (height - h) // 4, (width - w) // 4  # steps between places: a quarter of the free space
    places = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]
    i, j = rng.choice(places)
    return i * row, j * column, h, w


def random_resized_crop_box(
    height: int,
    width: int,
    rng: random.Random,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """The box of torchvision's RandomResizedCrop: a share of the area within `scale`, aspect ratio w / h log-uniform
    within `ratio`; after ten boxes that do not fit, the largest central one.

    Returns: (top, left, h, w) in pixels.
    """
    for _ in range(10):  # as torchvision
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    # no box fits, as in a very wide frame
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(clip: torch.Tensor, size: int | tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resizes uint8 [T, 3, H, W] to size (an int: square; or (h, w)) with antialias; "bilinear" or "bicubic"."""
    if isinstance(size, int):
        size = (size, size)
    return F.resize(clip, size, InterpolationMode(interpolation), antialias=True)


def jitter_colors(clip: torch.Tensor, strength: float, rng: random.Random) -> torch.Tensor:
    """Multiplies brightness, contrast and saturation of uint8 [T, 3, H, W], in random order, by factors uniform in
    [1 - strength, 1 + strength], the same for all frames."""
    changes = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    rng.shuffle(changes)
    for change in changes:
        clip = change(clip, rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return clip


class PretrainTransform:
    """Random crop, resize to size x size, horizontal flip and colour jitter, drawn once per clip.

    Args: size in pixels; crop "multiscale" or "random_resized"; interpolation "bicubic", "bilinear" or "random" (one of
    the two per clip); color_jitter, strength (0: none); flip, with probability a half. Raises: ValueError.
    """

    def __init__(
        self,
        size: int,
        crop: str = "multiscale",
        interpolation: str = "bicubic",
        color_jitter: float = 0.0,
        flip: bool = True,
    ) -> None:
        if crop not in ("multiscale", "random_resized"):
            raise ValueError(f"unknown crop {crop!r}: choose multiscale or random_resized")
        if interpolation not in ("bicubic", "bilinear", "random"):
            raise ValueError(f"unknown interpolation {interpolation!r}: choose bicubic, bilinear or random")
        self.size, self.crop, self.interpolation = size, crop, interpolation
        self.color_jitter, self.flip = color_jitter, flip

    def __call__(self, clip: torch.Tensor, rng: random.Random) -> torch.Tensor:
        """clip uint8 [T, 3, H, W] -> uint8 [T, 3, size, size], contiguous."""
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


def pick_interpolation(interpolation: str, rng: random.Random) -> str:
    """The kernel of one clip: "random" draws one of the two."""
    if interpolation == "random":
        return rng.choice(("bilinear", "bicubic"))
    return interpolation


def auto_augmentation(config: str, interpolation: str = "bicubic") -> Callable[[Image.Image], Image.Image]:
    """timm's augmentation of PIL images that a string such as rand-m7-n4-mstd0.5-inc1 describes.

    Args: config, RandAugment ("rand-..."), AugMix ("augmix-...") or an AutoAugment policy ("v0", "original", "3a");
    interpolation of rotations and shears ("random": timm draws one).
    Returns: a function of PIL images that draws from random and numpy.random. Raises: ValueError.
    """
    hparams = {}  # without "interpolation" timm draws bilinear or bicubic
    if interpolation != "random":
        hparams["interpolation"] = getattr(Image.Resampling, interpolation.upper())
    makers = {"rand": auto_augment.rand_augment_transform, "augmix": auto_augment.augment_and_mix_transform}
    make = makers.get(config.split("-")[0], auto_augment.auto_augment_transform)
    try:
        augment = make(config, hparams)
        if hasattr(augment, "ops"):
            operations = augment.ops
        else:  # an AutoAugment policy: lists of operations
            operations = [operation for part in augment.policy for operation in part]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
        return augment
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"--aa {config}: no augmentation of timm ({error or 'unknown part'}); for example rand-m7-n4-mstd0.5-inc1, "
            "augmix-m5-w4-d2, v0, or none"
        ) from error


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    """timm's goes down to 0 bits at the strongest magnitude, an error in current Pillow."""
    return auto_augment.posterize(image, max(bits, 1))


def augment_frames(
    clip: torch.Tensor, augment: Callable[[Image.Image], Image.Image], rng: random.Random
) -> torch.Tensor:
    """Applies the same draw of timm's augmentation to every frame of uint8 [T, 3, H, W].

    timm draws from two global generators: both get the same seed before each frame, and their old state back at last.
    """
    seed = rng.getrandbits(32)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    frames = []
    try:
        for frame in clip.permute(0, 2, 3, 1).contiguous().numpy():  # [H, W, 3]
            random.seed(seed)
            np.random.seed(seed)
            frames.append(np.asarray(augment(Image.fromarray(frame))))
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # [T, H, W, 3] -> [T, 3, H, W]


def erase_box(
    height: int,
    width: int,
    rng: random.Random,
    count: int = 1,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 10 / 3),
) -> Box | None:
    """A box of random erasing (Zhong 2020, timm): a share of the frame within `area`, divided by the number of boxes;
    aspect ratio h / w log-uniform within `ratio`.

    Returns: (top, left, h, w) in pixels, or None after ten boxes that do not fit.
    """
    for _ in range(10):
        target = rng.uniform(*area) * height * width / count
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if h < height and w < width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


def random_erase(
    clip: torch.Tensor,
    rng: random.Random,
    probability: float,
    mode: str = "pixel",
    max_count: int = 1,
    mean: Channels = IMAGENET_MEAN,
    std: Channels = IMAGENET_STD,
) -> torch.Tensor:
    """With a probability, fills the same 1 to max_count boxes in every frame of a clip uint8 [T, 3, H, W], in place.

    mode: "pixel", normal noise with the input's statistics, new in every frame; "rand", one such colour per box;
    "const", the mean (zero after normalisation). Noise is clipped to valid pixels.
    """
    if rng.random() >= probability:
        return clip
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    count = rng.randint(1, max_count)
    for _ in range(count):
        box = erase_box(*clip.shape[-2:], rng, count)
        if box is None:
            continue
        top, left, h, w = box
        if mode == "const":
            noise = 0
        else:
            # [T, 3, h, w], or one colour for all frames and pixels of the box
            shape = {"pixel": (len(clip), 3, h, w), "rand": (3, 1, 1)}[mode]
            noise = torch.randn(shape, generator=generator)
        clip[..., top : top + h, left : left + w] = ((mean + std * noise) * 255).round().clamp(0, 255).byte()
    return clip


class FinetuneTransform:
    """Random resized crop, horizontal flip, RandAugment or colour jitter, random erasing: drawn once per clip.

    Unlike VideoMAE's, RandAugment sees the cropped clip (timm's order), 3 times fewer pixels of a 320 x 256 frame.
    Args: size in pixels; scale, share of the frame's area in the crop; augment, from auto_augmentation (None: colour
    jitter of the given strength); flip, with probability a half; erase_*: see random_erase.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        interpolation: str = "bicubic",
        augment: Callable[[Image.Image], Image.Image] | None = None,
        color_jitter: float = 0.0,
        flip: bool = True,
        erase_probability: float = 0.0,
        erase_mode: str = "pixel",
        erase_count: int = 1,
        mean: Channels = IMAGENET_MEAN,
        std: Channels = IMAGENET_STD,
    ) -> None:
        self.size, self.scale, self.interpolation, self.augment = size, scale, interpolation, augment
        self.color_jitter, self.flip = color_jitter, flip
        self.erase = dict(probability=erase_probability, mode=erase_mode, max_count=erase_count, mean=mean, std=std)

    def __call__(self, clip: torch.Tensor, rng: random.Random) -> torch.Tensor:
        """clip uint8 [T, 3, H, W] -> uint8 [T, 3, size, size], contiguous."""
        top, left, h, w = random_resized_crop_box(*clip.shape[-2:], rng, self.scale)
        # cropped before it is resized: fewer pixels to filter
        clip = resize(clip[..., top : top + h, left : left + w], self.size, pick_interpolation(self.interpolation, rng))
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        if self.augment is not None:
            clip = augment_frames(clip, self.augment, rng)
        elif self.color_jitter > 0:
            clip = jitter_colors(clip, self.color_jitter, rng)
        return random_erase(clip.contiguous(), rng, **self.erase)


def spatial_crops(frames: torch.Tensor, size: int, short_side: int, num_crops: int) -> torch.Tensor:
    """The evaluation's crops: short side resized (bilinear, antialias), then squares evenly along the long side.

    Args: frames uint8 [n, 3, H, W]; size and short_side in pixels, short_side >= size. One crop is the central one,
    several reach from edge to edge. Returns: uint8 [num_crops, n, 3, size, size], a view where possible.
    """
    height, width = frames.shape[-2:]
    scale = short_side / min(height, width)
    height, width = max(short_side, round(height * scale)), max(short_side, round(width * scale))
    frames = resize(frames, (height, width), "bilinear")
    crops = []  # squares [n, 3, size, size]
    for number in range(num_crops):
        place = 0.5  # of the free space along the long side: the centre
        if num_crops > 1:
            place = number / (num_crops - 1)
        if height > width:
            top, left = round((height - size) * place), round((width - size) * 0.5)
        else:
            top, left = round((height - size) * 0.5), round((width - size) * place)
        crops.append(frames[..., top : top + size, left : left + size])
    return torch.stack(crops)


def normalize(
    clips: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips for the model, on their device.

    Args: clips uint8 [B, T, 3, H, W]; mean and std of the three channels (tensors already on the device save a copy
    from the host per call).
    Returns: pixels in [0, 1] and video = (pixels - mean) / std, both float32 [B, 3, T, H, W].
    """
    mean, std = (torch.as_tensor(c, dtype=torch.float32, device=clips.device).view(3, 1, 1, 1) for c in (mean, std))
    pixels = clips.transpose(1, 2).float() / 255  # [B, 3, T, H, W]
    return pixels, (pixels - mean) / std
