"""A learned sampler of one's own: one class and one line in SAMPLERS. Two of them, the smallest there are.

    python examples/new_learned_sampler.py --mask_type linear --data_path LIST ...
    python examples/new_learned_sampler.py --mask_type linear_alone --data_path LIST ...

has all flags of run_mae_pretraining.py. To keep a sampler, put the class into a module at the root and its line into
SAMPLERS of run_mae_pretraining.py: resume, pictures and --finetune know it then too.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import run_mae_pretraining
from masking_generator import LearnedSampler


class LinearSampler(LearnedSampler):
    """A linear layer, trained by the autoencoder's backward pass; shows what is easy and hides what is hard."""

    def __init__(self, grid: tuple[int, int, int], mask_ratio: float, dim: int, use_checkpoint: bool = False):
        super().__init__(grid, mask_ratio)
        self.head = nn.Linear(dim, 1)

    def policy(self, tokens: Tensor) -> tuple[Tensor, None]:
        """tokens [B, N, D] -> log p float32 [B, N], and no critic's value."""
        return self.head(tokens).squeeze(-1).float().log_softmax(dim=1), None

    def loss(self, log_prob, value, episode, moments=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy gradient that lowers p of masked tokens by their error. The second value goes to the log."""
        chosen = log_prob.gather(1, episode.masked)
        return (chosen * episode.reward).mean(), {"easy": chosen.detach().mean()}


class LinearSamplerAlone(LinearSampler):
    """The same with an optimizer of its own (--tats_lr), in phases, and a flag that it reads."""

    own_optimizer = True
    flags = {"scale": "softmax_temp"}  # argument of the constructor: flag

    def __init__(self, grid, mask_ratio, dim, use_checkpoint=False, scale: float = 1.0):
        super().__init__(grid, mask_ratio, dim)
        self.scale = scale

    def policy(self, tokens: Tensor) -> tuple[Tensor, None]:
        log_prob, value = super().policy(tokens.detach())  # no gradient reaches the autoencoder
        return (log_prob / self.scale).log_softmax(dim=1), value


def main(arguments: list[str] | None = None) -> None:
    run_mae_pretraining.SAMPLERS |= {"linear": LinearSampler, "linear_alone": LinearSamplerAlone}
    run_mae_pretraining.main(arguments)


if __name__ == "__main__":
    main()
