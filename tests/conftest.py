"""Fixtures shared by the tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

from datasets.moving_shapes import write_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

os.environ["PYTHON"] = sys.executable  # what scripts/common.sh starts, also without an active environment
torch.set_num_threads(1)  # tiny tensors; and runs in subprocesses want the other cores


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real recordings beside the repository; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the real recordings (../shared/data) are not here")
    return SHARED


@pytest.fixture(scope="session")
def real_clips(shared_data):
    """{path: every frame by a plain decode}"""
    from tests.helpers.clips import whole_video

    paths = [p for p in sorted((shared_data / "clips").glob("*/*")) if p.suffix in (".avi", ".mp4", ".webm")]
    assert {p.parent.name for p in paths} == {"ucf101", "hmdb51", "kinetics400", "ssv2"}
    return {path: whole_video(path) for path in paths}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """List of 10 small clips; 2 steps an epoch at batch 4."""
    return write_dataset(tmp_path_factory.mktemp("shapes"), train=10, val=10, size=32, frames=12) / "train.csv"


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """Folder with train.csv (10 clips: 5 steps an epoch at batch 4 with 2 clips a video), val.csv (11), classes.txt."""
    folder = write_dataset(tmp_path_factory.mktemp("shapes"), train=10, val=10, size=40, frames=12)
    lines = (folder / "val.csv").read_text().splitlines()
    (folder / "val.csv").write_text("\n".join([*lines, lines[3]]) + "\n")  # 11 entries: no number of processes divides
    return folder


def pytest_sessionfinish(session, exitstatus):
    """.ci/run sets REQUIRE_SHARED_DATA where the recordings are present: a skip is then a failure."""
    skipped = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    if os.environ.get("REQUIRE_SHARED_DATA") and skipped and exitstatus == 0:
        print(f"\n{len(skipped)} test(s) skipped although ../shared/data is present")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
