"""Small models with random weights, and inputs for them."""

import functools

import torch
from torch import nn
from transformers import VideoMAEConfig

from masking_generator import Mask
from modeling_finetune import VisionTransformer
from modeling_pretrain import PretrainVisionTransformer

NORM = functools.partial(nn.LayerNorm, eps=1e-6)
SIZE, PATCH, FRAMES, GRID = (16, 24), 8, 4, (2, 2, 3)
IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SHAPE = dict(img_size=16, patch_size=8, all_frames=4, qkv_bias=True, norm_layer=NORM)  # a grid of 2 x 2 x 2


def make_mae(**kwargs):
    torch.manual_seed(0)
    settings = dict(
        img_size=SIZE, patch_size=PATCH, all_frames=FRAMES, encoder_embed_dim=24, encoder_depth=2, encoder_num_heads=2,
        decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=4, qkv_bias=True, norm_layer=NORM,
    )  # fmt: skip
    return PretrainVisionTransformer(**{**settings, **kwargs})


def randomize(module, seed=1):
    """Every parameter random, also the biases and norms that start at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter[0].numel() ** -0.5
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter == 1).float())
    return module


def make_input(batch=2, num_visible=5, size=SIZE, frames=FRAMES, num_tokens=12):
    """Pixels in [0, 1], the normalised video, and a mask with other tokens in every clip."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(batch, 3, frames, *size, generator=generator)
    order = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(batch)])
    mask = Mask(order[:, :num_visible].sort(dim=1).values, order[:, num_visible:].sort(dim=1).values)
    return pixels, (pixels - IMAGENET_MEAN.view(3, 1, 1, 1)) / IMAGENET_STD.view(3, 1, 1, 1), mask


def random_mae(**settings):
    encoder = dict(encoder_embed_dim=24, encoder_depth=3, encoder_num_heads=2)
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return randomize(PretrainVisionTransformer(**{**SHAPE, **encoder, **decoder, **settings}))


def random_classifier(seed=5, **settings):
    sizes = dict(embed_dim=24, depth=3, num_heads=2, num_classes=5)
    return randomize(VisionTransformer(**{**SHAPE, **sizes, **settings}), seed).eval()


def random_encoder(**settings):
    return random_classifier(num_classes=0, use_mean_pooling=False, **settings)


def make_huggingface(model_class, **settings):
    """transformers' model of random_mae's shape, with random weights and eps 1e-6 in every norm."""
    config = VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=24, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=96, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=64, layer_norm_eps=1e-6, **settings,
    )  # fmt: skip
    model = randomize(model_class(config), seed=9).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model
