import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from masking_generator import (
    FrameMask,
    Mask,
    MotionMask,
    RandomMask,
    TubeMask,
    count_visible,
    draw,
    gather_tokens,
    gumbel_noise,
    motion_energy,
    motion_lift,
    random_places,
    running_cell,
    split_by_score,
    uniform_noise,
)
from tests.helpers import reference
from tests.helpers.runs import naming

torch.set_num_threads(1)

SAMPLERS = [RandomMask, TubeMask, FrameMask, MotionMask]
GRID = (4, 4, 5)
PAPER_GRID = (8, 14, 14)
all_samplers = pytest.mark.parametrize("sampler_class", SAMPLERS)


def make_video(batch, grid=GRID, pixels=(2, 4, 4), seed=0):
    size = [cells * k for cells, k in zip(grid, pixels, strict=True)]
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def sample(sampler_class, seeds, grid=GRID, mask_ratio=0.75, video=None):
    sampler = sampler_class(grid, mask_ratio)
    return sampler(make_video(1, grid).expand(len(seeds), -1, -1, -1, -1) if video is None else video, seeds)


def count_frequencies(index, num_tokens):
    """How often each token occurs in index [B, K]."""
    return torch.bincount(index.flatten(), minlength=num_tokens).double()


@all_samplers
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
def test_visible_and_masked_are_an_ascending_partition(sampler_class, mask_ratio):
    mask = sample(sampler_class, torch.arange(6), mask_ratio=mask_ratio)
    for visible, masked in zip(mask.visible.tolist(), mask.masked.tolist(), strict=True):
        assert visible == sorted(visible) and masked == sorted(masked)
        assert sorted(visible + masked) == list(range(80))
    assert mask.visible.dtype == mask.masked.dtype == torch.int64
    assert mask.log_prob is None and mask.value is None


@pytest.mark.parametrize("sampler_class", [RandomMask, FrameMask, MotionMask])
@pytest.mark.parametrize("mask_ratio, num_visible", [(0.85, 235), (0.9, 156), (0.95, 78)])
def test_visible_tokens_of_the_papers_clip(sampler_class, mask_ratio, num_visible):
    assert sample(sampler_class, torch.arange(1), PAPER_GRID, mask_ratio).visible.shape == (1, num_visible)


@pytest.mark.parametrize("mask_ratio, a_frame", [(0.75, 49), (0.85, 30), (0.9, 20), (0.95, 10)])
def test_tube_mask_keeps_the_same_positions_in_every_frame(mask_ratio, a_frame):
    mask = sample(TubeMask, torch.arange(4), PAPER_GRID, mask_ratio)
    visible = ~mask.hidden().unflatten(1, (8, 196))
    assert (visible.sum(dim=2) == a_frame).all()
    assert (visible == visible[:, :1]).all()


def test_visible_counts_are_those_of_exact_arithmetic():
    for num_tokens, percent in itertools.product(range(2, 400), range(1, 100)):
        expected = int(num_tokens * (1 - Fraction(percent, 100)))
        if 0 < expected < num_tokens:
            assert count_visible(num_tokens, percent / 100) == expected, (num_tokens, percent)
    assert count_visible(100, 0.9) == 10


def test_tube_counts_are_those_of_exact_arithmetic():
    for positions, percent in itertools.product(range(2, 200), range(1, 100)):
        hidden = int(Fraction(percent, 100) * positions)
        if 0 < hidden and int(2 * positions * (1 - Fraction(percent, 100))) > 0:
            sampler = TubeMask((2, 1, positions), percent / 100)
            assert sampler.num_visible == 2 * (positions - hidden), (positions, percent)


@pytest.mark.parametrize("mask_ratio", [0.5, 0.7, 0.9, 0.96])
def test_frame_mask_shows_whole_frames_but_at_most_one(mask_ratio):
    visible = ~sample(FrameMask, torch.arange(20), (8, 4, 5), mask_ratio).hidden().unflatten(1, (8, 20))
    a_frame = visible.sum(dim=2)
    whole, partial = (a_frame == 20).sum(dim=1), ((a_frame > 0) & (a_frame < 20)).sum(dim=1)
    num_visible = round(160 * (1 - mask_ratio), 6) // 1
    assert (whole == num_visible // 20).all()
    assert (partial == (num_visible % 20 > 0)).all()


def test_frame_mask_shows_every_frame_and_every_token_equally_often():
    frequency = count_frequencies(sample(FrameMask, torch.arange(4000), (4, 2, 3), 0.6).visible, 24)
    assert scipy.stats.chisquare(frequency).pvalue > 1e-3


@all_samplers
def test_a_mask_depends_on_its_clip_and_seed_alone(sampler_class):
    video, seeds = make_video(6), torch.tensor([5, 7, 2**62, -3, 0, 5])
    mask = sample(sampler_class, seeds, video=video)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(sample(sampler_class, seeds[order], video=video[order]).visible, mask.visible[order])
    parts = [sample(sampler_class, seeds[i], video=video[i]).visible for i in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert torch.equal(torch.cat(parts), mask.visible)
    torch.manual_seed(123)
    assert torch.equal(sample(sampler_class, seeds, video=video).visible, mask.visible)


@all_samplers
def test_masks_differ_between_seeds(sampler_class):
    visible = sample(sampler_class, torch.arange(50), (8, 6, 6), 0.7).visible
    distinct = len({tuple(row) for row in visible.tolist()})
    # 2 whole frames of 8 and a part of a third: the frames of two of 50 seeds may agree, their partial frame may not.
    assert distinct == 50


@pytest.mark.parametrize("sampler_class, num_free", [(RandomMask, 40), (TubeMask, 20)])
def test_every_token_is_visible_equally_often(sampler_class, num_free):
    visible = sample(sampler_class, torch.arange(3000), (2, 4, 5), 0.75).visible
    assert scipy.stats.chisquare(count_frequencies(visible, 40)[:num_free]).pvalue > 1e-3


def splitmix64(state):
    """Steele, Lea, Flood 2014, in Python's unbounded integers."""
    z = state * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniform_noise_is_splitmix64_bit_for_bit():
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])
    noise = uniform_noise(seeds, 9)
    assert noise.dtype == torch.float64  # float32 would round one value in 2^25 to 1.0, whose Gumbel noise is infinite
    for seed, row in zip(seeds.tolist(), noise.tolist(), strict=True):
        assert row == [((splitmix64((seed * 9 + i) % 2**64) >> 12) + 0.5) / 2**52 for i in range(9)]


@pytest.mark.parametrize("first, step", [(0, 1), (10**15, 1), (-500, 1), (3, 2**32), (0, 10**9 + 7)])
def test_uniform_noise_is_uniform_and_independent_between_seeds_and_positions(first, step):
    noise = uniform_noise(torch.arange(1000) * step + first, 40).numpy()
    assert noise.min() > 0 and noise.max() < 1
    assert scipy.stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3
    bound = 4.5 / np.sqrt(1000)  # 780 + 1 pairs of positions, standard error 1 / sqrt(1000) each
    assert np.abs(np.corrcoef(noise.T) - np.eye(40)).max() < bound
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < bound
    assert abs(np.corrcoef(noise[1:, 0], noise[:-1, 39])[0, 1]) < bound


def test_gumbel_noise_has_the_gumbel_distribution():
    noise = gumbel_noise(torch.arange(1000), 30)
    assert noise.dtype == torch.float32
    assert scipy.stats.kstest(noise.numpy().ravel(), "gumbel_r").pvalue > 1e-3


def test_draws_are_sequential_draws_without_replacement():
    p, count = [0.5, 0.25, 0.15, 0.07, 0.03], 40_000
    log_prob = torch.tensor(p).log().expand(count, -1)
    visible, masked = draw(log_prob, 2, torch.arange(count))
    assert torch.equal(torch.cat((visible, masked), dim=1).sort(dim=1).values, torch.arange(5).expand(count, -1))
    expected = reference.set_probabilities(p, 2)
    observed = [(visible == torch.tensor(members)).all(dim=1).sum().item() for members in expected]
    assert scipy.stats.chisquare(observed, [count * x for x in expected.values()]).pvalue > 1e-3
    inclusion = count_frequencies(visible, 5) / count
    expected = torch.tensor(reference.inclusion_probabilities(p, 2), dtype=torch.float64)
    assert ((inclusion - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()
    # Drawing in proportion to p is another distribution: 2 p would be 1.0 for the first token.
    assert (expected - 2 * torch.tensor(p)).abs().max() > 0.1


def test_without_a_seed_the_most_probable_tokens_are_visible():
    log_prob = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]]).log()
    visible, masked = draw(log_prob, 2, None)
    assert visible.tolist() == [[1, 3], [0, 1]] and masked.tolist() == [[0, 2], [2, 3]]


@pytest.mark.parametrize("tail", [-1000.0, -float("inf")])
def test_probabilities_that_underflow_to_zero_do_not_stop_the_draw(tail):
    log_prob = torch.full((200, 10), tail)
    log_prob[:, [2, 7]] = torch.tensor(0.5).log()
    visible, masked = draw(log_prob, 4, torch.arange(200))
    assert torch.equal(torch.cat((visible, masked), dim=1).sort(dim=1).values, torch.arange(10).expand(200, -1))
    assert ((visible == 2).any(dim=1) & (visible == 7).any(dim=1)).all()
    if tail > -float("inf"):  # beyond float32's range the order still is a fair draw
        others = count_frequencies(visible, 10)[[0, 1, 3, 4, 5, 6, 8, 9]]
        assert scipy.stats.chisquare(others).pvalue > 1e-3


def test_split_by_score_takes_the_highest_scores():
    visible, masked = split_by_score(torch.tensor([[0.3, -1.0, 2.0, 0.5]]), 2)
    assert visible.tolist() == [[2, 3]] and masked.tolist() == [[0, 1]]


def test_one_frame_has_no_motion_and_a_mask_all_the_same():
    video = torch.randn(2, 3, 1, 32, 32)
    assert torch.equal(motion_energy(video, (1, 4, 4)), torch.zeros(2, 16))
    for sampler in (MotionMask((1, 4, 4), 0.75), FrameMask((1, 4, 4), 0.75)):
        assert sampler(video, torch.arange(2)).visible.shape == (2, 4)


@pytest.mark.parametrize("grid, pixels", [((2, 3, 2), (2, 2, 3)), ((3, 1, 2), (1, 4, 2)), ((1, 2, 2), (4, 1, 1))])
def test_motion_energy_equals_a_naive_loop(grid, pixels):
    video = make_video(2, grid, pixels)
    energy = motion_energy(video, grid)
    frames, height, width = video.shape[2:]
    expected = np.zeros((2, *grid))
    for b, f, y, x in itertools.product(range(2), range(frames), range(height), range(width)):
        current = max(f, 1)  # the first frame has none before it and takes the second's difference
        difference = video[b, :, current, y, x].double() - video[b, :, current - 1, y, x].double()
        cell = (b, f // pixels[0], y // pixels[1], x // pixels[2])
        expected[cell] += (difference**2).sum().item() / 3 / np.prod(pixels)
    np.testing.assert_allclose(energy.numpy(), expected.reshape(2, -1), rtol=1e-5)


def test_motion_mask_prefers_moving_tokens():
    video = torch.full((500, 3, 8, 16, 20), 0.5)
    video[:, :, 1::2, :4, :8] = 1.0  # flickers in the first two columns of the first row of every frame
    visible = sample(MotionMask, torch.arange(500), video=video, mask_ratio=0.9).visible
    moving = (visible // 5 % 4 == 0) & (visible % 5 < 2)
    assert visible.shape[1] == 8
    assert moving.double().mean() > 0.95


def test_motion_mask_draws_in_proportion_to_the_motion():
    video = torch.zeros(8000, 3, 2, 1, 4)
    video[:, :, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0]).sqrt()  # differences squared: 1, 2, 3, 4
    visible = sample(MotionMask, torch.arange(8000), (1, 1, 4), 0.75, video).visible
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) + 1e-3 * 2.5
    assert scipy.stats.chisquare(count_frequencies(visible, 4), 8000 * weights / weights.sum()).pvalue > 1e-3


def test_motion_mask_of_a_still_clip_is_uniform():
    still = torch.rand(1, 3, 1, 8, 8).expand(4000, 3, 4, 8, 8)
    visible = sample(MotionMask, torch.arange(4000), (2, 2, 2), 0.75, still).visible
    assert scipy.stats.chisquare(count_frequencies(visible, 8)).pvalue > 1e-3


def test_motion_lift_is_the_visible_tokens_motion_over_that_of_all():
    energy = torch.tensor([[0.0, 1.0, 2.0, 5.0], [0.0, 0.0, 0.0, 4.0]])
    visible = torch.tensor([[1, 3], [0, 3]])
    assert motion_lift(energy, visible).item() == pytest.approx((1 + 5 + 0 + 4) / 4 / (12 / 8))
    assert motion_lift(energy, torch.arange(4).expand(2, -1)).item() == 1.0
    assert motion_lift(torch.zeros(2, 4), visible).item() == 0.0  # a batch without motion does not divide by zero


@all_samplers
def test_bool_masks_and_index_sets_convert_into_each_other(sampler_class):
    mask = sample(sampler_class, torch.arange(3))
    hidden = mask.hidden()
    assert hidden.dtype == torch.bool and hidden.shape == (3, 80)
    assert [row.nonzero().flatten().tolist() for row in hidden] == mask.masked.tolist()
    again = Mask.from_bool(hidden.unflatten(1, GRID))
    assert torch.equal(again.visible, mask.visible) and torch.equal(again.masked, mask.masked)


def test_bool_masks_hiding_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        Mask.from_bool(torch.tensor([[True, False, False], [True, True, False]]))


def test_gather_tokens_takes_each_clips_own_rows():
    tokens, index = torch.arange(24.0).view(2, 4, 3), torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(gather_tokens(tokens, index), torch.stack([tokens[0, [3, 0]], tokens[1, [1, 1]]]))


@all_samplers
@pytest.mark.parametrize("mask_ratio", [0, 1, -1, 2, 0.0, 1.0, 0.999])
def test_ratios_that_leave_nothing_to_see_or_to_predict_are_refused(sampler_class, mask_ratio):
    if (sampler_class, mask_ratio) == (TubeMask, 0.999):  # tubes always leave one position of a frame
        assert TubeMask(GRID, mask_ratio).num_visible == GRID[0]
        return
    with pytest.raises(ValueError, match=naming(f"--mask_ratio {mask_ratio}")):
        sampler_class(GRID, mask_ratio)


@pytest.mark.parametrize("sampler_class, mask_ratio", [(RandomMask, 0.9), (TubeMask, 0.2)])
def test_ratios_too_extreme_for_a_small_clip_are_refused(sampler_class, mask_ratio):
    with pytest.raises(ValueError, match=naming(f"--mask_ratio {mask_ratio}")):
        sampler_class((2, 2, 2), mask_ratio)


def random_subsets(batch, num_tokens, size):
    order = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return order[:, :size].sort(dim=1).values


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 5, 3), (6, 1, 4)])
@pytest.mark.parametrize("share, ratio", [(1.0, 0.5), (0.75, 0.5), (0.75, 0.3), (0.9, 0.9), (0.5, 0.01), (0.9, 0.999)])
def test_running_cell_equals_a_naive_loop(grid, share, ratio):
    seeds = torch.tensor([0, 5, -7, 2**62, 5])
    masked = random_subsets(5, math.prod(grid), int(share * math.prod(grid)))
    noise = uniform_noise(seeds ^ 0x5DEECE66D, 1 + masked.shape[1]).tolist()
    expected = [
        reference.running_cell(row, grid, ratio, int(4 * start), chances)
        for row, (start, *chances) in zip(masked.tolist(), noise, strict=True)
    ]
    kept = running_cell(masked, seeds, grid, ratio)
    assert kept.tolist() == expected and kept.dtype == torch.int64
    assert kept.shape[1] == masked.shape[1] - int(ratio * masked.shape[1])


@pytest.mark.parametrize("ratio, places", [(0.25, 3), (0.5, 2), (0.75, 1)])
def test_running_cell_covers_every_cell_of_every_frame_and_every_place_evenly(ratio, places):
    grid = (8, 4, 6)
    kept = running_cell(torch.arange(192).expand(20, -1), torch.arange(20), grid, ratio)
    shown = torch.zeros(20, 192).scatter(1, kept, 1.0)
    shown = shown.unflatten(1, (8, 2, 2, 3, 2))  # frame, row of cells, row in it, column of cells, column in it
    assert (shown.sum(dim=(3, 5)) == places).all()
    assert (shown.unflatten(1, (2, 4)).sum(dim=2) == places).all()
    assert (shown == shown[:, :, :1, :, :1]).all()  # the cells of a frame agree


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", [(8, 14, 14), (4, 16, 16), (8, 4, 6)])
def test_running_cell_of_tube_masks_is_the_published_one(grid, ratio):
    """One of its four turns for each clip, and every turn for some."""
    seeds, sampler = torch.arange(40), TubeMask(grid, 0.9)
    hidden = sampler(None, seeds).masked
    sampler.decoder_mask_ratio = ratio
    shown = [set(reference.published_running_cell(grid, ratio, start)) for start in range(4)]
    turns = []
    for every, kept in zip(hidden.tolist(), sampler(None, seeds).masked.tolist(), strict=True):
        turns.append([start for start in range(4) if kept == sorted(shown[start] & set(every))])
    assert all(turns) and {start for found in turns for start in found} == {0, 1, 2, 3}


def test_random_decoder_mask_is_a_random_subset():
    masked = random_subsets(1000, 64, 48)
    kept = random_places(masked, torch.arange(1000), (4, 4, 4), 0.5)
    assert kept.shape == (1000, 24) and (kept.diff(dim=1) > 0).all()
    assert all(set(few) <= set(every) for few, every in zip(kept.tolist(), masked.tolist(), strict=True))
    counts, expected = (count_frequencies(x.flatten(), 64) for x in (kept, masked))
    assert scipy.stats.chisquare(counts, expected / 2).pvalue > 1e-3
    sampler = RandomMask((4, 4, 4), 0.75)
    sampler.decoder_mask_ratio, sampler.decoder_mask_type = 0.5, "random"
    seeds = torch.arange(5)
    hidden = RandomMask((4, 4, 4), 0.75)(None, seeds).masked
    assert torch.equal(sampler(None, seeds).masked, random_places(hidden, seeds, (4, 4, 4), 0.5))


def test_running_cell_starts_at_every_place_equally_often_whatever_the_mask():
    """The place shown first, and whether the mask's own noise at that place is high."""
    seeds = torch.arange(4000)
    first = running_cell(torch.arange(4).expand(4000, -1), seeds, (1, 2, 2), 0.75)[:, 0]
    assert scipy.stats.chisquare(count_frequencies(first, 4)).pvalue > 1e-3
    for size in (4, 5, 64):
        high = uniform_noise(seeds, size)[:, 0] > 0.5
        table = [count_frequencies(first[high], 4).tolist(), count_frequencies(first[~high], 4).tolist()]
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


@all_samplers
def test_what_the_decoder_is_spared_depends_on_clip_and_seed_alone_and_moves_no_mask(sampler_class):
    video, seeds = make_video(6), torch.tensor([5, 7, 2**62, -3, 0, 5])
    full = sample(sampler_class, seeds, video=video)
    sampler = sampler_class(GRID, 0.75)
    sampler.decoder_mask_ratio = 0.5
    mask = sampler(video, seeds)
    assert torch.equal(mask.visible, full.visible) and mask.masked.shape == (6, 30)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(sampler(video[order], seeds[order]).masked, mask.masked[order])
    assert torch.equal(sampler(video[1:3], seeds[1:3]).masked, mask.masked[1:3])
