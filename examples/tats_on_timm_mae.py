"""TATS chooses the masks of an image autoencoder (He 2022) on timm's VisionTransformer: a clip of one frame.

Both start from scratch on pictures of shapes. This shows the wiring and takes about a minute. There is no motion to
find: the lift printed is that of the texture of the visible tokens.
"""

import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from examples.loop import parse_args, shapes, train
from masking_generator import Mask, gather_tokens
from modeling_pretrain import reconstruction_target, token_error
from modeling_tats import TATS

MASK_RATIO = 0.75


class ImageMAE(nn.Module):
    """A masked autoencoder around a timm ViT without class token, whose weights stay timm's.

    forward(tokens [B, N, D] of vit.patch_embed, mask) -> predictions of the masked tokens [B, N_m, p * p * 3]."""

    def __init__(self, vit: VisionTransformer, dim: int = 64, depth: int = 2, num_heads: int = 2):
        super().__init__()
        self.vit = vit
        rows, columns = vit.patch_embed.grid_size
        self.grid = (1, rows, columns)
        self.narrow = nn.Linear(vit.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, rows * columns, dim))
        self.decoder = nn.Sequential(*(Block(dim, num_heads, qkv_bias=True) for _ in range(depth)), nn.LayerNorm(dim))
        self.head = nn.Linear(dim, 3 * vit.patch_embed.patch_size[0] ** 2)

    def encode(self, tokens: Tensor, mask: Mask) -> Tensor:
        """timm's features of the visible tokens alone, [B, N_v, D]."""
        return self.vit.norm(self.vit.blocks(gather_tokens(tokens + self.vit.pos_embed, mask.visible)))

    def forward(self, tokens: Tensor, mask: Mask) -> Tensor:
        position = self.pos_embed.expand(len(tokens), -1, -1)
        shown = self.narrow(self.encode(tokens, mask)) + gather_tokens(position, mask.visible)
        hidden = self.mask_token + gather_tokens(position, mask.masked)
        return self.head(self.decoder(torch.cat((shown, hidden), dim=1)))[:, -mask.masked.shape[1] :]

    def tokens_of(self, pixels: Tensor) -> Tensor:
        return self.vit.patch_embed(pixels[:, :, 0] / 127.5 - 1)

    def error_of(self, pixels: Tensor, mask: Mask, tokens: Tensor) -> Tensor:
        return token_error(self(tokens, mask), reconstruction_target(pixels, mask, self.grid, normalize=True), "mse")


def build() -> tuple[ImageMAE, TATS]:
    vit = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=4, class_token=False, global_pool="avg",
        num_classes=0, fc_norm=False,
    )  # fmt: skip
    model = ImageMAE(vit)
    return model, TATS(model.grid, MASK_RATIO, vit.embed_dim, 4, attention="mha", objective="listwise")


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    args = parse_args(__doc__, 32, arguments)
    model, sampler = build()
    batches = shapes(args.batch_size, 1, model.vit.patch_embed.img_size[0], args.seed)
    return train(model, sampler, model.tokens_of, model.error_of, batches, MASK_RATIO, args.steps, args.warmup)


if __name__ == "__main__":
    main()
