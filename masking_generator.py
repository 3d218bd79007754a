"""Which space-time tokens the encoder sees: the Mask, the sampler interface and the samplers without parameters.

Shapes: B clips, t token frames, S = h*w tokens per frame, N = t*S tokens in (time, row, column) order, N_v visible,
N_m masked.
"masked" means hidden from the encoder, everywhere; with a decoder_mask_ratio, hidden and left to the decoder.
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mask(NamedTuple):
    """Index sets of one batch, each in ascending order; together every token of a clip exactly once, unless the decoder
    is spared some."""

    visible: Tensor  # int64 [B, N_v]
    masked: Tensor  # int64 [B, N_m]; those the decoder predicts, fewer than all hidden ones with a decoder_mask_ratio
    log_prob: Tensor | None = None  # float32 [B, N], log p of the categorical over all tokens; learned samplers only
    value: Tensor | None = None  # float32 [B], the critic's estimate; TATS only

    @classmethod
    def from_bool(cls, hidden: Tensor) -> "Mask":
        """VideoMAE's bool_masked_pos [B, N] (True = hidden), the same number of hidden tokens in every row."""
        num_hidden = hidden.flatten(1).sum(dim=1)
        if (num_hidden != num_hidden[0]).any():
            raise ValueError(f"every clip must hide the same number of tokens, got {num_hidden.tolist()}")
        order = hidden.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
        num_visible = order.shape[1] - int(num_hidden[0])
        return cls(order[:, :num_visible], order[:, num_visible:])

    def hidden(self) -> Tensor:
        """bool [B, N], True = hidden from the encoder; not for a mask whose decoder is spared some tokens."""
        num_tokens = self.visible.shape[1] + self.masked.shape[1]
        hidden = torch.ones(self.visible.shape[0], num_tokens, dtype=torch.bool, device=self.visible.device)
        return hidden.scatter(1, self.visible, False)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D], index int64 [B, K] -> [B, K, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def uniform_noise(seed: Tensor, size: int) -> Tensor:
    """float64 [B, size] in (0, 1): row b is a function of the int64 seed[b] alone (splitmix64 of seed and position).

    A stateless hash instead of a generator: a clip gets the same mask on every device, in every split of the global
    batch over processes and accumulation steps, and after a resume.
    """
    z = (seed.unsqueeze(1) * size + torch.arange(size, device=seed.device)) * -0x61C8864680B583EB
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ _shift_right(z, shift)) * multiplier
    z = z ^ _shift_right(z, 31)
    return (_shift_right(z, 12).double() + 0.5) * 2.0**-52


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) shift; torch's >> on int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(seed: Tensor, size: int) -> Tensor:
    """float32 [B, size], standard Gumbel; top-k of log p + Gumbel is k draws without replacement from p."""
    return -torch.log(-torch.log(uniform_noise(seed, size))).float()


def split_by_score(scores: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """scores [B, N] -> indices of the num_visible highest scores and of the rest, each ascending."""
    order = scores.argsort(dim=1, descending=True)
    return order[:, :num_visible].sort(dim=1).values, order[:, num_visible:].sort(dim=1).values


def count_visible(num_tokens: int, mask_ratio: float) -> int:
    """int(num_tokens * (1 - mask_ratio)) as in exact arithmetic (100 tokens at 0.9: 10, where floats say 9.99...).

    Raises ValueError where that leaves no visible or no masked token.
    """
    num_visible = int(num_tokens * (1 - mask_ratio) + 1e-6)
    if not 0 < mask_ratio < 1 or not 0 < num_visible < num_tokens:
        raise ValueError(
            f"--mask_ratio {mask_ratio} leaves {num_visible if 0 < mask_ratio < 1 else 'no'} of {num_tokens} tokens "
            "visible; it must lie between 0 and 1 and leave at least one token visible and one masked"
        )
    return num_visible


class MaskSampler(nn.Module):
    """Draws one Mask a batch. grid = (t, h, w) token frames, rows, columns.

    forward(video float [B, 3, T, H, W], seed int64 [B], tokens [B, N, D] or None) -> Mask. All randomness of a clip's
    mask comes from its seed. Samplers with needs_tokens get the embedded tokens without positions. A sampler defines
    scores, or draw_mask where it has more to say than scores.

    decoder_mask_ratio (attribute): share of the masked tokens that the decoder is spared. decoder_mask_type: which, see
    DECODER_MASKS.
    learned: training changes its weights (LearnedSampler). own_optimizer: an optimizer of its own does so, by
    engine_for_tats; otherwise one backward pass trains autoencoder and sampler. flags: arguments of the constructor, by
    the flag of run_mae_pretraining.py that gives them.
    """

    needs_tokens = False
    learned = False
    own_optimizer = False
    flags: ClassVar[dict[str, str]] = {}
    decoder_mask_ratio = 0.0
    decoder_mask_type = "run_cell"

    def __init__(self, grid: tuple[int, int, int], mask_ratio: float):
        super().__init__()
        self.grid = grid
        self.num_tokens = grid[0] * grid[1] * grid[2]
        self.num_visible = self.visible_at(mask_ratio)

    @classmethod
    def for_encoder(cls, encoder: nn.Module, grid: tuple[int, int, int], mask_ratio: float, **settings):
        """A sampler for the tokens of this encoder; settings: what `flags` names."""
        return cls(grid, mask_ratio, **settings)

    def visible_at(self, mask_ratio: float) -> int:
        """N_v, the same for every clip."""
        return count_visible(self.num_tokens, mask_ratio)

    def forward(self, video: Tensor | None, seed: Tensor | None, tokens: Tensor | None = None) -> Mask:
        return self.spare_decoder(self.draw_mask(video, seed, tokens), seed)

    def spare_decoder(self, mask: Mask, seed: Tensor | None) -> Mask:
        """The mask with fewer tokens for the decoder, where decoder_mask_ratio says so."""
        if self.decoder_mask_ratio and seed is not None:
            kept = DECODER_MASKS[self.decoder_mask_type](mask.masked, seed, self.grid, self.decoder_mask_ratio)
            mask = Mask(mask.visible, kept, mask.log_prob, mask.value)
        return mask

    def draw_mask(self, video: Tensor | None, seed: Tensor | None, tokens: Tensor | None) -> Mask:
        return Mask(*split_by_score(self.scores(video, seed), self.num_visible))

    def scores(self, video: Tensor, seed: Tensor) -> Tensor:
        """float [B, N]; the highest num_visible stay visible."""
        raise TypeError(f"{type(self).__name__} must define scores or draw_mask")


class LearnedSampler(MaskSampler):
    """Draws visible tokens without replacement from a categorical over all tokens that training changes. A subclass
    defines policy and loss. seed=None takes the most probable tokens instead (for pictures).

    Its weights are in checkpoints under the name it has in SAMPLERS of run_mae_pretraining.py.
    position_tables: those of its parameters [1, N, D] that are interpolated for another grid.
    """

    needs_tokens = True
    learned = True
    position_tables: tuple[str, ...] = ()

    @classmethod
    def for_encoder(cls, encoder: nn.Module, grid: tuple[int, int, int], mask_ratio: float, **settings):
        """settings: use_checkpoint, and what `flags` names."""
        return cls(grid, mask_ratio, encoder.embed_dim, **settings)

    def policy(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens [B, N, D] without positions -> log p float32 [B, N] and the critic's value float32 [B], or None."""
        raise NotImplementedError

    def loss(
        self, log_prob: Tensor, value: Tensor | None, episode, moments: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the sampler minimises on a ppo.Episode, given the current policy: 0-d loss, and 0-d values to log.

        moments: see ppo.advantage."""
        raise NotImplementedError

    def draw(self, log_prob: Tensor, value: Tensor | None, seed: Tensor | None) -> Mask:
        return self.spare_decoder(Mask(*draw(log_prob, self.num_visible, seed), log_prob, value), seed)

    def draw_mask(self, video: Tensor | None, seed: Tensor | None, tokens: Tensor) -> Mask:
        log_prob, value = self.policy(tokens)
        return Mask(*draw(log_prob, self.num_visible, seed), log_prob, value)


class Policy(nn.Module):
    """A learned sampler as what its optimizer trains: forward(tokens) -> log_prob, value, without drawing a mask."""

    def __init__(self, sampler: LearnedSampler):
        super().__init__()
        self.sampler = sampler

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.sampler.policy(tokens)


@torch.no_grad()
def draw(log_prob: Tensor, num_visible: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """log_prob float32 [B, N] -> (visible, masked) indices, visible drawn without replacement by Gumbel top-k.

    In float32 on log p it cannot fail where p underflows to 0. seed=None: the most probable tokens.
    """
    noise = 0.0 if seed is None else gumbel_noise(seed, log_prob.shape[1])
    return split_by_score(log_prob.float() + noise, num_visible)


def running_cell(masked: Tensor, seed: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """The masked tokens int64 [B, N_m] left to the decoder, int64 [B, N_m - int(ratio * N_m)] ascending: dual masking
    with a running cell (VideoMAE V2, Wang 2023).

    The four places of every 2 x 2 cell, row by row, take turns from frame to frame, from a random one on: each frame is
    covered evenly and over four frames every place has its turn. VideoMAE V2 lets this pattern decide alone, and
    visible tokens fall out of it. Here the number is fixed, and chance decides among places of equal turn. For its tube
    masks of 4, 8, ... token frames and ratios 1/4, 1/2, 3/4 the two are the same tokens.
    """
    _, rows, columns = grid
    frame, place = masked // (rows * columns), masked % (rows * columns)
    row, column = place // columns % 2, place % columns % 2
    noise = _decoder_noise(masked, seed)
    turn = (-(2 * row + column + frame) - (4 * noise[:, :1]).long()) % 4
    return _lowest(masked, turn + noise[:, 1:], ratio)


def random_places(masked: Tensor, seed: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """As running_cell, with every masked token equally likely."""
    return _lowest(masked, _decoder_noise(masked, seed)[:, 1:], ratio)


def _decoder_noise(masked: Tensor, seed: Tensor) -> Tensor:
    """float64 [B, 1 + N_m] in (0, 1), of another stream than the mask's."""
    return uniform_noise(seed ^ 0x5DEECE66D, 1 + masked.shape[1])


def _lowest(masked: Tensor, score: Tensor, ratio: float) -> Tensor:
    """Of masked int64 [B, N_m] the N_m - int(ratio * N_m) of the lowest score [B, N_m], ascending."""
    num_kept = masked.shape[1] - int(ratio * masked.shape[1])
    return masked.gather(1, score.argsort(dim=1)[:, :num_kept].sort(dim=1).values)


DECODER_MASKS = {"run_cell": running_cell, "random": random_places}


class RandomMask(MaskSampler):
    """Space-time random (ST-MAE, arXiv 2205.09113): every token equally likely."""

    def scores(self, video, seed):
        return uniform_noise(seed, self.num_tokens)


class TubeMask(MaskSampler):
    """The same random positions in every frame (VideoMAE, arXiv 2203.12602): S - int(ratio * S) visible a frame."""

    def visible_at(self, mask_ratio):
        frames, rows, columns = self.grid
        hidden = int(mask_ratio * rows * columns + 1e-6) if 0 < mask_ratio < 1 else 0
        if not hidden:
            raise ValueError(
                f"--mask_ratio {mask_ratio} masks none of the {rows * columns} tubes; "
                "it must lie between 0 and 1 and be large enough for one"
            )
        return frames * (rows * columns - hidden)

    def scores(self, video, seed):
        frames, rows, columns = self.grid
        # Ranks, not noise: equal scores of two positions could split a tube.
        position = uniform_noise(seed, rows * columns).argsort(dim=1).argsort(dim=1).float()
        return position.repeat(1, frames)


class FrameMask(MaskSampler):
    """Whole token frames in random order until N_v tokens are visible; the last of them may be partly visible.

    So the number of visible tokens is that of random masking, also where N_v is less than one frame.
    """

    def scores(self, video, seed):
        frames, rows, columns = self.grid
        noise = uniform_noise(seed, frames + self.num_tokens)
        rank = noise[:, :frames].argsort(dim=1).argsort(dim=1)
        return rank.repeat_interleave(rows * columns, dim=1) + noise[:, frames:]


def motion_energy(video: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Mean squared difference to the previous frame, float32 [B, N]; the first frame takes the second's difference. A
    clip of one frame has no motion: 0."""
    if video.shape[2] == 1:
        return video.new_zeros(len(video), math.prod(grid), dtype=torch.float32)
    difference = (video[:, :, 1:] - video[:, :, :-1]).float().square().mean(dim=1)
    difference = torch.cat((difference[:, :1], difference), dim=1)  # [B, T, H, W]
    kernel = tuple(size // cells for size, cells in zip(difference.shape[1:], grid, strict=True))
    return F.avg_pool3d(difference.unsqueeze(1), kernel).flatten(1)


def motion_lift(energy: Tensor, visible: Tensor) -> Tensor:
    """Mean motion energy of the visible tokens over that of all tokens, 0-d float32; 1.0 = the mask is blind to motion.
    With another energy (texture_energy) the same of that.

    A ratio of batch means, so that clips without motion neither divide by zero nor count.
    """
    return energy.gather(1, visible).mean() / energy.mean().clamp_min(1e-12)


def texture_energy(video: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Variance of a token's pixels, mean over colours, float32 [B, N]; 0 = flat. video float [B, 3, T, H, W]."""
    kernel = tuple(size // cells for size, cells in zip(video.shape[2:], grid, strict=True))
    mean, square = (F.avg_pool3d(x, kernel) for x in (video.float(), video.float().square()))
    return (square - mean.square()).clamp_min(0).mean(dim=1).flatten(1)


class MotionMask(MaskSampler):
    """Training-free baseline: tokens drawn without replacement in proportion to their frame difference.

    A thousandth of the clip's mean energy is added to every token, so that still clips fall back to random masks.
    """

    def scores(self, video, seed):
        energy = motion_energy(video, self.grid)
        floor = 1e-3 * energy.mean(dim=1, keepdim=True) + 1e-12
        return torch.log(energy + floor) + gumbel_noise(seed, self.num_tokens)
