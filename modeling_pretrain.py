"""The masked autoencoder: encoder on the visible tokens, decoder on all, and the pixels it has to predict.

Class names, constructor arguments and state-dict names are VideoMAE's.
Shapes: B clips, N tokens of which N_v visible and N_m masked, D encoder width, P = tubelet * p * p * 3 values a token.
"""

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from masking_generator import LearnedSampler, Mask, gather_tokens
from modeling_finetune import (
    LAYER_NORM,
    SIZES,
    Block,
    PatchEmbed,
    drop_path_rates,
    get_sinusoid_encoding_table,
    register,
    run_blocks,
    xavier_init,
)


class PretrainVisionTransformerEncoder(nn.Module):
    """forward(video, mask, tokens=None) -> [B, N_v, D]; tokens: all N embedded tokens where they are at hand."""

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=0,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        init_values=None,
        tubelet_size=2,
        use_checkpoint=False,
        use_learnable_pos_emb=False,
        all_frames=16,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.use_checkpoint = use_checkpoint
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, all_frames, tubelet_size)
        num_patches = self.patch_embed.num_patches
        if use_learnable_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, embed_dim))
            trunc_normal_(self.pos_embed, std=0.02, a=-0.02, b=0.02)
        else:
            table = get_sinusoid_encoding_table(num_patches, embed_dim)
            self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate, init_values,
                norm_layer=norm_layer,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )  # fmt: skip
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(xavier_init)

    def forward(self, x: Tensor, mask: Mask, tokens: Tensor | None = None) -> Tensor:
        if tokens is None:
            x = self.patch_embed(x, mask.visible)  # hidden tokens are not embedded at all
        else:
            x = gather_tokens(tokens, mask.visible)
        x = x + gather_tokens(self.pos_embed.to(x.dtype).expand(len(x), -1, -1), mask.visible)
        return self.head(self.norm(run_blocks(self.blocks, x, self.use_checkpoint)))


class PretrainVisionTransformerDecoder(nn.Module):
    """forward(x [B, N, D_dec], return_token_num) -> predictions [B, return_token_num, P] of the last tokens."""

    def __init__(
        self,
        patch_size=16,
        num_classes=768,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        init_values=None,
        num_patches=196,
        tubelet_size=2,
        use_checkpoint=False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate, init_values,
                norm_layer=norm_layer,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )  # fmt: skip
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(xavier_init)

    def forward(self, x: Tensor, return_token_num: int) -> Tensor:
        return self.head(self.norm(run_blocks(self.blocks, x, self.use_checkpoint, return_token_num)))


class PretrainVisionTransformer(nn.Module):
    """Video masked autoencoder. forward(video float [B, C, T, H, W], mask) -> predictions [B, N_m, P].

    mask: a Mask, or VideoMAE's bool [B, N] with True = hidden. tokens: see the encoder.
    Predictions are of the masked tokens in ascending order, each ordered (frame, row, column, channel).
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        encoder_in_chans=3,
        encoder_num_classes=0,
        encoder_embed_dim=768,
        encoder_depth=12,
        encoder_num_heads=12,
        decoder_num_classes=None,  # None: the P values of a token; VideoMAE's code passes 1536 for 2 x 16 x 16 x 3
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=8,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        init_values=0.0,
        use_learnable_pos_emb=False,
        use_checkpoint=False,
        tubelet_size=2,
        num_classes=0,  # VideoMAE's signature has these two for timm's create_model; they have no effect there or here
        in_chans=0,
        all_frames=16,
    ):
        super().__init__()
        self.encoder = PretrainVisionTransformerEncoder(
            img_size, patch_size, encoder_in_chans, encoder_num_classes, encoder_embed_dim, encoder_depth,
            encoder_num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, drop_path_rate, norm_layer,
            init_values, tubelet_size, use_checkpoint, use_learnable_pos_emb, all_frames,
        )  # fmt: skip
        embed = self.encoder.patch_embed
        values_per_token = embed.tubelet_size * embed.patch_size[0] * embed.patch_size[1] * encoder_in_chans
        if decoder_num_classes not in (None, values_per_token):
            raise ValueError(
                f"decoder_num_classes is {decoder_num_classes}, but a token of {embed.tubelet_size} x "
                f"{embed.patch_size[0]} x {embed.patch_size[1]} pixels has {values_per_token} values; leave it out"
            )
        self.decoder = PretrainVisionTransformerDecoder(
            patch_size, values_per_token, decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio, qkv_bias,
            qk_scale, drop_rate, attn_drop_rate, drop_path_rate, norm_layer, init_values, embed.num_patches,
            tubelet_size, use_checkpoint,
        )  # fmt: skip
        self.encoder_to_decoder = nn.Linear(encoder_embed_dim, decoder_embed_dim, bias=False)
        nn.init.xavier_uniform_(self.encoder_to_decoder.weight)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        table = get_sinusoid_encoding_table(embed.num_patches, decoder_embed_dim)
        self.register_buffer("pos_embed", table, persistent=False)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token frames, rows, columns."""
        return self.encoder.patch_embed.grid

    def get_num_layers(self) -> int:
        return len(self.encoder.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "encoder.pos_embed", "cls_token", "mask_token"}

    def forward(self, x: Tensor, mask: Mask | Tensor, tokens: Tensor | None = None) -> Tensor:
        if isinstance(mask, Tensor):
            mask = Mask.from_bool(mask)
        visible = self.encoder_to_decoder(self.encoder(x, mask, tokens))
        position = self.pos_embed.to(visible.dtype).expand(len(visible), -1, -1)
        visible = visible + gather_tokens(position, mask.visible)
        hidden = self.mask_token.to(visible.dtype) + gather_tokens(position, mask.masked)
        return self.decoder(torch.cat((visible, hidden), dim=1), mask.masked.shape[1])


class JointModel(nn.Module):
    """The autoencoder and a learned sampler as one module, which one joint loss trains (AdaMAE).

    forward(video, seed) -> (predictions [B, N_m, P], Mask).
    """

    def __init__(self, mae: PretrainVisionTransformer, sampler: LearnedSampler):
        super().__init__()
        self.mae = mae
        self.sampler = sampler

    def no_weight_decay(self) -> set[str]:
        return {f"mae.{name}" for name in self.mae.no_weight_decay()}

    def forward(self, video: Tensor, seed: Tensor) -> tuple[Tensor, Mask]:
        tokens = self.mae.encoder.patch_embed(video)
        mask = self.sampler(video, seed, tokens)
        return self.mae(video, mask, tokens), mask


def patchify(pixels: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """pixels [B, C, T, H, W] -> [B, N, k, C]: k = tubelet * p * p pixels a token in (frame, row, column) order."""
    (t, h, w), (frames, height, width) = grid, pixels.shape[2:]
    x = pixels.reshape(*pixels.shape[:2], t, frames // t, h, height // h, w, width // w)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(len(x), t * h * w, -1, pixels.shape[1])


def unpatchify(patches: Tensor, grid: tuple[int, int, int], size: tuple[int, int, int]) -> Tensor:
    """Inverse of patchify: [B, N, k, C] -> [B, C, T, H, W] for size = (T, H, W)."""
    (t, h, w), (frames, height, width) = grid, size
    x = patches.reshape(len(patches), t, h, w, frames // t, height // h, width // w, patches.shape[-1])
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(patches), -1, frames, height, width)


def normalize_patches(patches: Tensor) -> Tensor:
    """Each colour channel of each token to mean 0 and (unbiased) deviation 1, as VideoMAE's target.

    patches [..., k, C], float in [0, 1], or uint8, which gives float32. The deviation gets 1e-6 (of white) more.
    """
    white, dtype = (255, torch.float32) if patches.dtype == torch.uint8 else (1, patches.dtype)
    # a copy [..., C, k]: sums over the last dimension are the fast ones
    values = patches.transpose(-1, -2).to(dtype, memory_format=torch.contiguous_format, copy=True)
    count = values.shape[-1]
    values -= values.sum(dim=-1, keepdim=True) / count  # of integers exact: a patch of one colour is 0
    deviation = torch.linalg.vector_norm(values, dim=-1, keepdim=True) / math.sqrt(count - 1)
    return values.div_(deviation + 1e-6 * white).transpose(-1, -2)


@torch.no_grad()
def reconstruction_target(pixels: Tensor, mask: Mask, grid: tuple[int, int, int], normalize: bool) -> Tensor:
    """pixels [B, C, T, H, W], float in [0, 1] or uint8 -> what the decoder has to predict, float32 [B, N_m, P].

    uint8 pixels become float once the masked tokens are picked.
    """
    patches = patchify(pixels, grid)
    patches = gather_tokens(patches.flatten(2), mask.masked).unflatten(-1, patches.shape[2:])
    if normalize:
        patches = normalize_patches(patches)
    elif patches.dtype == torch.uint8:
        patches = patches.float().div_(255)
    return patches.flatten(2)


def token_error(prediction: Tensor, target: Tensor, loss: str) -> Tensor:
    """Per-token reconstruction error e_i, float32 [B, N_m]; its mean is L_recon (paper eq. 6). loss: "mse" or "l1".

    prediction [B, N_m, P], target float32 of the same shape, without a gradient of its own.
    """
    return _TokenError.apply(prediction, target, loss)


class _TokenError(torch.autograd.Function):
    """Keeps one tensor in the prediction's dtype for the backward pass: autograd's own would keep two in float32."""

    @staticmethod
    def forward(ctx, prediction, target, loss):
        difference = torch.sub(prediction, target).float()  # from bf16 without a copy in float32
        ctx.scale = {"mse": 2, "l1": 1}[loss] / difference.shape[-1]
        if loss == "mse":
            error = torch.linalg.vector_norm(difference, dim=-1).square() / difference.shape[-1]
        else:
            error = difference.abs().mean(dim=-1)
            difference = difference.sign()
        ctx.save_for_backward(difference.to(prediction.dtype))
        return error

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        # computed in float32, stored as the prediction is
        return torch.mul(slope, (grad * ctx.scale).unsqueeze(-1), out=torch.empty_like(slope)), None, None


def _pretrain(size: str, decoder_embed_dim: int, decoder_num_heads: int, **kwargs) -> PretrainVisionTransformer:
    defaults = {name if name == "mlp_ratio" else f"encoder_{name}": value for name, value in SIZES[size].items()}
    defaults |= dict(decoder_embed_dim=decoder_embed_dim, decoder_num_heads=decoder_num_heads)
    return PretrainVisionTransformer(**{"qkv_bias": True, "norm_layer": LAYER_NORM, **defaults, **kwargs})


@register
def pretrain_videomae_tiny_patch8_64(**kwargs):
    return _pretrain("tiny", 64, 2, **{"img_size": 64, "patch_size": 8, "all_frames": 8, **kwargs})


@register
def pretrain_videomae_small_patch16_224(**kwargs):
    return _pretrain("small", 192, 3, **kwargs)


@register
def pretrain_videomae_base_patch16_224(**kwargs):
    return _pretrain("base", 384, 6, **kwargs)


@register
def pretrain_videomae_large_patch16_224(**kwargs):
    return _pretrain("large", 512, 8, **kwargs)


@register
def pretrain_videomae_huge_patch16_224(**kwargs):
    return _pretrain("huge", 640, 8, **kwargs)


@register
def pretrain_videomae_giant_patch14_224(**kwargs):
    """VideoMAE V2's. Its decoder shares the encoder's MLP ratio 48/11: 512 -> 2234."""
    return _pretrain("giant", 512, 8, **{"patch_size": 14, **kwargs})
