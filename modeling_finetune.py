"""Vision transformer for clips: the blocks the whole project shares, and the classifier.

Class names, constructor arguments and state-dict names are VideoMAE's: its checkpoints load here and ours there.
Shapes: B clips, T frames, N = (T/tubelet) * (H/patch) * (W/patch) tokens in (time, row, column) order, D width.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYER_NORM = functools.partial(nn.LayerNorm, eps=1e-6)

# Encoder sizes; small to huge are VideoMAE's, giant is VideoMAE V2's (ViT-g), tiny is for tests and the demo.
SIZES = {
    "tiny": dict(embed_dim=96, depth=4, num_heads=4),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
    "giant": dict(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
}


def register(build):
    """Registers a model function with timm. VideoMAE's names partly are timm's own: ours replace them, silently.

    timm's create_model passes pretrained and its config keys, which mean nothing here: no weights are bundled.
    """

    @functools.wraps(build)
    def entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        if pretrained:
            raise ValueError(f"{build.__name__}: no weights are bundled; give a checkpoint with --finetune")
        return build(**kwargs)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Overwriting")
        return register_model(entry)


def get_sinusoid_encoding_table(n_position: int, d_hid: int) -> Tensor:
    """Fixed sine-cosine table over the flat token index, float32 [1, n_position, d_hid]: base 10000, sine on even
    channels, cosine on odd (the table of VideoMAE)."""
    channel = torch.arange(d_hid, dtype=torch.float64)
    angle = torch.arange(n_position, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / d_hid)
    table = torch.where(channel.long() % 2 == 0, angle.sin(), angle.cos())
    return table.float().unsqueeze(0)


def is_sinusoid_encoding_table(table: Tensor) -> bool:
    """Whether a table of positions [1, N, D] is the fixed one, also where it went through half precision."""
    fixed = get_sinusoid_encoding_table(*table.shape[1:])
    value = table.float().cpu()
    halves = [kind for kind in (torch.float16, torch.bfloat16) if torch.equal(value.to(kind).float(), value)]
    return torch.allclose(value, fixed, rtol=0, atol=max([1e-4, *(torch.finfo(kind).eps for kind in halves)]))


def xavier_init(module: nn.Module) -> None:
    """Initial values of linear layers in the autoencoder and the samplers (with module.apply)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def zero_gradient(parameter: nn.Parameter, size: int | None = None) -> None:
    """Makes the gradient of a parameter, or of its first size elements, exactly 0.

    For a bias that a softmax cannot see, because it adds the same to every score. Its computed gradient is rounding
    noise, and Adam with a tiny eps moves by its learning rate whatever the gradient's size. It stays a parameter, so
    that checkpoints and optimizer states have the same entries as before.
    """

    def zeroed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:size].zero_()  # "= 0" would make a tensor on the host
        return gradient

    parameter.register_hook(zeroed)


class PatchEmbed(nn.Module):
    """Tubelets of tubelet_size x patch x patch pixels to tokens; the weights are those of a strided Conv3d."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, num_frames=16, tubelet_size=2):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.num_frames, self.tubelet_size = num_frames, int(tubelet_size)
        kernel = (self.tubelet_size, *self.patch_size)
        for what, size, cell in zip(("frames", "rows", "columns"), (num_frames, *self.img_size), kernel, strict=True):
            if size % cell:
                raise ValueError(
                    f"{size} {what} cannot be cut into patches of {cell}: "
                    "--num_frames must be a multiple of --tubelet_size and --input_size of --patch_size"
                )
        self.grid = (num_frames // kernel[0], self.img_size[0] // kernel[1], self.img_size[1] // kernel[2])
        self.num_patches = self.grid[0] * self.grid[1] * self.grid[2]
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, N, D], or only the tokens of index int64 [B, K] -> [B, K, D]."""
        if x.shape[2:] != (self.num_frames, *self.img_size):
            raise ValueError(
                f"clip of {tuple(x.shape[2:])} (frames, height, width) given to a model "
                f"for {(self.num_frames, *self.img_size)}"
            )
        batch, channels = x.shape[:2]
        (t, h, w), (kt, kh, kw) = self.grid, self.proj.kernel_size
        # A convolution whose stride is its kernel is one matrix product; this form can skip the hidden tokens.
        x = x.reshape(batch, channels, t, kt, h, kh, w, kw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = x.reshape(batch, self.num_patches, -1)
        if index is not None:
            x = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention; queries and values have a bias, keys have none (VideoMAE's layout)."""

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, attn_head_dim=None
    ):
        super().__init__()
        self.num_heads = num_heads
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        width = (attn_head_dim or dim // num_heads) * num_heads
        self.scale = qk_scale  # None: 1 / sqrt(head width)
        self.qkv = nn.Linear(dim, width * 3, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.attn_drop = attn_drop
        self.proj = nn.Linear(width, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], or with num_queries that of the last tokens alone, [B, num_queries, D]."""
        weight, bias, heads = self.qkv.weight, None, self.num_heads
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if num_queries is None:
            q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            width = len(weight) // 3
            q = F.linear(x[:, -num_queries:], weight[:width], self.q_bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            bias = None if bias is None else bias[width:]
            k, v = F.linear(x, weight[width:], bias).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        # q, k, v each [B, heads, N, d]
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm transformer block; init_values > 0 scales both branches by learned gammas."""

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        init_values=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
        attn_head_dim=None,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, attn_head_dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=(0.0, drop))
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim)) if init_values else None
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim)) if init_values else None

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """As Attention.forward."""
        attended = self.attn(self.norm1(x), num_queries)
        if num_queries is not None:
            x = x[:, -num_queries:]
        x = x + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        mixed = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed if self.gamma_2 is None else self.gamma_2 * mixed)


def run_blocks(blocks: nn.ModuleList, x: Tensor, use_checkpoint: bool, num_outputs: int | None = None) -> Tensor:
    """Applies blocks in order; use_checkpoint recomputes each in the backward pass to save memory.

    num_outputs: the last block answers for the last tokens alone, [B, N, D] -> [B, num_outputs, D].
    """
    for i, block in enumerate(blocks, 1):
        num_queries = num_outputs if i == len(blocks) else None
        if use_checkpoint and x.requires_grad:
            x = checkpoint(block, x, num_queries, use_reentrant=False)
        else:
            x = block(x, num_queries)
    return x if num_outputs is None else x[:, -num_outputs:]


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly from 0 at the first block to rate at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


class VisionTransformer(nn.Module):
    """Clip classifier. forward(video float [B, C, T, H, W]) -> logits [B, num_classes].

    Mean pooling + LayerNorm + linear head by default; use_mean_pooling=False reads the first token after the norm.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        fc_drop_rate=0.0,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        init_values=0.0,
        use_learnable_pos_emb=False,
        init_scale=0.0,
        all_frames=16,
        tubelet_size=2,
        use_checkpoint=False,
        use_mean_pooling=True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.use_checkpoint = use_checkpoint
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, all_frames, tubelet_size)
        num_patches = self.patch_embed.num_patches
        if use_learnable_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, embed_dim))
        else:
            table = get_sinusoid_encoding_table(num_patches, embed_dim)
            self.register_buffer("pos_embed", table, persistent=False)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate, init_values,
                norm_layer=norm_layer,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )  # fmt: skip
        self.norm = nn.Identity() if use_mean_pooling else norm_layer(embed_dim)
        self.fc_norm = norm_layer(embed_dim) if use_mean_pooling else None
        self.fc_dropout = nn.Dropout(fc_drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

        if use_learnable_pos_emb:
            nn.init.normal_(self.pos_embed, std=0.02)
        self.apply(_init_classifier_weights)
        if num_classes > 0:
            with torch.no_grad():  # a head near zero leaves the pre-trained features undisturbed at the start
                self.head.weight.mul_(init_scale)
                self.head.bias.mul_(init_scale)

    def get_num_layers(self) -> int:
        return len(self.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_tokens(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, N, D]."""
        x = self.patch_embed(x)
        x = self.pos_drop(x + self.pos_embed.to(x.dtype))
        return self.norm(run_blocks(self.blocks, x, self.use_checkpoint))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, D]."""
        x = self.forward_tokens(x)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(x.mean(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return full_precision(self.head, self.fc_dropout(self.forward_features(x)))


def full_precision(head: nn.Module, features: Tensor) -> Tensor:
    """head(features) outside autocast: among bf16 logits the first of several equal ones would win."""
    with torch.autocast(features.device.type, enabled=False):
        weight = getattr(head, "weight", features)
        return head(features.to(weight.dtype))


def _init_classifier_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)  # VideoMAE cuts it at +-2: 100 deviations, hence not at all
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Probe(nn.Module):
    """A classifier on a frozen encoder, which gets no gradient and stays in evaluation mode. forward(video) -> logits.

    "linear": mean of the tokens, batch norm without weights, linear (the protocol of MAE, He 2022). "attentive": a
    learned query attends to the tokens, then an MLP and linear (V-JEPA, Bardes 2024).
    Args: encoder, a VisionTransformer with num_classes 0 and use_mean_pooling False, so that the pre-trained norm is
    the last layer.
    """

    def __init__(self, encoder: VisionTransformer, kind: str, num_classes: int):
        super().__init__()
        if kind not in ("linear", "attentive"):
            raise ValueError(f"unknown probe {kind!r}: choose linear or attentive")
        self.encoder = encoder.requires_grad_(False)
        self.kind = kind
        width = encoder.embed_dim
        if kind == "linear":
            self.pool = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        else:
            heads = encoder.blocks[0].attn.num_heads
            self.pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=LAYER_NORM)
            zero_gradient(self.pool.kv.bias, width)  # of the keys
        self.head = nn.Linear(width, num_classes)
        trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """What the trained part reads: [B, D] for a linear probe, [B, N, D] for an attentive one."""
        tokens = self.encoder.forward_tokens(video)
        return tokens.mean(dim=1) if self.kind == "linear" else tokens

    def classify(self, features: Tensor) -> Tensor:
        return full_precision(self.head, self.pool(features))

    def forward(self, x: Tensor) -> Tensor:
        """x: video [B, C, T, H, W], or features already computed -> logits [B, num_classes]."""
        return self.classify(self.features(x) if x.ndim == 5 else x)


def _vit(size: str, **kwargs) -> VisionTransformer:
    return VisionTransformer(**{"qkv_bias": True, "norm_layer": LAYER_NORM, **SIZES[size], **kwargs})


@register
def vit_tiny_patch8_64(**kwargs):
    return _vit("tiny", **{"img_size": 64, "patch_size": 8, "all_frames": 8, **kwargs})


@register
def vit_small_patch16_224(**kwargs):
    return _vit("small", **kwargs)


@register
def vit_base_patch16_224(**kwargs):
    return _vit("base", **kwargs)


@register
def vit_base_patch16_384(**kwargs):
    return _vit("base", **{"img_size": 384, **kwargs})


@register
def vit_large_patch16_224(**kwargs):
    return _vit("large", **kwargs)


@register
def vit_large_patch16_384(**kwargs):
    return _vit("large", **{"img_size": 384, **kwargs})


@register
def vit_large_patch16_512(**kwargs):
    return _vit("large", **{"img_size": 512, **kwargs})


@register
def vit_huge_patch16_224(**kwargs):
    return _vit("huge", **kwargs)


@register
def vit_giant_patch14_224(**kwargs):
    return _vit("giant", **{"patch_size": 14, **kwargs})
