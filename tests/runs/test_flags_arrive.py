"""What a flag says is seen to arrive: all flags of both scripts at values unlike their defaults and unlike one another,
read off where training uses them. A row for each flag; flags that steer a run's life are tested elsewhere (ELSEWHERE).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine_for_pretraining
import engine_for_tats
import modeling_pretrain
import run_class_finetuning
import run_mae_pretraining
import utils
from datasets.build import build_evaluation_loader
from datasets.moving_shapes import write_dataset
from engine_for_pretraining import PretrainRecipe
from masking_generator import gumbel_noise, uniform_noise
from runtime import backend as runtime_backend
from runtime import build as runtime_build
from runtime.checkpoint import load_run
from tests.helpers import reference
from tests.helpers.engines import HEADS, NUM_MASKED, NUM_TOKENS, make_batch, make_run, train_step
from tests.helpers.runs import flags_to_read

torch.set_num_threads(1)

# ---------------------------------------------------------------------- what the flags become, up to the first epoch


class Arrived(Exception):
    """Thrown in place of the first epoch."""


class Seen(dict):
    __getattr__ = dict.__getitem__


def until_the_first_epoch(main, flags: str, epochs: dict, monkeypatch) -> Seen:
    """What main(flags) hands to its first epoch. epochs: {(module, function): names of its arguments}."""
    seen = Seen()
    for (module, function), names in epochs.items():

        def stop(*args, names=names, **kwargs):
            seen.update(zip(names.split(), args, strict=False), **kwargs)
            raise Arrived

        monkeypatch.setattr(module, function, stop)
    state = torch.get_rng_state(), np.random.get_state()
    with pytest.raises(Arrived):
        main(flags.split())
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    return seen


def group_values(backend, name) -> list:
    return sorted({group[name] for group in backend.optimizer.param_groups})


def lr_at(seen, step) -> float:
    """Of the optimizer's groups of the last layer, after the recipe has set the rates of a step."""
    seen.recipe.apply_schedule(seen.backend, step)
    return max(group["lr"] for group in seen.backend.optimizer.param_groups)


def decay_at(seen, step) -> float:
    seen.recipe.apply_schedule(seen.backend, step)
    return max(group_values(seen.backend, "weight_decay"))


def end(seen) -> int:
    return seen.recipe.total_steps


# 4 clips x 3 micro-batches x 1 process = 12 a step; 64 videos: 16 micro-batches, 5 steps an epoch, 35 steps in all.
SHARED = (
    "--batch_size 4 --accum_iter 3 --epochs 7 --print_freq 11 --seed 5 --device cpu --amp bf16 --start_epoch 3 "
    "--input_size 32 --num_frames 4 --patch_size 16 --tubelet_size 1 --use_checkpoint --opt_eps 1e-7 --opt_betas 0.7 "
    "0.97 --clip_grad 0.6 --weight_decay 0.2 --weight_decay_end 0.35 --lr 0.03 --min_lr 0.004 --warmup_lr 0.0005 "
    "--warmup_steps 2 --sampling_rate 3 --num_sample 1 --train_interpolation random --color_jitter 0.23 "
    "--no-imagenet_default_mean_and_std --decoder pyav --max_short_side 90 --num_workers 2 "
)
SCALE = 12 / 256
# flag: (what was seen of it, what it has to be); of either script
SHARED_ROWS = {
    "batch_size": (lambda s: s.loader.batch_size, 4),
    "accum_iter": (lambda s: s.backend.accum_iter, 3),
    "epochs": (lambda s: s.recipe.epochs, 7),
    "print_freq": (lambda s: s.recipe.print_freq, 11),
    "seed": (lambda s: (s.loader.sampler.seed, s.seeds), (5, [(5,), (5, 0)])),
    "device": (lambda s: str(s.backend.device), "cpu"),
    "amp": (lambda s: s.backend.dtype, torch.bfloat16),
    "start_epoch": (lambda s: s.epoch, 3),
    "model": (lambda s: s.embed.proj.out_channels, 96),
    "input_size": (lambda s: (s.embed.img_size, s.transform.size), ((32, 32), 32)),
    "num_frames": (lambda s: (s.embed.num_frames, s.loader.dataset.num_frames), (4, 4)),
    "patch_size": (lambda s: s.embed.patch_size, (16, 16)),
    "tubelet_size": (lambda s: s.embed.tubelet_size, 1),
    "drop_path": (lambda s: [round(b.drop_path.drop_prob, 6) for b in s.blocks[1:]], [0.1, 0.2, 0.3]),
    "use_checkpoint": (lambda s: s.encoder.use_checkpoint, True),
    "opt": (lambda s: (type(s.backend.optimizer).__name__, s.backend.optimizer.defaults["fused"]), ("AdamW", True)),
    "opt_eps": (lambda s: group_values(s.backend, "eps"), [1e-7]),
    "opt_betas": (lambda s: group_values(s.backend, "betas"), [(0.7, 0.97)]),
    "clip_grad": (lambda s: s.backend.clip_grad, 0.6),
    "weight_decay": (lambda s: decay_at(s, 0), 0.2),
    "weight_decay_end": (lambda s: decay_at(s, end(s)), 0.35),
    "lr": (lambda s: lr_at(s, 2), 0.03 * SCALE),
    "min_lr": (lambda s: lr_at(s, end(s)), 0.004 * SCALE),
    "warmup_lr": (lambda s: lr_at(s, 0), 0.0005 * SCALE),
    "warmup_steps": (lambda s: s.recipe.warmup_steps, 2),
    "data_path": (lambda s: Path(s.loader.dataset.list_path).name, "train.csv"),
    "sampling_rate": (lambda s: s.loader.dataset.stride, 3),
    "num_sample": (lambda s: s.loader.dataset.num_sample, 1),
    "train_interpolation": (lambda s: s.transform.interpolation, "random"),
    "color_jitter": (lambda s: s.transform.color_jitter, 0.23),
    "imagenet_default_mean_and_std": (lambda s: s.recipe.mean.tolist() + s.recipe.std.tolist(), [0.5] * 6),
    "decoder": (lambda s: s.loader.dataset.decoder, "pyav"),
    "max_short_side": (lambda s: s.loader.dataset.max_short_side, 90),
    "num_workers": (lambda s: s.loader.num_workers, 2),
}


def watch_seeds(module, seen_seeds, monkeypatch):
    """The engine's stream has to be the rank's own: seed_everything(seed, rank) is the last call."""
    monkeypatch.setattr(
        module, "seed_everything", lambda *args: seen_seeds.append(args) or utils.seed_everything(*args)
    )


# ------------------------------------------------------------------------------------------------- pre-training

PRETRAINING_EPOCHS = {
    (engine_for_pretraining, "train_one_epoch"): "backend sampler loader recipe epoch state",
    (engine_for_tats, "train_one_epoch"): "backend tats sampler loader recipe phases epoch state",
}


def pretraining(flags: str, folder: Path, monkeypatch) -> Seen:
    (folder / "train.csv").write_text("a.mp4 0\n" * 64)
    seeds = []
    watch_seeds(run_mae_pretraining, seeds, monkeypatch)
    flags = f"--data_path {folder / 'train.csv'} --model pretrain_videomae_tiny_patch8_64 {flags}"
    seen = until_the_first_epoch(run_mae_pretraining.main, flags, PRETRAINING_EPOCHS, monkeypatch)
    mae = getattr(seen.backend.unwrapped, "mae", seen.backend.unwrapped)
    seen.update(mae=mae, encoder=mae.encoder, blocks=mae.encoder.blocks, embed=mae.encoder.patch_embed, seeds=seeds,
                transform=seen.loader.dataset.transforms[0])  # fmt: skip
    return seen


TATS_FLAGS = (
    f"{SHARED} --drop_path 0.3 --mask_type tats --decoder_depth 2 --mask_ratio 0.6 --decoder_mask_ratio 0.3 "
    "--decoder_mask_type random --loss l1 "
    "--no-normalize_target --tats_attention trajectory --tats_blocks 2 --num_landmarks 17 --landmark_gradient "
    "--softmax_temp 0.5 --tats_logit_cap 2.5 --tats_lr 0.00021 --tats_eps 1e-9 --tats_start_epoch 3 "
    "--tats_rollout_steps 4 --ppo_epochs 2 --ppo_clip 0.31 --policy_coef 0.011 --value_coef 0.012 --entropy_coef 0.013 "
    "--entropy uniform_kl "
    "--normalize_advantage --crop random_resized"
)
TATS_ROWS = SHARED_ROWS | {
    "mask_type": (lambda s: type(s.sampler).__name__, "TATS"),
    "decoder_depth": (lambda s: len(s.mae.decoder.blocks), 2),
    "mask_ratio": (lambda s: s.sampler.num_visible, 6),  # 4 frames of 2 x 2 tokens
    "decoder_mask_ratio": (lambda s: s.sampler.decoder_mask_ratio, 0.3),
    "decoder_mask_type": (lambda s: s.sampler.decoder_mask_type, "random"),
    "loss": (lambda s: s.recipe.loss, "l1"),
    "normalize_target": (lambda s: s.recipe.normalize_target, False),
    "tats_attention": (lambda s: [b.attn.approx for b in s.sampler.blocks], ["none"] * 2),
    "tats_blocks": (lambda s: len(s.sampler.blocks), 2),
    "num_landmarks": (lambda s: [b.attn.num_landmarks for b in s.sampler.blocks], [17] * 2),
    "landmark_gradient": (lambda s: [b.attn.landmark_gradient for b in s.sampler.blocks], [True] * 2),
    "softmax_temp": (lambda s: s.sampler.temperature, 0.5),
    "tats_logit_cap": (lambda s: s.sampler.logit_cap, 2.5),
    "tats_lr": (lambda s: group_values(s.tats, "lr"), [0.00021]),
    "tats_eps": (lambda s: group_values(s.tats, "eps"), [1e-9]),
    "tats_start_epoch": (lambda s: "tats" in s, True),
    "tats_rollout_steps": (lambda s: s.phases.rollout_steps, 4),
    "ppo_epochs": (lambda s: s.phases.epochs, 2),
    "ppo_clip": (lambda s: s.sampler.ppo["clip"], 0.31),
    "policy_coef": (lambda s: s.sampler.ppo["policy_coef"], 0.011),
    "value_coef": (lambda s: s.sampler.ppo["value_coef"], 0.012),
    "entropy_coef": (lambda s: s.sampler.ppo["entropy_coef"], 0.013),
    "entropy": (lambda s: s.sampler.ppo["entropy_form"], "uniform_kl"),
    "tats_objective": (lambda s: s.sampler.objective, "ppo"),
    "normalize_advantage": (lambda s: s.phases.normalize_advantage, True),
    "crop": (lambda s: s.transform.crop, "random_resized"),
}
# what a flag says of TATS's own optimizer, or must not say of it
TATS_ASIDE = {
    "accum_iter": (lambda s: s.tats.accum_iter, 3),
    "clip_grad": (lambda s: s.tats.clip_grad, None),
    "weight_decay": (lambda s: group_values(s.tats, "weight_decay"), [0.0, 0.2]),
    "opt_betas": (lambda s: group_values(s.tats, "betas"), [(0.7, 0.97)]),
    "amp": (lambda s: s.tats.dtype, None),  # several evaluations of the policy: their ratio would be rounding
    "checkpoint": (lambda s: [b.use_checkpoint for b in s.sampler.blocks], [True] * 2),
}
OTHER_PRETRAINING = {
    "adamae_coef": ("--mask_type adamae --adamae_coef 0.02", lambda s: s.sampler.coef, 0.02),
    "mask_type": ("--mask_type learnable", lambda s: type(s.sampler).__name__, "AdaMAESampler"),
    "compile": ("--compile", lambda s: s.backend.compile, True),
    "momentum": ("--opt sgd --momentum 0.45", lambda s: group_values(s.backend, "momentum"), [0.45]),
    "warmup_epochs": ("--epochs 9 --warmup_epochs 3", lambda s: s.recipe.warmup_steps, 3 * 16),
    "checkpoint_modules": (
        "--mask_type adamae --checkpoint_modules encoder sampler",
        lambda s: (s.encoder.use_checkpoint, s.mae.decoder.use_checkpoint, s.sampler.use_checkpoint),
        (True, False, True),
    ),
    "decoder checkpoint": (
        "--mask_type adamae --checkpoint_modules decoder",
        lambda s: (s.encoder.use_checkpoint, s.mae.decoder.use_checkpoint, s.sampler.use_checkpoint),
        (False, True, False),
    ),
    "tats_start_epoch": (
        "--mask_type tats --tats_start_epoch 1",
        lambda s: (type(s.sampler).__name__, "tats" in s),
        ("RandomMask", False),
    ),
    "tats_objective": (
        "--mask_type tats --tats_start_epoch 0 --tats_objective listwise",
        lambda s: (s.sampler.objective, s.sampler.tau, s.sampler.critic),
        ("listwise", 0.1, None),
    ),
    "tats_tau": (
        "--mask_type tats --tats_start_epoch 0 --tats_objective listwise --tats_tau -0.3", lambda s: s.sampler.tau, -0.3
    ),
    "one pass in bf16": (
        "--mask_type tats --tats_start_epoch 0 --amp bf16", lambda s: s.tats.dtype, torch.bfloat16
    ),
    "rollouts in float32": (
        "--mask_type tats --tats_start_epoch 0 --amp bf16 --tats_rollout_steps 2", lambda s: s.tats.dtype, None
    ),
    "passes in float32": (
        "--mask_type tats --tats_start_epoch 0 --amp bf16 --ppo_epochs 2", lambda s: s.tats.dtype, None
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tats_seen(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return pretraining(TATS_FLAGS, tmp_path_factory.mktemp("tats"), monkeypatch)


def assert_row(seen, row):
    read, expected = row
    found = read(seen)
    assert found == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("flag", TATS_ROWS)
def test_pretraining_flag(tats_seen, flag):
    assert_row(tats_seen, TATS_ROWS[flag])


@pytest.mark.parametrize("what", TATS_ASIDE)
def test_pretraining_flag_at_the_samplers_optimizer(tats_seen, what):
    assert_row(tats_seen, TATS_ASIDE[what])


@pytest.mark.parametrize("what", OTHER_PRETRAINING)
def test_pretraining_flag_alone(what, tmp_path, monkeypatch):
    flags, *row = OTHER_PRETRAINING[what]
    tiny = "--input_size 32 --num_frames 4 --device cpu --num_workers 0 --batch_size 4 --amp none "
    assert_row(pretraining(tiny + flags, tmp_path, monkeypatch), row)


# ------------------------------------------------------------------------------------------------- fine-tuning

FINETUNING_EPOCHS = {(run_class_finetuning, "train_one_epoch"): "backend loader recipe epoch ema"}


def finetuning(flags: str, folder: Path, monkeypatch) -> Seen:
    (folder / "a.mp4").touch()
    for name in ("train", "val", "other", "test", "another"):
        (folder / f"{name}.csv").write_text("a.mp4 0\n" * 64)
    seeds, evaluation = [], {}
    watch_seeds(run_class_finetuning, seeds, monkeypatch)

    def build(args, split, *rest):
        evaluation[split] = build_evaluation_loader(args, split, *rest)
        return evaluation[split]

    monkeypatch.setattr(run_class_finetuning, "build_evaluation_loader", build)
    flags = f"--data_path {folder} --model vit_tiny_patch8_64 {flags}".replace("FOLDER", str(folder))
    seen = until_the_first_epoch(run_class_finetuning.main, flags, FINETUNING_EPOCHS, monkeypatch)
    model = seen.backend.unwrapped
    encoder = getattr(model, "encoder", model)
    seen.update(model=model, encoder=encoder, blocks=encoder.blocks, embed=encoder.patch_embed, seeds=seeds,
                transform=seen.loader.dataset.transforms[-1], first=seen.loader.dataset.transforms[0],
                mixup=seen.recipe.mixup, **evaluation)  # fmt: skip
    return seen


FINETUNE_FLAGS = (
    f"{SHARED} --drop_path 0.3 --data_set custom --nb_classes 7 --num_segments 2 --smoothing 0.15 --layer_decay 0.6 "
    "--mixup 0.71 --cutmix 0.92 --mixup_prob 0.63 --mixup_switch_prob 0.34 --mixup_mode pair --fc_drop_rate 0.35 "
    "--drop 0.11 --attn_drop_rate 0.12 --init_scale 0 --model_ema --model_ema_decay 0.97 --model_ema_force_cpu "
    "--crop_scale 0.3 0.9 --no-flip --aa none --reprob 0.33 --remode const --recount 5 --short_side_size 40 "
    "--test_num_segment 3 --test_num_crop 2 --eval_data_path FOLDER/other.csv --test_data_path FOLDER/another.csv"
)
FINETUNE_ROWS = SHARED_ROWS | {
    "data_set": (lambda s: s.recipe.mixup.num_classes, 7),
    "nb_classes": (lambda s: (s.model.head.out_features, s.mixup.num_classes), (7, 7)),
    "num_segments": (lambda s: [x.dataset.num_segments for x in (s.loader, s.val, s.test)], [2, 2, 2]),
    "smoothing": (lambda s: (s.recipe.smoothing, s.mixup.label_smoothing), (0.15, 0.15)),
    "layer_decay": (lambda s: [round(x / 0.6**5, 6) for x in group_values(s.backend, "lr_scale")],
                    [round(0.6**-k, 6) for k in range(6)]),
    "mixup": (lambda s: s.mixup.mixup_alpha, 0.71),
    "cutmix": (lambda s: s.mixup.cutmix_alpha, 0.92),
    "mixup_prob": (lambda s: s.mixup.mix_prob, 0.63),
    "mixup_switch_prob": (lambda s: s.mixup.switch_prob, 0.34),
    "mixup_mode": (lambda s: s.mixup.mode, "pair"),
    "fc_drop_rate": (lambda s: s.model.fc_dropout.p, 0.35),
    "drop": (lambda s: [s.model.pos_drop.p] + [b.attn.proj_drop.p for b in s.blocks], [0.11] * 5),
    "attn_drop_rate": (lambda s: [b.attn.attn_drop for b in s.blocks], [0.12] * 4),
    "init_scale": (lambda s: s.model.head.weight.abs().max().item(), 0.0),
    "model_ema": (lambda s: type(s.ema).__name__, "ModelEmaV3"),
    "model_ema_decay": (lambda s: s.ema.decay, 0.97),
    "model_ema_force_cpu": (lambda s: str(s.ema.device), "cpu"),
    "crop_scale": (lambda s: tuple(s.transform.scale), (0.3, 0.9)),
    "flip": (lambda s: s.transform.flip, False),
    "aa": (lambda s: s.transform.augment, None),
    "reprob": (lambda s: s.transform.erase["probability"], 0.33),
    "remode": (lambda s: s.transform.erase["mode"], "const"),
    "recount": (lambda s: s.transform.erase["max_count"], 5),
    "short_side_size": (lambda s: [x.dataset.crop.keywords["short_side"] for x in (s.val, s.test)], [40, 40]),
    "test_num_segment": (lambda s: (s.val.dataset.num_views, s.test.dataset.num_views), (1, 3)),
    "test_num_crop": (lambda s: [x.dataset.crop.keywords["num_crops"] for x in (s.val, s.test)], [1, 2]),
    "eval_data_path": (lambda s: Path(s.val.dataset.list_path).name, "other.csv"),
    "test_data_path": (lambda s: Path(s.test.dataset.list_path).name, "another.csv"),
}  # fmt: skip
OTHER_FINETUNING = {
    "cutmix_minmax": (
        "--cutmix_minmax 0.2 0.8 --mixup 0.4", lambda s: (*s.mixup.cutmix_minmax, s.mixup.mixup_alpha), (0.2, 0.8, 0.4)
    ),
    "mixup off": ("--mixup 0 --cutmix 0 --smoothing 0.15", lambda s: (s.mixup, s.recipe.smoothing), (None, 0.15)),
    "mixup alone": ("--cutmix 0 --mixup 0.4", lambda s: (s.mixup.mixup_alpha, s.mixup.cutmix_alpha), (0.4, 0.0)),
    "cutmix alone": ("--mixup 0 --cutmix 0.4", lambda s: (s.mixup.mixup_alpha, s.mixup.cutmix_alpha), (0.0, 0.4)),
    "resplit": (
        "--num_sample 2 --resplit --reprob 0.4",
        lambda s: (s.first.erase["probability"], s.transform.erase["probability"]), (0.0, 0.4),
    ),
    "aa": ("--aa rand-m3-n2", lambda s: (len(s.transform.augment.ops) > 5, s.transform.augment.num_layers), (True, 2)),
    "flip": ("--flip", lambda s: s.transform.flip, True),
    "init_scale": ("--init_scale 7", lambda s: s.model.head.weight.std().item() > 0.03, True),
    "use_mean_pooling": ("--use_cls", lambda s: s.model.fc_norm, None),
    "mean pooling": ("", lambda s: s.model.fc_norm is not None, True),
    "linear_probe": ("--linear_probe --no-cache_features", lambda s: s.model.kind, "linear"),
    "cache_features": ("--linear_probe --no-cache_features", lambda s: s.loader.batch_size, 4),
    "attentive_probe": ("--attentive_probe --no-cache_features", lambda s: s.model.kind, "attentive"),
    "task": (
        "--task multi_label", lambda s: (s.recipe.task.name, s.loader.dataset.labels[0].tolist()[:2], s.mixup),
        ("multi_label", [1, 0], None),
    ),
    "no average": ("", lambda s: s.ema, None),
    "crop_pct": ("--crop_pct 0.5", lambda s: s.val.dataset.crop.keywords["short_side"], 64),
    "disable_eval_during_finetuning": ("--disable_eval_during_finetuning", lambda s: "val" in s, False),
    "data_set": ("--data_set SSV2", lambda s: (s.loader.dataset.num_segments, s.transform.flip), (4, False)),
    "momentum": ("--opt sgd --momentum 0.45", lambda s: group_values(s.backend, "momentum"), [0.45]),
    "warmup_epochs": ("--epochs 9 --warmup_epochs 3", lambda s: s.recipe.warmup_steps, 3 * 16),
}  # fmt: skip


@pytest.fixture(scope="module")
def finetune_seen(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return finetuning(FINETUNE_FLAGS, tmp_path_factory.mktemp("finetune"), monkeypatch)


@pytest.mark.parametrize("flag", FINETUNE_ROWS)
def test_finetuning_flag(finetune_seen, flag):
    assert_row(finetune_seen, FINETUNE_ROWS[flag])


@pytest.mark.parametrize("what", OTHER_FINETUNING)
def test_finetuning_flag_alone(what, tmp_path, monkeypatch):
    flags, *row = OTHER_FINETUNING[what]
    tiny = "--input_size 32 --num_frames 4 --device cpu --num_workers 0 --batch_size 4 --amp none --nb_classes 174 "
    tiny += "" if "--data_set" in flags else "--data_set custom "
    tiny += "" if "--num_sample" in flags else "--num_sample 1 "
    assert_row(finetuning(tiny + flags, tmp_path, monkeypatch), row)


# ------------------------------------------------------------------------------------------------- DeepSpeed

DEEPSPEED_ROWS = {
    "enable_deepspeed": (lambda c: list(c), [5e-7, 1e-9]),
    "zero_stage": (lambda c: c[5e-7]["zero_optimization"]["stage"], 2),
    "offload": (lambda c: c[5e-7]["zero_optimization"]["offload_optimizer"]["device"], "cpu"),
    "fused_adam": (lambda c: c[5e-7]["optimizer"]["params"]["torch_adam"], False),
    "deepspeed_config": (lambda c: c[5e-7]["comms_logger"], {"enabled": True}),
    "opt": (lambda c: c[5e-7]["optimizer"]["type"], "Adam"),
    "opt_betas": (lambda c: [x["optimizer"]["params"]["betas"] for x in c.values()], [[0.7, 0.97]] * 2),
    "lr of both": (lambda c: [x["optimizer"]["params"]["lr"] for x in c.values()], [0.03, 0.0002]),
    "batch of both": (lambda c: [x["train_batch_size"] for x in c.values()], [12, 12]),
    "clip_grad": (lambda c: [x["gradient_clipping"] for x in c.values()], [0.6, 0.0]),
    "amp": (lambda c: [x["torch_autocast"]["enabled"] for x in c.values()], [True, False]),
}


@pytest.fixture(scope="module")
def deepspeed_seen(tmp_path_factory):
    """The configurations of the autoencoder's engine and of TATS's, by Adam's eps."""
    folder, configs = tmp_path_factory.mktemp("deepspeed"), {}
    (folder / "ds.json").write_text(json.dumps({"comms_logger": {"enabled": True}}))
    (folder / "train.csv").write_text("a.mp4 0\n" * 64)

    def record(module, groups, device, config, *rest):
        configs[config["optimizer"]["params"]["eps"]] = config
        if len(configs) == 2:
            raise Arrived
        return runtime_backend.Backend(module, torch.optim.SGD(groups, lr=1), device)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runtime_build, "DeepSpeedBackend", record)
        with pytest.raises(Arrived):
            run_mae_pretraining.main(
                f"--data_path {folder / 'train.csv'} --model pretrain_videomae_tiny_patch8_64 --input_size 32 "
                "--num_frames 4 --batch_size 4 --accum_iter 3 --device cpu --num_workers 0 --mask_type tats --amp bf16 "
                "--ppo_epochs 2 --enable_deepspeed --zero_stage 2 --offload cpu --fused_adam deepspeed --opt adam --lr "
                "0.03 --tats_lr 0.0002 --opt_eps 5e-7 --tats_eps 1e-9 --opt_betas 0.7 0.97 --clip_grad 0.6 "
                f"--deepspeed_config {folder / 'ds.json'}".split()
            )
    return configs


@pytest.mark.parametrize("what", DEEPSPEED_ROWS)
def test_deepspeed_flag(deepspeed_seen, what):
    assert_row(deepspeed_seen, DEEPSPEED_ROWS[what])


# ------------------------------------------------------------------------------- no flag without a row or a reason

# Flags that decide where a run starts, stops, and what it leaves; on a GPU; or how processes meet: the test that sees
# them at work.
TESTS = Path(__file__).parents[1]
ELSEWHERE = {
    "output_dir": "test_run_pretraining.py", "log_dir": "test_run_pretraining.py", "resume": "test_run_pretraining.py",
    "auto_resume": "test_run_pretraining.py", "finetune": "test_run_pretraining.py",
    "save_ckpt_freq": "test_run_pretraining.py", "save_ckpt_minutes": "test_preemption.py",
    "keep_last": "test_preemption.py", "picture_freq": "test_run_pretraining.py", "pin_mem": "clips.py",
    "world_size": "test_launch.py", "local_rank": "test_launch.py", "dist_on_itp": "test_launch.py",
    "dist_url": "test_launch.py", "eval": "test_run_finetuning.py", "save_ckpt": "test_run_finetuning.py",
    "allow_missing": "test_run_finetuning.py", "finetune_sampler": "test_foreign_checkpoints.py",
    "test_best": "test_published_protocol.py", "model_key": "test_run_finetuning.py",
    "model_prefix": "test_run_finetuning.py", "inflate": "test_foreign_checkpoints.py", "knn": "test_run_finetuning.py",
}  # fmt: skip


@pytest.mark.parametrize(
    "script, tables",
    [
        (run_mae_pretraining, (TATS_ROWS, OTHER_PRETRAINING, DEEPSPEED_ROWS)),
        (run_class_finetuning, (FINETUNE_ROWS, OTHER_FINETUNING, DEEPSPEED_ROWS)),
    ],
)
def test_every_flag_has_a_row_or_a_test_that_sees_it(script, tables):
    flags = flags_to_read(script.get_parser())
    rows = {name for table in tables for name in table}
    assert flags - rows - set(ELSEWHERE) == set()
    for flag in flags & set(ELSEWHERE):
        assert flag in next(TESTS.glob(f"*/{ELSEWHERE[flag]}")).read_text(), flag


# ----------------------------------------------------------------------------- seen in the loss and in the weights


def test_unequal_values_give_the_weights_of_plain_training(monkeypatch):
    """Ten steps of TATS with every pair of like flags apart. Clipping at 0.05 and the sampler's large eps make it show
    whether TATS is clipped, too; decay at 0.4, whether it decays."""
    monkeypatch.setitem(modeling_pretrain.SIZES, "tiny", dict(embed_dim=32, depth=2, num_heads=HEADS[0]))
    run = make_run(
        "--mask_type tats --tats_attention trajectory --policy_coef 3 --value_coef 0.7 --entropy_coef 0.2 "
        "--tats_lr 2e-3 --lr 5e-4 --tats_eps 1e-2 --opt_eps 1e-5 --weight_decay 0.4 --clip_grad 0.05 "
        "--opt_betas 0.8 0.97 --normalize_advantage --softmax_temp 0.7"
    )
    settings = dict(loss="mse", lr=run.args.lr, min_lr=run.args.lr, epochs=100, weight_decay=run.args.weight_decay)
    run.recipe = PretrainRecipe(grid=run.mae.grid, mean=run.recipe.mean, std=run.recipe.std, **settings)
    plain = reference.PlainTraining(run.mae, run.sampler, run.args, run.mae.grid, HEADS)
    start = {name: p.detach().clone() for name, p in run.sampler.named_parameters()}
    for i in range(10):
        batch = make_batch(i)
        noise = gumbel_noise(batch["seed"], NUM_TOKENS), uniform_noise(batch["seed"] ^ 0x5DEECE66D, 1 + NUM_MASKED)
        stats, expected = train_step(run, i), plain.step(batch["video"], *noise)
        del expected["masked"], expected["log_prob"]
        # the mean of normalised advantages is 0: the policy's loss at ratio 1 is rounding
        assert abs(stats["policy_loss"]) < 1e-6 and abs(expected.pop("policy_loss")) < 1e-6
        assert {name: stats[name] for name in expected} == pytest.approx(expected, rel=1e-4), i
    assert expected["sampler_grad_norm"] > 0.1 and expected["grad_norm"] > 0.1  # clipping would matter to both
    for module, weights in ((run.mae, plain.mae), (run.sampler, plain.sampler)):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.double(), weights[name], rtol=0, atol=2e-5,
                                       msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
    assert max((p - start[name]).abs().max() for name, p in run.sampler.named_parameters()) > 5e-3


def test_validation_is_of_the_moving_average(tmp_path, monkeypatch):
    """val_loss of the log is that of the average's weights in the checkpoint, not of the weights themselves."""
    monkeypatch.setattr(run_class_finetuning, "test", lambda *args: None)
    shapes = write_dataset(tmp_path / "shapes", train=10, val=10, size=32, frames=8)
    flags = (
        f"--data_path {shapes} --data_set custom --nb_classes 10 --model vit_tiny_patch8_64 --input_size 32 "
        "--num_frames 4 --sampling_rate 2 --batch_size 4 --num_sample 1 --num_workers 0 --device cpu --epochs 1 "
        "--warmup_epochs 0 --lr 0.5 --mixup 0 --cutmix 0 --init_scale 1 --model_ema --model_ema_decay 0.95 "
        f"--output_dir {tmp_path / 'run'} --no-test_best"
    ).split()
    run_class_finetuning.main(flags)
    (record,) = (json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines())
    state = load_run(tmp_path / "run/checkpoint-0.pth")
    args = run_class_finetuning.parse_args(flags)
    run_class_finetuning.check_flags(args)
    loader, losses = build_evaluation_loader(args, "val"), {}
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for key in ("model", "model_ema"):
        model = run_class_finetuning.build_classifier(args, None).eval()
        model.load_state_dict(state[key])
        found = []
        for batch in loader:
            label = torch.tensor([loader.dataset.labels[i] for i in batch["index"].tolist()])
            with torch.no_grad():
                logits = model(((batch["video"].float() / 255 - mean) / std).transpose(1, 2))
            found.append(F.cross_entropy(logits, label, reduction="none"))
        losses[key] = torch.cat(found).mean().item()
    assert record["val_loss"] == pytest.approx(losses["model_ema"], rel=1e-5)
    assert losses["model"] != pytest.approx(losses["model_ema"], rel=1e-3)
