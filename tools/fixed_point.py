"""Compares a trained TATS policy with the fixed point of its PPO objective: does the reward follow motion, how much of
the preference that the objective allows was learned, and is the scale of the logits bounded?

    python tools/fixed_point.py --model_path output/ucf101_tats --data_path VAL.csv

For every clip, many masks are drawn from the checkpoint's policy. A token's expected advantage E[A m] is the mean of
error - V over the masks in which it is masked, times how often it is masked. Near the uniform policy, the objective's
fixed point is u log u = kappa E[A m] with u = N p of a token and kappa = (c_p / c_e)(N / N_m). Where that has
no solution, the token's p becomes 0. This fixed point is a local one. Along the scale of the logits z, the objective's
slope is c_p Cov(A, z) over the masked tokens, which grows with z, minus c_e Var(z) under p, which falls to 0 as p
collapses. Where the first is larger, the policy sharpens further. --tats_logit_cap prevents that; slopes of a capped
policy mean little.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import lambertw

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.lists import read_list
from masking_generator import motion_energy
from modeling_pretrain import reconstruction_target, token_error
from run_mae_vis import Trained, read_clip
from tools.common import run_tool
from utils import UsageError


def fixed_point(pull: np.ndarray) -> np.ndarray:
    """The stable u >= 0 with u log u = pull (kappa E[A m] of a token); 0 where there is none (pull < -1/e)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        u = np.exp(lambertw(pull).real)  # u = exp(W(pull)): u log u = W e^W
    return np.where(pull < -1 / np.e, 0.0, u)


@torch.no_grad()
def measure(trained: Trained, clips: torch.Tensor, draws: int) -> dict[str, np.ndarray]:
    """kappa, the two slopes along the scale of the logits, and arrays [clips, N]: motion, u (N p), error (mean where
    masked), pull (kappa E[A m]). With --normalize_advantage kappa has the deviation of A in it."""
    args, grid = trained.args, trained.mae.grid
    pixels, video = trained.normalize(clips)
    tokens = trained.mae.encoder.patch_embed(video)
    total = torch.zeros(len(clips), trained.sampler.num_tokens)
    count = torch.zeros_like(total)
    draws_of_error = []  # a draw: where masked, [clips, N_m] each
    for draw in range(draws):
        mask = trained.sampler(video, draw * len(clips) + torch.arange(len(clips)), tokens)
        target = reconstruction_target(pixels, mask, grid, args.normalize_target)
        error = token_error(trained.mae(video, mask), target, args.loss)
        total.scatter_add_(1, mask.masked, error)
        count.scatter_add_(1, mask.masked, torch.ones_like(error))
        draws_of_error.append((mask.masked, error))
    error = total / count.clamp(min=1)
    baseline = total.sum(dim=1, keepdim=True) / count.sum(dim=1, keepdim=True)  # a perfect critic
    scale = torch.cat([e - baseline for _, e in draws_of_error]).std().item() if args.normalize_advantage else 1.0
    kappa = args.policy_coef / args.entropy_coef * total.shape[1] / mask.masked.shape[1] / scale
    log_prob, p = mask.log_prob, mask.log_prob.exp()
    z = log_prob - (p * log_prob).sum(dim=1, keepdim=True)
    slopes = {
        "sharpens": args.policy_coef
        / scale
        * torch.stack([((e - baseline) * z.gather(1, masked)).mean() for masked, e in draws_of_error]).mean().item(),
        "holds": args.entropy_coef * (p * z.square()).sum(dim=1).mean().item(),
    }
    measured = {
        "motion": motion_energy(video, grid),
        "u": mask.log_prob.exp() * total.shape[1],
        "error": error,
        "pull": kappa * (error - baseline) * count / draws,
    }
    return {name: value.numpy() for name, value in measured.items()} | {"kappa": kappa} | slopes


def report(measured: dict) -> str:
    """The lines that are printed of what `measure` returned."""
    u, motion, error, pull = (measured[name].astype(float) for name in ("u", "motion", "error", "pull"))
    log_u = np.log(u + 1e-9)
    rest = fixed_point(pull)
    rest *= u.shape[1] / rest.sum(axis=1, keepdims=True)  # a distribution again

    def within(a: np.ndarray, b: np.ndarray) -> float:
        """Correlation over the tokens of a clip, mean over clips."""
        found = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True) if x.std() and y.std()]
        return float(np.mean(found)) if found else float("nan")

    def lift(weights: np.ndarray) -> float:
        """Mean motion of the tokens with these weights, over the mean of all tokens."""
        return float((weights * motion).mean() / motion.mean())

    lines = [
        f"kappa {measured['kappa']:.3g}; E[A m] between {pull.min() / measured['kappa']:.2f} and "
        f"{pull.max() / measured['kappa']:.2f}",
        f"correlation in a clip of error and motion   {within(error, motion):6.2f}   (does the reward follow motion?)",
        f"correlation in a clip of error and log u    {within(error, log_u):6.2f}   (does the policy follow it?)",
        f"correlation in a clip of motion and log u   {within(motion, log_u):6.2f}",
        "                            policy now   at the fixed point",
        f"contrast, mean u^2           {(u**2).mean():9.2f} {(rest**2).mean():9.2f}",
        f"motion of a token drawn      {lift(u):9.2f} {lift(rest):9.2f}   (1 = blind)",
        f"tokens with u below 0.05     {(u < 0.05).mean():9.1%} {(rest < 0.05).mean():9.1%}",
        f"slope along the scale of the logits: {measured['sharpens']:.2e} of the reward, "
        f"{-measured['holds']:.2e} of entropy",
    ]
    return "\n".join(lines)


def describe_policy(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    trained = Trained(args.model_path, [])
    flags = vars(trained.args)
    for name, needed in (("mask_type", "tats"), ("tats_objective", "ppo"), ("entropy", "bonus")):
        if flags[name] != needed:
            raise UsageError(f"{args.model_path}: --{name} {flags[name]}: has another end point (docs/SAMPLER.md)")
    if trained.args.entropy_coef == 0:
        raise UsageError(f"{args.model_path}: --entropy_coef 0: its objective has no fixed point")
    videos = read_list(args.data_path)[0]
    chosen = [videos[i * len(videos) // args.num_videos] for i in range(min(args.num_videos, len(videos)))]
    print(report(measure(trained, torch.stack([read_clip(video, trained.args) for video in chosen]), args.draws)))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="TATS checkpoint, or a run's folder")
    parser.add_argument("--data_path", required=True, help="list file")
    parser.add_argument("--num_videos", default=40, type=int)
    parser.add_argument("--draws", default=64, type=int, help="masks per clip")
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_tool(describe_policy, get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
