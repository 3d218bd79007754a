"""The landmark search as a Triton kernel against the plain form, by Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trajectory_attention

pytest.importorskip("triton", reason="no Triton on this platform: the plain search is used")
ROOT = Path(__file__).resolve().parents[2]
CODE = """
import torch
from landmark_kernel import search
from trajectory_attention import orthogonal_landmarks

generator = torch.Generator().manual_seed(0)
for shape, count, dtype in (
    ((2, 3, 70, 16), 20, torch.float32), ((1, 2, 300, 24), 30, torch.float32), ((1, 2, 300, 64), 20, torch.bfloat16),
    ((1, 1, 5, 8), 128, torch.float32), ((1, 2, 257, 8), 4, torch.float16),
):
    q = torch.randn(shape, generator=generator).to(dtype)
    strides = [q]
    if shape[0] == 2:  # the interpreter is slow
        strides += [q.transpose(a, a + 1).contiguous().transpose(a, a + 1) for a in (1, 2)]
    for given in strides:
        assert torch.equal(search(given, count), orthogonal_landmarks(given, count)), (shape, given.stride())
same = torch.ones(1, 1, 40, 8)  # equal queries are picked once each
assert sorted(search(same, 40).flatten().tolist()) == list(range(40))
assert search(torch.zeros(1, 1, 6, 8), 4).unique().numel() == 4
found = search(torch.full((1, 1, 6, 8), torch.nan), 4)
assert ((found >= 0) & (found < 6)).all()
"""


def test_the_kernel_picks_what_the_plain_form_picks():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_kernel_that_does_not_run_is_a_warning(monkeypatch):
    """No C compiler for Triton's launcher, say: training uses the plain search."""
    import landmark_kernel

    def fail(*_):
        raise RuntimeError("Failed to find C compiler\nset CC")

    monkeypatch.setattr(landmark_kernel, "search", fail)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="Triton.*C compiler"):
        assert trajectory_attention._kernel.__wrapped__() is None
    monkeypatch.setattr(landmark_kernel, "search", lambda *_: None)
    assert trajectory_attention._kernel.__wrapped__() is landmark_kernel
