"""Warnings about a failing sampler: each once, and what they are computed from."""

import numpy as np
import pytest
import torch

from masking_generator import motion_lift, texture_energy
from runtime.sampler_guard import EPOCHS_OF_A_BAD_CRITIC, SamplerGuard
from tests.helpers.runs import assert_names


def test_nothing_is_said_of_masks_without_a_sampler_nor_of_a_healthy_one():
    guard = SamplerGuard()
    assert guard.check({"loss": 1.0}) == []
    assert guard.check({"entropy": 0.9, "explained_variance": 0.1, "texture_lift": 1.2}) == []


@pytest.mark.parametrize("name, bad, said", [("entropy", 0.4, "entropy"), ("texture_lift", 0.4, "texture")])
def test_each_failure_is_said_once(name, bad, said):
    guard = SamplerGuard()
    assert guard.check({name: 0.6}) == []
    (warning,) = guard.check({name: bad})
    assert said in warning and "0.40" in warning and "docs/SAMPLER.md" in warning
    assert guard.check({name: bad}) == guard.check({name: bad / 2}) == []


def test_a_bad_critic_is_said_after_a_row_of_epochs():
    guard = SamplerGuard()
    for _ in range(EPOCHS_OF_A_BAD_CRITIC - 1):
        assert guard.check({"explained_variance": -0.5}) == []
    assert guard.check({"explained_variance": 0.1}) == []  # the row is broken
    said = [guard.check({"explained_variance": -0.5}) for _ in range(2 * EPOCHS_OF_A_BAD_CRITIC)]
    assert [len(warnings) for warnings in said] == [0] * (EPOCHS_OF_A_BAD_CRITIC - 1) + [1] + [
        0
    ] * EPOCHS_OF_A_BAD_CRITIC
    assert_names(said[EPOCHS_OF_A_BAD_CRITIC - 1][0], "critic", EPOCHS_OF_A_BAD_CRITIC, "-0.50")


def test_texture_is_the_variance_of_a_tokens_pixels():
    video = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    video[:, :, :, :4] *= 0.0
    grid = (2, 2, 2)
    energy = texture_energy(video, grid)
    tokens = video.double().numpy().reshape(2, 3, 2, 2, 2, 4, 2, 4).transpose(0, 2, 4, 6, 1, 3, 5, 7)
    expected = tokens.reshape(2, 8, 3, -1).var(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(energy, expected, atol=1e-6)
    flat = torch.tensor([[0, 1], [4, 5]])
    assert motion_lift(energy, flat) == 0 and motion_lift(energy, flat + 2) == pytest.approx(2, rel=0.3)
