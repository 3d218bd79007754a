"""A mask strategy of one's own, without weights: one class and one line in SAMPLERS.

    python examples/new_mask_sampler.py --mask_type blocks --data_path LIST ...

has all flags of run_mae_pretraining.py. To keep the strategy, put the class into a module at the root and its line into
SAMPLERS of run_mae_pretraining.py: pictures and --finetune know it then too.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import run_mae_pretraining
from masking_generator import MaskSampler, uniform_noise


class BlockMask(MaskSampler):
    """Hides squares around three random places, the same in all frames, as large as the ratio needs (as V-JEPA's masks,
    Bardes 2024, in spirit)."""

    num_blocks = 3

    def scores(self, video: Tensor, seed: Tensor) -> Tensor:
        """Distance from the nearest of the places, float [B, N]: the highest num_visible stay visible. video is not
        looked at, and all chance is the seed's: uniform_noise is a function of it."""
        frames, rows, columns = self.grid
        noise = uniform_noise(seed, 2 * self.num_blocks + rows * columns)
        places, ties = noise[:, : 2 * self.num_blocks], noise[:, 2 * self.num_blocks :]
        row, column = (x.flatten() for x in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        away = torch.maximum(
            (places[:, ::2, None] * rows - row.to(noise) - 0.5).abs(),
            (places[:, 1::2, None] * columns - column.to(noise) - 0.5).abs(),
        )  # [B, blocks, rows * columns], in tokens
        return (away.amin(dim=1) + 1e-6 * ties).repeat(1, frames)


def main(arguments: list[str] | None = None) -> None:
    run_mae_pretraining.SAMPLERS["blocks"] = BlockMask
    run_mae_pretraining.main(arguments)


if __name__ == "__main__":
    main()
