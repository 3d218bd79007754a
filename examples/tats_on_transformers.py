"""TATS chooses the masks of transformers' VideoMAEForPreTraining, which is used as it is.

Both start from scratch on moving shapes. This shows the wiring and takes about a minute; to see a sampler find motion,
train until the loss is clearly below 1 first (make demo).
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from datasets.transforms import mean_and_std
from examples.loop import parse_args, shapes, train
from masking_generator import Mask
from modeling_pretrain import reconstruction_target, token_error
from modeling_tats import TATS

MASK_RATIO = 0.75


def build() -> tuple[VideoMAEForPreTraining, TATS]:
    config = VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, tubelet_size=2, hidden_size=96, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=384, decoder_hidden_size=64, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=256,
    )  # fmt: skip
    side = config.image_size // config.patch_size
    grid = (config.num_frames // config.tubelet_size, side, side)  # token frames, rows, columns
    sampler = TATS(
        grid, MASK_RATIO, config.hidden_size, config.num_attention_heads, attention="trajectory", objective="listwise"
    )
    return VideoMAEForPreTraining(config), sampler


class Errors:
    """The two functions of examples/loop.py for this model."""

    def __init__(self, model: VideoMAEForPreTraining, grid: tuple[int, int, int]):
        self.model, self.grid = model, grid
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in mean_and_std(True))

    def video(self, pixels: Tensor) -> Tensor:
        """transformers' order and scale: float32 [B, T, 3, S, S]."""
        return (pixels.transpose(1, 2) / 255 - self.mean) / self.std

    def tokens_of(self, pixels: Tensor) -> Tensor:
        return self.model.videomae.embeddings.patch_embeddings(self.video(pixels))

    def error_of(self, pixels: Tensor, mask: Mask, tokens: Tensor) -> Tensor:
        output = self.model(self.video(pixels), bool_masked_pos=mask.hidden())
        target = reconstruction_target(pixels, mask, self.grid, self.model.config.norm_pix_loss)
        return token_error(output.logits, target, "mse")  # its mean is output.loss


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    args = parse_args(__doc__, 16, arguments)
    model, sampler = build()
    errors = Errors(model, sampler.grid)
    batches = shapes(args.batch_size, model.config.num_frames, model.config.image_size, args.seed)
    return train(model, sampler, errors.tokens_of, errors.error_of, batches, MASK_RATIO, args.steps, args.warmup)


if __name__ == "__main__":
    main()
