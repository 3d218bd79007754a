"""The engines against Algorithm 1 written out naively: plain optimizers, everything recomputed, nothing shared."""

import copy
import dataclasses
import math

import pytest
import torch

import engine_for_pretraining
import engine_for_tats
from engine_for_pretraining import PretrainRecipe
from engine_for_tats import Phases
from masking_generator import Policy, RandomMask
from modeling_adamae import AdaMAESampler
from modeling_pretrain import JointModel, pretrain_videomae_tiny_patch8_64
from modeling_tats import TATS
from runtime import epoch as epoch_runner
from runtime.backend import Backend
from tests.helpers.reference import patch_targets
from tests.helpers.runs import naming

torch.set_num_threads(1)
# SGD: its step is linear in the gradient, where Adam's sign-like first steps blow rounding up
LR, TATS_LR, STEPS = 0.05, 20.0, 6


class Batches:
    """A loader of six different batches of two clips."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            {
                "video": torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8, generator=generator),
                "seed": torch.tensor([2 * i, 2 * i + 1]),
                "failed": [],
            }
            for i in range(STEPS)
        ]

    def __iter__(self):
        return iter(self.batches)


def models(sampler_class, **more):
    torch.manual_seed(0)
    mae = pretrain_videomae_tiny_patch8_64(img_size=16, all_frames=4, decoder_depth=1)
    settings = dict(num_heads=4, attention="trajectory") if sampler_class is TATS else dict(coef=1.0)
    sampler = sampler_class(mae.grid, 0.5, 96, **settings, **more)
    if sampler_class is TATS:
        torch.nn.init.normal_(sampler.actor.weight)  # away from uniform, so that a wrong policy shows
    for module in sampler.modules():  # AdaMAE's dropout would need the same random stream in both loops
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return mae, sampler


def recipe_for(mae, accum_iter=1):
    half = torch.full((3,), 0.5)
    return PretrainRecipe(grid=mae.grid, mean=half, std=half, lr=LR, min_lr=LR, steps_per_epoch=STEPS // accum_iter)


def joint_training(mae, tats, batches, recipe, phases, epoch=0, **backends):
    """engine_for_tats with a plain optimizer each; stats."""
    mae_backend = backends.pop("mae_backend", None) or backend(mae, LR, **backends)
    agent = backend(Policy(tats), TATS_LR, **backends)
    return engine_for_tats.train_one_epoch(mae_backend, agent, tats, batches, recipe, phases, epoch)


def backend(module, lr, accum_iter=1, optimizer=torch.optim.SGD, **kwargs):
    return Backend(module, optimizer(module.parameters(), lr=lr, **kwargs), torch.device("cpu"), accum_iter=accum_iter)


def reconstruct(mae, batch, mask):
    """(mean loss, error [B, N_m]) with targets by loops."""
    pixels = batch["video"].transpose(1, 2).float() / 255
    prediction = mae((pixels - 0.5) / 0.5, mask)
    target = torch.from_numpy(patch_targets(pixels, mask.masked, 2, (8, 8), True)).float()
    error = ((prediction - target) ** 2).mean(-1)
    return error.mean(), error


def embed(mae, batch):
    return mae.encoder.patch_embed((batch["video"].transpose(1, 2).float() / 255 - 0.5) / 0.5)


def naive_tats(mae, tats, batches, settings: Phases, accum_iter: int):
    """Phase 1 and 2 of Algorithm 1; theta is asked anew in phase 2 also where the policy has not moved."""
    phi = torch.optim.SGD(mae.parameters(), lr=LR)
    theta = torch.optim.SGD(tats.parameters(), lr=TATS_LR)
    losses = []
    rollout = settings.rollout_steps * accum_iter
    for start in range(0, len(batches), rollout):
        episodes = []
        for index, batch in enumerate(batches[start : start + rollout]):
            tokens = embed(mae, batch).detach()
            with torch.no_grad():
                mask = tats(None, batch["seed"], tokens)
            loss, error = reconstruct(mae, batch, mask)
            (loss / accum_iter).backward()
            if (index + 1) % accum_iter == 0:
                phi.step()
                phi.zero_grad()
            losses.append(loss.item())
            episodes.append((tokens, mask.masked, mask.log_prob.gather(1, mask.masked), error.detach(), mask.value))
        moments = {}  # of the advantages of each optimizer step of theta, in plain numbers
        for first in range(0, len(episodes), accum_iter) if settings.normalize_advantage else ():
            step = episodes[first : first + accum_iter]
            flat = [r - v for *_, reward, value in step for row, v in zip(reward.tolist(), value.tolist(), strict=True)
                    for r in row]  # fmt: skip
            mean = math.fsum(flat) / len(flat)
            moments[first] = mean, math.sqrt(math.fsum((a - mean) ** 2 for a in flat) / (len(flat) - 1))
        for _ in range(settings.epochs):
            for index, (tokens, masked, old, reward, old_value) in enumerate(episodes):
                new = tats(None, None, tokens)
                p = new.log_prob.exp()
                if tats.objective == "listwise":
                    target = (reward / tats.tau).exp() / (reward / tats.tau).exp().sum(1, keepdim=True)
                    chosen = p.gather(1, masked) / p.gather(1, masked).sum(1, keepdim=True)
                    loss = -(target * chosen.log()).sum(1).mean()
                else:
                    advantage = reward - old_value[:, None]
                    if settings.normalize_advantage:
                        mean, deviation = moments[index - index % accum_iter]
                        advantage = (advantage - mean) / deviation
                    ratio = (new.log_prob.gather(1, masked) - old).exp()
                    clipped = ratio.clamp(0.8, 1.2)
                    objective = torch.min(ratio * advantage, clipped * advantage).mean()
                    value_loss = ((new.value - reward.mean(1)) ** 2).mean()
                    bonus = -(p * new.log_prob).sum(1).mean()
                    if tats.ppo["entropy_form"] == "uniform_kl":
                        bonus = (p * p.shape[1]).log().mean()
                    loss = -(1e-4 * objective - 1e-4 * value_loss + 1e-4 * bonus)
                (loss / accum_iter).backward()
                if (index + 1) % accum_iter == 0:
                    theta.step()
                    theta.zero_grad()
    return sum(losses) / len(losses)


def assert_same_weights(one, other):
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "rollout,passes,accum_iter", [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 3, 1), (3, 2, 1), (1, 2, 2), (3, 1, 2)]
)
def test_tats_engine_is_algorithm_1(rollout, passes, accum_iter, normalize):
    """(1, 1) is the one-pass form: same weights as with the policy asked again in phase 2. Advantages are normalised
    over an optimizer step of TATS, which is accum_iter micro-batches, however many are recorded."""
    mae, tats = models(TATS)
    mae2, tats2 = copy.deepcopy(mae), copy.deepcopy(tats)
    settings = Phases(rollout_steps=rollout, epochs=passes, normalize_advantage=normalize)
    stats = joint_training(mae, tats, Batches(), recipe_for(mae, accum_iter), settings, accum_iter=accum_iter)
    start = copy.deepcopy(tats2.actor.weight)
    loss = naive_tats(mae2, tats2, Batches().batches, settings, accum_iter)
    assert stats["loss"] == pytest.approx(loss, rel=1e-4)
    assert stats["reward"] == pytest.approx(loss, rel=1e-4)
    assert not torch.allclose(start, tats2.actor.weight, atol=1e-3)
    assert_same_weights(mae, mae2)
    assert_same_weights(tats, tats2)


@pytest.mark.parametrize("more", [{"objective": "listwise", "tau": 0.3}, {"entropy_form": "uniform_kl"}])
@pytest.mark.parametrize("rollout,passes,accum_iter", [(1, 1, 1), (1, 1, 2), (3, 2, 1), (3, 1, 2)])
def test_other_objectives_go_through_the_same_phases(rollout, passes, accum_iter, more, monkeypatch):
    monkeypatch.setattr(f"{__name__}.TATS_LR", 0.005 if "objective" in more else TATS_LR)  # no coefficient of 1e-4
    mae, tats = models(TATS, **more)
    mae2, tats2 = copy.deepcopy(mae), copy.deepcopy(tats)
    settings = Phases(rollout_steps=rollout, epochs=passes)
    stats = joint_training(mae, tats, Batches(), recipe_for(mae, accum_iter), settings, accum_iter=accum_iter)
    start = copy.deepcopy(tats2.actor.weight)
    loss = naive_tats(mae2, tats2, Batches().batches, settings, accum_iter)
    assert stats["loss"] == pytest.approx(loss, rel=1e-4)
    assert ("value" in stats) == ("objective" not in more)
    assert not torch.allclose(start, tats2.actor.weight, atol=1e-3)
    assert_same_weights(mae, mae2)
    assert_same_weights(tats, tats2)


@pytest.mark.parametrize("settings", [Phases(epochs=2), Phases(rollout_steps=2)])
def test_several_passes_in_full_precision_beside_an_autoencoder_in_bf16(settings):
    mae, tats = models(TATS)
    before = copy.deepcopy(tats.state_dict())
    optimizer = torch.optim.SGD(mae.parameters(), lr=LR)
    half = Backend(mae, optimizer, torch.device("cpu"), amp="bf16")
    stats = joint_training(mae, tats, Batches(), recipe_for(mae), settings, mae_backend=half)
    assert math.isfinite(stats["loss"]) and stats["approx_kl"] >= 0
    assert any(not torch.equal(value, before[name]) for name, value in tats.state_dict().items())


def test_an_incomplete_rollout_is_used_at_the_end_of_the_epoch():
    mae, tats = models(TATS)
    mae2, tats2 = copy.deepcopy(mae), copy.deepcopy(tats)
    settings = Phases(rollout_steps=4)  # six steps: four, then two
    joint_training(mae, tats, Batches(), recipe_for(mae), settings)
    naive_tats(mae2, tats2, Batches().batches, settings, 1)
    assert_same_weights(tats, tats2)


def test_adamae_engine_is_one_joint_loss():
    mae, sampler = models(AdaMAESampler)
    joint = JointModel(mae, sampler)
    reference = copy.deepcopy(joint)
    stats = engine_for_pretraining.train_one_epoch(backend(joint, LR), sampler, Batches(), recipe_for(mae), epoch=0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=LR)
    total = 0.0
    for batch in Batches():
        mask = reference.sampler(None, batch["seed"], embed(reference.mae, batch))
        loss, error = reconstruct(reference.mae, batch, mask)
        for b in range(2):  # the published loop over samples
            probabilities = mask.log_prob[b].exp()
            log_prob = torch.distributions.Categorical(probs=probabilities).log_prob(mask.masked[b])
            loss = loss - (log_prob * error[b].detach()).mean() / 2
        total += error.mean().item() / STEPS
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stats["loss"] == pytest.approx(total, rel=1e-4)
    assert stats["reward"] == pytest.approx(total, rel=1e-4)  # the mean error of the masked tokens
    assert_same_weights(joint, reference)


def test_fixed_masks_engine_is_plain_training():
    mae, _ = models(TATS)
    reference = copy.deepcopy(mae)
    sampler = RandomMask(mae.grid, 0.5)
    engine_for_pretraining.train_one_epoch(backend(mae, LR), sampler, Batches(), recipe_for(mae), epoch=0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=LR)
    for batch in Batches():
        loss, _ = reconstruct(reference, batch, sampler(batch["video"], batch["seed"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(mae, reference)


def test_training_that_stops_moving_is_said(monkeypatch):
    mae, _ = models(TATS)
    monkeypatch.setattr(epoch_runner, "MAX_SKIPPED_IN_A_ROW", 3)
    with torch.no_grad():
        mae.mask_token.fill_(float("nan"))
    with pytest.raises(epoch_runner.UsageError, match=naming("finite", "--lr", "--clip_grad", "--amp")):
        engine_for_pretraining.train_one_epoch(
            backend(mae, LR), RandomMask(mae.grid, 0.5), Batches(), recipe_for(mae), epoch=0
        )


@pytest.mark.parametrize(
    "settings,accum_iter",
    [(Phases(), 1), (Phases(normalize_advantage=True), 1), (Phases(normalize_advantage=True), 2)],
)
def test_no_step_waits_for_the_device(settings, accum_iter, monkeypatch):
    """Reading a tensor's value would: inside the steps of an epoch no .item(), .tolist(), bool() or float() happens."""
    mae, tats = models(TATS)
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, name=name, original=original):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)
    recipe = dataclasses.replace(recipe_for(mae, accum_iter), print_freq=1000)
    counts = []

    class Counting(Batches):
        def __iter__(self):
            for batch in self.batches:
                counts.append(len(reads))
                yield batch

    fused = dict(optimizer=torch.optim.AdamW, fused=True)
    joint_training(mae, tats, Counting(), recipe, settings, accum_iter=accum_iter, **fused)
    assert counts[-1] == counts[accum_iter], reads  # the first step may set things up, the last prints


def test_sampler_steps_that_are_not_finite_are_counted_and_stop_training(monkeypatch):
    mae, tats = models(TATS)
    with torch.no_grad():
        tats.critic[-1].bias.fill_(float("nan"))
    backends = backend(mae, LR), backend(Policy(tats), TATS_LR), tats
    stats = engine_for_tats.train_one_epoch(*backends, Batches(), recipe_for(mae), Phases(), epoch=0)
    assert (stats["skipped_steps"], stats["sampler_skipped_steps"]) == (0, STEPS)
    monkeypatch.setattr(epoch_runner, "MAX_SKIPPED_IN_A_ROW", STEPS)
    with pytest.raises(epoch_runner.UsageError, match=naming("finite", "--lr", "--clip_grad", "--amp")):
        engine_for_tats.train_one_epoch(*backends, Batches(), recipe_for(mae), Phases(), epoch=0)
