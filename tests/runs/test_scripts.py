"""Every shell script parses against the real flags, refuses to run without data, and runs on small data."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import run_class_finetuning
import run_mae_pretraining
from datasets.moving_shapes import write_dataset
from utils import UsageError

ROOT = Path(__file__).resolve().parents[2]
SBATCH = sorted((ROOT / "scripts").rglob("*.sbatch"))
SOURCED = {ROOT / "scripts" / name for name in ("checks.sh", "common.sh", "shapes/data.sh", "compare/sweep.sh")}
SCRIPTS = sorted(set((ROOT / "scripts").rglob("*.sh")) - SOURCED)
SWEEPS = [path for path in SCRIPTS if path.parent.name in ("compare", "ablations")]
PAPERS = ("ssv2", "k400", "ucf101", "hmdb51")
PRETRAIN = [path for path in SCRIPTS if path.name.startswith("pretrain_") and path.parent.name in PAPERS]
FINETUNE = [path for path in SCRIPTS if path.name == "finetune.sh" and path.parent.name in PAPERS]
OTHERS = [path for path in SCRIPTS if path.parent.name in ("shapes", "custom")]
PARSERS = {
    "run_mae_pretraining.py": (
        lambda a: run_mae_pretraining.get_parser().parse_args(a),
        run_mae_pretraining.check_flags,
    ),
    "run_class_finetuning.py": (run_class_finetuning.parse_args, run_class_finetuning.check_flags),
}


def run_script(path: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    own = ("DATA_PATH", "MODEL_PATH", "GPUS")
    env = {name: value for name, value in os.environ.items() if name not in own} | environment
    return subprocess.run(["bash", str(path), *flags], env=env, capture_output=True, text=True, timeout=300)


def parsed(path: Path, *flags: str, **environment: str):
    """The flags a script would start its Python script with, parsed by that script's parser."""
    result = run_script(path, *flags, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    command = result.stdout.splitlines()
    script = next(i for i, word in enumerate(command) if Path(word).name in PARSERS)
    parse, check_flags = PARSERS[Path(command[script]).name]
    args = parse(command[script + 1 :])
    check_flags(args)
    return args, command[:script]


def test_all_data_sets_have_all_methods():
    names = [f"pretrain_{method}.sh" for method in ("tats", "adamae", "videomae", "random")] + ["finetune.sh"]
    for data in (*PAPERS, "shapes", "custom"):
        assert {p.name for p in SCRIPTS if p.parent.name == data} == set(names)


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


@pytest.mark.parametrize("path", FINETUNE, ids=lambda p: p.parent.name)
def test_finetuning_parses_with_the_papers_settings(path):
    """Table 7."""
    data = path.parent.name
    args, launcher = parsed(path, DATA_PATH="lists", MODEL_PATH="some.pth", GPUS="1")
    names = {"ssv2": "SSV2", "k400": "Kinetics-400", "ucf101": "UCF101", "hmdb51": "HMDB51"}
    assert (args.data_set, args.finetune, args.data_path) == (names[data], "some.pth", "lists")
    assert args.sampling_rate == (4 if data == "k400" else 2)
    assert (args.test_num_segment, args.test_num_crop) == (5 if data == "k400" else 2, 3)
    assert (args.flip, args.num_segments) == ((False, 16) if data == "ssv2" else (True, 1))
    assert (args.epochs, args.warmup_epochs, args.batch_size, args.lr) == (100, 5, 8, 1e-3)
    assert (args.opt, args.opt_betas, args.weight_decay, args.layer_decay) == ("adamw", [0.9, 0.999], 0.05, 0.75)
    assert (args.smoothing, args.mixup, args.cutmix, args.drop_path) == (0.1, 0.8, 1.0, 0.1)
    assert (args.aa, args.num_frames) == ("rand-m9-mstd0.5-inc1", 16)
    assert len(launcher) == 1 and args.output_dir.endswith(f"output/{data}_finetune_from_some")
    scratch, _ = parsed(path, DATA_PATH="lists", MODEL_PATH="none", GPUS="1")
    assert scratch.finetune == "" and scratch.output_dir.endswith(f"output/{data}_finetune_from_scratch")
    probe, _ = parsed(path, "--linear_probe", DATA_PATH="lists", MODEL_PATH="output/ssv2_tats/checkpoint-399.pth")
    assert probe.output_dir.endswith(f"output/{data}_linear_probe_from_ssv2_tats")
    assert (probe.mixup, probe.weight_decay, probe.layer_decay) == (0, 0, 1)


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize(
    "path", [*FINETUNE, *(p for p in OTHERS if p.name == "finetune.sh")], ids=lambda p: p.parent.name
)
def test_probes_have_the_defaults_of_probes_in_every_script(path, scale):
    environment = dict(DATA_PATH="lists", MODEL_PATH="a.pth", GPUS="0", SCALE=scale, NB_CLASSES="3")
    for kind in ("linear_probe", "attentive_probe"):
        args, _ = parsed(path, f"--{kind}", **environment)
        differ = {
            name: getattr(args, name)
            for name, value in run_class_finetuning.PROBE_DEFAULTS.items()
            if getattr(args, name) != value
        }
        assert not differ and args.output_dir.endswith(f"_{kind}_from_a")
    for flag in (["--knn", "5"], ["--knn=5"]):
        args, _ = parsed(path, *flag, **environment)
        assert args.knn == 5 and args.output_dir.endswith("_knn_from_a")
    with pytest.raises(UsageError, match="test_num_segment"):  # said, not silently another
        parsed(path, "--knn", "5", "--test_num_segment", "4", **environment)
    trained, _ = parsed(path, **environment)
    assert trained.aa == ("none" if scale == "tiny" else "rand-m9-mstd0.5-inc1")


def test_clean_removes_no_results(tmp_path):
    commands = subprocess.run(
        ["make", "-n", "--no-print-directory", "clean"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    kept = ["output/compare/a/checkpoint-1.pth", "output/ssv2_tats/log.txt", "datasets/lists.py"]
    removed = [".pytest_cache/x", "output/gpu/GPU.md", "datasets/__pycache__/a.pyc"]
    for name in [*kept, *removed]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["bash", "-c", commands], cwd=tmp_path, check=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_environment_and_extra_flags_override():
    path = ROOT / "scripts/ssv2/pretrain_tats.sh"
    env = dict(
        DATA_PATH="l", BATCH_SIZE="8", EPOCHS="3", MASK_RATIO="0.85", OUTPUT_DIR="out", GPUS="4", NODES="2", LR="1"
    )
    args, launcher = parsed(path, "--tats_lr", "0.1", **env)
    assert (args.batch_size, args.epochs, args.mask_ratio, args.output_dir, args.lr) == (8, 3, 0.85, "out", 1.0)
    assert args.tats_lr == 0.1
    assert launcher[1:7] == ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--nnodes", "2"]


def test_demo_parses():
    args, launcher = parsed(ROOT / "scripts/demo/pretrain_tats.sh", "--seed", "3")
    assert (args.mask_type, args.seed, args.device, len(launcher)) == ("tats", 3, "cpu", 1)


def test_no_script_is_left_out():
    demo = {ROOT / "scripts/demo/pretrain_tats.sh", ROOT / "scripts/demo/finetune.sh"}
    slurm = {ROOT / "scripts/slurm/run.sh"}
    assert set(SCRIPTS) - set(PRETRAIN) - set(FINETUNE) - set(OTHERS) - set(SWEEPS) == demo | slurm
    assert {path.name for path in SBATCH} == {"pretrain.sbatch", "finetune.sbatch"}


@pytest.mark.parametrize("path", [*SCRIPTS, *SBATCH], ids=lambda p: str(p.relative_to(ROOT / "scripts")))
def test_script_is_sound(path):
    """bash reads it, and the scripts it names are there."""
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    for name in re.findall(r"scripts/[\w/]+\.(?:sh|sbatch)", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", SBATCH, ids=lambda p: p.stem)
def test_batch_file_asks_for_what_a_restart_needs(path):
    options = re.findall(r"^#SBATCH --(\S+)$", path.read_text(), re.MULTILINE)
    assert {"signal=USR1@120", "requeue", "open-mode=append"} < set(options)
    edited = {option.split("=")[0] for option in options if "=" in option}
    assert {"partition", "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "time"} < edited
    assert "scripts/slurm/run.sh" in path.read_text().splitlines()[-1]


def test_missing_paths_are_said():
    for path in (PRETRAIN[0], FINETUNE[0]):
        result = run_script(path)
        assert result.returncode == 2 and "DATA_PATH" in result.stderr
    result = run_script(FINETUNE[0], DATA_PATH="lists")
    assert result.returncode == 2 and "MODEL_PATH" in result.stderr


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


@pytest.mark.slow
def test_script_fine_tunes_on_the_cpu(tmp_path):
    shapes = write_dataset(tmp_path / "shapes", train=10, val=10, size=32, frames=12)
    result = run_script(
        ROOT / "scripts/hmdb51/finetune.sh", "--model", "vit_tiny_patch8_64", "--input_size", "32", "--num_frames", "4",
        DATA_PATH=str(shapes), MODEL_PATH="none", GPUS="0", EPOCHS="1", BATCH_SIZE="4", NUM_WORKERS="0",
        OUTPUT_DIR=str(tmp_path / "finetuned"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "finetuned" / "test.json").exists()
