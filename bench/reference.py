"""The reference of bench/step.py: the same step by Hugging Face's VideoMAEForPreTraining, which computes its own target
and loss. No command of its own."""

import torch
from torch import nn

from engine_for_pretraining import PretrainRecipe, masked_error, to_device
from masking_generator import MaskSampler
from optim_factory import parameter_groups
from runtime.backend import Backend
from runtime.build import make_backend
from runtime.checkpoint import load_weights, model_weights
from utils import UsageError


def build_reference(mae: nn.Module, sampler: MaskSampler, batch: dict, recipe: PretrainRecipe, args) -> Backend:
    """transformers' model with our optimizer and mixed precision; our autoencoder takes over its fresh weights.

    Raises UsageError where the flags ask for what it does not have, or the two models differ on the batch.
    """
    if args.loss != "mse" or args.drop_path or args.decoder_mask_ratio:
        raise UsageError(
            "transformers' model has no --loss l1, --drop_path or --decoder_mask_ratio: leave it out with --rows"
        )
    device = recipe.mean.device
    model = _model(mae, args).to(device)
    load_weights(mae, model_weights(model.state_dict(), "transformers"), "transformers")
    _check(mae, model, sampler, batch, recipe)
    if args.use_checkpoint:
        model.gradient_checkpointing_enable()
    model.no_weight_decay = mae.no_weight_decay
    groups = parameter_groups(model, args.weight_decay)
    return make_backend(
        args, model.train(), groups, device, lr=args.lr, eps=args.opt_eps, amp=args.amp, clip_grad=args.clip_grad
    )


def reference_steps(backend: Backend, sampler: MaskSampler, batch: dict, recipe: PretrainRecipe) -> None:
    """recipe.steps_per_epoch optimizer steps; waits for the device."""
    for index in range(recipe.steps_per_epoch * backend.accum_iter):
        recipe.apply_schedule(backend, index // backend.accum_iter)
        _, video, seed = to_device(batch, recipe)
        hidden = sampler(video, seed).hidden()
        with backend.autocast(), backend.no_sync():
            loss = backend.module(video.transpose(1, 2), bool_masked_pos=hidden).loss
        backend.backward(loss)
        backend.step()
    loss.item()


def _model(mae: nn.Module, args) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining  # seconds, and not needed to train

    embed, block, decoder_block = mae.encoder.patch_embed, mae.encoder.blocks[0], mae.decoder.blocks[0]
    config = VideoMAEConfig(
        image_size=embed.img_size,
        patch_size=embed.patch_size[0],
        num_frames=embed.num_frames,
        tubelet_size=embed.tubelet_size,
        hidden_size=mae.encoder.embed_dim,
        num_hidden_layers=len(mae.encoder.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        decoder_hidden_size=mae.mask_token.shape[-1],
        decoder_num_hidden_layers=len(mae.decoder.blocks),
        decoder_num_attention_heads=decoder_block.attn.num_heads,
        decoder_intermediate_size=decoder_block.mlp.fc1.out_features,
        norm_pix_loss=args.normalize_target,
        use_mean_pooling=False,  # else the encoder has no last norm
        attn_implementation="sdpa",
    )
    model = VideoMAEForPreTraining(config)
    for module in model.modules():  # the decoder's last norm ignores the configuration's eps
        if isinstance(module, nn.LayerNorm):
            module.eps = mae.encoder.norm.eps
    return model


@torch.no_grad()
def _check(mae: nn.Module, model: nn.Module, sampler: MaskSampler, batch: dict, recipe: PretrainRecipe) -> None:
    pixels, video, seed = to_device(batch, recipe)
    mask = sampler(video, seed)
    ours, theirs = mae(video, mask), model(video.transpose(1, 2), bool_masked_pos=mask.hidden())
    loss, their_loss = masked_error(ours, pixels, mask, recipe).mean().item(), theirs.loss.item()
    error = ((ours - theirs.logits).abs().max() / theirs.logits.abs().max()).item()
    if not (error < 1e-3 and abs(loss - their_loss) < 1e-3 * loss):
        raise UsageError(
            f"on the same weights and masks transformers' loss is {their_loss:.6f} and ours {loss:.6f}, predictions "
            f"differ by {error:.2g} of the largest: nothing was timed"
        )
