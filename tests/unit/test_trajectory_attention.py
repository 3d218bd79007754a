import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import reference
from tests.helpers.runs import naming
from trajectory_attention import TrajectoryAttention, orthoformer_tokens, orthogonal_landmarks, trajectory_tokens

torch.set_num_threads(1)

DOUBLE = dict(rtol=1e-10, atol=1e-10)
SINGLE = dict(rtol=1e-4, atol=1e-5)


def make_layer(dim, heads, dtype=torch.float64, seed=0, **kwargs):
    """Weights and biases all random and large enough for attention far from uniform."""
    torch.manual_seed(seed)
    layer = TrajectoryAttention(dim, heads, **kwargs).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=1.5 * dim**-0.5 if parameter.dim() == 2 else 1.0)
    return layer


def make_qkv(heads=2, tokens=6, dim=8, seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, 1, heads, tokens, dim, dtype=torch.float64)


def reference_tokens(q, k, v, num_frames, landmarks=None):
    """reference.trajectory_tokens for every head: [1, h, N, d] -> [1, N, t, D]."""
    y = [reference.trajectory_tokens(*head, num_frames, landmarks) for head in zip(q[0], k[0], v[0], strict=True)]
    return torch.cat(y, dim=-1).unsqueeze(0)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_layer_equals_the_equations(heads, num_frames, bias):
    layer = make_layer(12, heads, qkv_bias=bias)
    x = torch.randn(2, 3 * num_frames, 12, dtype=torch.float64)
    expected = reference.trajectory_attention(x, layer.state_dict(), heads, num_frames)
    torch.testing.assert_close(layer(x, num_frames), expected, **DOUBLE)
    torch.testing.assert_close(layer.float()(x.float(), num_frames).double(), expected, **SINGLE)


@pytest.mark.parametrize("bias", [False, True])
def test_without_value_projection_the_trajectory_tokens_are_pooled_as_they_are(bias):
    layer = make_layer(8, 2, qkv_bias=bias, project_value=False)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    expected = reference.trajectory_attention(x, layer.state_dict(), 2, 3, project_value=False)
    torch.testing.assert_close(layer(x, 3), expected, **DOUBLE)
    projected = reference.trajectory_attention(x, layer.state_dict(), 2, 3)
    assert (expected - projected).abs().max() > 0.1


@pytest.mark.parametrize("num_landmarks", [1, 3, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_orthoformer_layer_equals_its_definition(num_landmarks, bias):
    layer = make_layer(12, 2, qkv_bias=bias, approx="orthoformer", num_landmarks=num_landmarks)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    expected = reference.trajectory_attention(x, layer.state_dict(), 2, 3, num_landmarks=num_landmarks)
    torch.testing.assert_close(layer(x, 3), expected, **DOUBLE)
    torch.testing.assert_close(layer.float()(x.float(), 3).double(), expected, **SINGLE)


@pytest.mark.parametrize("approx", ["none", "orthoformer"])
def test_gradients_pass_a_finite_difference_check(approx):
    """Of Orthoformer with the gradient through its landmarks: without, it is not that of the output."""
    layer = make_layer(4, 2, qkv_bias=True, approx=approx, num_landmarks=2, landmark_gradient=True)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)

    def output(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, 2))

    assert torch.autograd.gradcheck(output, (x, *layer.parameters()))


@pytest.mark.parametrize("num_landmarks", [1, 2, 5, 12])
def test_landmarks_are_the_greedy_most_orthogonal_queries(num_landmarks):
    q = torch.randn(2, 3, 12, 5, generator=torch.Generator().manual_seed(0))
    index = orthogonal_landmarks(q, num_landmarks)
    expected = [[reference.greedy_landmarks(head.double(), num_landmarks) for head in clip] for clip in q]
    assert index.tolist() == expected


def test_landmarks_do_not_depend_on_the_lengths_of_the_queries():
    q = torch.randn(1, 2, 12, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.logspace(-2, 2, 12)[:, None]
    assert torch.equal(orthogonal_landmarks(q * scale, 6), orthogonal_landmarks(q, 6))


def test_landmarks_are_the_same_under_autocast():
    q = torch.randn(2, 2, 300, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        index = orthogonal_landmarks(q, 40)
    assert torch.equal(index, orthogonal_landmarks(q, 40))


def test_more_landmarks_than_queries_takes_every_query_once():
    q = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(0))
    assert orthogonal_landmarks(q, 100)[0, 0].sort().values.tolist() == list(range(7))


# With every query a landmark and the queries mutually orthogonal, softmax_R(q L' / sqrt d) has exp(|q|^2 / sqrt d) on
# its diagonal and 1 elsewhere: the identity for long queries, so that A (B v) = B v, eq. 1 itself. The keys shrink as
# the queries grow, so that B stays far from one-hot.
@pytest.mark.parametrize("length, gap", [(1.0, 0.05), (40.0, 0.0)])
def test_orthoformer_is_exact_for_all_landmarks_long_and_orthogonal(length, gap):
    q, k, v = make_qkv(heads=2, tokens=6, dim=8).unbind(0)
    q = torch.linalg.qr(q.transpose(-1, -2)).Q.transpose(-1, -2)  # 6 orthonormal rows of 8 channels a head
    k = 8 * k / length
    exact = trajectory_tokens(length * q, k, v, 2)
    error = (orthoformer_tokens(length * q, k, v, 2, 6) - exact).abs().max()
    uniform = v.unflatten(2, (2, 3)).mean(dim=3)  # [1, h, t, d]
    assert (exact - uniform.permute(0, 2, 1, 3).flatten(2).unsqueeze(1)).abs().max() > 0.3
    assert error < 1e-12 if gap == 0 else error > gap


# Equal queries have equal landmarks: every row of A sums to one over equal rows of B v.
@pytest.mark.parametrize("num_landmarks", [1, 4])
def test_orthoformer_is_exact_for_identical_queries(num_landmarks):
    q, k, v = make_qkv().unbind(0)
    q = q[:, :, :1].expand_as(q)
    expected = reference_tokens(q, k, v, 2)
    torch.testing.assert_close(orthoformer_tokens(q, k, v, 2, num_landmarks), expected, rtol=1e-12, atol=1e-12)


def attention_flops(function, tokens_per_frame, num_frames=4, heads=2, dim=16, **kwargs):
    """Counted on the math back end, whose matrix products every torch version counts; norms and sums are not."""
    q, k, v = torch.randn(3, 1, heads, num_frames * tokens_per_frame, dim).unbind(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(q, k, v, num_frames, **kwargs)
    return counter.get_total_flops()


def test_exact_attention_cost_is_quadratic_in_the_tokens_of_a_frame():
    small, large = (attention_flops(trajectory_tokens, tokens) for tokens in (16, 32))
    # q k' and a v, two operations per multiply-add, h heads of N x N x d: 4 h N^2 d
    assert small == 4 * 2 * (4 * 16) ** 2 * 16
    assert large == 4 * small


def test_orthoformer_cost_is_linear_in_the_tokens_of_a_frame():
    small, large = (attention_flops(orthoformer_tokens, tokens, num_landmarks=8) for tokens in (16, 32))
    assert 0 < small < attention_flops(trajectory_tokens, 16)
    assert large / small == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_have_the_names_and_shapes_of_motionformers_layer(bias):
    layer = TrajectoryAttention(6, 2, qkv_bias=bias)
    weights = {"qkv.weight": (18, 6), "proj_q.weight": (6, 6), "proj_kv.weight": (12, 6), "proj.weight": (6, 6)}
    biases = {"qkv.bias": (18,), "proj_q.bias": (6,), "proj_kv.bias": (12,)} if bias else {}
    expected = {**weights, **biases, "proj.bias": (6,)}
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected


def test_tokens_that_are_no_multiple_of_the_frames_are_refused():
    with pytest.raises(ValueError, match=naming(7, 2)):
        TrajectoryAttention(4, 2)(torch.zeros(1, 7, 4), 2)


@pytest.mark.parametrize("args, parts", [((6, 4), [6, 4]), ((4, 2, False, "nystrom"), ["'nystrom'", "orthoformer"])])
def test_impossible_layers_are_refused(args, parts):
    with pytest.raises(ValueError, match=naming(*parts)):
        TrajectoryAttention(*args)


@pytest.mark.parametrize("approx", ["none", "orthoformer"])
def test_the_trajectory_of_a_token_is_what_the_layer_attends_to(approx):
    """With values that name the token, [S one-hots], the layer's trajectory tokens are the weights themselves."""
    torch.manual_seed(0)
    frames, per_frame, heads, dim = 3, 4, 2, 8
    layer = TrajectoryAttention(dim, heads, True, approx, num_landmarks=5)
    torch.nn.init.normal_(layer.qkv.weight)
    torch.nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, frames * per_frame, dim)
    q, k, _ = layer.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    v = torch.eye(per_frame).repeat(frames, 1).expand(2, heads, -1, -1)
    if approx == "none":
        expected = trajectory_tokens(q, k, v, frames)
    else:
        expected = orthoformer_tokens(q, k, v, frames, 5)
    expected = expected.unflatten(-1, (heads, per_frame)).mean(dim=3)  # [B, N, t, S]
    for token in (0, 7):
        found = layer.trajectory_of(x, frames, token)
        torch.testing.assert_close(found, expected[:, token])
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, frames))
