"""AdaMAE's adaptive sampler (Bandara 2023, arXiv 2211.09120), trained by the backward pass of the autoencoder."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from masking_generator import LearnedSampler
from modeling_finetune import Block, xavier_init, zero_gradient


class AdaMAESampler(LearnedSampler):
    """One ViT block (8 heads, dropout 0.1) on the patch embedding plus its own learned position table, then a linear
    layer and a softmax over all tokens. The gradient of log_prob reaches the tokenizer, as in AdaMAE.

    coef: weight of the sampling loss against the reconstruction loss.
    """

    flags = {"coef": "adamae_coef"}
    position_tables = ("pos_embed_probs",)

    def __init__(
        self,
        grid: tuple[int, int, int],
        mask_ratio: float,
        dim: int,
        num_heads: int = 8,
        use_checkpoint: bool = False,
        coef: float = 1e-4,
    ):
        super().__init__(grid, mask_ratio)
        self.use_checkpoint = use_checkpoint
        self.coef = coef
        # Names and initial values are AdaMAE's, so that its checkpoints load.
        self.pos_embed_probs = nn.Parameter(torch.zeros(1, self.num_tokens, dim))
        self.get_token_probs = nn.Sequential(Block(dim, num_heads, drop=0.1), nn.Linear(dim, 1))
        self.apply(xavier_init)
        zero_gradient(self.get_token_probs[-1].bias)

    def policy(self, tokens: Tensor) -> tuple[Tensor, None]:
        x = tokens + self.pos_embed_probs
        if self.use_checkpoint and torch.is_grad_enabled():
            x = checkpoint(self.get_token_probs, x, use_reentrant=False)
        else:
            x = self.get_token_probs(x)
        logits = x.squeeze(-1).float()
        return torch.log_softmax(logits, dim=-1), None

    def loss(self, log_prob, value, episode, moments=None) -> tuple[Tensor, dict[str, Tensor]]:
        """REINFORCE without a baseline: -coef * mean over B and I_m of log p_i * e_i."""
        chosen = log_prob.gather(1, episode.masked)
        return -self.coef * (chosen * episode.reward).mean(), {}
