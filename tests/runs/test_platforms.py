"""Systems that this one is not: macOS, Windows; and no active environment."""

import ast
import math
import multiprocessing
import pickle
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import engine_for_finetuning
import run_class_finetuning
import run_mae_pretraining
import utils
from datasets.build import build_evaluation_loader, build_finetuning_loader, build_pretraining_loader, start_worker
from tests.helpers.runs import assert_names, read_log, run_here
from tools.common import in_processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [f"run_{name}.py" for name in ("mae_pretraining", "class_finetuning", "mae_vis")]
SCRIPTS += [
    f"tools/{name}.py" for name in ("check_videos", "make_lists", "make_subset", "resize_videos", "compare_runs")
]
WINDOWS = """
import multiprocessing.util, os, runpy, signal, subprocess, sys
import torch, torchvision, timm, matplotlib  # before: these have their own way round, asyncio below them too
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGCHLD"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("sysconf", "fork", "getuid", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
sys.argv = [SCRIPT, "--help"]
sys.path.insert(0, ".")
try:
    runpy.run_path(SCRIPT, run_name="__main__")
except SystemExit as stop:
    sys.exit(stop.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_where_posix_is_missing(script):
    code = f"SCRIPT = {script!r}\n" + WINDOWS
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]


POSIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}


def module_level_imports(path):
    """Names of the modules that importing a file imports, whatever it then calls."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_no_file_imports_what_windows_lacks():
    files = [
        file
        for folder in ("", "datasets", "runtime", "tools", "bench", "examples")
        for file in (ROOT / folder).glob("*.py")
    ]
    assert len(files) > 40
    found = {str(file.relative_to(ROOT)): POSIX_ONLY & set(module_level_imports(file)) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_loaders_can_be_sent_to_workers(tmp_path):
    """macOS and Windows start workers anew, Python 3.14 on Linux too: what they get has to be picklable."""
    (tmp_path / "list.csv").write_text("".join(f"{number}.mp4 {number % 2}\n" for number in range(4)))
    lists = ["--data_path", f"{tmp_path}/list.csv", "--eval_data_path", f"{tmp_path}/list.csv"]
    finetune = run_class_finetuning.parse_args(
        [
            *lists,
            "--data_set",
            "custom",
            "--nb_classes",
            "2",
            *"--batch_size 2 --num_workers 0 --device cpu".split(),
            "--resplit",
        ]
    )
    run_class_finetuning.check_flags(finetune)
    pretrain = run_mae_pretraining.get_parser().parse_args(
        [*lists[:2], *"--batch_size 2 --num_workers 0 --device cpu".split()]
    )
    loaders = [build_pretraining_loader(pretrain), build_finetuning_loader(finetune)]
    loaders += [build_evaluation_loader(finetune, split) for split in ("val", "test")]
    for loader in loaders:
        dataset, _, _ = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        assert len(dataset) == len(loader.dataset) == 4


def test_loader_workers_start_without_sigusr1(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    ignored = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append((number, handler)))
    start_worker(0)
    assert ignored == [(signal.SIGTERM, signal.SIG_IGN), (signal.SIGINT, signal.SIG_IGN)]


def test_tools_work_where_processes_can_only_be_spawned(monkeypatch):
    real = multiprocessing.get_context

    def get_context(method=None):
        if method != "spawn":
            raise ValueError(f"cannot find context for {method!r}")
        return real(method)

    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(multiprocessing, "get_context", get_context)
    answers = list(in_processes(math.sqrt, [(4,), (9,)], 1, 60))
    assert answers == [(0, 2.0, None), (1, 3.0, None)]


def no_meminfo(monkeypatch):
    real = open

    def opened(path, *args, **kwargs):
        if str(path) == "/proc/meminfo":
            raise FileNotFoundError(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", opened)


def test_files_that_a_container_has_read_do_not_count_as_used(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "CGROUP", tmp_path)
    unlimited = utils.available_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 450\nactive_file 100\n")
    assert utils.available_memory() == pytest.approx(unlimited, rel=0.1)
    (tmp_path / "memory.max").write_text("1000\n")
    assert utils.available_memory() == 1000 - 900 + 450 + 100


def test_memory_on_macos_is_not_known_and_not_asked(monkeypatch, capsys):
    no_meminfo(monkeypatch)
    assert utils.available_memory() is None
    probe = SimpleNamespace(features=lambda video: torch.zeros(2, 8), eval=lambda: None)
    monkeypatch.setattr(engine_for_finetuning, "prepare", lambda video, recipe: video)
    batch = {"video": torch.zeros(2, 3), "failed": []}
    recipe = SimpleNamespace(mean=torch.zeros(3))
    (stored,) = engine_for_finetuning.store_features(probe, [batch], recipe, "none", 10**12)
    assert stored["video"].shape == (2, 8)
    assert_names(capsys.readouterr().out, "features", 10**12, "GiB")


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_the_platforms_unit(monkeypatch, platform, unit):
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0))
    monkeypatch.setattr(sys, "platform", platform)
    assert utils.peak_memory(torch.device("cpu")) == 3
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(utils.peak_memory(torch.device("cpu")))


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {found.name: found for found in map(Requirement, filter(None, lines))}


def test_constraints_are_versions_that_the_requirements_allow():
    run, extra, dev = (requirements(f"requirements{part}.txt") for part in ("", "-extra", "-dev"))
    assert {"torch", "torchvision", "timm", "numpy", "scipy", "matplotlib", "tensorboardX", "av"} == run.keys()
    assert {"decord", "deepspeed", "mmcv-lite", "opencv-python"} == extra.keys()
    assert {"pytest", "pytest-xdist", "ruff", "transformers"} <= dev.keys()
    constraints = requirements("constraints.txt")
    for name, requirement in (run | extra | dev).items():
        (exact,) = constraints[name].specifier
        assert exact.operator == "==" and requirement.specifier.contains(exact.version), name


def test_pretraining_needs_no_extra_package(shapes, tmp_path, monkeypatch):
    """Of requirements-extra.txt, with requirements.txt alone."""
    for package in ("decord", "deepspeed", "mmcv", "cv2", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    run_here(shapes, "--mask_type", "tats", "--tats_start_epoch", 0, "--epochs", 1, "--output_dir", tmp_path)
    assert read_log(tmp_path)[-1]["train_loss"] > 0


def test_supported_pythons_are_said_where_pip_reads_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = SpecifierSet(project["requires-python"])
    assert [minor for minor in range(9, 18) if f"3.{minor}" in supported] == [11, 12, 13, 14]
    assert ".".join(map(str, sys.version_info[:2])) in supported
