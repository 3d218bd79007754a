"""Fine-tuning's data: augmentation, sampling, lists, the evaluation's data set, and both loaders."""

import argparse
import functools
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from datasets import decoding, transforms
from datasets.build import DATA_SETS, build_evaluation_loader, build_finetuning_loader, find_list
from datasets.lists import ListError, read_list
from datasets.moving_shapes import write_video
from datasets.transforms import (
    HALF_MEAN,
    HALF_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    FinetuneTransform,
    augment_frames,
    auto_augmentation,
    erase_box,
    mean_and_std,
    random_erase,
    random_resized_crop_box,
    spatial_crops,
)
from datasets.video import EvalVideoDataset, TrainVideoDataset, clip_indices, collate_views, view_indices
from tests.helpers.runs import naming

av = pytest.importorskip("av")
torch.set_num_threads(1)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_decoded(clip):
    """The same clip in a decoder's memory order: frame, row, column, channel."""
    return clip.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def smooth(frames, height, width, seed=0):
    """uint8 [frames, 3, height, width] without edges, in a decoder's memory order."""
    small = noise(frames, 3, 5, 6, seed=seed).float()
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=False)
    return as_decoded(large.clamp(0, 255).byte())


def global_states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def pil_resize(frame, height, width, kernel):
    """uint8 [3, h, w] by PIL, which always smooths when it shrinks."""
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).resize((width, height), kernel)
    return np.asarray(image).transpose(2, 0, 1).astype(int)


# ---------------------------------------------------------------------------------------------- timm's augmentation


HPARAMS = dict(translate_const=10, interpolation=Image.Resampling.BICUBIC)  # 0.45 of 24 pixels
FAMILIES = {
    "rand-m7-n4-mstd0.5-inc1": auto_augment.rand_augment_transform,
    "rand-m9-n3-p0.9-tweights": auto_augment.rand_augment_transform,
    "augmix-m5-w4-d2": auto_augment.augment_and_mix_transform,
    "augmix-m3-b1": auto_augment.augment_and_mix_transform,
    "v0": auto_augment.auto_augment_transform,
    "original-mstd0.5": auto_augment.auto_augment_transform,
    "3a": auto_augment.auto_augment_transform,
}


@pytest.mark.parametrize("config", FAMILIES)
def test_augmentation_of_a_clip_is_timms_of_each_frame_alone(config):
    """timm's two generators stand at the same place before every frame, wherever that is."""
    clip, states = noise(3, 3, 24, 24), []
    ours, theirs = auto_augmentation(config), FAMILIES[config](config, dict(HPARAMS))

    def watched(image):
        states.append((random.getstate(), np.random.get_state()))
        return ours(image)

    starts, changed = set(), 0
    for seed in range(8):
        states.clear()
        before = global_states()
        together = augment_frames(clip, watched, random.Random(seed))
        assert global_states() == before
        assert together.shape == clip.shape and together.dtype == torch.uint8
        assert len(states) == 3 and len({str(state) for state in states}) == 1
        for frame, output in zip(clip, together, strict=True):
            random.setstate(states[0][0])
            np.random.set_state(states[0][1])
            alone = np.asarray(theirs(Image.fromarray(frame.permute(1, 2, 0).numpy())))
            assert np.array_equal(output.permute(1, 2, 0), alone)
        starts.add(str(states[0]))
        changed += not torch.equal(together, clip)
        again = augment_frames(clip, ours, random.Random(seed))
        assert torch.equal(together, again)
    assert len(starts) == 8 and changed >= 4


@pytest.mark.parametrize("config", ["rand-m9-n4-mstd0.5-inc1", "augmix-m5-w4-d2", "v0"])
def test_equal_frames_stay_equal(config):
    clip = noise(1, 3, 24, 24).expand(4, -1, -1, -1)
    augment = auto_augmentation(config, "random")  # the kernel is drawn too
    outputs = [augment_frames(clip, augment, random.Random(seed)) for seed in range(8)]
    assert all(torch.equal(output, output[:1].expand_as(output)) for output in outputs)
    assert len({output.numpy().tobytes() for output in outputs}) >= 4


@pytest.mark.parametrize(
    "interpolation, kernel",
    [
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
        ("random", auto_augment._RANDOM_INTERPOLATION),
    ],
)
def test_interpolation_reaches_timm(interpolation, kernel):
    for op in auto_augmentation("rand-m9-n2", interpolation).ops:
        assert op.kwargs["resample"] == kernel


@pytest.mark.parametrize(
    "config", ["nonsense", "v9", "rand-q5", "rand-m1.5", "rand-nx3", "augmix-z3", "augmix-w1.5", "original-m3", "randy"]
)
def test_unknown_augmentation_is_refused_by_flag(config):
    with pytest.raises(ValueError, match=naming(f"--aa {config}", "rand-m7-n4-mstd0.5-inc1")):
        auto_augmentation(config)


@pytest.mark.parametrize("config", ["rand-m10-n2-p1.0-inc1", "augmix-m10-mstd0", "v0"])
def test_posterize_keeps_one_bit_at_the_strongest(config):
    """timm would keep none, which current Pillow refuses."""
    augment = auto_augmentation(config)
    operations = augment.ops if config != "v0" else [op for pair in augment.policy for op in pair if op.magnitude == 2]
    (operation,) = (op for op in operations if op.name.startswith("Posterize"))
    image = noise(24, 24, 3).numpy()
    random.seed(0)
    outputs = {np.asarray(operation(Image.fromarray(image))).tobytes() for _ in range(40)}
    assert outputs - {image.tobytes()} == {(image & 0x80).tobytes()}


# --------------------------------------------------------------------------------------------------- random erasing


def test_erase_boxes_are_uniform_in_area_and_log_uniform_in_aspect_ratio():
    for count in (1, 4):
        rng = random.Random(0)
        top, left, h, w = np.array([erase_box(400, 300, rng, count, ratio=(0.5, 2)) for _ in range(4000)]).T
        assert top.min() >= 0 and left.min() >= 0 and (top + h).max() <= 400 and (left + w).max() <= 300
        area = h * w * count / (400 * 300)
        assert 0.0195 < area.min() < 0.022 and 0.33 < area.max() < 0.336
        expected = [0.02 + share * (1 / 3 - 0.02) for share in (0.25, 0.5, 0.75)]
        if count > 1:  # one large box may not fit and is drawn again, four small ones always do
            np.testing.assert_allclose(np.quantile(area, (0.25, 0.5, 0.75)), expected, atol=0.011)
        aspect = np.log2(h / w)  # uniform over -1 .. 1
        assert -1.03 < aspect.min() < -0.98 and 0.95 < aspect.max() < 1.03
        if count > 1:
            np.testing.assert_allclose(np.quantile(aspect, (0.25, 0.5, 0.75)), [-0.5, 0, 0.5], atol=0.09)
        for start, length, limit in ((top, h, 400), (left, w, 300)):
            place = start / (limit - length)
            np.testing.assert_allclose(np.quantile(place, (0.25, 0.5, 0.75)), [0.25, 0.5, 0.75], atol=0.05)
            assert place.min() == 0 and place.max() == 1


def test_erase_box_defaults_and_misfits():
    rng = random.Random(0)
    h, w = np.array([erase_box(1000, 1000, rng)[2:] for _ in range(2000)]).T
    assert 0.02 < (h * w).min() / 1e6 < 0.022 and 0.32 < (h * w).max() / 1e6 < 0.334
    assert 0.298 < (h / w).min() < 0.32 and 3.1 < (h / w).max() < 3.35
    assert erase_box(20, 20, rng, area=(1, 1)) is None  # a box of the whole area is too high or too wide
    assert {erase_box(10, 10, rng, area=(0.81, 0.81), ratio=(1, 1))[2:] for _ in range(20)} == {(9, 9)}


BACKGROUND = 7


def erased(seed, mode, size=(40, 50), **kwargs):
    """A clip of one colour after erasing, and bool [H, W], the same in every frame: where it was erased."""
    clip = torch.full((3, 3, *size), BACKGROUND, dtype=torch.uint8)
    output = random_erase(clip, random.Random(seed), kwargs.pop("probability", 1.0), mode, **kwargs)
    assert output.data_ptr() == clip.data_ptr() and output.dtype == torch.uint8  # in place
    changed = (output != BACKGROUND).any(dim=1)  # noise hits all three channels of the background once in 10^9
    assert (changed == changed[:1]).all()
    return output, changed[0]


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_one_box_is_erased_in_every_frame_and_nothing_outside(mode):
    before = global_states()
    for seed in range(30):
        output, where = erased(seed, mode)
        rows, columns = where.any(dim=1), where.any(dim=0)
        assert torch.equal(where, rows[:, None] & columns)  # a filled box
        assert 0.015 < where.float().mean() < 0.36
        assert (output[..., ~where] == BACKGROUND).all()
        assert torch.equal(output, erased(seed, mode)[0])
    assert global_states() == before
    assert len({erased(seed, mode)[1].numpy().tobytes() for seed in range(30)}) == 30


@pytest.mark.parametrize("mean, std", [(IMAGENET_MEAN, IMAGENET_STD), (HALF_MEAN, HALF_STD)])
def test_erased_pixels_have_the_inputs_statistics(mean, std):
    draw = np.random.default_rng(0).standard_normal(200_000)
    noise_of = [np.clip(np.round((m + s * draw) * 255), 0, 255) for m, s in zip(mean, std, strict=True)]
    pixels, colours = [], []
    for seed in range(150):
        output, where = erased(seed, "const", mean=mean, std=std)
        assert output[..., where].unique(dim=2).squeeze().tolist() == [[round(255 * m) for m in mean]] * 3
        output, where = erased(seed, "pixel", mean=mean, std=std)
        inside = output[..., where]  # [T, 3, n]
        assert not torch.equal(inside[0], inside[1])
        pixels.append(inside.permute(1, 0, 2).flatten(1))
        output, where = erased(seed, "rand", mean=mean, std=std)
        (colour,) = {tuple(c) for c in output[..., where].permute(0, 2, 1).flatten(0, 1).tolist()}
        colours.append(colour)
    pixels = torch.cat(pixels, dim=1).double()
    for channel in range(3):
        expected = noise_of[channel]
        assert pixels[channel].mean().item() == pytest.approx(expected.mean(), abs=0.6)
        assert pixels[channel].std().item() == pytest.approx(expected.std(), abs=0.6)
        assert np.mean([c[channel] for c in colours]) == pytest.approx(expected.mean(), abs=4 * expected.std() / 12)
        assert np.std([c[channel] for c in colours]) == pytest.approx(expected.std(), rel=0.2)
    correlation = np.corrcoef(pixels[:2, :50_000])[0, 1]  # channels, and frames of a pixel, have their own noise
    assert abs(correlation) < 0.03


def test_erasing_has_its_probability():
    for probability, low, high in ((0.0, 0, 0), (0.25, 110, 190), (1.0, 600, 600)):
        assert low <= sum(bool(erased(seed, "const", probability=probability)[1].any()) for seed in range(600)) <= high


def test_one_to_max_count_boxes_share_the_area():
    counts, shares = Counter(), {1: [], 2: [], 3: []}
    for seed in range(400):
        output, where = erased(seed, "rand", size=(60, 60), max_count=3)
        count = len({tuple(c) for c in output[0][:, where].T.tolist()})  # a colour a box
        counts[count] += 1
        shares[count].append(where.float().mean().item())
    assert set(counts) == {1, 2, 3} and all(100 < number < 170 for number in counts.values())
    for values in shares.values():  # together they take what one box would
        assert max(values) < 0.36 and 0.13 < np.mean(values) < 0.2
    assert {len(erased(seed, "rand", max_count=1)[0].unique()) <= 4 for seed in range(50)} == {True}


# ----------------------------------------------------------------------------------------- the training transform


@pytest.mark.parametrize("height, width", [(48, 60), (60, 40)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_transform_crops_and_resizes_each_frame(height, width, interpolation):
    clip = smooth(3, height, width)
    kernel = Image.Resampling[interpolation.upper()]
    for seed in range(8):
        output = FinetuneTransform(24, (0.2, 0.9), interpolation, flip=False)(clip, random.Random(seed))
        assert output.shape == (3, 3, 24, 24) and output.dtype == torch.uint8 and output.is_contiguous()
        top, left, h, w = random_resized_crop_box(height, width, random.Random(seed), (0.2, 0.9))
        for frame, result in zip(clip, output, strict=True):
            expected = pil_resize(frame[:, top : top + h, left : left + w], 24, 24, kernel)
            assert np.abs(result.numpy() - expected).max() <= 2


AUGMENTED = dict(augment=auto_augmentation("rand-m7-n2-mstd0.5-inc1"), color_jitter=0.4)


@pytest.mark.parametrize("mode", ["const", "rand"])
@pytest.mark.parametrize("settings", [AUGMENTED, dict(color_jitter=0.4), {}])
def test_transform_is_the_same_frame_by_frame_and_depends_on_its_generator_alone(settings, mode):
    clip, outputs = smooth(3, 40, 50), set()
    transform = FinetuneTransform(
        24, interpolation="random", erase_probability=0.5, erase_mode=mode, erase_count=2, **settings
    )
    untouched = clip.clone()
    for seed in range(10):
        before = global_states()
        together = transform(clip, random.Random(seed))
        assert global_states() == before and together.is_contiguous() and together.dtype == torch.uint8
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert torch.equal(together, torch.cat([transform(frame[None], random.Random(seed)) for frame in clip]))
        outputs.add(together.numpy().tobytes())
    assert len(outputs) == 10 and torch.equal(clip, untouched)


def test_half_of_the_clips_are_mirrored_unless_flip_is_off():
    clip = smooth(2, 40, 50)
    flips = 0
    for seed in range(300):  # the flip is the last draw here: the crop is the same with and without
        plain = FinetuneTransform(16, flip=False)(clip, random.Random(seed))
        output = FinetuneTransform(16)(clip, random.Random(seed))
        flips += torch.equal(output, plain.flip(-1))
        assert torch.equal(output, plain) or torch.equal(output, plain.flip(-1))
        rising = torch.arange(50).mul(5).byte().expand(2, 3, 40, 50)
        assert (FinetuneTransform(16, flip=False)(rising, random.Random(seed)).int().diff(dim=-1) >= 0).all()
    assert 110 < flips < 190


def test_stages_come_in_their_order():
    """Crop and flip; timm's augmentation of that, in place of colour jitter; erasing of that, over the rest."""
    clip = smooth(3, 40, 50)
    flipped = dict(size=24, scale=(0.3, 1.0))
    brighter = erasing = 0
    for seed in range(30):
        plain, rng = FinetuneTransform(**flipped)(clip, random.Random(seed)), random.Random(seed)
        random_resized_crop_box(40, 50, rng, (0.3, 1.0))
        rng.random()  # the flip's
        expected = augment_frames(plain, AUGMENTED["augment"], rng).contiguous()
        options = dict(erase_probability=0.5, erase_mode="rand", erase_count=3, mean=HALF_MEAN, std=HALF_STD)
        output = FinetuneTransform(**flipped, **AUGMENTED, **options)(clip, random.Random(seed))
        random_erase(expected, rng, 0.5, "rand", 3, HALF_MEAN, HALF_STD)
        assert torch.equal(output, expected)
        jittered = FinetuneTransform(**flipped, color_jitter=0.4)(clip, random.Random(seed))
        brighter += abs(jittered.float().mean() - plain.float().mean()) > 5
        erasing += not torch.equal(
            jittered, FinetuneTransform(**flipped, color_jitter=0.4, erase_probability=0.5)(clip, random.Random(seed))
        )
    assert brighter > 10 and 8 <= erasing <= 22


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.1, 0.3)])
def test_crop_takes_its_share_of_the_area(monkeypatch, scale):
    shares, resize = [], transforms.resize
    monkeypatch.setattr(
        transforms, "resize", lambda clip, *rest: shares.append(clip[0, 0].numel() / 12000) or resize(clip, *rest)
    )
    transform = FinetuneTransform(8) if scale == (0.08, 1.0) else FinetuneTransform(8, scale)
    clip = torch.zeros(1, 3, 100, 120, dtype=torch.uint8)
    for seed in range(400):
        transform(clip, random.Random(seed))
    assert scale[0] * 0.97 < min(shares) < scale[0] * 1.25 and scale[1] * 0.9 < max(shares) <= scale[1] * 1.02


# -------------------------------------------------------------------------------------------- the evaluation's crops


@pytest.mark.parametrize("num_crops", [1, 2, 3, 5])
@pytest.mark.parametrize("height, width", [(40, 53), (61, 36), (45, 45), (24, 40), (40, 24)])
@pytest.mark.parametrize("size, short_side", [(24, 24), (24, 31)])
def test_crops_equal_slices_of_frames_resized_one_by_one(num_crops, height, width, size, short_side):
    frames = smooth(2, height, width)
    crops = spatial_crops(frames, size, short_side, num_crops)
    assert crops.shape == (num_crops, 2, 3, size, size) and crops.dtype == torch.uint8
    if height < width:
        new = short_side, round(Fraction(width * short_side, height))
    else:
        new = round(Fraction(height * short_side, width)), short_side
    long, exact = max(new), (height, width) == new
    starts = [(long - size) / 2] if num_crops == 1 else np.linspace(0, long - size, num_crops)
    across = (short_side - size) // 2
    for crop, start in zip(crops, starts, strict=True):
        for frame, result in zip(frames, crop, strict=True):
            resized = pil_resize(frame, *new, Image.Resampling.BILINEAR)
            best = 255
            for along in {int(np.floor(start)), int(np.ceil(start))}:  # halves may go either way
                for off in {across, across + (short_side - size) % 2}:
                    top, left = (along, off) if height > width else (off, along)
                    expected = resized[:, top : top + size, left : left + size]
                    if expected.shape == result.shape:
                        best = min(best, np.abs(result.numpy() - expected).max())
            assert best <= (0 if exact else 1)


def test_several_crops_reach_from_edge_to_edge_and_one_lies_in_the_middle():
    ramp = torch.arange(40, dtype=torch.uint8).expand(1, 3, 20, 40)  # a pixel's value is its column
    for frames in (ramp, ramp.transpose(2, 3)):
        lines = [
            crop.unique().tolist() for number in (1, 2, 3, 5) for crop in spatial_crops(frames, 20, 20, number)[:, 0]
        ]
        starts = [10, 0, 20, 0, 10, 20, 0, 5, 10, 15, 20]
        assert lines == [list(range(start, start + 20)) for start in starts]


# ---------------------------------------------------------------------------------------------- frames of a clip


def test_one_segment_is_the_dense_clip_of_pretraining():
    for seed, (length, frames, stride) in enumerate([(40, 4, 3), (10, 4, 3), (9, 4, 3), (1, 4, 2), (300, 16, 4)] * 20):
        rng, ours = random.Random(seed), random.Random(seed)
        start = rng.randint(0, max(length - ((frames - 1) * stride + 1), 0))
        dense = [min(start + i * stride, length - 1) for i in range(frames)]
        assert clip_indices(length, frames, stride, ours) == dense
        assert clip_indices(length, frames, stride, random.Random(seed), num_segments=1) == dense
        assert ours.getstate() == rng.getstate()


@pytest.mark.parametrize("length, segments", [(40, 8), (43, 8), (16, 16), (37, 5)])
def test_each_segment_gives_a_frame_uniform_over_it(length, segments):
    """Frame f belongs to segment s where floor(s n / S) <= f < floor((s + 1) n / S); the stride has no say."""
    rng = random.Random(0)
    draws = 400 * -(-length // segments)
    clips = np.array([clip_indices(length, segments, 7, rng, segments) for _ in range(draws)])
    for segment in range(segments):
        members = [f for f in range(length) if segment * length // segments <= f < (segment + 1) * length // segments]
        counts = Counter(clips[:, segment].tolist())
        assert set(counts) == set(members)
        expected = draws / len(members)
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < len(members) + 5 * (2 * len(members)) ** 0.5
    if length > 2 * segments:  # each segment is drawn for itself
        assert abs(np.corrcoef(clips[:, 0], clips[:, 1])[0, 1]) < 0.1


@pytest.mark.parametrize("sample", ["random", "view"])
@pytest.mark.parametrize("length, frames, stride, segments", [(60, 8, 3, 4), (61, 6, 2, 3), (30, 4, 14, 2)])
def test_segments_of_several_frames_hold_a_stride_within_them(length, frames, stride, segments, sample):
    a_segment = frames // segments
    starts = [set() for _ in range(segments)]
    for seed in range(200):
        if sample == "random":
            clip = clip_indices(length, frames, stride, random.Random(seed), segments)
        else:
            clip = view_indices(length, frames, stride, segments, seed, 200)
        for segment in range(segments):
            part = clip[segment * a_segment : (segment + 1) * a_segment]
            assert part == list(range(part[0], part[0] + a_segment * stride, stride))
            assert segment * length // segments <= part[0] and part[-1] < (segment + 1) * length // segments
            starts[segment].add(part[0])
    span = (a_segment - 1) * stride + 1
    for segment, seen in enumerate(starts):
        begin, end = segment * length // segments, (segment + 1) * length // segments
        assert seen == set(range(begin, end - span + 1))


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("frames, stride, segments", [(8, 1, 8), (8, 4, 8), (8, 4, 1), (8, 3, 2)])
def test_short_videos_give_all_they_have(length, frames, stride, segments):
    clips = [clip_indices(length, frames, stride, random.Random(seed), segments) for seed in range(20)]
    clips += [view_indices(length, frames, stride, segments, view, 3) for view in range(3)]
    for clip in clips:
        assert len(clip) == frames and min(clip) >= 0 and max(clip) <= length - 1
        if segments in (1, frames):
            assert clip == sorted(clip)
        if segments == frames and length < frames:
            assert set(clip) == set(range(length))
        if segments == 1 and length < (frames - 1) * stride + 1:
            assert clip == [min(i * stride, length - 1) for i in range(frames)]


@pytest.mark.parametrize("length, frames, stride", [(100, 8, 4), (33, 8, 4), (29, 8, 4), (28, 8, 4), (5, 8, 4)])
@pytest.mark.parametrize("num_views", [1, 2, 3, 5, 10])
def test_dense_views_are_spread_from_the_first_start_to_the_last(length, frames, stride, num_views):
    last = max(length - ((frames - 1) * stride + 1), 0)
    for view in range(num_views):
        clip = view_indices(length, frames, stride, 1, view, num_views)
        start = last / 2 if num_views == 1 else last * view / (num_views - 1)
        assert abs(clip[0] - start) <= 0.5
        assert clip == [min(clip[0] + i * stride, length - 1) for i in range(frames)]
        assert clip == view_indices(length, frames, stride, 1, view, num_views)


@pytest.mark.parametrize("length, segments", [(64, 16), (160, 16), (48, 16), (77, 16), (16, 16), (24, 8)])
def test_the_view_of_segments_is_their_middle(length, segments):
    """TSN's rule for the test: int(tick / 2 + tick j), tick = n / segments."""
    tick = length / segments
    middle = [int(tick / 2 + tick * j) for j in range(segments)]
    ours = view_indices(length, segments, 4, segments, 0, 1)
    if length % segments:  # parts of equal length only up to a frame
        assert max(abs(a - b) for a, b in zip(ours, middle, strict=True)) <= 1
    else:
        assert ours == middle


@pytest.mark.parametrize("length, segments, num_views", [(64, 16, 2), (100, 8, 5), (30, 8, 3), (48, 16, 3)])
def test_views_of_segments_are_apart_and_evenly_spread(length, segments, num_views):
    views = np.array([view_indices(length, segments, 1, segments, view, num_views) for view in range(num_views)])
    assert (np.diff(views, axis=0) > 0).all()
    for segment in range(segments):
        begin, end = segment * length // segments, (segment + 1) * length // segments
        for view in range(num_views):  # the middle of each of num_views parts of the segment
            exact = begin + (end - begin) * (Fraction(1, 2) + view) / num_views
            assert 0 <= exact - Fraction(int(views[view, segment])) <= 1 and views[view, segment] < end


# ------------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("label", [-1, 5, 17])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_list(path, 5),
        lambda path: TrainVideoDataset(path, 4, 1, None, num_classes=5),
        lambda path: EvalVideoDataset(path, 4, 1, None, num_classes=5),
    ],
    ids=["list", "train", "eval"],
)
def test_labels_outside_the_classes_are_named_with_file_and_line(tmp_path, read, label):
    listing = tmp_path / "list.csv"
    listing.write_text(f"# comment\na.mp4 0\n\nb.mp4 4\nc.mp4 90 {label}\nd.mp4 99\n")
    with pytest.raises(ListError, match=naming(listing, "line 5", f"'c.mp4 90 {label}'", "--nb_classes")):
        read(listing)
    assert read_list(listing)[1] == [0, 4, label, 99]


def find(split, **paths):
    return find_list(argparse.Namespace(**dict(eval_data_path=None, test_data_path=None) | paths), split)


@pytest.mark.parametrize("has_test", [True, False])
def test_lists_of_a_folder(tmp_path, has_test):
    if has_test:
        (tmp_path / "test.csv").write_text("a 0\n")
    folder, lists = str(tmp_path), {split: str(tmp_path / f"{split}.csv") for split in ("train", "val", "test")}
    assert find(data_path=folder, split="train") == lists["train"]
    assert find(data_path=folder, split="val") == lists["val"]
    assert find(data_path=folder, split="test") == lists["test" if has_test else "val"]
    named = dict(data_path=folder, eval_data_path="v", test_data_path="t")
    assert [find(**named, split=split) for split in ("train", "val", "test")] == [lists["train"], "v", "t"]
    assert find(data_path=folder, test_data_path="t", split="val") == lists["val"]
    assert find(data_path=folder, test_data_path="t", split="test") == "t"
    assert find(data_path=folder, eval_data_path="v", split="val") == "v"
    if not has_test:
        assert find(data_path=folder, eval_data_path="v", split="test") == "v"


def test_lists_by_name(tmp_path):
    (tmp_path / "test.csv").write_text("a 0\n")
    listing = str(tmp_path / "mine.csv")
    assert find(data_path=listing, split="train") == listing
    assert find(data_path=listing, eval_data_path="v", split="val") == "v"
    assert find(data_path=listing, eval_data_path="v", split="test") == "v"
    assert find(data_path=listing, eval_data_path="v", test_data_path="t", split="test") == "t"
    assert find(data_path=listing, test_data_path="t", split="test") == "t"
    for split in ("val", "test"):
        with pytest.raises(ListError, match=naming(f"--data_path {listing}", "--eval_data_path")):
            find(data_path=listing, split=split)
    with pytest.raises(ListError, match="--eval_data_path"):
        find(data_path=listing, test_data_path="t", split="val")


def test_data_sets():
    assert {name: data_set.num_classes for name, data_set in DATA_SETS.items()} == {
        "Kinetics-400": 400, "Kinetics-600": 600, "Kinetics-700": 700, "Kinetics-710": 710, "SSV2": 174,
        "UCF101": 101, "HMDB51": 51, "Diving48": 48, "EPIC-100-verb": 97, "EPIC-100-noun": 300, "custom": None,
    }  # fmt: skip
    assert [name for name, data_set in DATA_SETS.items() if data_set.segments] == ["SSV2"]
    assert [name for name, data_set in DATA_SETS.items() if not data_set.flip] == ["SSV2"]
    assert mean_and_std(True) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert mean_and_std(False) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --------------------------------------------------------------------------------------------------- data sets


LENGTHS = [20, 5, 33, 17, 26, 12, 40]  # shorter and longer than a clip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven videos of 64 x 32 pixels; list.csv with labels 0 .. 6, and bad.csv with two that cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    for number, length in enumerate(LENGTHS):
        write_video(folder / f"{number}.mp4", smooth(length, 32, 64, seed=number).permute(0, 2, 3, 1).numpy())
    (folder / "list.csv").write_text("".join(f"{number}.mp4 {number}\n" for number in range(7)))
    (folder / "text.mp4").write_text("not a video")
    (folder / "bad.csv").write_text("0.mp4 0\nmissing.mp4 1\n2.mp4 2\ntext.mp4 3\n4.mp4 4\n")
    return folder


@functools.cache
def whole_video(path):
    """Every frame by a plain sequential decode, uint8 [n, 3, H, W]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def two_crops(frames):
    """The left and the right half, mirrored: no view is like another."""
    return torch.stack([frames[..., :32], frames[..., 32:].flip(-1)])


@pytest.mark.parametrize("num_views, segments", [(1, 1), (5, 1), (2, 4), (3, 2)])
def test_views_equal_a_separate_decode_of_each(videos, monkeypatch, num_views, segments):
    opened, open_video = [], decoding.open_video
    monkeypatch.setattr(decoding, "open_video", lambda path, name: opened.append(path) or open_video(path, name))
    dataset = EvalVideoDataset(videos / "list.csv", 4, 3, two_crops, num_views, segments)
    assert len(dataset) == 7 and dataset.labels == list(range(7))
    for index, length in enumerate(LENGTHS):
        item = dataset[index]
        assert item["index"] == index and item["failed"] == []
        frames, expected = whole_video(videos / f"{index}.mp4"), []
        assert len(frames) == length
        for view in range(num_views):
            clip = frames[view_indices(length, 4, 3, segments, view, num_views)]
            expected += [clip[..., :32], clip[..., 32:].flip(-1)]
        assert torch.equal(item["video"], torch.stack(expected)) and item["video"].is_contiguous()
    assert opened == [str(videos / f"{index}.mp4") for index in range(7)]  # one decode a video


def test_videos_that_cannot_be_read_leave_the_batch_and_are_named(videos):
    dataset = EvalVideoDataset(videos / "bad.csv", 4, 2, two_crops, 3)
    items = [dataset[index] for index in range(5)]
    for index in (1, 3):
        assert items[index]["video"] is None and items[index]["index"] == index
        (failure,) = items[index]["failed"]
        assert failure.startswith(dataset.paths[index] + ": ")
    batch = collate_views(items)
    assert batch["index"].tolist() == [0, 2, 4] and batch["index"].dtype == torch.int64
    assert torch.equal(batch["video"], torch.cat([items[index]["video"] for index in (0, 2, 4)]))
    assert batch["failed"] == items[1]["failed"] + items[3]["failed"]
    none = collate_views([items[1], items[3]])
    assert none["index"].tolist() == [] and none["index"].dtype == torch.int64 and none["video"] is None
    assert len(none["failed"]) == 2


@pytest.mark.parametrize("num_sample", [1, 3])
def test_labels_are_those_of_the_videos_shown(videos, num_sample):
    """Also where an unreadable video is replaced by another."""
    dataset = TrainVideoDataset(
        videos / "bad.csv", 4, 2, lambda clip, rng: clip, num_sample, max_retries=50, num_classes=5, num_segments=2
    )
    shown = set()
    for seed in range(12):
        for asked in (1, 3, 4):
            item = dataset[asked, seed]
            assert item["label"].tolist() == [item["index"]] * num_sample and item["label"].dtype == torch.int64
            assert item["index"] == 4 if asked == 4 else item["failed"]
            frames = whole_video(dataset.paths[item["index"]])
            for clip in item["video"]:
                starts = [next(i for i, f in enumerate(frames) if torch.equal(f, clip[k])) for k in (0, 2)]
                assert torch.equal(clip, frames[[starts[0], starts[0] + 2, starts[1], starts[1] + 2]])
                assert starts[0] + 2 < len(frames) // 2 <= starts[1]  # two frames of each half
            shown.add(item["index"])
    assert shown == {0, 2, 4}


def test_only_the_first_clip_of_a_video_has_the_first_transform(videos):
    calls = []

    def make(name):
        return lambda clip, rng: calls.append((name, rng)) or clip

    dataset = TrainVideoDataset(videos / "list.csv", 2, 1, make("rest"), 3, first_transform=make("first"))
    for index in (0, 2):
        calls.clear()
        dataset[index, 5]
        assert [name for name, _ in calls] == ["first", "rest", "rest"] and len({id(rng) for _, rng in calls}) == 1
    plain = TrainVideoDataset(videos / "list.csv", 2, 1, make("rest"), 2)
    calls.clear()
    plain[0, 5]
    assert [name for name, _ in calls] == ["rest", "rest"]


# ------------------------------------------------------------------------------------------------------- loaders


def loader_args(videos, **changes):
    args = dict(
        data_path=str(videos / "list.csv"), eval_data_path=str(videos / "list.csv"), test_data_path=None,
        num_frames=4, sampling_rate=2, num_segments=1, input_size=16, short_side_size=20, nb_classes=7, num_sample=1,
        decoder="auto", batch_size=4, num_workers=0, pin_mem=False, device="cpu", seed=3, crop_scale=(0.3, 0.9),
        train_interpolation="bilinear", aa="none", color_jitter=0.3, flip=True, reprob=0.5, remode="const", recount=2,
        resplit=False, max_short_side=0, imagenet_default_mean_and_std=True, test_num_segment=2, test_num_crop=3,
        task="single_label",
    )  # fmt: skip
    return argparse.Namespace(**args | changes)


def assert_same_batches(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], name


SETTINGS = [
    dict(aa="rand-m5-n2-inc1", num_segments=4, flip=False, reprob=0.0),
    dict(resplit=True, num_sample=2, train_interpolation="bicubic", imagenet_default_mean_and_std=False, reprob=1.0),
    dict(remode="pixel", crop_scale=(0.5, 0.5), color_jitter=0.0, aa="", recount=1, train_interpolation="random"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_batches_are_what_the_flags_say(videos, settings):
    args = loader_args(videos, **settings)
    loader = build_finetuning_loader(args)
    loader.sampler.set_epoch(2)
    batches = list(loader)
    assert len(batches) == len(loader) == 7 // 4
    statistics = (IMAGENET_MEAN, IMAGENET_STD) if args.imagenet_default_mean_and_std else (HALF_MEAN, HALF_STD)
    augment = None
    if args.aa not in ("", "none"):
        kernel = Image.Resampling[args.train_interpolation.upper()]
        augment = auto_augment.rand_augment_transform(args.aa, dict(interpolation=kernel))
    erasing = [0.0 if args.resplit else args.reprob] + [args.reprob] * (args.num_sample - 1)
    naive = [
        FinetuneTransform(
            size=16, scale=args.crop_scale, interpolation=args.train_interpolation, augment=augment,
            color_jitter=args.color_jitter, flip=args.flip, erase_probability=probability, erase_mode=args.remode,
            erase_count=args.recount, mean=statistics[0], std=statistics[1],
        ) for probability in erasing
    ]  # fmt: skip
    order = list(loader.sampler)
    for number, batch in enumerate(batches):
        per_batch = 4  # videos
        expected = []
        for index, seed in order[number * per_batch : (number + 1) * per_batch]:
            rng, frames = random.Random(seed), whole_video(videos / f"{index}.mp4")
            clips = [clip_indices(len(frames), 4, 2, rng, args.num_segments) for _ in naive]
            expected += [transform(frames[clip], rng) for transform, clip in zip(naive, clips, strict=True)]
        assert torch.equal(batch["video"], torch.stack(expected))
        indices = [index for index, _ in order[number * per_batch : (number + 1) * per_batch]]
        assert batch["index"].tolist() == indices
        assert batch["label"].tolist() == [index for index in indices for _ in naive]


def test_training_loader_drops_the_rest_or_keeps_it(videos):
    assert [len(batch["label"]) for batch in build_finetuning_loader(loader_args(videos))] == [4]
    kept = list(build_finetuning_loader(loader_args(videos), drop_last=False))
    assert [len(batch["label"]) for batch in kept] == [4, 3]
    assert sorted(torch.cat([batch["label"] for batch in kept]).tolist()) == list(range(7))
    with pytest.raises(ListError, match=naming("list.csv", "line 7", "label 6", "--nb_classes")):
        build_finetuning_loader(loader_args(videos, nb_classes=6))
    with pytest.raises(ValueError, match="--aa nonsense"):
        build_finetuning_loader(loader_args(videos, aa="nonsense"))
    with pytest.raises(ListError, match=naming("list.csv", "line 7", "label 6", "--nb_classes")):
        build_evaluation_loader(loader_args(videos, nb_classes=6), "val")


def test_loaders_do_not_depend_on_the_number_of_workers(videos):
    def batches(num_workers):
        args = loader_args(videos, num_workers=num_workers, aa="rand-m7-n2-mstd0.5-inc1", remode="pixel", num_sample=2)
        return list(build_finetuning_loader(args)), list(build_evaluation_loader(args, "test"))

    alone = batches(0)
    for num_workers in (1, 2):
        for one, other in zip(alone, batches(num_workers), strict=True):
            assert_same_batches(one, other)


@pytest.mark.parametrize(
    "split, views, batch_size, videos_a_batch",
    [("test", 6, 12, 2), ("test", 6, 17, 2), ("test", 6, 4, 1), ("test", 6, 1, 1), ("val", 1, 3, 3)],
)
def test_evaluation_batches_hold_whole_videos_and_at_least_one(videos, split, views, batch_size, videos_a_batch):
    batches = list(build_evaluation_loader(loader_args(videos, batch_size=batch_size), split))
    indices = [batch["index"].tolist() for batch in batches]
    assert indices == [list(range(7))[i : i + videos_a_batch] for i in range(0, 7, videos_a_batch)]
    for batch in batches:
        assert batch["video"].shape == (len(batch["index"]) * views, 4, 3, 16, 16)


def test_evaluation_views_are_the_flags_views_and_crops(videos):
    """Validation: the one in the middle; test: all of them; for the short side, 32 pixels, resized to 20."""
    for split, num_views, num_crops, segments in (("val", 1, 1, 1), ("test", 2, 3, 1), ("test", 2, 3, 4)):
        loader = build_evaluation_loader(loader_args(videos, batch_size=1, num_segments=segments), split)
        for batch in loader:
            frames = whole_video(videos / f"{batch['index'].item()}.mp4")
            expected = []
            for view in range(num_views):
                clip = frames[view_indices(len(frames), 4, 2, segments, view, num_views)]
                resized = np.stack([pil_resize(frame, 20, 40, Image.Resampling.BILINEAR) for frame in clip])
                for left in [12] if num_crops == 1 else [0, 12, 24]:
                    expected.append(resized[..., 2:18, left : left + 16])
            assert np.abs(batch["video"].numpy() - np.stack(expected)).max() <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
@pytest.mark.parametrize("listing, readable", [("list.csv", [0, 1, 2, 3, 4, 5, 6]), ("bad.csv", [0, 2, 4])])
def test_processes_together_see_every_video_once(videos, world_size, listing, readable):
    args = loader_args(videos, eval_data_path=str(videos / listing), batch_size=2)
    loaders = [build_evaluation_loader(args, "val", rank, world_size) for rank in range(world_size)]
    batches = [list(loader) for loader in loaders]
    assert [len(b) for b in batches] == [len(loader) for loader in loaders]
    flat = [batch for rank in batches for batch in rank]
    assert sorted(i for batch in flat for i in batch["index"].tolist()) == readable
    assert sum(len(batch["failed"]) for batch in flat) == len(loaders[0].dataset) - len(readable)
    sizes = [sum(len(batch["index"]) + len(batch["failed"]) for batch in rank) for rank in batches]
    assert max(sizes) - min(sizes) <= 1
