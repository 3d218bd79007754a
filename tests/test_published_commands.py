"""The training commands that VideoMAE (18) and AdaMAE (4) publish, pasted: each is parsed as it stands, and trains with
tiny overrides behind it. Their flag lines are data here: files under scripts/ of the two repositories."""

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_class_finetuning
import run_mae_pretraining
from datasets.moving_shapes import write_dataset

ROOT = Path(__file__).resolve().parents[1]


def pretrain(model, ratio, batch, rate, epochs, depth=4, mask="tube", more="", saves=20):
    return "run_mae_pretraining.py", (
        f"--data_path DATA/train.csv --mask_type {mask} --mask_ratio {ratio} "
        f"--model pretrain_videomae_{model}_patch16_224 --decoder_depth {depth} {more} --batch_size {batch} "
        f"--num_frames 16 --sampling_rate {rate} --opt adamw --opt_betas 0.9 0.95 --warmup_epochs 40 "
        f"--save_ckpt_freq {saves} --epochs {epochs} --log_dir OUTPUT --output_dir OUTPUT"
    )


def finetune(model, data, batch, samples, lr, epochs, views, rate=None, more="", saves=10):
    classes = {"Kinetics-400": 400, "SSV2": 174, "UCF101": 101}[data]
    return "run_class_finetuning.py", (
        f"--model vit_{model}_patch16_224 --data_set {data} --nb_classes {classes} --data_path DATA --finetune MODEL "
        f"--log_dir OUTPUT --output_dir OUTPUT --batch_size {batch} --num_sample {samples} --input_size 224 "
        f"--short_side_size 224 --save_ckpt_freq {saves} --num_frames 16 {f'--sampling_rate {rate}' if rate else ''} "
        f"--opt adamw --lr {lr} --opt_betas 0.9 0.999 --weight_decay 0.05 --epochs {epochs} --dist_eval "
        f"--test_num_segment {views} --test_num_crop 3 {more} --enable_deepspeed"
    )


RECIPE = "--warmup_lr 1e-8 --min_lr 1e-5 --drop_path 0.2 --fc_drop_rate 0.5 --use_checkpoint"
COMMANDS = {
    "kinetics base 1600 pretrain": pretrain("base", 0.9, 32, 4, 1601),
    "kinetics base 1600 finetune": finetune("base", "Kinetics-400", 6, 2, "5e-4", 75, 5, 4),
    "kinetics base 800 pretrain": pretrain("base", 0.9, 32, 4, 801),
    "kinetics base 800 finetune": finetune("base", "Kinetics-400", 8, 1, "1e-3", 100, 5, 4),
    "kinetics huge pretrain": pretrain("huge", 0.9, 16, 4, 1601, 12, more="--use_checkpoint"),
    "kinetics huge finetune": finetune("huge", "Kinetics-400", 8, 2, "1e-3", 50, 5, 4, f"{RECIPE} --layer_decay 0.75"),
    "kinetics large pretrain": pretrain("large", 0.9, 8, 4, 1601, 12),
    "kinetics large finetune": finetune("large", "Kinetics-400", 2, 2, "2e-3", 35, 5, 4),
    "kinetics small pretrain": pretrain("small", 0.9, 32, 4, 1601),
    "kinetics small finetune": finetune("small", "Kinetics-400", 12, 2, "5e-4", 150, 5, 4),
    "ssv2 base 2400 pretrain": pretrain("base", 0.9, 32, 2, 2401),
    "ssv2 base 2400 finetune": finetune("base", "SSV2", 6, 2, "5e-4", 30, 2),
    "ssv2 base 800 pretrain": pretrain("base", 0.9, 32, 2, 801),
    "ssv2 base 800 finetune": finetune("base", "SSV2", 8, 1, "5e-4", 50, 2),
    "ssv2 small pretrain": pretrain("small", 0.9, 32, 2, 2401),
    "ssv2 small finetune": finetune("small", "SSV2", 12, 2, "1e-3", 40, 2, more="--layer_decay 0.7"),
    "ucf101 pretrain": pretrain("base", 0.75, 24, 4, 3201, more="--lr 3e-4", saves=100),
    "ucf101 finetune": finetune("base", "UCF101", 16, 2, "5e-4", 100, 5, 4, f"{RECIPE} --layer_decay 0.7", saves=50),
    "adamae kinetics pretrain": pretrain("base", 0.95, 32, 4, 801, mask="learnable"),
    "adamae kinetics finetune": finetune("base", "SSV2", 8, 1, "5e-4", 50, 2),  # as published, under this name
    "adamae ssv2 pretrain": pretrain("base", 0.95, 32, 2, 801, mask="learnable"),
    "adamae ssv2 finetune": finetune("base", "Kinetics-400", 8, 1, "1e-3", 100, 5, 4),
}
SCRIPTS = {"run_mae_pretraining.py": run_mae_pretraining, "run_class_finetuning.py": run_class_finetuning}
TINY = {
    "run_mae_pretraining.py": "--model pretrain_videomae_tiny_patch8_64 --decoder_depth 1",
    "run_class_finetuning.py": "--model vit_tiny_patch8_64 --short_side_size 32 --test_num_segment 1 --test_num_crop 1",
}
SMALL = "--input_size 32 --num_frames 4 --epochs 1 --batch_size 2 --num_workers 0 --device cpu --save_ckpt_freq 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Lists of ten videos each, and a checkpoint to fine-tune."""
    folder = write_dataset(tmp_path_factory.mktemp("shapes"), train=10, val=10, size=32, frames=8)
    flags = pasted("kinetics base 800 pretrain", folder, folder / "model", "")
    run_mae_pretraining.main(flags)
    return folder


def pasted(name, folder, output, model, more=""):
    script, line = COMMANDS[name]
    places = {"DATA/train.csv": folder / "train.csv", "DATA": folder, "OUTPUT": output, "MODEL": model}
    words = [str(places.get(word, word)) for word in shlex.split(line)]
    return [*words, *TINY[script].split(), *SMALL.split(), *more.split()]


def values_of(line):
    """{flag: values as text} of a line, the last one counting."""
    values = {}
    for word in shlex.split(line):
        if word.startswith("--"):
            flag = word[2:]
            values[flag] = []
        else:
            values[flag].append(word)
    return values


@pytest.mark.parametrize("name", COMMANDS)
def test_published_line_is_taken_as_it_stands(name, tmp_path):
    """Every value is where the scripts read it, and no check refuses it."""
    script, line = COMMANDS[name]
    if script == "run_class_finetuning.py":
        args = run_class_finetuning.parse_args(shlex.split(line))
    else:
        args = run_mae_pretraining.get_parser().parse_args(shlex.split(line))
    args.world_size, args.rank = 64, 0
    SCRIPTS[script].check_flags(args)
    for flag, words in values_of(line).items():
        if flag == "dist_eval":  # evaluation is always shared
            continue
        value = getattr(args, flag)
        if not words:
            assert value is True, flag
        elif flag == "mask_type":
            assert value == {"tube": "tube", "learnable": "adamae"}[words[0]]
        else:
            found = value if isinstance(value, list) else [value]
            assert [type(v)(w) for v, w in zip(found, words, strict=True)] == found, flag


@pytest.mark.parametrize("name", COMMANDS)
def test_published_line_trains(name, data, tmp_path):
    script, line = COMMANDS[name]
    model = data / "model" / "checkpoint-0.pth"
    more = "" if script == "run_mae_pretraining.py" else "--no-enable_deepspeed"  # with it below: it makes a group
    SCRIPTS[script].main(pasted(name, data, tmp_path, model, more))
    saved = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    overridden = {*values_of(TINY[script] + " " + SMALL), "enable_deepspeed", "dist_eval", "data_path", "finetune"}
    for flag, words in values_of(line).items():
        if flag not in overridden and words and flag not in ("mask_type", "log_dir", "output_dir"):
            value = saved["args"][flag]
            found = value if isinstance(value, list) else [value]
            assert [type(v)(w) for v, w in zip(found, words, strict=True)] == found, flag
    if "learnable" in line:
        assert any(name.startswith("get_token_probs") for name in saved["adamae"])
    if script == "run_class_finetuning.py":
        assert (tmp_path / "test.json").exists()


def test_published_launcher_and_deepspeed(data, tmp_path):
    """python -m torch.distributed.launch, which torchrun has replaced and torch still has, with --enable_deepspeed."""
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = pasted("ssv2 base 2400 finetune", data, tmp_path, data / "model" / "checkpoint-0.pth")
    launch = f"-m torch.distributed.launch --nproc_per_node=1 --master_port {port} --nnodes=1 --node_rank=0"
    command = [
        sys.executable,
        *launch.split(),
        "--master_addr=127.0.0.1",
        str(ROOT / "run_class_finetuning.py"),
        *flags,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "test.json").exists() and list(tmp_path.glob("deepspeed_config*"))
