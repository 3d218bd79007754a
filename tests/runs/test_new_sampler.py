"""A new learned sampler is one class and one line in SAMPLERS: it trains, resumes, is drawn and started from."""

import shutil

import pytest
import torch
from torch import nn

import run_class_finetuning
import run_mae_pretraining
import run_mae_vis
from masking_generator import LearnedSampler
from tests.helpers.runs import finetuning_flags, read_log, run_here


class Joint(LearnedSampler):
    """A linear layer, trained by the autoencoder's backward pass; shows what is easy."""

    def __init__(self, grid, mask_ratio, dim, use_checkpoint=False):
        super().__init__(grid, mask_ratio)
        self.head = nn.Linear(dim, 1)

    def policy(self, tokens):
        return self.head(tokens).squeeze(-1).float().log_softmax(dim=1), None

    def loss(self, log_prob, value, episode, moments=None):
        chosen = log_prob.gather(1, episode.masked)
        return (chosen * episode.reward).mean(), {"easy": chosen.detach().mean()}


class Alone(Joint):
    """The same with an optimizer of its own, in phases, and a flag that it reads."""

    own_optimizer = True
    flags = {"scale": "softmax_temp"}

    def __init__(self, grid, mask_ratio, dim, use_checkpoint=False, scale=1.0):
        super().__init__(grid, mask_ratio, dim)
        self.scale = scale

    def policy(self, tokens):
        log_prob, value = super().policy(tokens.detach())
        return (log_prob / self.scale).log_softmax(dim=1), value


@pytest.mark.parametrize("sampler", [Joint, Alone])
def test_a_learned_sampler_of_ones_own(sampler, shapes, labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run_mae_pretraining.SAMPLERS, "mine", sampler)
    flags = ["--mask_type", "mine", "--tats_start_epoch", 1, "--tats_rollout_steps", 2, "--softmax_temp", 0.5,
             "--save_ckpt_freq", 1, "--normalize_advantage"]  # fmt: skip
    run_here(shapes, *flags, "--epochs", 3, "--output_dir", tmp_path / "whole")
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-1.pth", tmp_path / "two")
    run_here(shapes, *flags, "--epochs", 3, "--output_dir", tmp_path / "two")

    whole, two = (torch.load(tmp_path / name / "checkpoint-2.pth") for name in ("whole", "two"))
    assert whole["mine"].keys() == {"head.weight", "head.bias"}
    assert ("mine_optimizer" in whole) == sampler.own_optimizer
    for part in ("model", "mine"):
        for name, value in whole[part].items():
            assert torch.equal(value, two[part][name]), name
    first, *_, last = (torch.load(tmp_path / "whole" / f"checkpoint-{epoch}.pth")["mine"] for epoch in range(3))
    assert not torch.equal(first["head.weight"], last["head.weight"])
    assert {"train_easy", "train_entropy", "train_reward"} <= read_log(tmp_path / "whole")[-1].keys()

    checkpoint = str(tmp_path / "whole/checkpoint-2.pth")
    trained = run_mae_vis.Trained(checkpoint, [])
    assert torch.equal(trained.sampler.head.weight, whole["mine"]["head.weight"])
    capsys.readouterr()
    run_here(shapes, *flags, "--epochs", 1, "--finetune", checkpoint)
    assert "mine sampler: 2 tensors" in capsys.readouterr().out
    run_class_finetuning.main(finetuning_flags(labelled, "--finetune", checkpoint, "--epochs", 1))
    assert "left over" in capsys.readouterr().out
