"""Fine-tuning and evaluation against loops written out naively in float64, numpy and plain torch."""

import copy
import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

import engine_for_finetuning as engine
from datasets.decoding import VideoError
from engine_for_finetuning import FeatureLoader, FinetuneRecipe, Scores, StoredViews
from modeling_finetune import Probe, VisionTransformer
from optim_factory import parameter_groups
from runtime.backend import Backend
from runtime.reports import class_names, confusion_matrix, draw_confusion, per_class_accuracy, write_report
from tests.helpers.runs import assert_names, naming
from utils import UsageError

torch.set_num_threads(1)

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
CLASSES, FRAMES, SIZE = 4, 2, 8


def recipe_for(**settings):
    return FinetuneRecipe(**dict(mean=MEAN, std=STD, lr=0.1, min_lr=0.01, print_freq=1000) | settings)


def make_model(**settings):
    """A classifier whose every part acts: random head and biases, two blocks."""
    torch.manual_seed(0)
    model = VisionTransformer(
        **dict(
            img_size=SIZE, patch_size=4, num_classes=CLASSES, embed_dim=8, depth=2, num_heads=2, qkv_bias=True,
            all_frames=FRAMES, init_scale=1.0,
        ) | settings
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1))
    return model


def clips(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def batches(number, size, seed=0):
    video = clips(number * size, seed)
    label = torch.arange(number * size) * 7 % CLASSES
    return [dict(video=v, label=k, failed=[]) for v, k in zip(video.split(size), label.split(size), strict=True)]


def normalized(video, dtype=torch.float64):
    """uint8 [B, T, 3, H, W] -> [B, 3, T, H, W], channel by channel."""
    channels = [(video[:, :, c].to(dtype) / 255 - MEAN[c].to(dtype)) / STD[c].to(dtype) for c in range(3)]
    return torch.stack(channels, dim=1)


# ------------------------------------------------------------------------------------------------ mixup and CutMix


def constant_clips(number, video_shape=(3, 4, 10, 14)):
    """Clip b is b everywhere; its label is b."""
    video = torch.arange(float(number)).view(-1, 1, 1, 1, 1).expand(-1, *video_shape).contiguous()
    return video, torch.arange(number)


def soft_label(shares, smoothing):
    """shares [B, K] of the classes -> soft labels: 1 - s of the share, s spread over all classes."""
    return (1 - smoothing) * shares + smoothing / shares.shape[1]


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("settings", [dict(cutmix_alpha=1.0), dict(cutmix_minmax=(0.2, 0.9))])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cutmix_labels_are_the_pixel_shares_of_one_box_in_all_frames(mode, settings, smoothing):
    mixup = Mixup(mixup_alpha=0.0, mode=mode, label_smoothing=smoothing, num_classes=6, **settings)
    video, label = constant_clips(6)
    np.random.seed(0)
    widths, heights, distinct = set(), set(), 0
    for _ in range(40):
        mixed, target = engine.mix(video.clone(), label, mixup)
        assert mixed.shape == video.shape and target.shape == (6, 6)
        shares = torch.tensor([[(clip == k).double().mean() for k in range(6)] for clip in mixed])
        torch.testing.assert_close(target.double(), soft_label(shares, smoothing), rtol=0, atol=1e-6)
        boxes = []
        for b, clip in enumerate(mixed):
            pasted = clip == 5 - b  # of the reversed batch, and the rest is the clip's own
            assert (pasted | (clip == b)).all()
            assert (pasted == pasted[:1, :1]).all()  # the same in every channel and frame
            rows, columns = pasted[0, 0].any(dim=1), pasted[0, 0].any(dim=0)
            assert torch.equal(pasted[0, 0], rows[:, None] & columns)
            heights.add(int(rows.sum()))
            widths.add(int(columns.sum()))
            boxes.append(pasted[0, 0].numpy().tobytes())
        distinct = max(distinct, len(set(boxes)))
    assert max(heights) > 7 and max(widths) > 9 and min(heights) < 4  # in H x W
    assert distinct == 1 if mode == "batch" else distinct >= 3 if mode == "pair" else distinct >= 5


def test_the_pasted_box_keeps_its_place():
    video = torch.randn(4, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    np.random.seed(1)
    pasted = 0
    for _ in range(20):
        mixed, _ = engine.mix(video.clone(), torch.arange(4), Mixup(0.0, 1.0, num_classes=4))
        own, other = mixed == video, mixed == video.flip(0)
        assert (own | other).all()
        pasted += other.any().item()
    assert pasted > 10


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup_labels_are_the_weights_of_the_clips(mode, smoothing):
    mixup = Mixup(mixup_alpha=0.8, mode=mode, label_smoothing=smoothing, num_classes=6)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(6, 3, 2, 4, 5, generator=generator)
    label = torch.tensor([5, 0, 3, 3, 1, 2])
    np.random.seed(0)
    for _ in range(10):
        mixed, target = engine.mix(video.clone(), label, mixup)
        shares = torch.zeros(6, 6, dtype=torch.float64)
        weights = []
        for b in range(6):
            own, other = video[b].double(), video[5 - b].double()
            weight = ((mixed[b] - other) * (own - other)).sum() / ((own - other) ** 2).sum()  # least squares
            torch.testing.assert_close(mixed[b].double(), weight * own + (1 - weight) * other, rtol=0, atol=1e-5)
            shares[b, label[b]] += weight
            shares[b, label[5 - b]] += 1 - weight
            weights.append(round(weight.item(), 4))
        torch.testing.assert_close(target.double(), soft_label(shares, smoothing), rtol=0, atol=1e-5)
        assert mode == "elem" or weights == weights[::-1]
        assert len(set(weights)) == 1 if mode == "batch" else len(set(weights)) >= 3


@pytest.mark.parametrize("settings", [dict(mixup_alpha=1.0), dict(mixup_alpha=0.0, cutmix_alpha=1.0)])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("layout", ["contiguous", "as normalized"])
def test_mixing_leaves_its_input_as_it_was(settings, mode, layout):
    video = torch.randn(4, 3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    if layout != "contiguous":  # [B, T, 3, H, W] in memory, as prepare gives it
        video = video.transpose(1, 2).contiguous().transpose(1, 2)
    before, label = video.clone(), torch.arange(4)
    np.random.seed(0)
    mixed, _ = engine.mix(video, label, Mixup(mode=mode, num_classes=4, **settings))
    assert (mixed != before).any()
    assert (video == before).all() and label.tolist() == [0, 1, 2, 3]


def test_batches_that_are_not_mixed_are_smoothed_alone():
    video, label = constant_clips(4)
    mixed, target = engine.mix(video, label, Mixup(prob=0.0, label_smoothing=0.1, num_classes=4))
    assert torch.equal(mixed, video)
    torch.testing.assert_close(target.double(), soft_label(torch.eye(4).double(), 0.1))


# ---------------------------------------------------------------------------------------------------- training


def naive_loss(logits, target):
    """Cross entropy with soft targets, clip by clip."""
    total = 0.0
    for row, weights in zip(logits, target, strict=True):
        log_sum = (row - row.max()).exp().sum().log() + row.max()
        total = total + (weights * (log_sum - row)).sum()
    return total / len(logits)


def naive_training(model, steps, settings, targets=None, decay=0.5):
    """AdamW on float64: steps is a list of lists of micro-batches. Returns losses, and of every step the weights and
    their moving average."""
    model = copy.deepcopy(model).double().train()
    scale = {name: settings["layer_decay"] ** (3 - depth) for name, depth in layers(model).items()}
    groups = [
        dict(params=[p], weight_decay=0.05 if p.ndim > 1 else 0.0, scale=scale[name])
        for name, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, eps=1e-3, foreach=False)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, weights, averages = [], [], []
    for step, micro_batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(steps), settings) * group["scale"]
        for batch in micro_batches:
            if targets:
                video, target = (x.double() for x in targets.pop(0))
            else:
                video = normalized(batch["video"])
                target = soft_label(torch.eye(CLASSES).double()[batch["label"]], settings["smoothing"])
            loss = naive_loss(model(video), target)
            (loss / len(micro_batches)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        average = {name: decay * average[name] + (1 - decay) * w for name, w in weights[-1].items()}
        averages.append(average)
    return losses, weights, averages


def layers(model):
    """Depth of each parameter of a model of two blocks."""
    starts = {"patch_embed.": 0, "pos_embed": 0, "blocks.0.": 1, "blocks.1.": 2, "norm.": 3, "fc_norm.": 3, "head.": 3}
    return {
        n: next(depth for start, depth in starts.items() if n.startswith(start)) for n, _ in model.named_parameters()
    }


def learning_rate(step, total, settings):
    warmup = settings["warmup_steps"]
    if step < warmup:
        return settings["warmup_lr"] + (settings["lr"] - settings["warmup_lr"]) * step / (warmup - 1)
    cosine = math.cos(math.pi * (step - warmup) / (total - warmup))
    return settings["min_lr"] + (settings["lr"] - settings["min_lr"]) * (1 + cosine) / 2


def backend_for(model, settings, accum_iter=1):
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, settings["layer_decay"]), eps=1e-3)
    return Backend(model, optimizer, CPU, accum_iter=accum_iter)


def assert_weights(module, expected):
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), expected[name], rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("accum_iter", [1, 2])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_epochs_are_plain_training(accum_iter, layer_decay, smoothing):
    """Two epochs of three steps: weights, moving average, losses and accuracy."""
    settings = dict(lr=0.02, min_lr=0.001, warmup_lr=0.004, warmup_steps=2, smoothing=smoothing)
    model = make_model()
    data = batches(6 * accum_iter, 4)
    steps = [data[i : i + accum_iter] for i in range(0, len(data), accum_iter)]
    losses, weights, averages = naive_training(model, steps, settings | dict(layer_decay=layer_decay))
    backend = backend_for(model, dict(layer_decay=layer_decay), accum_iter)
    ema, recipe = ModelEmaV3(model, decay=0.5), recipe_for(steps_per_epoch=3, epochs=2, **settings)
    half = len(data) // 2
    for epoch in range(2):
        model.eval()  # as validation leaves it
        with torch.no_grad():
            before = copy.deepcopy(model)
        stats = engine.train_one_epoch(backend, data[epoch * half : (epoch + 1) * half], recipe, epoch, ema)
        assert model.training
        assert stats["loss"] == pytest.approx(np.mean(losses[epoch * half : (epoch + 1) * half]), rel=1e-4)
        assert_weights(model, weights[3 * epoch + 2])
        assert_weights(ema.module, averages[3 * epoch + 2])
        assert 0 < stats["grad_norm"] and stats["skipped_steps"] == 0
    assert (weights[5]["head.weight"] - weights[0]["head.weight"]).abs().max() > 0.005
    if accum_iter == 1 and layer_decay == 1:  # one step, so that all clips meet the same weights
        right = [before(normalized(b["video"], torch.float32)).argmax(1) == b["label"] for b in data[:1]]
        backend = backend_for(before, dict(layer_decay=1.0))
        stats = engine.train_one_epoch(backend, data[:1], recipe_for(smoothing=smoothing), 0)
        assert stats["acc1"] == pytest.approx(100 * torch.cat(right).double().mean().item())


@pytest.mark.parametrize("mixing", [dict(mixup_alpha=0.8), dict(mixup_alpha=0.0, cutmix_alpha=1.0)])
def test_mixed_labels_are_trained_on_as_they_are(monkeypatch, mixing):
    """Soft labels hold the smoothing already: it is not applied twice."""
    model, targets, mix = make_model(), [], engine.mix
    settings = dict(lr=0.02, min_lr=0.001, warmup_lr=0.0, warmup_steps=0, smoothing=0.1)

    def watched(video, label, mixup):
        torch.testing.assert_close(video.double(), normalized(data[len(targets)]["video"]), rtol=0, atol=1e-5)
        mixed = mix(video, label, mixup)
        targets.append(tuple(x.clone() for x in mixed))
        return mixed

    monkeypatch.setattr(engine, "mix", watched)
    data, start = batches(3, 4), copy.deepcopy(model)
    np.random.seed(0)
    mixup = Mixup(label_smoothing=0.1, num_classes=CLASSES, **mixing)
    recipe = recipe_for(steps_per_epoch=3, mixup=mixup, **settings)
    stats = engine.train_one_epoch(backend_for(model, dict(layer_decay=0.5)), data, recipe, 0)
    assert len(targets) == 3 and "acc1" not in stats
    steps = [[batch] for batch in data]
    losses, weights, _ = naive_training(start, steps, settings | dict(layer_decay=0.5), targets)
    assert stats["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert_weights(model, weights[-1])


def test_two_micro_batches_are_one_batch_of_twice_the_size():
    one, two = make_model(), make_model()
    large, small = batches(3, 8), batches(6, 4)
    settings = dict(layer_decay=0.75)
    recipe = recipe_for(lr=0.02, steps_per_epoch=3, smoothing=0.1)
    ema_one, ema_two = ModelEmaV3(one, decay=0.9), ModelEmaV3(two, decay=0.9)
    stats_one = engine.train_one_epoch(backend_for(one, settings), large, recipe, 0, ema_one)
    stats_two = engine.train_one_epoch(backend_for(two, settings, accum_iter=2), small, recipe, 0, ema_two)
    for module, other in ((one, two), (ema_one.module, ema_two.module)):
        assert_weights(module, {name: p.detach().double() for name, p in other.named_parameters()})
    for name in ("loss", "acc1", "grad_norm"):
        assert stats_one[name] == pytest.approx(stats_two[name], rel=1e-3)


def test_each_layer_moves_by_its_own_learning_rate():
    model = make_model(use_learnable_pos_emb=True)
    before, gradients = copy.deepcopy(model), copy.deepcopy(model)
    (batch,) = batches(1, 4)
    nn.functional.cross_entropy(gradients(normalized(batch["video"], torch.float32)), batch["label"]).backward()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 0.5))
    engine.train_one_epoch(Backend(model, optimizer, CPU), [batch], recipe_for(lr=0.1, weight_decay=0.0), 0)
    depth = layers(model)
    for (name, p), start, g in zip(model.named_parameters(), before.parameters(), gradients.parameters(), strict=True):
        expected = -0.1 * 0.5 ** (3 - depth[name]) * g.grad
        torch.testing.assert_close(p - start, expected, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: name + text)


def test_replaced_videos_are_named_and_counted(capsys):
    data = batches(2, 4)
    data[1]["failed"] = ["a.mp4: no such file", "a.mp4: no such file", "b.mp4: no frames"]
    model = make_model()
    stats = engine.train_one_epoch(backend_for(model, dict(layer_decay=1.0)), data, recipe_for(steps_per_epoch=2), 0)
    output = capsys.readouterr().out
    assert stats["unreadable_videos"] == 3 and output.count("a.mp4: no such file") == output.count("b.mp4") == 1


def test_no_step_waits_for_the_device(monkeypatch):
    """Reading a tensor's value would: inside the steps of an epoch no .item(), .tolist(), bool() or float() happens."""
    reads, counts = [], []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, name=name, original=original):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)

    def counting():
        for batch in batches(6, 4):
            counts.append(len(reads))
            yield batch

    model = make_model(drop_path_rate=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, 0.75), fused=True)
    backend = Backend(model, optimizer, CPU, accum_iter=2, clip_grad=1.0)
    for mixup in (None, Mixup(0.8, 1.0, num_classes=CLASSES)):
        counts.clear()
        recipe = recipe_for(steps_per_epoch=3, smoothing=0.1, mixup=mixup)
        engine.train_one_epoch(backend, counting(), recipe, 0, ModelEmaV3(model, decay=0.9))
        assert counts[-1] == counts[1], reads  # the first step may set things up, the last prints


# -------------------------------------------------------------------------------------------------- evaluation


VIEWS = 3
LABELS = [2, 0, 3, 1, 1, 0, 2]


class Net(nn.Module):
    """Dropout shows whether the model is in evaluation mode; the scale, how far the views differ."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(classes, 3 * FRAMES * SIZE * SIZE, generator=generator) * 0.1)
        self.dropout = nn.Dropout(0.5)
        self.sizes = []

    def forward(self, video):
        self.sizes.append(len(video))
        return self.dropout(video.flatten(1) @ self.weight.T)


def view_batches(indices, failing=(), size=2, views=VIEWS, seed=0):
    """Batches of a rank's videos, as collate_views makes them; views of video i come from seed + i."""
    found = []
    for start in range(0, len(indices), size):
        chosen = [i for i in indices[start : start + size] if i not in failing]
        failed = [f"/v/{i}.mp4: no frames" for i in indices[start : start + size] if i in failing]
        video = torch.cat([clips(views, seed=seed + i) for i in chosen]) if chosen else None
        found.append(dict(index=torch.tensor(chosen, dtype=torch.int64), video=video, failed=failed))
    return found


def loader_of(batches):
    loader = SimpleNamespace(dataset=SimpleNamespace(labels=LABELS, list_path="/v/val.csv"))
    return StoredViews(loader, batches)


def naive_probability(index, weight):
    """Mean of the softmax of each view alone, in numpy."""
    total = np.zeros(len(weight))
    for view in normalized(clips(VIEWS, seed=index)).numpy():
        logits = weight @ view.ravel()
        total += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return total / VIEWS


def naive_scores(net, failing=()):
    weight = net.weight.detach().double().numpy()
    return np.stack([
        np.zeros(len(weight)) if i in failing else naive_probability(i, weight) for i in range(len(LABELS))
    ])  # fmt: skip


def accuracy(scores: Scores, k: int) -> float:
    """Top-k in %."""
    return 100 * scores.correct(k).double().mean().item()


def naive_accuracy(probability, k, failing=(), labels=LABELS):
    right = [
        i not in failing and label in np.argsort(-probability[i], kind="stable")[:k] for i, label in enumerate(labels)
    ]
    return 100 * np.mean(right)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_scores_are_the_mean_of_softmax_view_by_view(batch_size):
    net = Net().train()
    scores = engine.evaluate(net, loader_of(view_batches(range(7))), recipe_for(), "none", batch_size)
    expected = naive_scores(net)
    assert max(net.sizes) <= batch_size and sum(net.sizes) == 7 * VIEWS
    assert scores.probability.shape == (7, CLASSES) and scores.probability.dtype == torch.float32
    np.testing.assert_allclose(scores.probability, expected, atol=1e-5)
    assert scores.label.tolist() == LABELS and scores.found.tolist() == [True] * 7 and scores.failed == []
    for k in (1, 2, 3, CLASSES, 5):
        assert accuracy(scores, k) == pytest.approx(naive_accuracy(expected, k))
    assert 0 < accuracy(scores, 1) < accuracy(scores, 2) < accuracy(scores, CLASSES) == 100
    assert scores.measures()["loss"] == pytest.approx(-np.log(expected[range(7), LABELS]).mean(), rel=1e-4)


def test_softmax_comes_before_the_mean_over_views():
    """One view is sure and wrong, two lean a little to the right class: the mean of logits would say otherwise."""

    class Logits(nn.Module):
        def forward(self, x):
            return x

    views = torch.tensor([[9.0, 0, 0], [0.0, 4, 0], [0.0, 4, 0]])
    batch = dict(index=torch.tensor([0]), video=views, failed=[])
    _, probability, _ = engine.predict(Logits(), [batch], recipe_for(), "none", 8)
    assert probability.argmax() == 1 and views.mean(dim=0).argmax() == 0
    np.testing.assert_allclose(probability[0], views.double().softmax(1).mean(0), atol=1e-6)


def test_mixed_precision_scores_in_float32():
    net = Net()
    exact = engine.predict(net, view_batches(range(7)), recipe_for(), "none", 4)[1]
    index, probability, _ = engine.predict(net, view_batches(range(7)), recipe_for(), "bf16", 4)
    assert probability.dtype == torch.float32 and index.tolist() == list(range(7))
    torch.testing.assert_close(probability.sum(1), torch.ones(7))
    torch.testing.assert_close(probability, exact, rtol=0, atol=0.03)
    assert not torch.equal(probability, exact)


def test_evaluation_progress_is_printed_where_asked(capsys):
    engine.predict(Net(), loader_of(view_batches(range(7), size=1)), recipe_for(print_freq=3), "none", 4)
    assert capsys.readouterr().out == ""
    engine.predict(Net(), loader_of(view_batches(range(7), size=1)), recipe_for(print_freq=3), "none", 4, "test")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" batches]")[0] for line in lines] == ["test [3/7", "test [6/7"]


@pytest.mark.parametrize("failing", [(1,), (5, 1, 2), (0, 1, 2, 3, 4, 5)])
def test_unreadable_videos_stop_the_test_or_count_as_wrong(failing, capsys):
    net, loader = Net(), loader_of(view_batches(range(7), failing))
    with pytest.raises(VideoError) as error:
        engine.evaluate(net, loader, recipe_for(), "none", 4)
    message = str(error.value)
    assert_names(message, len(failing), 7, "/v/val.csv", "--allow_missing")
    named = sorted(failing)
    assert all(f"/v/{i}.mp4: no frames" in message for i in named[:3])
    assert all(f"/v/{i}.mp4" not in message for i in named[3:]) and ("; ..." in message) == (len(failing) > 3)
    scores = engine.evaluate(net, loader, recipe_for(), "none", 4, allow_missing=True)
    output = capsys.readouterr().out
    assert all(f"/v/{i}.mp4: no frames" in output for i in failing)
    assert scores.found.tolist() == [i not in failing for i in range(7)]
    assert scores.failed == [f"/v/{i}.mp4: no frames" for i in named]
    expected = naive_scores(net, failing)
    np.testing.assert_allclose(scores.probability, expected, atol=1e-5)
    for k in (1, 2, CLASSES):  # also where k is the number of classes
        assert accuracy(scores, k) == pytest.approx(naive_accuracy(expected, k, failing))
    read = [i for i in range(7) if i not in failing]
    losses = [-np.log(expected[i, LABELS[i]]) for i in read]
    assert scores.measures()["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("allow_missing", [True, False])
def test_no_readable_video_is_an_error_in_any_case(allow_missing):
    loader = loader_of(view_batches(range(7), range(7)))
    with pytest.raises(VideoError, match="7 of 7 .*/v/val.csv"):
        engine.evaluate(Net(), loader, recipe_for(), "none", 4, allow_missing)


@pytest.mark.parametrize(
    "indices, failing, counts",
    [
        ([0, 1, 2, 3, 4, 5, 6, 3], (), [1, 0, 0]),
        ([0, 1, 2, 4, 5], (), [0, 2, 0]),
        ([0, 1, 2, 2, 4, 5], (), [1, 2, 0]),
        ([0, 1, 2, 4, 5, 6], (6,), [0, 2, 1]),
    ],
)
def test_evaluation_that_is_not_complete_is_an_error(indices, failing, counts):
    """Videos predicted twice, not at all, and how many of those cannot be read."""
    with pytest.raises(RuntimeError, match=".*".join(rf"\b{count}\b" for count in counts)):
        engine.evaluate(Net(), loader_of(view_batches(indices, failing)), recipe_for(), "none", 4, allow_missing=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error(bad):
    net = Net()
    with torch.no_grad():
        net.weight[1, 5] = bad
    with pytest.raises(UsageError, match=naming("finite", "7 of 7", "--lr", "--amp")):
        engine.evaluate(net, loader_of(view_batches(range(7))), recipe_for(), "none", 4)


def test_order_of_the_predictions_does_not_matter():
    probability = torch.rand(7, CLASSES)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    scores = engine.gather(order, probability[order], [], torch.tensor(LABELS))
    assert torch.equal(scores.probability, probability) and scores.found.all()


def test_top_k_equals_a_sort():
    rng = np.random.default_rng(0)
    probability = rng.dirichlet(np.ones(9), 200).astype(np.float32)
    label = rng.integers(0, 9, 200)
    found = rng.random(200) > 0.2
    failing = set(np.flatnonzero(~found).tolist())
    scores = Scores(*(torch.from_numpy(x) for x in (probability, label, found)), [])
    for k in (1, 2, 5, 9, 20):
        assert accuracy(scores, k) == pytest.approx(naive_accuracy(probability, k, failing, label))


@pytest.mark.parametrize("classes", [3, 10, 51, 174, 400])
def test_equal_scores_are_ranked_in_one_way(classes):
    """A head of zeros gives them: top-1 is among the top-5, and is the class the confusion matrix counts."""
    label = torch.arange(classes)
    scores = Scores(torch.full((classes, classes), 1 / classes), label, torch.ones(classes, dtype=torch.bool), [])
    top1, top5 = scores.correct(1), scores.correct(5)
    assert int(top1.sum()) == 1 and int(top5.sum()) == min(5, classes)
    assert (top5 | ~top1).all()
    assert confusion_matrix(scores, classes).diagonal().tolist() == top1.tolist()


# --------------------------------------------------------------------------------------------- several processes


SCENARIOS = {
    "all": (),
    "the first process fails": (0, 2, 4, 6),
    "the second process fails": (1, 3, 5),
    "some fail": (2, 3),
    "all fail": (0, 1, 2, 3, 4, 5, 6),
    "damaged": (),
    "incomplete": (),
}


def outcome(name, rank, world_size):
    """Scores of a scenario, or the type and text of its error."""
    net, indices = Net(), list(range(7))[rank::world_size]
    if name == "damaged" and rank == world_size - 1:
        net.weight.data.fill_(float("nan"))
    if name == "incomplete" and rank == world_size - 1:
        indices = indices[:-1]
    loader = loader_of(view_batches(indices, SCENARIOS[name], size=1))  # a video a call: the same sums in any share
    try:
        scores = engine.evaluate(net, loader, recipe_for(), "none", 4, allow_missing=True)
    except (VideoError, UsageError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return tuple(scores)


def make_probe(kind="linear"):
    torch.manual_seed(3)
    encoder = make_model(num_classes=0, use_mean_pooling=False)
    return Probe(encoder, kind, CLASSES)


def train_probe(rank, world_size):
    """State of a linear probe and of its moving average after an epoch on this process's share of the batches."""
    probe = make_probe()
    optimizer = torch.optim.SGD(parameter_groups(probe, 0.0), lr=0.1)
    backend, ema = Backend(probe, optimizer, CPU), ModelEmaV3(probe, decay=0.5)
    data = batches(6, 4)[rank::world_size]
    engine.train_one_epoch(backend, data, recipe_for(steps_per_epoch=len(data)), 0, ema)
    return probe.state_dict(), ema.module.state_dict()


def neighbours(rank, world_size):
    """Scores of --knn: 7 test videos, as many for training, of which one cannot be read."""
    shares = {"train": view_batches(list(range(7))[rank::world_size], (5,), 1, views=1),
              "test": view_batches(list(range(7))[rank::world_size], (2,), 1, views=1, seed=50)}  # fmt: skip
    loaders = {split: loader_of(batches) for split, batches in shares.items()}
    return tuple(engine.evaluate_neighbours(make_probe(), loaders, recipe_for(), "none", 3, CLASSES, True))


def one_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    outcomes = {name: outcome(name, rank, 2) for name in SCENARIOS}
    torch.save((outcomes, train_probe(rank, 2), neighbours(rank, 2)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(one_process, (folder,), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_give_exactly_what_one_gives(two_processes, name):
    alone = outcome(name, 0, 1)
    for outcomes, *_ in two_processes:
        assert len(outcomes[name]) == len(alone)
        for ours, expected in zip(outcomes[name], alone, strict=True):
            if torch.is_tensor(expected):
                assert torch.equal(ours, expected)
            elif name != "damaged":  # how many videos the damaged weights saw differs
                assert ours == expected
    types = {"all fail": "VideoError", "damaged": "UsageError", "incomplete": "RuntimeError"}
    assert alone[0] == types[name] if name in types else len(alone) == 4
    if name == "damaged":
        for outcomes, *_ in two_processes:
            assert outcomes[name][0] == "UsageError"
            assert_names(outcomes[name][1], "finite", "3 of 7", "--lr", "--amp")


@pytest.mark.parametrize("which", ["model", "average"])
def test_processes_end_an_epoch_with_the_same_probe(two_processes, which):
    """Running statistics too: all of them evaluate one model."""
    first, second = (states[["model", "average"].index(which)] for _, states, _ in two_processes)
    fresh = make_probe().state_dict()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name} {text}")
    assert not torch.equal(first["pool.running_mean"], fresh["pool.running_mean"])
    assert not torch.equal(first["head.weight"], fresh["head.weight"])


def test_neighbours_are_the_same_on_two_processes_and_those_of_a_loop(two_processes):
    alone = Scores(*neighbours(0, 1))
    for *_, theirs in two_processes:
        for ours, other in zip(alone[:3], theirs[:3], strict=True):
            assert torch.equal(ours, other)
        assert alone.failed == theirs[3] == ["/v/2.mp4: no frames"]
    probe = make_probe().eval()
    train, test = (
        torch.stack([probe.features(normalized(clips(1, seed=seed + i), torch.float32))[0] for i in range(7)])
        for seed in (0, 50)
    )
    known = [i for i in range(7) if i != 5]
    mean, deviation = train[known].double().mean(0), train[known].double().std(0) + 1e-6
    for row in range(7):
        votes = np.zeros(CLASSES)
        a, b = (train[known].double() - mean) / deviation, (test[row].double() - mean) / deviation
        cosine = ((a @ b) / a.norm(dim=1) / b.norm()).numpy()
        for near in np.argsort(-cosine)[:3]:
            votes[LABELS[known[near]]] += np.exp(cosine[near] / 0.07)
        expected = 0 * votes if row == 2 else votes / votes.sum()
        np.testing.assert_allclose(alone.probability[row], expected, atol=1e-4)


def test_running_statistics_are_the_mean_of_the_processes(two_processes):
    probe = make_probe()
    expected = {"pool.running_mean": 0, "pool.running_var": 0}
    for rank in range(2):
        mean, variance = torch.zeros(8), torch.ones(8)
        for batch in batches(6, 4)[rank::2]:
            features = probe.features(normalized(batch["video"], torch.float32))
            mean = 0.9 * mean + 0.1 * features.mean(0)
            variance = 0.9 * variance + 0.1 * features.var(0)
        expected["pool.running_mean"] += mean / 2
        expected["pool.running_var"] += variance / 2
    for _, (state, _), _ in two_processes:
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value)


# ------------------------------------------------------------------------------------------- features of probes


def test_every_epoch_takes_features_in_an_order_of_seed_and_epoch():
    features, label = torch.arange(23.0)[:, None].expand(-1, 4), torch.arange(23)

    def epoch(seed, number):
        loader = FeatureLoader(features, label, 5, seed)
        loader.sampler.set_epoch(number)
        drawn = list(loader)
        assert len(loader) == len(drawn) == 4
        for batch in drawn:
            assert batch["video"].shape == (5, 4) and batch["failed"] == []
            assert torch.equal(batch["video"][:, 0].long(), batch["label"])
        return torch.cat([batch["label"] for batch in drawn]).tolist()

    random_before = torch.get_rng_state()
    orders = [epoch(seed, number) for seed in (0, 1) for number in range(3)]
    assert all(len(set(order)) == 20 for order in orders)  # at most once; the rest is another one each epoch
    assert len({tuple(order) for order in orders}) == len({tuple(sorted(order)) for order in orders}) == 6
    assert orders[2] == epoch(0, 2) and torch.equal(torch.get_rng_state(), random_before)
    whole = FeatureLoader(features[:20], label[:20], 5, 0)
    whole.set_epoch(1)
    assert sorted(torch.cat([batch["label"] for batch in whole]).tolist()) == list(range(20))


@pytest.mark.parametrize("kind, dtype", [("linear", torch.float32), ("attentive", torch.float16)])
def test_stored_features_equal_the_encoders_and_train_the_same_probe(kind, dtype, capsys):
    probe = make_probe(kind).train()
    data = batches(3, 4)
    data[1]["failed"] = ["/v/x.mp4: no frames"]
    stored = list(engine.store_features(probe, [*data, dict(video=None, failed=["/v/y.mp4: gone"])], recipe_for(),
                                        "none", 12))  # fmt: skip
    output = capsys.readouterr().out
    assert "/v/x.mp4: no frames" in output and "/v/y.mp4: gone" in output
    assert len(stored) == 4 and stored[3]["video"] is None
    encoder = probe.encoder
    for batch, kept in zip(data, stored, strict=False):
        x = encoder.patch_embed(normalized(batch["video"], torch.float32)) + encoder.pos_embed
        for block in encoder.blocks:
            x = block(x)
        tokens = encoder.norm(x)
        expected = tokens.mean(dim=1) if kind == "linear" else tokens.half()
        assert kept["video"].dtype == dtype and not kept["video"].requires_grad
        torch.testing.assert_close(
            kept["video"], expected.detach(), rtol=1e-3, atol=1e-3 if dtype.itemsize == 2 else 1e-5
        )
        assert kept["label"] is batch["label"] and kept["failed"] == batch["failed"]
    other = copy.deepcopy(probe)
    for module, loader in ((probe, data), (other, stored[:3])):
        backend = Backend(module, torch.optim.SGD(parameter_groups(module, 0.0), lr=0.1), CPU)
        engine.train_one_epoch(backend, loader, recipe_for(steps_per_epoch=3), 0)
    for a, b in zip(probe.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_stored_views_score_as_the_clips_do():
    probe = make_probe()
    probe.pool.running_mean.normal_(std=0.1)
    views = view_batches(range(7), failing=(4,))
    stored = list(engine.store_features(probe, views, recipe_for(), "none", 21))
    expected = engine.evaluate(probe, loader_of(views), recipe_for(), "none", 4, True)
    loader = StoredViews(loader_of(views), stored)
    scores = engine.evaluate(probe, loader, recipe_for(), "none", 4, True)
    assert len(loader) == len(views) and loader.dataset.labels == LABELS
    torch.testing.assert_close(scores.probability, expected.probability)
    assert scores.failed == expected.failed and torch.equal(scores.found, expected.found)


@pytest.mark.parametrize("kind, bytes_a_clip", [("linear", 8 * 4), ("attentive", 4 * 8 * 2)])
def test_features_that_do_not_fit_into_memory_are_refused(monkeypatch, kind, bytes_a_clip):
    """From four fifths of what is free."""
    needed = bytes_a_clip * 10_000_000
    for free, fits in ((needed * 1.26, True), (needed * 1.24, False)):
        monkeypatch.setattr(engine, "available_memory", lambda free=free: int(free))
        kept = engine.store_features(make_probe(kind), batches(1, 2), recipe_for(), "none", 10_000_000)
        if fits:
            next(kept)
        else:
            with pytest.raises(UsageError, match=r"\b10000000\b.*\b0\.\d GiB.*--no-cache_features"):
                next(kept)


# ----------------------------------------------------------------------------------------------------- reports


def some_scores(classes, number=40, unreadable=(3, 17), seed=0):
    """Class 0 has no video; unreadable ones have zero scores."""
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.ones(classes), number).astype(np.float32)
    label = rng.integers(1, classes, number)
    probability[np.arange(number), label] += rng.random(number).astype(np.float32) * 0.5
    probability /= probability.sum(axis=1, keepdims=True)
    found = np.array([i not in unreadable for i in range(number)])
    probability[~found] = 0
    failed = [f"/v/{i}.mp4: no frames" for i in unreadable]
    return Scores(torch.from_numpy(probability), torch.from_numpy(label), torch.from_numpy(found), failed)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("classes", [3, 5, 9, 70])
def test_report_equals_a_count_by_hand(tmp_path, classes):
    scores, names = some_scores(classes), [f"class {k}, so" for k in range(classes)]
    paths = [f"/v/a b, {i}.mp4" for i in range(40)]
    result = write_report(tmp_path, scores, paths, names, {"temporal_clips": 5, "list": "val.csv"})
    assert {path.name for path in tmp_path.iterdir()} == {
        "test.json", "per_class.csv", "predictions.csv", "scores.npz", "confusion.png",
    }  # fmt: skip
    probability, label, found = (x.numpy() for x in scores[:3])
    order = np.argsort(-probability, axis=1, kind="stable")
    right = [bool(found[i] and order[i, 0] == label[i]) for i in range(40)]

    header, *rows = read_csv(tmp_path / "per_class.csv")
    assert header == ["label", "class", "videos", "acc1"] and len(rows) == classes
    means = []
    for k, row in enumerate(rows):
        members = [i for i in range(40) if label[i] == k]
        accuracy = 100 * np.mean([right[i] for i in members]) if members else None
        assert row[:3] == [str(k), names[k], str(len(members))]
        assert row[3] == "" if accuracy is None else float(row[3]) == pytest.approx(accuracy, abs=0.006)
        means += [] if accuracy is None else [accuracy]
    assert rows[0][2:] == ["0", ""]

    with open(tmp_path / "test.json") as file:
        assert json.load(file) == result
    assert result["acc1"] == pytest.approx(100 * np.mean(right))
    top5 = [found[i] and label[i] in order[i, :5] for i in range(40)]
    assert result["acc5"] == pytest.approx(100 * np.mean(top5))
    assert result["mean_class_acc1"] == pytest.approx(np.mean(means))
    assert result["loss"] == pytest.approx(-np.log(probability[found, label[found]]).mean(), rel=1e-5)
    assert (result["videos"], result["unreadable"]) == (40, 2)
    assert (result["temporal_clips"], result["list"]) == (5, "val.csv")

    header, *rows = read_csv(tmp_path / "predictions.csv")
    best = min(5, classes)
    assert header == ["path", "label", "correct"] + [f"{w}{i + 1}" for i in range(best) for w in ("top", "probability")]
    assert len(rows) == 40
    for i, row in enumerate(rows):
        assert row[:3] == [paths[i], str(label[i]), str(int(right[i]))]
        if not found[i]:
            assert row[3:] == []
            continue
        assert [int(x) for x in row[3::2]] == order[i, :best].tolist()
        np.testing.assert_allclose([float(x) for x in row[4::2]], probability[i, order[i, :best]], atol=5.1e-5)

    stored = np.load(tmp_path / "scores.npz")
    assert np.array_equal(stored["probability"], probability) and np.array_equal(stored["label"], label)
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_confusion_counts_readable_videos_in_rows_of_their_class():
    scores = some_scores(6)
    expected = np.zeros((6, 6), dtype=int)
    for p, k, ok in zip(scores.probability.tolist(), scores.label.tolist(), scores.found.tolist(), strict=True):
        if ok:
            expected[k, p.index(max(p))] += 1
    assert np.array_equal(confusion_matrix(scores, 6), expected)
    assert expected.sum() == 38 and not np.array_equal(expected, expected.T)
    counts = np.bincount(scores.label, minlength=6)
    for k, (number, accuracy) in enumerate(per_class_accuracy(scores, 6)):
        assert number == counts[k] and accuracy == pytest.approx(100 * expected[k, k] / max(counts[k], 1))


@pytest.mark.parametrize("classes, named, numbered", [(6, True, True), (30, True, False), (70, False, False)])
def test_confusion_picture_shows_shares_of_rows(tmp_path, monkeypatch, classes, named, numbered):
    figures, names = [], [f"class {k}" for k in range(classes)]
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    matrix = confusion_matrix(some_scores(classes), classes)
    draw_confusion(tmp_path / "x.png", matrix, names, "title")
    axes = figures[0].axes[0]
    shown, counts = np.asarray(axes.images[0].get_array()), matrix.numpy()
    for row in range(classes):
        np.testing.assert_allclose(shown[row], counts[row] / max(counts[row].sum(), 1))
    labels = [[text.get_text() for text in ticks] for ticks in (axes.get_xticklabels(), axes.get_yticklabels())]
    assert (labels == [names, names]) == named
    texts = {(*text.get_position()[::-1], int(text.get_text())) for text in axes.texts}
    assert texts == ({(r, c, counts[r, c]) for r, c in zip(*counts.nonzero(), strict=True)} if numbered else set())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_report_of_a_model_that_never_predicts_the_last_class(tmp_path):
    """Fewer classes than were seen still make a full table."""
    label = torch.tensor([0, 0, 1])
    probability = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0]])
    scores = Scores(probability, label, torch.ones(3, dtype=torch.bool), [])
    result = write_report(tmp_path, scores, ["a", "b", "c"], ["x", "y", "z"], {})
    assert result["acc5"] == 100 and result["mean_class_acc1"] == 75 and result["acc1"] == pytest.approx(200 / 3)
    assert confusion_matrix(scores, 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_class_names_come_from_the_lists_folder(tmp_path):
    assert class_names(tmp_path, 3) == ["0", "1", "2"]
    (tmp_path / "classes.txt").write_text("push left\npush right\n")
    assert class_names(tmp_path, 2) == class_names(str(tmp_path), 2) == ["push left", "push right"]
    assert class_names(tmp_path, 3) == ["0", "1", "2"]  # of another list
