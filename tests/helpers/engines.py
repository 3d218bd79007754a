"""Runs in this process of one step at a time, on the CPU or on a GPU that is not there."""

import sys

import torch
from torch import nn

import run_class_finetuning
import run_mae_pretraining
from datasets.transforms import mean_and_std
from engine_for_finetuning import FinetuneRecipe
from engine_for_pretraining import PretrainRecipe
from run_mae_pretraining import Run, check_flags, get_parser
from tests.helpers.runs import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from without_gpu import GPU  # noqa: E402

FLAGS = """--model pretrain_videomae_tiny_patch8_64 --input_size 16 --patch_size 4 --num_frames 8 --decoder_depth 2
    --batch_size 2 --num_landmarks 5 --device cpu --amp none --lr 1e-3 --tats_lr 1e-3
    --adamae_coef 0.01 --tats_start_epoch 0""".split()
NUM_TOKENS, NUM_MASKED, HEADS = 64, 48, (4, 2)


def make_run(flags, dropout=0.0):
    args = get_parser().parse_args([*FLAGS, *flags.split()])
    check_flags(args)
    torch.manual_seed(0)
    run = Run(args, torch.device("cpu"))
    for module in run.sampler.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if args.mask_type == "tats":
        nn.init.normal_(run.sampler.actor.weight, std=0.3)  # a policy far from uniform
    settings = dict(loss=args.loss, normalize_target=args.normalize_target, lr=args.lr, min_lr=args.lr, epochs=100)
    run.recipe = PretrainRecipe(grid=run.mae.grid, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.5), **settings)
    return run


def make_batch(i):
    clips = torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
    return {"video": clips, "seed": torch.tensor([2 * i, 2 * i + 1]), "failed": []}


def train_step(run, i):
    return run.train_one_epoch([make_batch(i)], run.recipe, i)


# --- on `cuda`

TINY = "--model pretrain_videomae_tiny_patch8_64 --input_size 32 --num_frames 4 --batch_size 2 --device cuda"
TATS = "--mask_type tats"
ENGINES = [
    "--mask_type tube",
    "--mask_type tube --amp none",
    "--mask_type random --loss l1 --no-normalize_target",
    "--mask_type frame --use_checkpoint",
    "--mask_type motion --drop_path 0.1 --clip_grad 1.0",
    "--mask_type random --decoder_mask_ratio 0.5 --accum_iter 2",
    "--mask_type adamae",
    "--mask_type adamae --use_checkpoint --amp none",
    *(f"{TATS} --tats_attention {kind} --num_landmarks 8" for kind in ("orthoformer", "trajectory", "mha")),
    f"{TATS} --amp none --num_landmarks 8 --landmark_gradient",
    f"{TATS} --tats_rollout_steps 2 --normalize_advantage --num_landmarks 8",
    f"{TATS} --ppo_epochs 2 --tats_blocks 2 --tats_attention trajectory",
    f"{TATS} --accum_iter 2 --normalize_advantage --decoder_mask_ratio 0.5 --tats_attention trajectory",
    f"{TATS} --checkpoint_modules sampler decoder --tats_attention trajectory",
    f"{TATS} --use_checkpoint --tats_logit_cap 2 --num_landmarks 8 --loss l1",
]


def parse(flags: str):
    args = run_mae_pretraining.get_parser().parse_args([*TINY.split(), *flags.split()])
    args.rank, args.local_rank, args.world_size = 0, 0, 1
    run_mae_pretraining.check_flags(args)
    return args


def classifier(flags: str) -> tuple[torch.nn.Module, FinetuneRecipe]:
    args = run_class_finetuning.parse_args(
        f"--model vit_tiny_patch8_64 --input_size 32 --num_frames 4 --batch_size 4 --nb_classes 5 --device cuda "
        f"--data_path none {flags}".split()
    )
    with GPU:
        model = run_class_finetuning.build_classifier(args, None)
        mean, std = (torch.tensor(values) for values in mean_and_std(True))
    recipe = FinetuneRecipe(mean=mean, std=std, lr=1e-3, min_lr=0.0, smoothing=0.1, print_freq=10**9,
                            steps_per_epoch=10**6)  # fmt: skip
    return model, recipe


def clips(size: int = 4) -> dict:
    video = torch.zeros(size, 4, 3, 32, 32, dtype=torch.uint8)
    return {"video": video, "label": torch.zeros(size, dtype=torch.int64), "failed": []}
