import functools
import inspect
import math

import pytest
import timm
import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from masking_generator import Mask, gather_tokens
from modeling_finetune import Attention, PatchEmbed, VisionTransformer, get_sinusoid_encoding_table
from modeling_pretrain import (
    PretrainVisionTransformer,
    normalize_patches,
    patchify,
    reconstruction_target,
    token_error,
    unpatchify,
)
from runtime.convert import load_weights, model_weights
from tests.helpers import reference
from tests.helpers.models import FRAMES, GRID, NORM, PATCH, SIZE, make_input, make_mae, randomize
from tests.helpers.runs import naming

torch.set_num_threads(1)


def make_classifier(**kwargs):
    torch.manual_seed(0)
    settings = dict(
        img_size=SIZE, patch_size=PATCH, all_frames=FRAMES, embed_dim=24, depth=2, num_heads=2, num_classes=5,
        qkv_bias=True, norm_layer=NORM, init_scale=1.0,
    )  # fmt: skip
    return VisionTransformer(**{**settings, **kwargs})


def make_huggingface(model_class, **kwargs):
    config = VideoMAEConfig(
        image_size=SIZE, patch_size=PATCH, num_frames=FRAMES, tubelet_size=2, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=96, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4, decoder_intermediate_size=64, layer_norm_eps=1e-6, **kwargs,
    )  # fmt: skip
    model = randomize(model_class(config)).eval()
    for module in model.modules():  # the last norm of decoder and classifier ignores layer_norm_eps; VideoMAE's is 1e-6
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return model


def bias_the_keys(model):
    for name, module in list(model.named_modules()):
        if name.endswith("attention.attention"):
            weight = module.key.weight
            module.key = nn.Linear(*weight.shape)
            module.key.weight = weight
            nn.init.normal_(module.key.bias, std=3.0)


def with_old_names(weights):
    """As the files on the hub have them."""
    old = {"attention.query.bias": "attention.q_bias", "attention.value.bias": "attention.v_bias"}
    return {functools.reduce(lambda n, pair: n.replace(*pair), old.items(), name): w for name, w in weights.items()}


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_equals_transformers_videomae(normalize):
    theirs = make_huggingface(VideoMAEForPreTraining, use_mean_pooling=False, norm_pix_loss=normalize)
    ours = make_mae()
    load_weights(ours, model_weights(theirs.state_dict(), "hf"), "hf")
    pixels, video, mask = make_input()
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2), bool_masked_pos=mask.hidden())
        prediction = ours(video, mask)
    assert prediction.std() > 0.1
    torch.testing.assert_close(prediction, expected.logits, rtol=1e-5, atol=1e-5)
    loss = token_error(prediction, reconstruction_target(pixels, mask, GRID, normalize), "mse").mean()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_huggingface_key_biases_are_dropped_because_they_change_nothing():
    theirs = make_huggingface(VideoMAEForPreTraining, use_mean_pooling=False)
    bias_the_keys(theirs)
    weights = theirs.state_dict()
    assert sum(name.endswith("key.bias") for name in weights) == 4
    ours = make_mae()
    load_weights(ours, model_weights(weights, "hf"), "hf")
    _, video, mask = make_input()
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2), bool_masked_pos=mask.hidden()).logits
        torch.testing.assert_close(ours(video, mask), expected, rtol=1e-4, atol=1e-4)


def test_huggingface_names_of_the_published_files_load_too():
    weights = make_huggingface(VideoMAEForPreTraining, use_mean_pooling=False).state_dict()
    old = with_old_names(weights)
    assert "videomae.encoder.layer.0.attention.attention.q_bias" in old and old.keys() != weights.keys()
    expected, converted = model_weights(weights, "hf"), model_weights(old, "hf")
    assert converted.keys() == expected.keys() == make_mae().state_dict().keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mean_pooling", [True, False])
def test_classifier_equals_transformers_videomae(mean_pooling):
    theirs = make_huggingface(VideoMAEForVideoClassification, use_mean_pooling=mean_pooling, num_labels=5)
    ours = make_classifier(use_mean_pooling=mean_pooling).eval()
    weights = {name.removeprefix("encoder."): w for name, w in model_weights(theirs.state_dict(), "hf").items()}
    assert ("fc_norm.weight" in weights) == mean_pooling and "head.weight" in weights
    load_weights(ours, weights, "hf")
    _, video, _ = make_input()
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2)).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(video), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "grid, tubelet, patch",
    [((2, 2, 3), 2, (4, 4)), ((1, 3, 1), 4, (2, 2)), ((3, 1, 2), 1, (3, 3)), ((1, 2, 2), 2, (2, 3))],
)
def test_targets_equal_a_naive_loop(grid, tubelet, patch, normalize):
    size = (grid[1] * patch[0], grid[2] * patch[1])
    num_tokens = math.prod(grid)
    pixels, _, mask = make_input(2, 1, size, grid[0] * tubelet, num_tokens)
    target = reconstruction_target(pixels, mask, grid, normalize)
    expected = torch.from_numpy(reference.patch_targets(pixels, mask.masked, tubelet, patch, normalize))
    assert target.dtype == torch.float32 and target.shape == (2, num_tokens - 1, tubelet * patch[0] * patch[1] * 3)
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)


def test_targets_of_low_contrast_patches_are_damped_by_1e_6():
    """With deviation s the unit target shrinks to s / (s + 1e-6); a patch of one colour is 0, not NaN."""
    pattern = torch.tensor([0.0, 1.0] * 64).view(2, 8, 8).expand(1, 3, 2, 8, 8).double()
    mask = Mask(torch.empty(1, 0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    for contrast in (0.0, 1e-6, 1e-5):
        target = reconstruction_target(0.5 + contrast * pattern, mask, (1, 1, 1), True)
        s = contrast * math.sqrt(0.25 * 128 / 127)
        assert target.std().item() == pytest.approx(s / (s + 1e-6), rel=0.01)


@pytest.mark.parametrize("patch", [2, 14, 16])
def test_targets_of_uint8_patches(patch):
    """Of one colour, whichever: exactly 0. One value off by a grey level: as in float64. The input is not changed."""
    grey = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 2 * patch * patch, 3)
    assert torch.count_nonzero(normalize_patches(grey)) == 0
    single = torch.randint(0, 256, (2, 5, 2 * patch * patch, 1), dtype=torch.uint8)
    faint = grey.clone()
    faint[:, :, 0] ^= 1
    for patches in (single, single.double() / 255, single.expand(-1, -1, -1, 3).clone(), faint):
        before = patches.clone()
        target = normalize_patches(patches)
        exact = before.double() / (255 if before.dtype == torch.uint8 else 1)
        exact = (exact - exact.mean(2, keepdim=True)) / (exact.std(2, keepdim=True) + 1e-6)
        assert torch.equal(patches, before)
        torch.testing.assert_close(target.double(), exact, rtol=1e-4, atol=1e-4)  # measured: 6e-5, of the faint ones


@pytest.mark.parametrize("grid, size", [((2, 3, 2), (4, 6, 8)), ((1, 1, 4), (2, 3, 8)), ((3, 2, 1), (3, 4, 5))])
def test_unpatchify_is_the_inverse_of_patchify(grid, size):
    pixels = torch.rand(2, 3, *size)
    patches = patchify(pixels, grid)
    assert patches.shape == (2, math.prod(grid), math.prod(size) // math.prod(grid), 3)
    assert torch.equal(unpatchify(patches, grid, size), pixels)


@pytest.mark.parametrize("loss, power", [("mse", 2), ("l1", 1)])
def test_token_error_is_the_mean_over_a_tokens_values_in_float32(loss, power):
    prediction, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    error = token_error(prediction.bfloat16(), target, loss)
    difference = prediction.bfloat16().double() - target.double()
    expected = [[sum(abs(x) ** power for x in token) / 4 for token in clip] for clip in difference.tolist()]
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, torch.tensor(expected))


@pytest.mark.parametrize("width", [8, 10])
def test_position_table_is_sine_on_even_and_cosine_on_odd_channels(width):
    table = get_sinusoid_encoding_table(50, width)
    assert table.shape == (1, 50, width) and table.dtype == torch.float32
    for position in range(50):
        for pair in range(width // 2):
            angle = position / 10000 ** (2 * pair / width)
            expected = [math.sin(angle), math.cos(angle)]
            assert table[0, position, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("patch, tubelet", [((4, 4), 2), ((2, 4), 1), ((4, 2), 4)])
def test_patch_embedding_is_its_own_convolution(patch, tubelet):
    torch.manual_seed(0)
    embed = PatchEmbed((8, 12), patch, embed_dim=10, num_frames=4, tubelet_size=tubelet)
    video = torch.randn(2, 3, 4, 8, 12)
    expected = embed.proj(video).flatten(2).transpose(1, 2)
    assert isinstance(embed.proj, nn.Conv3d) and expected.shape[1] == embed.num_patches == math.prod(embed.grid)
    torch.testing.assert_close(embed(video), expected, rtol=1e-5, atol=1e-5)
    index = torch.tensor([[3, 0, 5], [1, 2, 4]])
    torch.testing.assert_close(embed(video, index), gather_tokens(expected, index), rtol=1e-5, atol=1e-5)


def test_all_three_ways_to_give_a_mask_agree():
    model = randomize(make_mae())
    _, video, mask = make_input()
    with torch.no_grad():
        plain = model(video, mask)
        assert torch.equal(model(video, mask.hidden()), plain)
        torch.testing.assert_close(model(video, mask, model.encoder.patch_embed(video)), plain, rtol=1e-5, atol=1e-5)


def test_hidden_pixels_do_not_reach_the_predictions():
    model = randomize(make_mae())
    pixels, video, mask = make_input(batch=1)
    hidden = mask.hidden().view(1, 1, *GRID)
    hidden = nn.functional.interpolate(hidden.float(), video.shape[2:], mode="nearest").bool()
    with torch.no_grad():
        plain = model(video, mask)
        assert torch.equal(model(video.masked_fill(hidden, 99.0), mask), plain)
        assert not torch.allclose(model(video.masked_fill(~hidden, 0.0), mask), plain)


@pytest.mark.parametrize("frames", [8, 16, 32])
@pytest.mark.parametrize("size, patch, tubelet", [(32, 16, 2), (24, 8, 1), ((16, 32), 8, 4)])
def test_frames_size_patch_and_tubelet_are_arguments_of_both_models(frames, size, patch, tubelet):
    settings = dict(img_size=size, patch_size=patch, all_frames=frames, tubelet_size=tubelet)
    mae = make_mae(**settings, decoder_num_classes=3 * tubelet * patch**2)
    rows, columns = (size, size) if isinstance(size, int) else size
    assert mae.grid == (frames // tubelet, rows // patch, columns // patch)
    num_tokens = math.prod(mae.grid)
    _, video, mask = make_input(1, 2, (rows, columns), frames, num_tokens)
    assert mae(video, mask).shape == (1, num_tokens - 2, 3 * tubelet * patch**2)
    assert make_classifier(**settings)(video).shape == (1, 5)


def block_names(prefix):
    parts = ["norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight",
             "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
             "mlp.fc2.bias"]  # fmt: skip
    return [prefix + part for part in parts]


def test_state_dict_names_are_videomaes():
    encoder = ["encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", *block_names("encoder.blocks.0."),
               "encoder.norm.weight", "encoder.norm.bias"]  # fmt: skip
    decoder = [*block_names("decoder.blocks.0."), "decoder.norm.weight", "decoder.norm.bias", "decoder.head.weight",
               "decoder.head.bias"]  # fmt: skip
    mae = make_mae(encoder_depth=1, decoder_depth=1)
    assert sorted(mae.state_dict()) == sorted([*encoder, *decoder, "encoder_to_decoder.weight", "mask_token"])

    body = ["patch_embed.proj.weight", "patch_embed.proj.bias", *block_names("blocks.0."), "head.weight", "head.bias"]
    for mean_pooling, norm in ((True, "fc_norm"), (False, "norm")):
        classifier = make_classifier(depth=1, use_mean_pooling=mean_pooling)
        assert sorted(classifier.state_dict()) == sorted([*body, f"{norm}.weight", f"{norm}.bias"])


def test_optional_parameters_have_videomaes_names_too():
    scaled = make_classifier(init_values=0.1, use_learnable_pos_emb=True, qkv_bias=False).state_dict()
    plain = make_classifier(qkv_bias=False).state_dict()
    assert not [name for name in plain if "q_bias" in name or "v_bias" in name]
    gammas = [f"blocks.{i}.gamma_{j}" for i in (0, 1) for j in (1, 2)]
    assert sorted(scaled.keys() - plain.keys()) == sorted([*gammas, "pos_embed"])
    assert (scaled["blocks.0.gamma_1"] == 0.1).all()


SHARED_NAMES = """img_size patch_size mlp_ratio qkv_bias qk_scale drop_rate attn_drop_rate drop_path_rate norm_layer
    init_values use_learnable_pos_emb use_checkpoint tubelet_size num_classes in_chans""".split()
MAE_NAMES = """encoder_in_chans encoder_num_classes encoder_embed_dim encoder_depth encoder_num_heads
    decoder_num_classes decoder_embed_dim decoder_depth decoder_num_heads""".split()
CLASSIFIER_NAMES = "embed_dim depth num_heads fc_drop_rate init_scale all_frames use_mean_pooling".split()


@pytest.mark.parametrize(
    "model_class, names",
    [(PretrainVisionTransformer, SHARED_NAMES + MAE_NAMES), (VisionTransformer, SHARED_NAMES + CLASSIFIER_NAMES)],
)
def test_constructors_take_videomaes_arguments(model_class, names):
    assert set(names) <= inspect.signature(model_class).parameters.keys()


def count_block(width):
    norms, attention, mlp = 4 * width, 4 * width**2 + 3 * width, 8 * width**2 + 5 * width
    return norms + attention + mlp  # keys have no bias


def count_encoder(width, depth):
    return (2 * 16 * 16 * 3 + 1) * width + depth * count_block(width) + 2 * width


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


SIZES = {  # encoder width, blocks, heads; decoder width, heads
    "small": (384, 12, 6, 192, 3),
    "base": (768, 12, 12, 384, 6),
    "large": (1024, 24, 16, 512, 8),
    "huge": (1280, 32, 16, 640, 8),
}


@pytest.mark.parametrize("size", SIZES)
def test_pretraining_models_have_the_published_sizes(size):
    width, depth, heads, decoder_width, decoder_heads = SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(f"pretrain_videomae_{size}_patch16_224", decoder_depth=4)
    assert model.grid == (8, 14, 14) and len(model.decoder.blocks) == 4
    assert [block.attn.num_heads for block in model.encoder.blocks] == [heads] * depth
    assert model.decoder.blocks[0].attn.num_heads == decoder_heads
    assert count_parameters(model.encoder) == count_encoder(width, depth)
    decoder = 4 * count_block(decoder_width) + 2 * decoder_width + (decoder_width + 1) * 1536
    assert count_parameters(model) == count_encoder(width, depth) + decoder + (width + 1) * decoder_width
    assert model.encoder.norm.eps == model.decoder.norm.eps == model.decoder.blocks[0].norm1.eps == 1e-6
    if size == "base":
        assert count_parameters(model.encoder) == 86_227_200 and count_parameters(model) == 94_210_944


@pytest.mark.parametrize(
    "name, size, pixels",
    [
        ("vit_small_patch16_224", "small", 224),
        ("vit_base_patch16_224", "base", 224),
        ("vit_base_patch16_384", "base", 384),
        ("vit_large_patch16_224", "large", 224),
        ("vit_large_patch16_384", "large", 384),
        ("vit_large_patch16_512", "large", 512),
        ("vit_huge_patch16_224", "huge", 224),
    ],
)
def test_classifiers_have_the_published_sizes(name, size, pixels):
    width, depth, heads, *_ = SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=174)
    assert isinstance(model, VisionTransformer)
    assert model.patch_embed.grid == (8, pixels // 16, pixels // 16)
    assert [block.attn.num_heads for block in model.blocks] == [heads] * depth
    assert count_parameters(model) == count_encoder(width, depth) + (width + 1) * 174
    assert model.fc_norm.eps == model.blocks[0].norm1.eps == 1e-6


def test_giant_models_have_the_sizes_of_videomae_v2():
    """ViT-g/14 of width 1408, 40 blocks, 16 heads, MLP 6144; its decoder of 512, 4 blocks, 8 heads has the same MLP
    ratio 48/11. timm's ViT-g/14 is the image model of these sizes."""
    with torch.device("meta"):
        classifier = timm.create_model("vit_giant_patch14_224", num_classes=710)
        mae = timm.create_model("pretrain_videomae_giant_patch14_224", decoder_depth=4)
        images = timm.models.vision_transformer.vit_giant_patch14_224(num_classes=710)
    for model in (classifier, mae.encoder):
        assert model.patch_embed.grid == (8, 16, 16) and len(model.blocks) == 40
        assert {(b.attn.num_heads, b.mlp.fc1.out_features, b.norm1.eps) for b in model.blocks} == {(16, 6144, 1e-6)}
    assert [(b.attn.num_heads, b.attn.qkv.in_features, b.mlp.fc1.out_features) for b in mae.decoder.blocks] == (
        [(8, 512, 2234)] * 4
    )
    assert mae.decoder.head.out_features == 1176  # 2 x 14 x 14 x 3
    image_table = images.pos_embed.numel() + images.cls_token.numel()
    tubelet, key_bias = 3 * 14 * 14 * 1408, 40 * 1408
    assert count_parameters(classifier) == count_parameters(images) - image_table - key_bias + tubelet == 1_012_611_142
    assert count_parameters(mae.encoder) == 1_011_610_752


@pytest.mark.parametrize("name", ["pretrain_videomae_tiny_patch8_64", "vit_tiny_patch8_64"])
def test_tiny_models_are_made_for_8_frames_of_64_pixels(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        embed = model.encoder.patch_embed if "pretrain" in name else model.patch_embed
        assert embed(torch.empty(1, 3, 8, 64, 64)).shape[1] == 4 * 8 * 8


def test_asking_for_bundled_weights_is_refused():
    with pytest.raises(ValueError, match="--finetune"):
        timm.create_model("vit_small_patch16_224", pretrained=True)


@pytest.mark.parametrize("make", [make_mae, make_classifier])
@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(all_frames=5), "--num_frames.*--tubelet_size"),
        (dict(img_size=(16, 20)), "--input_size.*--patch_size"),
        (dict(img_size=(20, 16)), "--input_size.*--patch_size"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_flag(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_wrong_decoder_num_classes_is_refused():
    with pytest.raises(ValueError, match=naming("decoder_num_classes", 1536, 384)):
        make_mae(decoder_num_classes=1536)


@pytest.mark.parametrize("shape", [(4, 24, 24), (6, 16, 24), (4, 24, 16)])
def test_clips_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(4, 16, 24\)"):
        make_classifier()(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize("make", [make_mae, make_classifier])
def test_activation_checkpointing_gives_identical_gradients(make):
    _, video, mask = make_input()
    gradients, calls = [], []
    for use_checkpoint in (False, True):
        model = make(use_checkpoint=use_checkpoint, drop_path_rate=0.5, drop_rate=0.1, attn_drop_rate=0.1).train()
        counter = []
        for block in model.modules():
            if type(block).__name__ == "Block":
                block.register_forward_pre_hook(lambda *_, counter=counter: counter.append(1))
        torch.manual_seed(3)
        (model(video, mask) if make is make_mae else model(video)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        calls.append(len(counter))
    assert calls[1] == 2 * calls[0]  # every block ran again in the backward pass
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_stochastic_depth_grows_linearly_from_zero_in_encoder_and_decoder():
    mae = make_mae(encoder_depth=5, decoder_depth=3, drop_path_rate=0.4)
    for blocks, expected in ((mae.encoder.blocks, [0, 0.1, 0.2, 0.3, 0.4]), (mae.decoder.blocks, [0, 0.2, 0.4])):
        assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx(expected)


def test_a_dropped_path_leaves_the_residual_stream_as_it_is():
    model, shallow = randomize(make_classifier(drop_path_rate=1.0)).train(), make_classifier(depth=1)
    shallow.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("blocks.1.")})
    video = make_input()[1]
    torch.testing.assert_close(model(video), shallow(video))
    assert not torch.allclose(model.eval()(video), shallow(video))


def test_attention_scale_is_one_over_the_root_of_the_head_width_unless_given():
    x = torch.randn(1, 5, 12)
    attention = randomize(Attention(12, 3, qkv_bias=True))
    plain = attention(x)
    attention.scale = 4**-0.5
    torch.testing.assert_close(attention(x), plain)
    assert not torch.allclose(randomize(Attention(12, 3, qkv_bias=True, qk_scale=1.0))(x), plain)


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate", "fc_drop_rate"])
def test_every_drop_rate_acts_in_training_alone(rate):
    model, plain = randomize(make_classifier(**{rate: 0.5})), randomize(make_classifier())
    video = make_input(batch=4)[1]
    assert torch.equal(model.eval()(video), plain.train()(video))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(video), model(video))


def test_every_dropout_has_its_own_argument():
    model = make_classifier(drop_rate=0.1, attn_drop_rate=0.2, fc_drop_rate=0.3)
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    assert (model.pos_drop.p, attention.proj_drop.p, mlp.drop1.p, mlp.drop2.p) == (0.1, 0.1, 0.0, 0.1)
    assert (attention.attn_drop, model.fc_dropout.p) == (0.2, 0.3)
