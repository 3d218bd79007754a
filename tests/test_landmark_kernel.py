"""The landmark search as a Triton kernel against the plain form, by Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform: the plain search is used")
ROOT = Path(__file__).resolve().parents[1]
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
    for given in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.transpose(2, 3).contiguous().transpose(2, 3)):
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
