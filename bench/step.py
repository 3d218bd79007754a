"""Time of a whole training step for every mask type, as a ratio to tube masks measured in the same run.

    python bench/step.py [--rounds 5] [--steps 3] [flags of run_mae_pretraining.py]

The engines run on one random batch, so loading is not in it. Rounds visit every mask type in turn, which spreads the
noise of a shared machine over all of them; the medians over rounds are printed.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import engine_for_pretraining
import engine_for_tats
from engine_for_pretraining import PretrainRecipe
from run_mae_pretraining import SAMPLERS, Run, get_parser, ppo_settings, resolve_amp

# (label, flags)
VARIANTS = [(name, ["--mask_type", name]) for name in SAMPLERS if name != "tats"]
VARIANTS += [
    (f"tats {a}", ["--mask_type", "tats", "--tats_attention", a]) for a in ("orthoformer", "trajectory", "mha")
]
VARIANTS += [("tats orthoformer, 2 passes", ["--mask_type", "tats", "--ppo_epochs", "2"])]


class OneBatch:
    """Stands in for a loader: the same batch for ever."""

    def __init__(self, args):
        generator = torch.Generator().manual_seed(0)
        shape = (args.batch_size, args.num_frames, 3, args.input_size, args.input_size)
        video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.batch_size = args.batch_size
        self.batch = {"video": video, "seed": torch.arange(args.batch_size), "failed": []}

    def __iter__(self):
        while True:
            yield self.batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--steps", default=3, type=int, help="steps a round")
    flags, rest = parser.parse_known_args()
    defaults = (
        "--model pretrain_videomae_tiny_patch8_64 --input_size 64 --num_frames 8 --mask_ratio 0.9 --batch_size 16"
    )
    runs = []
    for label, variant in VARIANTS:
        args = get_parser().parse_args([*defaults.split(), *rest, *variant])
        args.local_rank = 0
        resolve_amp(args)
        device = torch.device(args.device)
        torch.manual_seed(0)
        run = Run(args, device)
        half = torch.full((3,), 0.5, device=device)
        recipe = PretrainRecipe(
            run.mae.grid,
            half,
            half,
            args.loss,
            args.normalize_target,
            steps_per_epoch=flags.steps,
            epochs=10**6,
            print_freq=10**9,
        )
        runs.append((label, run, recipe))
    loader = OneBatch(args)
    seconds: dict[str, list[float]] = {label: [] for label, _, _ in runs}
    for round_number in range(flags.rounds + 1):  # the first warms up
        for label, run, recipe in runs:
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                if run.tats_backend is None:
                    engine_for_pretraining.train_one_epoch(run.backend, run.sampler, loader, recipe, round_number)
                else:
                    engine_for_tats.train_one_epoch(
                        run.backend,
                        run.tats_backend,
                        loader,
                        recipe,
                        ppo_settings(run.args),
                        round_number,
                    )
            if round_number:  # an epoch ends by reading its means, which waits for the device
                seconds[label].append((time.perf_counter() - start) / flags.steps)
    print(
        f"{args.model}, batch {args.batch_size}, {args.num_frames} x {args.input_size}^2, masked {args.mask_ratio}\n"
        f"{device}, --amp {args.amp}, {torch.get_num_threads()} thread(s), {flags.rounds} rounds of {flags.steps} steps"
    )
    print(f"{'mask type':28s} {'ms a step':>10s} {'clips/s':>9s} {'x tube':>7s}")
    for label, times in seconds.items():
        ratio = statistics.median(t / reference for t, reference in zip(times, seconds["tube"], strict=True))
        median = statistics.median(times)
        print(f"{label:28s} {median * 1e3:10.1f} {args.batch_size / median:9.1f} {ratio:7.2f}")


if __name__ == "__main__":
    main()
