"""TATS, the Trajectory-Aware Adaptive Token Sampler: an actor and a critic on trajectory attention (paper 3.2)."""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from masking_generator import Mask, MaskSampler, gumbel_noise, split_by_score
from modeling_finetune import LAYER_NORM, Attention, get_sinusoid_encoding_table, zero_gradient
from trajectory_attention import TrajectoryAttention

ATTENTIONS = ("orthoformer", "trajectory", "mha")


class TATSBlock(nn.Module):
    """Pre-norm residual block: attention over the clip, then an MLP of ratio 4. No dropout: a PPO ratio compares the
    same function of the parameters before and after an update.

    use_checkpoint: the backward pass computes trajectory tokens and the MLP again instead of storing them.
    landmark_gradient: of Orthoformer, see TrajectoryAttention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attention: str,
        num_landmarks: int,
        use_checkpoint: bool = False,
        landmark_gradient: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm1 = LAYER_NORM(dim)
        if attention == "mha":
            self.attn = Attention(dim, num_heads, qkv_bias=True)
        else:
            approx = "orthoformer" if attention == "orthoformer" else "none"
            self.attn = TrajectoryAttention(
                dim, num_heads, True, approx, num_landmarks, landmark_gradient=landmark_gradient
            )
            self.attn.recompute = use_checkpoint
        self.norm2 = LAYER_NORM(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def attend(self, x: Tensor, num_frames: int) -> Tensor:
        y = self.norm1(x)
        return x + (self.attn(y) if isinstance(self.attn, Attention) else self.attn(y, num_frames))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        return self._stored_or_not(self._mix, self.attend(x, num_frames))

    def score(self, x: Tensor, num_frames: int, head: nn.Linear) -> Tensor:
        """head(forward(x)) for a head of one output, float32 [B, N]: the MLP's second matrix is folded into the head,
        D*4D products a clip instead of N*4D*D."""
        return self._stored_or_not(self._mix_and_score, self.attend(x, num_frames), head)

    def _stored_or_not(self, function, x: Tensor, *arguments) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(function, x, *arguments, use_reentrant=False)
        return function(x, *arguments)

    def _mix(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))

    def _mix_and_score(self, x: Tensor, head: nn.Linear) -> Tensor:
        hidden = self.mlp.act(self.mlp.fc1(self.norm2(x)))
        folded = head.weight @ self.mlp.fc2.weight  # [1, 4D]
        bias = F.linear(self.mlp.fc2.bias, head.weight, head.bias)
        return (F.linear(x, head.weight).float() + F.linear(hidden, folded).float() + bias).squeeze(-1)


class TATS(MaskSampler):
    """forward(video, seed, tokens [B, N, D]) -> Mask with log_prob and value.

    tokens are cut off from the graph that made them: no gradient reaches the MAE. The fixed position table is added
    here (paper eq. 3-5). Visible tokens are drawn without replacement from p = softmax(z / temperature) by Gumbel
    top-k; seed=None takes the most probable ones instead (for pictures).

    logit_cap C > 0: logits of a clip are centred and bounded by z -> C tanh(z / C), so that no token is more than
    exp(2 C / temperature) times as probable as another. The objective itself has no such bound: it grows with the scale
    of the logits for ever (docs/SAMPLER.md).
    """

    needs_tokens = True

    def __init__(
        self,
        grid: tuple[int, int, int],
        mask_ratio: float,
        dim: int,
        num_heads: int,
        attention: str = "orthoformer",
        num_blocks: int = 1,
        num_landmarks: int = 128,
        temperature: float = 1.0,
        logit_cap: float = 0.0,
        use_checkpoint: bool = False,
        landmark_gradient: bool = False,
    ):
        super().__init__(grid, mask_ratio)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got {attention!r}")
        self.temperature, self.logit_cap = temperature, logit_cap
        table = get_sinusoid_encoding_table(self.num_tokens, dim)
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.ModuleList(
            TATSBlock(dim, num_heads, attention, num_landmarks, use_checkpoint, landmark_gradient)
            for _ in range(num_blocks)
        )
        self.actor = nn.Linear(dim, 1)
        self.critic = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
        self.apply(_init_weights)
        # p = 1/N at the start: a random actor would hide whole regions from the encoder for long. V = 0 too,
        # lest the critic's first estimates differ from clip to clip by more than the rewards do.
        for head in (self.actor, self.critic[-1]):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        for bias in (self.actor.bias, self.blocks[-1].mlp.fc2.bias):  # both add the same to every logit
            zero_gradient(bias)

    @torch.no_grad()
    def trajectory_of(self, tokens: Tensor, token: int) -> Tensor:
        """Attention of one token in each frame, heads averaged, float32 [B, t, S] summing to 1 in a frame, of the last
        block (paper, figure 3). tokens as in forward. Raises ValueError for plain attention, which has no frames."""
        x = tokens.detach() + self.pos_embed.to(tokens.dtype)
        for block in self.blocks[:-1]:
            x = block(x, self.grid[0])
        last = self.blocks[-1]
        if isinstance(last.attn, Attention):
            raise ValueError("--tats_attention mha has no trajectories to draw")
        return last.attn.trajectory_of(last.norm1(x), self.grid[0], token)

    def draw_mask(self, video: Tensor | None, seed: Tensor | None, tokens: Tensor) -> Mask:
        x = tokens.detach() + self.pos_embed.to(tokens.dtype)
        value = self.critic(x.mean(dim=1)).squeeze(-1).float()
        for block in self.blocks[:-1]:
            x = block(x, self.grid[0])
        logits = self.blocks[-1].score(x, self.grid[0], self.actor)
        if self.logit_cap:
            logits = self.logit_cap * torch.tanh((logits - logits.mean(dim=1, keepdim=True)) / self.logit_cap)
        log_prob = torch.log_softmax(logits / self.temperature, dim=-1)
        return Mask(*draw(log_prob, self.num_visible, seed), log_prob, value)


@torch.no_grad()
def draw(log_prob: Tensor, num_visible: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """log_prob float32 [B, N] -> (visible, masked) indices, visible drawn without replacement by Gumbel top-k.

    In float32 on log p it cannot fail where p underflows to 0. seed=None: the most probable tokens.
    """
    noise = 0.0 if seed is None else gumbel_noise(seed, log_prob.shape[1])
    return split_by_score(log_prob.float() + noise, num_visible)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # as the autoencoder; 0.02 leaves narrow attention uniform
        if module.bias is not None:
            nn.init.zeros_(module.bias)
