"""TATS, the Trajectory-Aware Adaptive Token Sampler: an actor and a critic on trajectory attention (paper 3.2)."""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ppo
from masking_generator import LearnedSampler
from modeling_finetune import LAYER_NORM, Attention, get_sinusoid_encoding_table, xavier_init, zero_gradient
from trajectory_attention import TrajectoryAttention

ATTENTIONS = ("orthoformer", "trajectory", "mha")
OBJECTIVES = ("ppo", "listwise")
ENTROPIES = ("bonus", "uniform_kl")


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


class TATS(LearnedSampler):
    """p = softmax(z / temperature) of the actor's logits, and the critic's value, trained by PPO (paper eq. 7-8);
    objective="listwise": without a critic, by ppo.listwise_loss.

    tokens are cut off from the graph that made them: no gradient reaches the MAE. The fixed position table is added
    here (paper eq. 3-5).

    logit_cap C > 0: logits of a clip are centred and bounded by z -> C tanh(z / C), so that no token is more than
    exp(2 C / temperature) times as probable as another. The objective itself has no such bound: it grows with the scale
    of the logits for ever (docs/SAMPLER.md).

    clip, policy_coef, value_coef, entropy_coef, entropy_form: see ppo.sampling_loss; tau: see ppo.listwise_loss.
    """

    own_optimizer = True
    flags = {
        "attention": "tats_attention",
        "num_blocks": "tats_blocks",
        "num_landmarks": "num_landmarks",
        "landmark_gradient": "landmark_gradient",
        "temperature": "softmax_temp",
        "logit_cap": "tats_logit_cap",
        "clip": "ppo_clip",
        "policy_coef": "policy_coef",
        "value_coef": "value_coef",
        "entropy_coef": "entropy_coef",
        "entropy_form": "entropy",
        "objective": "tats_objective",
        "tau": "tats_tau",
    }

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
        clip: float = 0.2,
        policy_coef: float = 1e-4,
        value_coef: float = 1e-4,
        entropy_coef: float = 1e-4,
        entropy_form: str = "bonus",
        objective: str = "ppo",
        tau: float = 0.1,
    ):
        super().__init__(grid, mask_ratio)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got {attention!r}")
        self.temperature, self.logit_cap = temperature, logit_cap
        self.objective, self.tau = objective, tau
        self.ppo = dict(clip=clip, policy_coef=policy_coef, value_coef=value_coef, entropy_coef=entropy_coef,
                        entropy_form=entropy_form)  # fmt: skip
        table = get_sinusoid_encoding_table(self.num_tokens, dim)
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.ModuleList(
            TATSBlock(dim, num_heads, attention, num_landmarks, use_checkpoint, landmark_gradient)
            for _ in range(num_blocks)
        )
        self.actor = nn.Linear(dim, 1)
        heads = [self.actor]
        self.critic = None
        if objective == "ppo":
            self.critic = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
            heads.append(self.critic[-1])
        self.apply(xavier_init)  # as the autoencoder; 0.02 leaves narrow attention uniform
        # p = 1/N at the start: a random actor would hide whole regions from the encoder for long. V = 0 too,
        # lest the critic's first estimates differ from clip to clip by more than the rewards do.
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        for bias in (self.actor.bias, self.blocks[-1].mlp.fc2.bias):  # both add the same to every logit
            zero_gradient(bias)

    @classmethod
    def for_encoder(cls, encoder: nn.Module, grid: tuple[int, int, int], mask_ratio: float, **settings):
        return cls(grid, mask_ratio, encoder.embed_dim, encoder.blocks[0].attn.num_heads, **settings)

    @property
    def has_trajectories(self) -> bool:
        """False for plain attention, which knows no frames."""
        return isinstance(self.blocks[-1].attn, TrajectoryAttention)

    @torch.no_grad()
    def trajectory_of(self, tokens: Tensor, token: int) -> Tensor:
        """Attention of one token in each frame, heads averaged, float32 [B, t, S] summing to 1 in a frame, of the last
        block (paper, figure 3). tokens as in forward. Raises ValueError for plain attention, which has no frames."""
        x = tokens.detach() + self.pos_embed.to(tokens.dtype)
        for block in self.blocks[:-1]:
            x = block(x, self.grid[0])
        last = self.blocks[-1]
        if not self.has_trajectories:
            raise ValueError("--tats_attention mha has no trajectories to draw")
        return last.attn.trajectory_of(last.norm1(x), self.grid[0], token)

    def policy(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        x = tokens.detach() + self.pos_embed.to(tokens.dtype)
        value = self.critic(x.mean(dim=1)).squeeze(-1).float() if self.critic is not None else None
        for block in self.blocks[:-1]:
            x = block(x, self.grid[0])
        logits = self.blocks[-1].score(x, self.grid[0], self.actor)
        if self.logit_cap:
            logits = self.logit_cap * torch.tanh((logits - logits.mean(dim=1, keepdim=True)) / self.logit_cap)
        return torch.log_softmax(logits / self.temperature, dim=-1), value

    def loss(self, log_prob, value, episode, moments=None) -> tuple[Tensor, dict[str, Tensor]]:
        if self.objective == "listwise":
            return ppo.listwise_loss(log_prob, episode, self.tau)
        return ppo.sampling_loss(log_prob, value, episode, moments=moments, **self.ppo)
