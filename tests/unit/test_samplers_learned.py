import math

import pytest
import torch
from torch import nn

import ppo
from masking_generator import Mask
from modeling_adamae import AdaMAESampler
from modeling_pretrain import JointModel, PretrainVisionTransformer, reconstruction_target, token_error
from modeling_tats import ATTENTIONS, TATS
from tests.helpers import reference
from tests.helpers.models import randomize
from tests.helpers.runs import naming

torch.set_num_threads(1)

GRID, NUM_TOKENS, DIM, RATIO = (3, 2, 2), 12, 16, 0.75
all_attentions = pytest.mark.parametrize("attention", ATTENTIONS)


def make_tats(attention="trajectory", **kwargs):
    return TATS(GRID, RATIO, DIM, **{"num_heads": 2, "attention": attention, "num_landmarks": 4, **kwargs})


def make_tokens(batch=2):
    return torch.randn(batch, NUM_TOKENS, DIM, generator=torch.Generator().manual_seed(5))


def make_mae():
    torch.manual_seed(0)
    return PretrainVisionTransformer(
        img_size=8, patch_size=4, all_frames=6, encoder_embed_dim=DIM, encoder_depth=1, encoder_num_heads=2,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, qkv_bias=True,
    )  # fmt: skip


def has_gradient(parameters):
    return [parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) for parameter in parameters]


def layer_norm(x, state, name, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    x = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(x, state, name):
    hidden = reference.linear(x, state, f"{name}.fc1")
    return reference.linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), state, f"{name}.fc2")


def self_attention(x, state, name, num_heads):
    """Plain attention is eq. 1 with one frame; queries and values have a bias where the state has one."""
    dim = x.shape[-1] // num_heads
    q, k, v = reference.linear(x, state, f"{name}.qkv").split(x.shape[-1], dim=-1)
    q, v = q + state.get(f"{name}.q_bias", 0), v + state.get(f"{name}.v_bias", 0)
    heads = [slice(i * dim, (i + 1) * dim) for i in range(num_heads)]
    clips = [
        torch.cat([reference.trajectory_tokens(*(y[b][:, head] for y in (q, k, v)), 1)[:, 0] for head in heads], dim=-1)
        for b in range(len(x))
    ]
    return reference.linear(torch.stack(clips), state, f"{name}.proj")


def position_table():
    table = torch.zeros(NUM_TOKENS, DIM, dtype=torch.float64)
    for position in range(NUM_TOKENS):
        for channel in range(DIM):
            angle = position / 10000 ** (channel // 2 * 2 / DIM)
            table[position, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    return table


@all_attentions
@pytest.mark.parametrize("num_blocks, temperature", [(1, 1.0), (2, 0.5)])
def test_tats_equals_its_definition(attention, num_blocks, temperature):
    tats = randomize(make_tats(attention, num_blocks=num_blocks, temperature=temperature))
    tokens = make_tokens()
    state = {name: value.double() for name, value in tats.state_dict().items()}
    x = tokens.double() + position_table()
    pooled = x.mean(dim=1)
    for i in range(num_blocks):
        y = layer_norm(x, state, f"blocks.{i}.norm1", 1e-6)
        if attention == "mha":
            x = x + self_attention(y, state, f"blocks.{i}.attn", 2)
        else:
            own = {k.removeprefix(f"blocks.{i}.attn."): v for k, v in state.items()}
            landmarks = 4 if attention == "orthoformer" else None
            x = x + reference.trajectory_attention(y, own, 2, GRID[0], num_landmarks=landmarks)
        x = x + mlp(layer_norm(x, state, f"blocks.{i}.norm2", 1e-6), state, f"blocks.{i}.mlp")
    logits = reference.linear(x, state, "actor").squeeze(-1)
    p = torch.stack([reference.softmax(row / temperature) for row in logits])
    value = reference.linear(reference.linear(pooled, state, "critic.0").clamp_min(0), state, "critic.2").squeeze(-1)

    mask = tats(None, torch.arange(2), tokens)
    assert p.max() > 0.15  # far from 1/12
    torch.testing.assert_close(mask.log_prob.double(), p.log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask.value.double(), value, rtol=1e-4, atol=1e-5)


@all_attentions
def test_tats_starts_exactly_uniform(attention):
    mask = make_tats(attention)(None, torch.arange(2), make_tokens())
    assert (mask.log_prob == mask.log_prob[0, 0]).all()
    assert mask.log_prob[0, 0].item() == pytest.approx(-math.log(NUM_TOKENS), rel=1e-6)
    assert ppo.entropy(mask.log_prob).item() == pytest.approx(math.log(NUM_TOKENS), rel=1e-6)


def test_the_critic_starts_at_zero():
    """A random last layer would differ from clip to clip by more than the rewards do (docs/LOG.md)."""
    mask = make_tats()(None, None, make_tokens())
    assert torch.equal(mask.value, torch.zeros(len(mask.value)))


def test_the_actor_can_leave_the_uniform_start():
    tats = make_tats()
    tats(None, torch.arange(2), make_tokens()).log_prob[:, 0].sum().backward()
    assert tats.actor.weight.grad.abs().max() > 1e-3


def test_tats_has_mlps_four_times_and_a_critic_once_as_wide_as_the_tokens():
    shapes = {name: tuple(value.shape) for name, value in make_tats().state_dict().items()}
    assert shapes["blocks.0.mlp.fc1.weight"] == (4 * DIM, DIM) and shapes["critic.0.weight"] == (DIM, DIM)


def test_the_three_attentions_differ():
    kinds = [randomize(make_tats(attention, num_landmarks=3)) for attention in ATTENTIONS]
    assert kinds[0].state_dict().keys() == kinds[1].state_dict().keys() != kinds[2].state_dict().keys()
    orthoformer, trajectory, mha = (tats(None, torch.arange(2), make_tokens()).log_prob for tats in kinds)
    assert (orthoformer - trajectory).abs().max() > 0.01 and (mha - trajectory).abs().max() > 0.01


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match=naming("'nystrom'", "orthoformer", "trajectory", "mha")):
        make_tats("nystrom")


@all_attentions
def test_evaluating_tats_twice_is_bit_identical_also_in_training_mode(attention):
    tats, tokens = randomize(make_tats(attention)).train(), make_tokens()
    first, second = (tats(None, torch.arange(2), tokens) for _ in range(2))
    assert torch.equal(first.log_prob, second.log_prob) and torch.equal(first.value, second.value)
    assert torch.equal(first.visible, second.visible)


@all_attentions
def test_no_gradient_of_tats_reaches_the_tokens(attention):
    tats, tokens = randomize(make_tats(attention)), make_tokens().requires_grad_()
    mask = tats(None, torch.arange(2), tokens)
    (mask.log_prob[:, 0].sum() + mask.value.sum()).backward()
    assert tokens.grad is None
    same_for_all_tokens = ("actor.bias", "mlp.fc2.bias")  # tests/unit/test_method_protocol.py
    assert all(has_gradient(p for name, p in tats.named_parameters() if not name.endswith(same_for_all_tokens)))


def test_actor_and_critic_do_not_train_each_other():
    tats = randomize(make_tats())
    for output, silent in (("log_prob", tats.critic), ("value", tats.blocks)):
        tats.zero_grad()
        getattr(tats(None, torch.arange(2), make_tokens()), output)[:1].square().sum().backward()
        assert not any(has_gradient(silent.parameters()))


def samplers():
    return [("tats", randomize(make_tats())), ("adamae", randomize(AdaMAESampler(GRID, RATIO, DIM)).eval())]


@pytest.mark.parametrize("name, sampler", samplers())
def test_masks_are_drawn_from_the_policy_by_seed(name, sampler):
    tokens = make_tokens(1).expand(3000, -1, -1)
    mask = sampler(None, torch.arange(3000), tokens)
    everything = torch.cat((mask.visible, mask.masked), dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(NUM_TOKENS).expand(3000, -1)) and mask.visible.shape[1] == 3
    # First-order inclusion of 3 draws without replacement, four standard errors.
    p = mask.log_prob[0].double().exp()
    expected = torch.tensor(reference.inclusion_probabilities((p / p.sum()).tolist(), 3), dtype=torch.float64)
    observed = torch.bincount(mask.visible.flatten(), minlength=NUM_TOKENS) / 3000
    assert (observed - expected).abs().max() < 4 * math.sqrt(0.25 / 3000)
    assert (expected - 0.25).abs().max() > 0.2  # a policy unlike random masking
    again = sampler(None, torch.tensor([7, 3]), tokens[:2]).visible
    assert torch.equal(again, mask.visible[[7, 3]])


@pytest.mark.parametrize("name, sampler", samplers())
def test_without_a_seed_the_most_probable_tokens_are_visible(name, sampler):
    mask = sampler(None, None, make_tokens())
    for log_prob, visible in zip(mask.log_prob.tolist(), mask.visible.tolist(), strict=True):
        assert visible == sorted(sorted(range(NUM_TOKENS), key=lambda i, log_prob=log_prob: -log_prob[i])[:3])


@pytest.mark.parametrize("name, sampler", samplers())
def test_policy_is_float32_under_mixed_precision(name, sampler):
    with torch.autocast("cpu", torch.bfloat16):
        mask = sampler(None, torch.arange(2), make_tokens())
    assert mask.log_prob.dtype == torch.float32
    torch.testing.assert_close(mask.log_prob.double().exp().sum(dim=1), torch.ones(2, dtype=torch.float64))
    exact = sampler(None, torch.arange(2), make_tokens()).log_prob
    assert 0 < (mask.log_prob - exact).abs().max() < 0.2
    if name == "tats":
        assert mask.value.dtype == torch.float32


def test_temperature_divides_the_logits():
    cold, warm = (randomize(make_tats(temperature=tau))(None, torch.arange(2), make_tokens()) for tau in (0.5, 1.0))
    torch.testing.assert_close(cold.log_prob, (2 * warm.log_prob).log_softmax(dim=-1), rtol=1e-4, atol=1e-5)
    assert ppo.entropy(cold.log_prob) < ppo.entropy(warm.log_prob) - 0.1


def test_logit_cap_bounds_centred_logits():
    free, capped = (randomize(make_tats(logit_cap=cap))(None, torch.arange(2), make_tokens()) for cap in (0.0, 0.5))
    z = free.log_prob.double()
    z = z - z.mean(dim=1, keepdim=True)  # softmax tells logits but for a constant, which centring removes
    expected = (0.5 * torch.tanh(z / 0.5)).log_softmax(dim=-1)
    torch.testing.assert_close(capped.log_prob.double(), expected, rtol=1e-4, atol=1e-5)
    spread = capped.log_prob.amax(dim=1) - capped.log_prob.amin(dim=1)
    assert z.abs().max() > 1 and (spread < 1 + 1e-5).all()


def test_adamae_sampler_equals_its_definition():
    sampler, tokens = randomize(AdaMAESampler(GRID, RATIO, DIM)).eval(), make_tokens()
    state = {name: value.double() for name, value in sampler.state_dict().items()}
    x = tokens.double() + state["pos_embed_probs"]
    x = x + self_attention(layer_norm(x, state, "get_token_probs.0.norm1", 1e-5), state, "get_token_probs.0.attn", 8)
    x = x + mlp(layer_norm(x, state, "get_token_probs.0.norm2", 1e-5), state, "get_token_probs.0.mlp")
    logits = reference.linear(x, state, "get_token_probs.1").squeeze(-1)
    expected = torch.stack([reference.softmax(row) for row in logits]).log()
    mask = sampler(None, torch.arange(2), tokens)
    torch.testing.assert_close(mask.log_prob.double(), expected, rtol=1e-4, atol=1e-4)
    assert mask.value is None


def test_adamae_sampler_has_adamaes_names_start_and_dropout():
    sampler = AdaMAESampler(GRID, RATIO, DIM)
    names = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "norm2.weight",
             "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]  # fmt: skip
    names = [f"get_token_probs.0.{name}" for name in names]
    expected = ["pos_embed_probs", *names, "get_token_probs.1.weight", "get_token_probs.1.bias"]
    assert sorted(sampler.state_dict()) == sorted(expected)
    assert sampler.pos_embed_probs.shape == (1, NUM_TOKENS, DIM) and not sampler.pos_embed_probs.any()
    dropouts = {name: module.p for name, module in sampler.named_modules() if isinstance(module, nn.Dropout)}
    active = {name.removeprefix("get_token_probs.0."): p for name, p in dropouts.items() if p > 0}
    assert active == {"attn.proj_drop": 0.1, "mlp.drop2": 0.1} and sampler.get_token_probs[0].attn.attn_drop == 0
    assert sampler.get_token_probs[0].mlp.fc1.weight.shape == (4 * DIM, DIM)


def test_adamae_sampling_loss_equals_a_naive_loop():
    torch.manual_seed(0)
    log_prob = torch.randn(3, 6).log_softmax(dim=-1).requires_grad_()
    masked = torch.tensor([[0, 2, 3], [1, 2, 5], [0, 4, 5]])
    error = torch.rand(3, 3, requires_grad=True)
    terms = [log_prob[b, i].item() * error[b, n].item() for b in range(3) for n, i in enumerate(masked[b].tolist())]
    episode = ppo.record(None, Mask(torch.empty(3, 3), masked, log_prob), error)
    loss, _ = AdaMAESampler(GRID, RATIO, DIM).loss(log_prob, None, episode)
    assert loss.item() == pytest.approx(-1e-4 * sum(terms) / 9, rel=1e-5)
    loss.backward()
    assert error.grad is None
    expected = torch.zeros(3, 6).scatter(1, masked, -1e-4 * error.detach() / 9)
    torch.testing.assert_close(log_prob.grad, expected)


def forward_adamae():
    torch.manual_seed(0)
    model = JointModel(make_mae(), AdaMAESampler(GRID, RATIO, DIM))
    pixels = torch.rand(2, 3, 6, 8, 8)
    prediction, mask = model(pixels, torch.arange(2))
    error = token_error(prediction, reconstruction_target(pixels, mask, GRID, True), "mse")
    return model, pixels, prediction, mask, error


def test_adamae_predicts_what_its_mae_predicts_for_its_mask():
    model, pixels, prediction, mask, _ = forward_adamae()
    torch.testing.assert_close(model.mae(pixels, mask), prediction)
    assert model.no_weight_decay() >= {"mae.pos_embed", "mae.mask_token"}


def test_adamaes_sampling_loss_trains_sampler_and_tokenizer_alone():
    model, _, _, mask, error = forward_adamae()
    model.sampler.loss(mask.log_prob, None, ppo.record(None, mask, error))[0].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name in trained if name.startswith("mae.")} == {
        "mae.encoder.patch_embed.proj.weight",
        "mae.encoder.patch_embed.proj.bias",
    }
    assert {name for name, _ in model.named_parameters() if name.startswith("sampler.")} - trained <= {
        "sampler.get_token_probs.1.bias"  # adds the same to every logit
    }


def test_adamaes_reconstruction_loss_does_not_train_the_sampler():
    model, _, _, _, error = forward_adamae()
    error.mean().backward()
    assert all(p.grad is None for p in model.sampler.parameters())
    assert all(has_gradient([model.mae.encoder.patch_embed.proj.weight, model.mae.mask_token]))


@all_attentions
def test_neither_loss_of_the_joint_step_trains_the_other_network(attention):
    mae, tats = make_mae(), randomize(make_tats(attention))
    video = torch.rand(2, 3, 6, 8, 8)
    tokens = mae.encoder.patch_embed(video)  # with its graph: TATS has to cut it itself
    mask = tats(video, torch.arange(2), tokens)
    prediction = mae(video, mask)
    error = token_error(prediction, reconstruction_target(video, mask, GRID, True), "mse")
    error.mean().backward()
    assert all(parameter.grad is None for parameter in tats.parameters())
    assert all(has_gradient([mae.encoder.patch_embed.proj.weight, mae.decoder.head.weight]))

    mae.zero_grad(set_to_none=True)
    old = mask.log_prob.detach().gather(1, mask.masked)
    episode = ppo.Episode(tokens.detach(), mask.masked, old, error.detach(), mask.value.detach())
    loss, _ = ppo.sampling_loss(mask.log_prob, mask.value, episode)
    loss.backward()
    assert all(parameter.grad is None for parameter in mae.parameters())
    assert all(has_gradient([tats.actor.weight, tats.critic[0].weight, tats.blocks[0].mlp.fc1.weight]))


def test_one_forward_pass_serves_both_phases():
    """With k = 1 and one PPO epoch the recorded policy is the current one: phase 2's gradient is phase 1's graph."""
    tats, tokens = randomize(make_tats("orthoformer")), make_tokens()
    mask = tats(None, torch.arange(2), tokens)
    reward = torch.rand(2, 9)
    episode = ppo.Episode(
        tokens, mask.masked, mask.log_prob.detach().gather(1, mask.masked), reward, mask.value.detach()
    )
    gradients = []
    for policy in (mask, tats(None, None, tokens)):
        tats.zero_grad()
        loss, diagnostics = ppo.sampling_loss(policy.log_prob, policy.value, episode)
        loss.backward()
        assert diagnostics["approx_kl"] == 0 and diagnostics["clip_fraction"] == 0
        gradients.append([parameter.grad.clone() for parameter in tats.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_ppo_step_moves_the_policy_towards_the_tokens_with_large_errors():
    torch.manual_seed(0)
    tats, tokens = make_tats(), make_tokens(8)
    optimizer = torch.optim.Adam(tats.parameters(), lr=3e-3)
    hard = torch.zeros(NUM_TOKENS)
    hard[4:8] = 1.0  # the middle frame is hard to reconstruct
    for step in range(30):
        mask = tats(None, torch.arange(8) + 8 * step, tokens)
        old = mask.log_prob.detach().gather(1, mask.masked)
        episode = ppo.Episode(tokens, mask.masked, old, hard[mask.masked], mask.value.detach())
        loss, _ = ppo.sampling_loss(mask.log_prob, mask.value, episode)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p = mask.log_prob.exp().mean(dim=0)
    assert p[4:8].min() > p[[0, 1, 2, 3, 8, 9, 10, 11]].max() and p[4:8].sum() > 1.2 * 4 / NUM_TOKENS
