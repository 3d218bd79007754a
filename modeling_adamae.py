"""AdaMAE's adaptive sampler (Bandara 2023, arXiv 2211.09120) and its joint training with the MAE."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from masking_generator import Mask, MaskSampler
from modeling_finetune import Block, zero_gradient
from modeling_tats import draw


class AdaMAESampler(MaskSampler):
    """forward(video, seed, tokens [B, N, D]) -> Mask with log_prob; seed=None takes the most probable tokens.

    One ViT block (8 heads, dropout 0.1) on the patch embedding plus its own learned position table, then a linear
    layer and a softmax over all tokens. The gradient of log_prob reaches the tokenizer, as in AdaMAE.
    """

    needs_tokens = True

    def __init__(
        self,
        grid: tuple[int, int, int],
        mask_ratio: float,
        dim: int,
        num_heads: int = 8,
        use_checkpoint: bool = False,
    ):
        super().__init__(grid, mask_ratio)
        self.use_checkpoint = use_checkpoint
        # Names and initial values are AdaMAE's, so that its checkpoints load.
        self.pos_embed_probs = nn.Parameter(torch.zeros(1, self.num_tokens, dim))
        self.get_token_probs = nn.Sequential(Block(dim, num_heads, drop=0.1), nn.Linear(dim, 1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zero_gradient(self.get_token_probs[-1].bias)

    def draw_mask(self, video: Tensor, seed: Tensor | None, tokens: Tensor) -> Mask:
        x = tokens + self.pos_embed_probs
        if self.use_checkpoint and torch.is_grad_enabled():
            x = checkpoint(self.get_token_probs, x, use_reentrant=False)
        else:
            x = self.get_token_probs(x)
        logits = x.squeeze(-1).float()
        log_prob = torch.log_softmax(logits, dim=-1)
        return Mask(*draw(log_prob, self.num_visible, seed), log_prob)


class AdaMAE(nn.Module):
    """The MAE and its sampler as one module, because one joint loss trains both.

    forward(video, seed) -> (predictions [B, N_m, P], Mask).
    """

    def __init__(self, mae: nn.Module, sampler: AdaMAESampler):
        super().__init__()
        self.mae = mae
        self.sampler = sampler

    def no_weight_decay(self) -> set[str]:
        return {f"mae.{name}" for name in self.mae.no_weight_decay()}

    def forward(self, video: Tensor, seed: Tensor) -> tuple[Tensor, Mask]:
        tokens = self.mae.encoder.patch_embed(video)
        mask = self.sampler(video, seed, tokens)
        return self.mae(video, mask, tokens), mask


def sampling_loss(mask: Mask, error: Tensor, coef: float = 1e-4) -> Tensor:
    """AdaMAE's REINFORCE loss: -coef * mean over B and I_m of log p_i * e_i, e [B, N_m] cut off from its graph.

    The 1e-4 is AdaMAE's weight of the sampling loss against the reconstruction loss.
    """
    log_prob = mask.log_prob.gather(1, mask.masked)
    return -coef * (log_prob * error.detach()).mean()
