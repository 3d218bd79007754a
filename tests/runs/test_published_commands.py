"""The training commands that VideoMAE (18), AdaMAE (4) and VideoMAE V2 (20) publish, pasted: each is parsed as it
stands and builds its model, and one of each kind trains with tiny overrides behind it. Their flag lines are data here:
files under scripts/ of the three repositories."""

import os
import re
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
from runtime.flags import INSTEAD
from tests.helpers.runs import assert_names

ROOT = Path(__file__).resolve().parents[2]


CLASSES = {"Kinetics-400": 400, "Kinetics-600": 600, "Kinetics-710": 710, "SSV2": 174, "UCF101": 101, "HMDB51": 51}


def pretrain(model, ratio, batch, rate, epochs, depth=4, mask="tube", more="", saves=20):
    return "run_mae_pretraining.py", (
        f"--data_path DATA/train.csv --mask_type {mask} --mask_ratio {ratio} "
        f"--model pretrain_videomae_{model}_patch16_224 --decoder_depth {depth} {more} --batch_size {batch} "
        f"--num_frames 16 --sampling_rate {rate} --opt adamw --opt_betas 0.9 0.95 --warmup_epochs 40 "
        f"--save_ckpt_freq {saves} --epochs {epochs} --log_dir OUTPUT --output_dir OUTPUT"
    )


def finetune(model, data, batch, samples, lr, epochs, views, rate=None, more="", saves=10):
    return "run_class_finetuning.py", (
        f"--model vit_{model}_patch16_224 --data_set {data} --nb_classes {CLASSES[data]} --data_path DATA --finetune "
        f"MODEL --log_dir OUTPUT --output_dir OUTPUT --batch_size {batch} --num_sample {samples} --input_size 224 "
        f"--short_side_size 224 --save_ckpt_freq {saves} --num_frames 16 {f'--sampling_rate {rate}' if rate else ''} "
        f"--opt adamw --lr {lr} --opt_betas 0.9 0.999 --weight_decay 0.05 --epochs {epochs} --dist_eval "
        f"--test_num_segment {views} --test_num_crop 3 {more} --enable_deepspeed"
    )


def pretrain_v2(model, lr, epochs, saves, warmup=30, more=""):
    return "run_mae_pretraining.py", (
        f"--data_path DATA/train.csv --mask_type tube --mask_ratio 0.9 --decoder_mask_type run_cell "
        f"--decoder_mask_ratio 0.5 --model pretrain_videomae_{model}_224 --decoder_depth 4 --batch_size 32 {more} "
        f"--num_frames 16 --sampling_rate 4 --num_sample 4 --num_workers 10 --opt adamw --lr {lr} --opt_betas 0.9 0.95 "
        f"--warmup_epochs {warmup} --save_ckpt_freq {saves} --epochs {epochs} --log_dir OUTPUT --output_dir OUTPUT"
    )


def finetune_v2(model, data, batch, lr, epochs, decay=None, views=5, more="--num_sample 2"):
    data_set = f"--data_set {data} --nb_classes {CLASSES[data]} " if data else ""
    return "run_class_finetuning.py", (
        f"--model vit_{model}_224 {data_set} --data_path DATA --finetune MODEL --log_dir OUTPUT --output_dir OUTPUT "
        f"--batch_size {batch} --input_size 224 --short_side_size 224 --save_ckpt_freq 10 --num_frames 16 "
        f"--num_workers 10 --opt adamw --lr {lr} {f'--layer_decay {decay}' if decay else ''} --opt_betas 0.9 0.999 "
        f"--epochs {epochs} "
        f"--test_num_segment {views} --test_num_crop 3 {more} --dist_eval --enable_deepspeed"
    )


RECIPE = "--warmup_lr 1e-8 --min_lr 1e-5 --drop_path 0.2 --fc_drop_rate 0.5 --use_checkpoint"
DENSE = "--sampling_rate 4"  # of VideoMAE V2, from here on
HUGE = f"{DENSE} --num_sample 2 --drop_path 0.2 --head_drop_rate 0.5 --weight_decay 0.05 --warmup_epochs 5"
GIANT = f"{DENSE} --num_sample 2 --weight_decay 0.1"
SHORT = f"{GIANT} --drop_path 0.25 --warmup_epochs 1"
DROPPED = "--num_sample 2 --weight_decay 0.05 --drop_path 0.35 --head_drop_rate 0.5"
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
    "v2 base pretrain": pretrain_v2("base_patch16", "1e-3", 200, 20, 20),
    "v2 large pretrain": pretrain_v2("large_patch16", "1e-3", 300, 20),
    "v2 huge pretrain": pretrain_v2("huge_patch16", "1e-3", 300, 10, more="--with_checkpoint"),
    "v2 giant pretrain": pretrain_v2("giant_patch14", "6e-4", 300, 5, more="--with_checkpoint --clip_grad 0.02"),
    "v2 base k400": finetune_v2("base_patch16", "", 16, "7e-4", 90, 0.75, more=f"{DENSE} --weight_decay 0.05"),
    "v2 base k710": finetune_v2(
        "base_patch16",
        "Kinetics-710",
        16,
        "7e-4",
        90,
        0.75,
        more=f"{DENSE} --num_sample 2 --drop_path 0.1 --head_drop_rate 0.0 --warmup_epochs 5",
    ),
    "v2 base ssv2": finetune_v2("base_patch16", "SSV2", 16, "2e-3", 25, 0.65, 2, "--num_sample 2 --weight_decay 0.05"),
    "v2 large k400": finetune_v2(
        "large_patch16", "", 6, "2e-3", 35, 0.75, more=f"{DENSE} --drop_path 0.2 --weight_decay 0.05"
    ),
    "v2 large ssv2": finetune_v2(
        "large_patch16", "SSV2", 6, "5e-4", 20, None, 2, "--num_sample 2 --weight_decay 0.05 --drop_path 0.2"
    ),
    "v2 huge k400": finetune_v2("huge_patch16", "Kinetics-400", 4, "1e-3", 40, 0.8, more=HUGE),
    "v2 huge k600": finetune_v2("huge_patch16", "Kinetics-600", 4, "1e-3", 40, 0.8, more=HUGE),
    "v2 huge k710": finetune_v2(
        "huge_patch16", "Kinetics-710", 4, "1e-3", 40, 0.8, more=f"{HUGE} --warmup_lr 1e-8 --min_lr 1e-6"
    ),
    "v2 huge ssv2": finetune_v2(
        "huge_patch16", "SSV2", 4, "5e-4", 20, 0.8, 2, "--num_sample 2 --weight_decay 0.05 --drop_path 0.2"
    ),
    "v2 giant k400": finetune_v2(
        "giant_patch14", "Kinetics-400", 3, "1e-3", 30, 0.9, more=f"{GIANT} --drop_path 0.2 --warmup_epochs 5"
    ),
    "v2 giant k710": finetune_v2(
        "giant_patch14",
        "Kinetics-710",
        3,
        "1e-3",
        35,
        0.9,
        more=f"{GIANT} --drop_path 0.3 --clip_grad 5.0 --warmup_epochs 5",
    ),
    "v2 giant k710 k400": finetune_v2("giant_patch14", "Kinetics-400", 3, "1e-5", 3, 0.9, more=SHORT),
    "v2 giant k710 k600": finetune_v2("giant_patch14", "Kinetics-600", 3, "1e-5", 3, 0.9, more=SHORT),
    "v2 giant k710 ucf101": finetune_v2("giant_patch14", "UCF101", 3, "1e-3", 50, "0.90", more=f"{DENSE} {DROPPED}"),
    "v2 giant k710 hmdb51": finetune_v2(
        "giant_patch14", "HMDB51", 3, "5e-4", 15, "0.90", more=f"--sampling_rate 2 {DROPPED}"
    ),
    "v2 giant ssv2": finetune_v2(
        "giant_patch14",
        "SSV2",
        3,
        "3e-4",
        20,
        0.9,
        2,
        f"--fname_tmpl 'img_{{:05}}.jpg' --start_idx 1 {DENSE} --num_sample 2 --drop_path 0.25 --weight_decay 0.05 "
        "--warmup_epochs 5",
    ),
}
assert len(COMMANDS) == 18 + 4 + 20
# Flags that differ between published lines are all in one of these, which train.
TRAINED = (
    "kinetics huge pretrain", "ucf101 pretrain", "adamae kinetics pretrain", "v2 giant pretrain",
    "kinetics huge finetune", "ssv2 small finetune", "v2 base k400", "v2 huge k710", "v2 giant ssv2", "v2 giant k710",
    "v2 giant k710 hmdb51",
)  # fmt: skip
NO_EFFECT = {"dist_eval", "fname_tmpl", "start_idx"}  # evaluation is always shared, and videos are read, not frames
NAMES = {"update_freq": "accum_iter", "with_checkpoint": "use_checkpoint", "head_drop_rate": "fc_drop_rate"}
# AdaMAE's own names for the two are pretrain_mae_vit.py and finetune_class.py.
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


SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32), "giant": (1408, 40)}


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
    with torch.device("meta"):
        if script == "run_class_finetuning.py":
            encoder = run_class_finetuning.build_classifier(args, None)
        else:
            encoder = run_mae_pretraining.build_mae(args).encoder
    assert (encoder.embed_dim, len(encoder.blocks)) == SIZES[args.model.split("_")[-3]]
    for flag, words in values_of(line).items():
        if flag in NO_EFFECT:
            continue
        value = getattr(args, NAMES.get(flag, flag))
        if not words:
            assert value is True, flag
        elif flag == "mask_type":
            assert value == {"tube": "tube", "learnable": "adamae"}[words[0]]
        else:
            found = value if isinstance(value, list) else [value]
            assert [type(v)(w) for v, w in zip(found, words, strict=True)] == found, flag


def test_every_kind_of_published_line_trains():
    flags = {name: values_of(line).keys() for name, (_, line) in COMMANDS.items()}
    assert set.union(*map(set, flags.values())) == set.union(*(set(flags[name]) for name in TRAINED))


@pytest.mark.parametrize("name", TRAINED)
def test_published_line_trains(name, data, tmp_path):
    script, line = COMMANDS[name]
    model = data / "model" / "checkpoint-0.pth"
    more = "" if script == "run_mae_pretraining.py" else "--no-enable_deepspeed"  # with it below: it makes a group
    SCRIPTS[script].main(pasted(name, data, tmp_path, model, more))
    saved = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    overridden = {*values_of(TINY[script] + " " + SMALL), "enable_deepspeed", "data_path", "finetune", *NO_EFFECT}
    for flag, words in values_of(line).items():
        if flag not in overridden and words and flag not in ("mask_type", "log_dir", "output_dir"):
            value = saved["args"][NAMES.get(flag, flag)]
            found = value if isinstance(value, list) else [value]
            assert [type(v)(w) for v, w in zip(found, words, strict=True)] == found, flag
    if "learnable" in line:
        assert any(name.startswith("get_token_probs") for name in saved["adamae"])
    if script == "run_class_finetuning.py":
        assert (tmp_path / "test.json").exists()


def launched(name, folder, output, processes, model=""):
    """A published line behind python -m torch.distributed.launch, which torchrun has replaced and torch still has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m torch.distributed.launch --nproc_per_node={processes} --master_port {port} --nnodes=1 --node_rank=0"
    script = str(ROOT / COMMANDS[name][0])
    command = [sys.executable, *launch.split(), "--master_addr=127.0.0.1", script, *pasted(name, folder, output, model)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=output, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow  # DeepSpeed compiles its Adam
def test_published_launcher_and_deepspeed(data, tmp_path):
    pytest.importorskip("deepspeed")
    launched("ssv2 base 2400 finetune", data, tmp_path, 1, data / "model" / "checkpoint-0.pth")
    assert (tmp_path / "test.json").exists() and list(tmp_path.glob("deepspeed_config*"))


@pytest.mark.slow
def test_published_launcher_joins_two_processes(data, tmp_path):
    launched("ucf101 pretrain", data, tmp_path, 2)
    saved = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    assert len(saved["rng"]) == saved["args"]["world_size"] == 2
    assert saved["step"] == 2  # 10 videos, 2 on each of 2 processes


# --- flags: what the scripts of the two repositories declare -----------------------------------------------------

# type -> {flag: default}; bool: without a value. These are in all four scripts.
COMMON = {
    int: dict(batch_size=64, input_size=224, warmup_steps=-1, num_frames=16, sampling_rate=4, seed=0, start_epoch=0,
              num_workers=10, world_size=1, local_rank=-1),
    float: dict(opt_eps=1e-8, clip_grad=None, momentum=0.9, weight_decay=0.05, weight_decay_end=None, warmup_lr=1e-6),
    str: dict(opt="adamw", train_interpolation="bicubic", data_path="/path/to/list_kinetics-400", output_dir="",
              log_dir=None, device="cuda", resume="", dist_url="env://"),
    list: dict(opt_betas=None),
    bool: dict(imagenet_default_mean_and_std=True, auto_resume=True, pin_mem=True, dist_on_itp=False),
}  # fmt: skip
PRETRAIN = {
    int: dict(epochs=800, save_ckpt_freq=50, decoder_depth=4, warmup_epochs=40),
    float: dict(mask_ratio=0.75, drop_path=0.0, lr=1.5e-4, min_lr=1e-5, color_jitter=0.0),
    str: dict(model="pretrain_videomae_base_patch16_224", mask_type="tube"),
}
FINETUNE = {
    int: dict(epochs=30, update_freq=1, save_ckpt_freq=100, tubelet_size=2, warmup_epochs=5, num_sample=2,
              short_side_size=224, test_num_segment=5, test_num_crop=3, recount=1, nb_classes=400, num_segments=1),
    float: dict(drop=0.0, attn_drop_rate=0.0, drop_path=0.1, model_ema_decay=0.9999, lr=1e-3, layer_decay=0.75,
                min_lr=1e-6, color_jitter=0.4, smoothing=0.1, crop_pct=None, reprob=0.25, mixup=0.8, cutmix=1.0,
                mixup_prob=1.0, mixup_switch_prob=0.5, init_scale=0.001),
    str: dict(model="vit_base_patch16_224", aa="rand-m7-n4-mstd0.5-inc1", remode="pixel", mixup_mode="batch",
              finetune="", model_key="model|module", model_prefix="", eval_data_path=None, data_set="Kinetics-400"),
    list: dict(cutmix_minmax=None),
    bool: dict(disable_eval_during_finetuning=False, model_ema=False, model_ema_force_cpu=False, resplit=False,
               use_mean_pooling=True, save_ckpt=True, eval=False, dist_eval=False, enable_deepspeed=False),
}  # fmt: skip
# script there -> (options that it declares, script here, tables that follow COMMON)
PUBLISHED = {
    "VideoMAE run_mae_pretraining.py": (44, run_mae_pretraining, PRETRAIN, {bool: dict(use_checkpoint=False)}),
    "AdaMAE pretrain_mae_vit.py": (
        44,
        run_mae_pretraining,
        PRETRAIN,
        {int: dict(num_workers=4), float: dict(mask_ratio=0.95, softmax_temp=0.01), str: dict(mask_type="learnable")},
    ),
    "VideoMAE run_class_finetuning.py": (
        82,
        run_class_finetuning,
        FINETUNE,
        {float: dict(fc_drop_rate=0.0), bool: dict(use_checkpoint=False)},
    ),
    "AdaMAE finetune_class.py": (80, run_class_finetuning, FINETUNE, {}),
    "V2 run_mae_pretraining.py": (
        51,
        run_mae_pretraining,
        PRETRAIN,
        {
            int: dict(epochs=300, tubelet_size=2, num_sample=1),
            float: dict(mask_ratio=0.9, decoder_mask_ratio=0.0),
            str: dict(decoder_mask_type="run_cell", finetune="", data_root="", fname_tmpl="img_{:05}.jpg"),
            bool: dict(with_checkpoint=False),
        },
    ),
    "V2 run_class_finetuning.py": (
        87,
        run_class_finetuning,
        FINETUNE,
        {
            int: dict(test_num_segment=10, start_idx=1),
            float: dict(head_drop_rate=0.0),
            str: dict(data_root="", fname_tmpl="img_{:05}.jpg"),
            bool: dict(with_checkpoint=False, sparse_sample=False, validation=False),
        },
    ),
}
# Where a default differs on purpose: ours, and why. Published lines that rely on one of these would train otherwise.
OTHER_DEFAULTS = {
    "warmup_lr": 0.0,  # has no reader there: their warm-up starts at 0
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "short_side_size": None,  # --input_size
    "nb_classes": None,  # the data set's
    "num_segments": None,  # the data set's: 1, and for SSV2 --num_frames, as their reader of SSV2 does
    "softmax_temp": 1.0,  # TATS's; AdaMAE's flag has no reader there
}
OTHER_DEFAULTS_OF_PRETRAINING = {"train_interpolation": "bilinear"}  # as their crops are, whatever the flag says
OTHER_DEFAULTS_BESIDE_V2 = {"epochs": 800, "mask_ratio": 0.75, "test_num_segment": 5}  # VideoMAE's
OTHER_DEFAULTS_BESIDE_ADAMAE = {"mask_type": "tube", "mask_ratio": 0.75, "num_workers": 10}  # VideoMAE's
TURNED_OFF = dict(no_auto_resume="auto_resume", no_pin_mem="pin_mem", no_save_ckpt="save_ckpt",
                  use_cls="use_mean_pooling")  # fmt: skip
VALUES = {  # of flags with choices there, or here
    "mask_type": ["random", "tube", "learnable"], "remode": ["pixel", "rand", "const"], "device": ["cpu", "cuda"],
    "mixup_mode": ["batch", "pair", "elem"], "train_interpolation": ["random", "bilinear", "bicubic"],
    "decoder_mask_type": ["run_cell", "random"],
    "data_set": list(CLASSES),  # image_folder, of frames as files, is not read
}  # fmt: skip


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_flags_have_their_types_and_defaults(published, capsys):
    declared, script, *tables = PUBLISHED[published]
    parser = script.get_parser()
    defaults = vars(parser.parse_args([]))
    other = dict(OTHER_DEFAULTS)
    if script is run_mae_pretraining:
        other |= OTHER_DEFAULTS_OF_PRETRAINING
    if published.startswith("AdaMAE"):
        other |= OTHER_DEFAULTS_BESIDE_ADAMAE
    if published.startswith("V2"):
        other |= OTHER_DEFAULTS_BESIDE_V2 | ({"epochs": 30} if script is run_class_finetuning else {})
    texts = {int: ["7"], float: ["0.375"], str: ["text"], list: ["0.25 0.75"]}
    values = {int: 7, float: 0.375, list: [0.25, 0.75]}
    seen = 0
    for kind in COMMON:
        flags = dict(COMMON[kind])
        for table in tables:
            flags |= table.get(kind, {})
        seen += len(flags)
        for flag, default in flags.items():
            name = NAMES.get(flag, flag)
            if f"--{flag}" in INSTEAD:
                with pytest.raises(SystemExit):
                    parser.parse_args([f"--{flag}"] + ["text"] * (kind is str))
                assert_names(capsys.readouterr().err, f"--{flag}", "MIGRATING.md")
                continue
            if flag in NO_EFFECT:
                given = [] if kind is bool else [str(default)]
                assert vars(parser.parse_args([f"--{flag}", *given])) == defaults
                continue
            assert defaults[name] == other.get(flag, default), flag
            if kind is bool:
                assert getattr(parser.parse_args([f"--{flag}"]), name) is True
                continue
            for text in VALUES.get(flag, texts[kind]):
                value = getattr(parser.parse_args([f"--{flag}", *text.split()]), name)
                expected = {"learnable": "adamae"}.get(text, values.get(kind, text))
                assert value == expected and type(value) is type(expected), flag
    for flag, name in TURNED_OFF.items():
        if name in defaults:
            assert getattr(parser.parse_args([f"--{flag}"]), name) is False
            seen += 1
    if script is run_mae_pretraining:  # type=bool there, so that False means True; here what it says
        assert defaults["normalize_target"] is True
        assert parser.parse_args(["--normlize_target", "False"]).normalize_target is False
        seen += 1
    assert seen == declared


def test_every_difference_is_in_the_table_of_migrating():
    """What this file knows to differ is named in the first column, and what is named there is a flag of theirs."""
    rows = [line.split("|")[1] for line in (ROOT / "docs/MIGRATING.md").read_text().splitlines() if line[:1] == "|"]
    named = set(re.findall(r"--(\w+)", " ".join(rows)))
    defaults = (OTHER_DEFAULTS, OTHER_DEFAULTS_OF_PRETRAINING, OTHER_DEFAULTS_BESIDE_ADAMAE, OTHER_DEFAULTS_BESIDE_V2)
    differing = {flag for table in defaults for flag in table} | NO_EFFECT | NAMES.keys() - {"update_freq"}
    differing |= {flag[2:] for flag in INSTEAD} | {"normlize_target"}
    tables = [table for _, _, *tables in PUBLISHED.values() for table in (COMMON, *tables)]
    theirs = {flag for table in tables for flags in table.values() for flag in flags} | {"normlize_target"}
    assert differing <= named <= theirs


def test_a_flag_is_not_known_by_its_beginning():
    for script in SCRIPTS.values():
        assert script.get_parser().parse_known_args(["--enable_d", "--batch"])[1] == ["--enable_d", "--batch"]


def test_two_published_lines_leave_the_data_out(capsys):
    """Kinetics-400 huge and small, fine-tuning: they set OUTPUT_DIR twice and DATA_PATH never."""
    script, line = COMMANDS["kinetics huge finetune"]
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(shlex.split(line.replace(" DATA ", " ")))
    assert "error: argument --data_path" in capsys.readouterr().err  # argparse's own words
