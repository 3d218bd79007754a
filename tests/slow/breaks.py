"""What the tests catch: each fault of breaks.txt is put into a copy of the code; tests of its area have to fail.

    python tests/slow/breaks.py [--only 3 17] [--jobs 2] [--tests all]

A line per break: caught, and by which test first, or MISSED. --tests all runs the whole suite for each break (hours).
Chosen before any test was made leaner, so that one can say what a leaner suite loses.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Break(NamedTuple):
    file: str
    old: str  # occurs once
    new: str
    tests: str  # names of test files, without test_


def read_breaks() -> list[Break]:
    blocks = (ROOT / "tests/slow/breaks.txt").read_text().split("\n\n")[1:]
    found = []
    for block in blocks:
        head, old, new = block.strip("\n").split("\n")
        file, tests = head.split(": ")
        found.append(Break(file, old.removeprefix("- "), new.removeprefix("+ "), tests))
    return found


def copy_of(folder: Path) -> Path:
    """The tracked files."""
    copy = folder / "code"
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def try_break(number: int, chosen: Break, tests: str) -> tuple[bool, str]:
    """Whether it was caught, and a line about it."""
    what = f"{number:2} {chosen.file}: {chosen.old} -> {chosen.new}"
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(Path(folder))
        file = copy / chosen.file
        text = file.read_text()
        if text.count(chosen.old) != 1:
            return False, f"{what}: occurs {text.count(chosen.old)} times, correct breaks.txt"
        file.write_text(text.replace(chosen.old, chosen.new))
        found = (
            ["tests"]
            if tests == "all"
            else [str(path) for name in chosen.tests.split() for path in copy.glob(f"tests/*/test_{name}.py")]
        )
        begin = time.time()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *found]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        first = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
        caught = result.returncode == 1 and first is not None
        verdict = f"caught by {first[1]}" if caught else f"MISSED (pytest's status {result.returncode})"
        return caught, f"{what}: {verdict}, {time.time() - begin:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of breaks, from 0")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (2)")
    parser.add_argument("--tests", choices=["area", "all"], default="area", help="which tests run for a break (area)")
    flags = parser.parse_args()
    breaks = read_breaks()
    numbers = flags.only if flags.only is not None else range(len(breaks))
    caught = 0
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        for good, line in pool.map(lambda number: try_break(number, breaks[number], flags.tests), numbers):
            caught += good
            print(line, flush=True)
    print(f"{caught} of {len(numbers)} caught")
    return 0 if caught == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
