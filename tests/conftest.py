"""Fixtures shared by the tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

os.environ["PYTHON"] = sys.executable  # what scripts/common.sh starts, also without an active environment
torch.set_num_threads(1)  # tiny tensors; and runs in subprocesses want the other cores


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real recordings beside the repository; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the real recordings (../shared/data) are not here")
    return SHARED


def pytest_sessionfinish(session, exitstatus):
    """.ci/run sets REQUIRE_SHARED_DATA where the recordings are present: a skip is then a failure."""
    skipped = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    if os.environ.get("REQUIRE_SHARED_DATA") and skipped and exitstatus == 0:
        print(f"\n{len(skipped)} test(s) skipped although ../shared/data is present")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
