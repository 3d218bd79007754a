"""Who starts the processes: torchrun, mpirun, Slurm or nobody; what the scripts hand on; what becomes of their end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import utils
from datasets.moving_shapes import write_dataset
from tests.helpers.runs import assert_names, naming
from utils import UsageError, init_distributed

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/ssv2/pretrain_tats.sh"
RUN = ROOT / "scripts/slurm/run.sh"

# What Slurm 22.05 says in a job of two nodes with two tasks each: in the batch script, in salloc's shell on the login
# node, in salloc's shell on a node (LaunchParameters=use_interactive_step), and in task 3 of an srun step.
BATCH = dict(SLURM_JOB_ID="70", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_GTIDS="0",
             SLURM_JOB_NODELIST="n[0-1]")  # fmt: skip
SALLOC = dict(SLURM_JOB_ID="70", SLURM_NTASKS="4", SLURM_JOB_NODELIST="n[0-1]")
INTERACTIVE = BATCH | dict(SLURM_STEP_NUM_TASKS="1", SLURM_STEP_ID="4294967290", SLURM_STEP_NODELIST="n0")
STEP = BATCH | dict(SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_GTIDS="2,3", SLURM_STEP_NUM_TASKS="4", SLURM_STEP_ID="2",
                    SLURM_STEP_NODELIST="n[0-1]")  # fmt: skip
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in
            dict(RANK="2", SIZE="6", LOCAL_RANK="0", LOCAL_SIZE="3").items()}  # fmt: skip
TORCHRUN = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1")


def executable(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def join(monkeypatch, tmp_path):
    """join(environment, flags) calls init_distributed; returns its args, the environment it leaves, and the groups it
    asked torch for. scontrol puts its argument into the host names, so that a test sees what was asked."""
    executable(tmp_path / "scontrol", '[ "$1 $2" = "show hostnames" ] && printf "first-of-%s\\nother\\n" "$3"')

    def call(environment: dict[str, str], **flags):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | environment
        groups = []
        monkeypatch.setattr(os, "environ", env)
        monkeypatch.setattr(utils.dist, "init_process_group", lambda *args, **kwargs: groups.append((args, kwargs)))
        args = SimpleNamespace(
            **dict(device="cpu", world_size=1, local_rank=-1, dist_on_itp=False, dist_url="env://") | flags
        )
        init_distributed(args)
        assert args.distributed == bool(groups) == (args.world_size > 1)
        if groups:
            assert len(groups) == 1 and groups[0][1]["rank"] == args.rank
            assert groups[0][1]["world_size"] == args.world_size and groups[0][1]["init_method"] == args.dist_url
        return args, env, groups

    return call


def places(args) -> tuple[int, int, int]:
    return args.rank, args.world_size, args.local_rank


@pytest.mark.parametrize(
    "environment", [{}, BATCH, SALLOC, INTERACTIVE], ids=["plain", "sbatch", "salloc", "interactive"]
)
def test_one_process_is_alone(join, environment):
    args, env, _ = join(environment)
    assert places(args) == (0, 1, 0)
    assert "RANK" not in env and "MASTER_ADDR" not in env  # a process it starts is not taken for one of torchrun's


def test_torchrun_comes_first(join):
    args, env, groups = join(TORCHRUN | STEP | OPEN_MPI, dist_on_itp=True)
    assert places(args) == (5, 8, 1) and groups[0][0] == ("gloo",)
    assert {name: env[name] for name in TORCHRUN} == TORCHRUN
    args, _, _ = join(TORCHRUN | dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0") | STEP)
    assert places(args) == (0, 1, 0)
    args, env, _ = join(dict(RANK="1"), world_size=2, local_rank=1)
    assert places(args) == (1, 2, 1) and env["LOCAL_RANK"] == "1"


def test_open_mpi_by_flag_only(join):
    args, env, _ = join(OPEN_MPI | STEP, dist_on_itp=True)
    assert places(args) == (2, 6, 0)
    assert [env[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["2", "6", "0", "3"]
    assert places(join(OPEN_MPI)[0]) == (0, 1, 0)
    with pytest.raises(UsageError, match="mpirun.*OMPI_COMM_WORLD_RANK"):
        join(STEP, dist_on_itp=True)


def test_slurm_step(join):
    args, env, _ = join(STEP)
    assert places(args) == (3, 4, 1)
    assert [env[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["3", "4", "1", "2"]
    assert env["MASTER_ADDR"] == "first-of-n[0-1]"
    # the step's own tasks and hosts, where it has fewer than the job
    args, env, _ = join(STEP | dict(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="n1"))
    assert args.world_size == 2 and env["MASTER_ADDR"] == "first-of-n1"
    args, env, _ = join({name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"})
    assert env["MASTER_ADDR"] == "first-of-n[0-1]"
    assert join(STEP | dict(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"))[0].world_size == 1


def test_every_slurm_step_has_its_own_port(join):
    ports = [
        int(join(STEP | dict(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))[1]["MASTER_PORT"])
        for job in (7, 8, 9, 4_000_000_000)
        for step in range(20)
    ]
    assert len(set(ports)) == len(ports) and min(ports) > 1024 and max(ports) < 32768


def test_explicit_master_wins(join, tmp_path):
    (tmp_path / "scontrol").unlink()
    _, env, _ = join(STEP | dict(MASTER_ADDR="here", MASTER_PORT="99"))
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("here", "99")
    _, env, _ = join(STEP, dist_url="tcp://here:99")  # says it all
    assert "MASTER_ADDR" not in env


def test_scontrol_that_does_not_answer_is_said(join, tmp_path):
    executable(tmp_path / "scontrol", "echo 'no such cluster' >&2; exit 1")
    with pytest.raises(UsageError, match=naming("scontrol", "n[0-1]", "no such cluster", "MASTER_ADDR")):
        join(STEP)
    executable(tmp_path / "scontrol", ":")
    with pytest.raises(UsageError, match=naming("scontrol", "n[0-1]", "MASTER_ADDR")):
        join(STEP)
    (tmp_path / "scontrol").unlink()
    with pytest.raises(UsageError, match=naming("scontrol", "No such file", "MASTER_ADDR")):
        join(STEP | dict(PATH=str(tmp_path)))


def test_gpus_of_a_process(join, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for devices, place in ((1, 0), (4, 1)):  # one GPU bound to each task, or all visible to all
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        args, env, groups = join(STEP, device="cuda")
        assert (args.local_rank, chosen[-1], env["LOCAL_RANK"]) == (place, place, str(place))
        assert groups[0][0] == ("nccl",)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=naming("process 1", "GPU")):  # torchrun's processes see all GPUs
        join(TORCHRUN | BATCH, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=naming("process 3", "GPU")):
        join(STEP | dict(SLURM_LOCALID="3"), device="cuda")


def test_unreachable_master_is_said(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(RANK="1", WORLD_SIZE="2"))
    args = SimpleNamespace(device="cpu", world_size=1, local_rank=-1, dist_on_itp=False, dist_url="env://")
    with pytest.raises(UsageError, match=naming("process 1 of 2", "MASTER_ADDR")):
        init_distributed(args)


# --- the scripts -------------------------------------------------------------------------------------------------


def start(script: Path, *flags: str, **environment: str) -> subprocess.Popen:
    ours = ("SLURM_", "OMPI_", "MASTER_", "RDZV_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | environment
    return subprocess.Popen(
        ["bash", str(script), *flags], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(process: subprocess.Popen, timeout: float = 300) -> SimpleNamespace:
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return SimpleNamespace(status=process.returncode, output=output, errors=errors)


def command(**environment: str) -> list[str]:
    """What the script would start, up to the Python script."""
    result = outcome(start(SCRIPT, DATA_PATH="l", DRY_RUN="1", **environment))
    assert result.status == 0, result.errors
    words = result.output.splitlines()
    return words[1 : next(i for i, word in enumerate(words) if word.endswith("run_mae_pretraining.py"))]


SMI = """GPU 0: NVIDIA A100 (UUID: GPU-1)
  MIG 3g.20gb     Device  0: (UUID: MIG-1)
  MIG 3g.20gb     Device  1: (UUID: MIG-2)
GPU 1: NVIDIA A100 (UUID: GPU-2)
"""


@pytest.mark.parametrize(
    "devices, listed, expected",
    [
        (None, SMI, 2),
        (None, "NVIDIA-SMI has failed because it could not communicate\nwith the NVIDIA driver.\n", 0),
        (None, "", 0),
        ("3", SMI, 1),
        ("0,1,2", "", 3),
        ("", SMI, 0),
        ("-1", SMI, 0),
        ("GPU-1,GPU-2", "", 2),
        ("2,-1,3", "", 1),
        ("NoDevFiles", SMI, 0),
    ],
)
def test_default_of_gpus_is_what_processes_may_use(tmp_path, monkeypatch, devices, listed, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    result = outcome(start(SCRIPT, DATA_PATH="l", DRY_RUN="1", **environment))
    assert result.status == 0, result.errors
    words = result.output.splitlines()
    found = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 1
    assert (found, "--device" in words) == (max(expected, 1), expected == 0)


def test_launcher_of_the_scripts():
    several = dict(GPUS="4", NODES="2")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--nnodes", "2"]
    static = ["--node_rank", "1", "--master_addr", "a", "--master_port", "5"]
    assert command(**several, NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT="5") == torchrun + static
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "a:5", "--rdzv_id", "tats"]
    assert command(**several, RDZV_ENDPOINT="a:5") == torchrun + meeting
    for address, host in (("a", 1), ("b", 0)):
        here = ["--local_addr", address, "--rdzv_conf", f"is_host={host}"]
        assert command(**several, RDZV_ENDPOINT="a:5", LOCAL_ADDR=address) == torchrun + meeting + here
    assert command(GPUS="1", RDZV_ENDPOINT="a:5") == []
    one_node = [*torchrun[:4], "--nnodes", "1"]
    assert command(GPUS="4") == [
        *one_node,
        "--standalone",
        "--local_addr",
        "127.0.0.1",
    ]  # a free port, also beside another run
    assert command(GPUS="4", MASTER_PORT="5") == [
        *one_node,
        "--node_rank",
        "0",
        "--master_addr",
        "127.0.0.1",
        *static[4:],
    ]
    # started by srun, mpirun or torchrun: the same variables as in init_distributed
    assert command(**several, **STEP) == command(**several, **OPEN_MPI) == command(**several, RANK="0") == []
    for alone in (BATCH, SALLOC, INTERACTIVE):
        assert command(**several, **alone)[:6] == torchrun


@pytest.mark.parametrize(
    "environment, expected", [(OPEN_MPI, True), (OPEN_MPI | TORCHRUN, False), (STEP, False), ({}, False)]
)
def test_processes_of_mpirun_are_told_to_find_each_other(environment, expected):
    result = outcome(start(SCRIPT, DATA_PATH="l", GPUS="1", DRY_RUN="1", **environment))
    assert ("--dist_on_itp" in result.output.splitlines()) == expected


def test_launch_takes_the_place_of_its_shell(tmp_path):
    """A signal to the process the script was started as must reach Python."""
    python = executable(tmp_path / "python", "echo $$ $1")
    process = start(SCRIPT, DATA_PATH="l", GPUS="0", PYTHON=str(python))
    result = outcome(process)
    assert result.output == f"{process.pid} {ROOT}/run_mae_pretraining.py\n"


def test_demo_goes_on_after_training(tmp_path):
    python = executable(tmp_path / "python", "echo $1")
    result = outcome(start(ROOT / "scripts/demo/pretrain_tats.sh", PYTHON=str(python), OUTPUT_DIR=str(tmp_path)))
    called = [Path(line).name for line in result.output.splitlines()]
    assert called == ["moving_shapes.py", "run_mae_pretraining.py", "run_mae_vis.py", "-"]
    executable(python, "echo $1; case $1 in *pretraining*) exit 75 ;; esac")
    result = outcome(start(ROOT / "scripts/demo/pretrain_tats.sh", PYTHON=str(python), OUTPUT_DIR=str(tmp_path)))
    assert result.status == 75 and "vis" not in result.output


# --- the Slurm job, without Slurm (tests/slurm/local.sh has it) ----------------------------------------------


@pytest.mark.parametrize(
    "status, seen", [(0, 0), (75, 75), (138, 75), (143, 75), (1, 101), (2, 102), (137, 237), (139, 239), (200, 200)]
)
def test_status_of_a_task(tmp_path, status, seen):
    """A crash counts more than a stop, in whatever order srun's tasks end."""
    executable(tmp_path / "sleep", ":")
    script = executable(tmp_path / "script", f'[ "$1" = "a b" ] && exit {status}')
    result = outcome(start(RUN, "--task", str(script), "a b", PATH=f"{tmp_path}:{os.environ['PATH']}"))
    assert result.status == seen, result.errors


def test_task_outlives_the_signals_of_its_step(tmp_path):
    """Slurm signals the shell too; the task's status is Python's, and no other signal hits it while it waits."""
    ready = tmp_path / "ready"
    body = (
        f"import os, signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); open('{ready}', 'w').close()"
    )
    script = executable(tmp_path / "script", f'exec {sys.executable} -c "{body}; signal.pause()"')
    process = subprocess.Popen(["bash", str(RUN), "--task", str(script)], start_new_session=True)
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)  # the others may need a moment more
    os.killpg(process.pid, signal.SIGTERM)  # --kill-on-bad-exit, as soon as the first of them has ended
    assert process.wait(5) == 75


@pytest.mark.parametrize("status", [0, 75, 101])
def test_job_is_requeued_after_a_stop_only(tmp_path, status):
    executable(tmp_path / "srun", f'printf "%s\\n" "$@"; exit {status}')
    executable(tmp_path / "scontrol", "echo scontrol $*")
    for file in ("pretrain.sbatch", "finetune.sbatch"):
        spooled = tmp_path / "slurm_script"  # Slurm runs a copy
        spooled.write_text((ROOT / "scripts/slurm" / file).read_text())
        environment = dict(SLURM_JOB_ID="70", SLURM_SUBMIT_DIR=str(ROOT), PATH=f"{tmp_path}:{os.environ['PATH']}")
        result = outcome(start(spooled, "scripts/ssv2/pretrain_tats.sh", "--tats_lr", "a b", **environment))
        task = ["--kill-on-bad-exit=1", "bash", str(RUN), "--task", "scripts/ssv2/pretrain_tats.sh", "--tats_lr", "a b"]
        assert result.output.splitlines()[: len(task)] == task
        assert ("scontrol requeue 70" in result.output) == (status == 75) and result.status == status
        for wrong in ((), ("scripts/none.sh",)):
            result = outcome(start(spooled, *wrong, **environment))
            assert result.status == 2 and not result.output
            assert_names(result.errors, "error: ", *(wrong or ["script"]))


# --- real processes ----------------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def losses(output: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (output / "log.txt").read_text().splitlines()]


@pytest.mark.slow
def test_two_nodes_meet_in_both_ways(tmp_path):
    """Two launches on this machine stand for two nodes: by node ranks and by a meeting point, with the same losses."""
    shapes = write_dataset(tmp_path / "shapes", train=10, val=10, size=32, frames=12)
    flags = ("--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--num_frames", "4",
             "--tats_start_epoch", "0")  # fmt: skip
    settings = dict(
        DATA_PATH=str(shapes / "train.csv"), GPUS="0", NODES="2", EPOCHS="1", BATCH_SIZE="2", NUM_WORKERS="0",
        MASK_RATIO="0.75", OMP_NUM_THREADS="1", PYTHON=sys.executable,
    )  # fmt: skip
    static = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    meeting = dict(RDZV_ENDPOINT=f"127.0.0.1:{free_port()}")
    for name, places in (("static", [static | dict(NODE_RANK=n) for n in "01"]), ("meeting", [meeting, meeting])):
        nodes = [start(SCRIPT, *flags, **settings, **place, OUTPUT_DIR=str(tmp_path / name)) for place in places]
        results = [outcome(node) for node in nodes]
        assert [result.status for result in results] == [0, 0], results[0].errors + results[1].errors
        assert "2 process(es) x 2 videos" in results[0].output + results[1].output
    assert losses(tmp_path / "static") == losses(tmp_path / "meeting")
