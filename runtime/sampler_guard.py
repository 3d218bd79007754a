"""Warnings about a learned sampler that fails: PPO does so without an error, and a long run is lost by it."""

LOWEST_ENTROPY = 0.5  # of log N
LOWEST_TEXTURE_LIFT = 0.5
EPOCHS_OF_A_BAD_CRITIC = 10  # in a row


class SamplerGuard:
    """Looks at the means of each epoch and warns of each kind of failure once (docs/SAMPLER.md)."""

    def __init__(self):
        self.warned: set[str] = set()
        self.bad_critic = 0

    def check(self, stats: dict[str, float]) -> list[str]:
        """stats: an epoch's means by name; those of a mask that is not learned hold nothing to warn of."""
        self.bad_critic = self.bad_critic + 1 if stats.get("explained_variance", 0.0) < 0 else 0
        entropy, texture = stats.get("entropy", 1.0), stats.get("texture_lift", 1.0)
        found = {}
        if entropy < LOWEST_ENTROPY:
            found["entropy"] = (
                f"the sampler's entropy has fallen to {entropy:.2f} of log N: it draws ever the same few tokens. Lower "
                "its learning rate, raise --entropy_coef (listwise: --tats_tau), or start it later, when the loss is "
                "clearly below its plateau"
            )
        if self.bad_critic >= EPOCHS_OF_A_BAD_CRITIC:
            found["critic"] = (
                f"the critic has explained less than nothing for {EPOCHS_OF_A_BAD_CRITIC} epochs (explained variance "
                f"{stats['explained_variance']:.2f}): its estimates only add noise to the advantages. Try "
                "--normalize_advantage, or a lower --tats_lr"
            )
        if texture < LOWEST_TEXTURE_LIFT:
            found["texture"] = (
                f"the sampler draws flat patches (texture {texture:.2f} of the mean): their normalised targets are "
                "noise no model predicts. Start it later, raise --entropy_coef (listwise: --tats_tau), or use "
                "--no-normalize_target"
            )
        new = [text for name, text in found.items() if name not in self.warned]
        self.warned |= found.keys()
        return [f"{text} (docs/SAMPLER.md)" for text in new]
