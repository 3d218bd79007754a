"""Peak memory of a pre-training step on a GPU, computed without one: the rows of the paper's figures, and options.

    python bench/memory.py [--rows tube tats-mha ...] [flags of run_mae_pretraining.py]

The engines run on fake tensors on `cuda`, shapes without data, and the bytes of all live ones are added up: weights,
AdamW's state, gradients, activations, workspaces that operators allocate as tensors. Not in it: what the allocator
rounds up and cannot reuse, cuBLAS workspaces and the CUDA context.
bench/step.py measures the same on a GPU (torch.cuda.max_memory_allocated).
"""

import argparse
import sys

from common import choose_rows, print_table
from step import MEMORY_ROWS
from without_gpu import peak_of_a_step

from run_mae_pretraining import check_flags, get_parser

DEFAULTS = "--model pretrain_videomae_base_patch16_224 --mask_ratio 0.95 --batch_size 32 --device cuda --amp bf16"
# what the paper reports, and what the memory flags do to one of its rows
EXTRA = {
    " --checkpoint_modules sampler": "tats-trajectory",
    " --checkpoint_modules decoder": "tats-trajectory",
    " --use_checkpoint": "tats-trajectory",
    " --decoder_mask_ratio 0.5": "tats-trajectory",
}
ROWS = MEMORY_ROWS | {name + flag: (MEMORY_ROWS[name][0] + flag, "-") for flag, name in EXTRA.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these")
    flags, rest = parser.parse_known_args()
    print(f"computed, not measured; GB = 10^9 bytes\n{' '.join([DEFAULTS, *rest])}")
    table = []
    for name in choose_rows(flags, list(ROWS)):
        row_flags, reported = ROWS[name]
        args = get_parser().parse_args([*DEFAULTS.split(), *row_flags.split(), *rest])
        check_flags(args)
        if args.compile or args.enable_deepspeed:
            sys.exit("error: shapes alone do not tell the memory of --compile and --enable_deepspeed: leave them out")
        table.append([name, *(f"{x / 1e9:.2f}" for x in peak_of_a_step(args)), reported])
    print_table(["masks", "weights, optimizer GB", "peak GB", "paper reports (GB)"], table)


if __name__ == "__main__":
    main()
