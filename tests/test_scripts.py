"""Every shell script parses against the real flags, refuses to run without data, and runs on small data."""

import os
import subprocess
from pathlib import Path

import pytest

from datasets.moving_shapes import write_dataset
from run_mae_pretraining import check_flags, get_parser

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in (ROOT / "scripts").rglob("*.sh") if path.name != "common.sh")
PRETRAIN = [path for path in SCRIPTS if path.name.startswith("pretrain_") and path.parent.name != "demo"]


def run_script(path: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("DATA_PATH", "GPUS")} | environment
    return subprocess.run(["bash", str(path), *flags], env=env, capture_output=True, text=True, timeout=300)


def parsed(path: Path, *flags: str, **environment: str):
    """The flags a script would start its Python script with, parsed by that script's parser."""
    result = run_script(path, *flags, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()
    script = next(i for i, word in enumerate(command) if word.endswith("run_mae_pretraining.py"))
    args = get_parser().parse_args(command[script + 1 :])
    check_flags(args)
    return args, command[:script]


def test_all_data_sets_have_all_methods():
    assert {f"{p.parent.name}/{p.name}" for p in PRETRAIN} == {
        f"{data}/pretrain_{method}.sh"
        for data in ("ssv2", "k400", "ucf101", "hmdb51")
        for method in ("tats", "adamae", "videomae", "random")
    }


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_script_parses_with_the_papers_settings(path):
    args, launcher = parsed(path, DATA_PATH="list.csv", GPUS="1")
    method = path.stem.removeprefix("pretrain_")
    assert args.mask_type == {"videomae": "tube"}.get(method, method)
    assert args.sampling_rate == (4 if path.parent.name == "k400" else 2)
    assert (args.epochs, args.warmup_epochs, args.batch_size, args.lr) == (400, 40, 32, 1.5e-4)
    assert (args.opt_betas, args.weight_decay, args.num_frames, args.decoder_depth) == ([0.9, 0.95], 0.05, 16, 4)
    assert (args.tats_lr, args.tats_start_epoch, args.tats_rollout_steps, args.softmax_temp) == (1.5e-6, 10, 1, 1)
    assert args.policy_coef == args.value_coef == args.entropy_coef == 1e-4
    assert len(launcher) == 1  # one GPU: plain python
    assert args.output_dir.endswith(f"output/{path.parent.name}_{method}")


def test_environment_and_extra_flags_override():
    path = ROOT / "scripts/ssv2/pretrain_tats.sh"
    env = dict(
        DATA_PATH="l", BATCH_SIZE="8", EPOCHS="3", MASK_RATIO="0.85", OUTPUT_DIR="out", GPUS="4", NODES="2", LR="1"
    )
    args, launcher = parsed(path, "--tats_lr", "0.1", **env)
    assert (args.batch_size, args.epochs, args.mask_ratio, args.output_dir, args.lr) == (8, 3, 0.85, "out", 1.0)
    assert args.tats_lr == 0.1
    assert launcher[1:7] == ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--nnodes", "2"]


def test_srun_starts_the_processes_itself():
    env = dict(DATA_PATH="l", GPUS="4", NODES="2", SLURM_NTASKS="8")
    _, launcher = parsed(ROOT / "scripts/ssv2/pretrain_tats.sh", **env)
    assert len(launcher) == 1


def test_demo_parses():
    args, launcher = parsed(ROOT / "scripts/demo/pretrain_tats.sh", "--seed", "3")
    assert (args.mask_type, args.seed, args.device, len(launcher)) == ("tats", 3, "cpu", 1)


def test_no_script_is_left_out():
    assert set(SCRIPTS) - set(PRETRAIN) == {ROOT / "scripts/demo/pretrain_tats.sh"}


def test_missing_data_path_is_said():
    result = run_script(PRETRAIN[0])
    assert result.returncode == 2 and "set DATA_PATH" in result.stderr


def test_script_trains_on_the_cpu(tmp_path):
    shapes = write_dataset(tmp_path / "shapes", train=10, val=10, size=32, frames=12)
    result = run_script(
        ROOT / "scripts/ssv2/pretrain_tats.sh", "--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32",
        "--num_frames", "4", "--tats_start_epoch", "0",
        DATA_PATH=str(shapes / "train.csv"), GPUS="0", EPOCHS="1", BATCH_SIZE="4", NUM_WORKERS="0",
        OUTPUT_DIR=str(tmp_path / "out"), MASK_RATIO="0.75", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "checkpoint-0.pth").exists()
