"""The tests that need a GPU and the tables that need one, written to docs/GPU.md and docs/gpu.json.

    make gpu [PART=1]                      # python bench/gpu.py [--part 1]
    make gpu DRY_RUN=1                     # the same program on the CPU at a tiny size

Parts: 1 tests; 2 steps, attention layers and the loader; 3 --compile, memory and sizes. Together they take about 9
minutes on one H100-class GPU.
A job that has succeeded on this machine and this commit is not run again; --again runs it. What cannot run here is
listed with its reason.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ("GPU.md", "gpu.json")  # which do not make the commit another one
PACKAGES = ("torch", "triton", "timm", "transformers", "deepspeed", "av", "decord", "numpy")
STEP = "bench/step.py --rounds 3 --steps 10"
DRY_STEP = "bench/step.py --tiny --rounds 1 --steps 1 --skip_memory --num_frames 4 --input_size 32 --batch_size 2"


class Job(NamedTuple):
    part: int
    title: str
    command: str  # of Python
    dry: str  # the same at a tiny size on the CPU
    needs: tuple[str, ...] = ()  # packages
    limit: int = 240  # seconds


WORKERS = max(min((os.cpu_count() or 2) - 2, 12), 1)
DRY_COMPILE = f"{DRY_STEP} --mask_ratio 0.75 --compile --rows"
DRY_MEMORY = "bench/step.py --memory --tiny --device cpu --rows tube --num_frames 4 --input_size 32"
JOBS = {
    "tests": Job(1, "Tests", f"-m pytest -m gpu tests/gpu -n {WORKERS} --tb=short --durations=3 -W ignore",
                 "-m pytest -m gpu tests/gpu", ("pytest", "xdist"), 300),
    "step-95": Job(2, "Steps at mask ratio 0.95", f"{STEP} --mask_ratio 0.95", f"{DRY_STEP} --mask_ratio 0.75",
                   ("transformers",)),
    "attention": Job(2, "Attention layers", "bench/attention.py --rounds 5 --naive_limit 20",
                     "bench/attention.py --frames 2 --tokens 16 --dim 32 --heads 2 --landmarks 4 --rounds 1 "
                     "--skip_memory --device cpu"),
    "loader": Job(2, "Loading, beside the clips/s of the steps", "bench/data.py --rounds 2 --workers 0 8 --clips 64",
                  "bench/data.py --rounds 1 --workers 0 --clips 4 --size 64 --files 1 --frames 64", ("av", "decord")),
    "compile": Job(3, "Steps with --compile", f"{STEP} --mask_ratio 0.95 --skip_memory --compile --rows tube",
                   f"{DRY_COMPILE} tube"),
    "step-90": Job(3, "Steps at mask ratio 0.90", f"{STEP} --mask_ratio 0.9 --rows tube adamae tats-orthoformer "
                   "tats-trajectory tats-mha transformers", f"{DRY_STEP} --mask_ratio 0.75 --rows tube",
                   ("transformers",)),
    "memory": Job(3, "Memory beside the paper's table 3", "bench/step.py --memory", DRY_MEMORY),
    "sizes": Job(3, "Decoder depth and blocks of TATS", f"{STEP} --mask_ratio 0.95 --skip_memory --rows "
                 "decoder-depth-1 decoder-depth-2 decoder-depth-8 tats-blocks-2 tats-blocks-3",
                 f"{DRY_STEP} --mask_ratio 0.75 --rows decoder-depth-1 tats-blocks-2"),
    "compile-tats": Job(3, "Steps of TATS with --compile", f"{STEP} --mask_ratio 0.95 --skip_memory --compile --rows "
                        "tats-trajectory", f"{DRY_COMPILE} tats-trajectory"),
}  # fmt: skip


def environment(dry: bool) -> dict[str, str]:
    """What the figures depend on besides the commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "-"
    found = {"device": "CPU (dry run)", "driver": "-", "python": platform.python_version()} | versions
    if not dry:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        found["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GB"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            pass

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!docs/{name}" for name in WRITTEN))
    return found | {"commit": (git("describe", "--always") or "-") + ("-dirty" if changed else "")}


def run_job(job: Job, dry: bool, seconds_left: float) -> dict:
    """Runs it and prints its output as it comes; what is recorded of it."""
    command = job.dry if dry else job.command
    begin = time.time()
    limit = min(job.limit, seconds_left)
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # killed with its own processes, which would keep the pipe open
        env=os.environ | {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"},
    )
    try:
        output, status = process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0] + f"\nstopped after {limit:.0f} s", -9
    except BaseException:  # Ctrl-C, or main's SystemExit: it does not reach a session of its own
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = [without_places(line) for line in output.strip().splitlines() if line != "bringing up nodes..."][-60:]
    print("\n".join(lines), flush=True)
    return {
        "command": f"python {command}",
        "seconds": round(time.time() - begin),
        "status": status,
        "output": lines,
        "date": str(date.today()),
    }


def without_places(line: str) -> str:
    """The line without the folders of this machine, cut to a readable width."""
    places = {str(ROOT) + os.sep: "", sys.executable: "python", sys.prefix + os.sep: "", tempfile.gettempdir(): "TMP"}
    for place, name in places.items():
        line = line.replace(place, name)
    return line if len(line) <= 160 else line[:157] + "..."


def write_page(path: Path, record: dict) -> None:
    """docs/GPU.md from the record."""
    about = record["environment"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", *PACKAGES) if about[name] != "-")
    missing = [name for name in JOBS if name not in record["jobs"]]
    text = [
        "# Measured on a GPU",
        "",
        "Written by `make gpu` (bench/gpu.py); docs/gpu.json has the same as data.",
        "",
        f"Machine: {about['device']}, driver {about['driver']}, {platform.machine()}.",
        f"Software: {versions}; commit {about['commit']}.",
        "",
        "Not run:" if missing else "Everything was run.",
        *(f"- {name}: {record['skipped'].get(name) or f'`make gpu PART={JOBS[name].part}`'}" for name in missing),
    ]
    for name, job in JOBS.items():
        done = record["jobs"].get(name)
        if done:
            ended = "" if done["status"] == 0 else f", **ended with status {done['status']}**"
            text += [
                "",
                f"## {job.title}",
                "",
                f"    {done['command']}",
                "",
                f"{done['date']}, {done['seconds']} s{ended}",
            ]
            text += ["", "```", *done["output"], "```"]
    path.write_text("\n".join(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[1, 2, 3], help="only this part (all)")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), help="only these")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU at a tiny size, into output/gpu")
    parser.add_argument("--again", action="store_true", help="also what has succeeded before")
    parser.add_argument("--output", help="folder of GPU.md and gpu.json (docs)")
    parser.add_argument("--minutes", type=float, default=9, help="stops a job after so many minutes in all (9)")
    flags = parser.parse_args()
    if not flags.dry_run and not torch.cuda.is_available():
        print(
            "error: no GPU: torch.cuda.is_available() is False; `make gpu DRY_RUN=1` runs on the CPU", file=sys.stderr
        )
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.time()
    folder = Path(flags.output or (ROOT / "output/gpu" if flags.dry_run else ROOT / "docs"))
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(flags.dry_run), "jobs": {}, "skipped": {}}
    file = folder / "gpu.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before["environment"] == record["environment"]:
            record |= {"jobs": before["jobs"], "skipped": before["skipped"]}
    for name, job in JOBS.items():
        if flags.part not in (None, job.part) or (flags.jobs and name not in flags.jobs):
            continue
        if record["jobs"].get(name, {}).get("status") == 0 and not flags.again:
            print(f"== {name}: done before")
            continue
        record["skipped"].pop(name, None)
        missing = [package for package in job.needs if importlib.util.find_spec(package) is None]
        left = 60 * flags.minutes - (time.time() - begin)
        if missing:
            record["skipped"][name] = f"needs the package {', '.join(missing)}"
        elif left < 60:
            record["skipped"][name] = f"{flags.minutes:g} minutes were over; the same command continues here"
        else:
            print(f"== {name}: {job.title}", flush=True)
            record["jobs"][name] = run_job(job, flags.dry_run, left)
        file.write_text(json.dumps(record, indent=1) + "\n")
        write_page(folder / "GPU.md", record)
    for name, reason in record["skipped"].items():
        print(f"== {name}: not run: {reason}")
    failed = [name for name, done in record["jobs"].items() if done["status"] != 0]
    print(
        f"== {time.time() - begin:.0f} s; wrote {folder / 'GPU.md'}"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
