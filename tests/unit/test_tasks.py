"""Losses and measures of --task against closed forms and naive float64 references; lists of several labels."""

import numpy as np
import pytest
import torch

from datasets.lists import ListError, read_list
from datasets.video import read_targets
from engine_for_finetuning import Scores
from run_class_finetuning import check_flags, parse_args
from runtime.knn import knn_votes
from runtime.reports import add_best_epoch, write_report
from runtime.tasks import TASKS, average_precision, in_words, macro_f1
from tests.helpers.runs import assert_names, naming
from utils import UsageError

MULTI, VALUES = TASKS["multi_label"], TASKS["regression"]


# ------------------------------------------------------------------------------------------------------- references


def naive_average_precision(score, positive):
    """Precision at every threshold, weighted by the recall gained there: loops over thresholds and videos."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        taken = [p for s, p in zip(score, positive, strict=True) if s >= threshold]
        recall = sum(taken) / sum(positive)
        total += sum(taken) / len(taken) * (recall - before)
        before = recall
    return total


def naive_spearman(a, b):
    """Pearson's correlation of ranks; equal values share the mean of their ranks."""

    def ranks(x):
        return np.array([sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x])

    return np.corrcoef(ranks(a), ranks(b))[0, 1]


def naive_f1(predicted, label, classes):
    found = []
    for k in range(classes):
        tp = sum(p == k and t == k for p, t in zip(predicted, label, strict=True))
        fp = sum(p == k and t != k for p, t in zip(predicted, label, strict=True))
        fn = sum(p != k and t == k for p, t in zip(predicted, label, strict=True))
        if tp + fp + fn:
            precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
            found.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    return 100 * np.mean(found)


# --------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("ties", [False, True])
def test_map_is_the_mean_of_precision_over_recall(ties):
    rng = np.random.default_rng(0)
    score = rng.random((40, 7)).astype(np.float32)
    if ties:
        score = score.round(1)
    target = (rng.random((40, 7)) < 0.2).astype(np.float32)
    target[:, 3] = 0  # a class without a video does not count
    found = np.ones(40, dtype=bool)
    expected = [naive_average_precision(score[:, k].tolist(), target[:, k].tolist()) for k in range(7) if k != 3]
    measures = MULTI.measures(*map(torch.from_numpy, (score, target, found)))
    assert measures["mAP"] == pytest.approx(100 * np.mean(expected), rel=1e-12)
    clipped = score.astype(np.float64).clip(1e-12, 1 - 1e-12)
    losses = -(target * np.log(clipped) + (1 - target) * np.log(1 - clipped))
    assert measures["loss"] == pytest.approx(losses.mean(), rel=1e-12)


def test_average_precision_of_known_orders():
    def value(positive):
        return average_precision(torch.arange(len(positive), 0, -1.0), torch.tensor(positive, dtype=torch.bool))

    assert value([1, 1, 0, 0]) == 1 and value([0, 0, 0, 1]) == 0.25
    assert value([1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    one_score = average_precision(torch.zeros(8), torch.tensor([1, 0, 0, 0, 1, 0, 0, 0]).bool())
    assert one_score == pytest.approx(2 / 8)  # in whatever order they are listed


def test_videos_that_were_not_read_come_last_in_map():
    scores, target = torch.tensor([[0.9], [0.0], [0.3]]), torch.tensor([[0.0], [1.0], [0.0]])
    assert MULTI.measures(scores, target, torch.tensor([True, False, True]))["mAP"] == pytest.approx(100 / 3)


def test_regressions_measures_are_those_of_plain_loops():
    rng = np.random.default_rng(1)
    target = rng.normal(size=(30, 3)).astype(np.float32).round(1)  # with ties
    value = (target + rng.normal(size=(30, 3))).astype(np.float32).round(1)
    measures = VALUES.measures(torch.from_numpy(value), torch.from_numpy(target), torch.ones(30, dtype=torch.bool))
    error = value.astype(np.float64) - target.astype(np.float64)
    assert measures["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert measures["loss"] == pytest.approx((error**2).mean(), rel=1e-12)
    expected = np.mean([naive_spearman(value[:, k], target[:, k]) for k in range(3)])
    assert measures["spearman"] == pytest.approx(expected, rel=1e-9)
    constant = VALUES.measures(torch.zeros(4, 1), torch.arange(4.0)[:, None], torch.ones(4, dtype=torch.bool))
    assert np.isnan(constant["spearman"]) and constant["mae"] == 1.5


def test_macro_f1_equals_a_count_by_hand():
    rng = np.random.default_rng(2)
    label, predicted = rng.integers(0, 6, 50), rng.integers(-1, 7, 50)
    label[label == 4] = 0  # predicted only
    predicted[predicted == 2] = 1  # a label only
    expected = naive_f1(predicted.tolist(), label.tolist(), 9)  # classes 7 and 8 do not occur
    assert macro_f1(torch.from_numpy(predicted), torch.from_numpy(label), 9) == pytest.approx(expected, rel=1e-12)


def test_the_best_is_the_highest_or_the_least():
    assert MULTI.better(3, 2) and not MULTI.better(2, 2) and MULTI.better(0.0, MULTI.worst)
    assert VALUES.better(2, 3) and not VALUES.better(2, 2) and VALUES.better(1e9, VALUES.worst)
    for task in TASKS.values():
        assert not task.better(float("nan"), task.worst)
        assert all(in_words(name, 1.0) for name in task.metrics)


# ----------------------------------------------------------------------------------------------------------- losses


def test_losses_have_their_closed_forms():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 4, generator=generator)
    several = (torch.rand(5, 4, generator=generator) < 0.4).float()
    z, t = logits.double().numpy(), several.double().numpy()
    p = 1 / (1 + np.exp(-z))
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert MULTI.loss(logits, several, 0.0).item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(MULTI.scores(logits), p, rtol=1e-5)
    assert VALUES.loss(logits, several, 0.0).item() == pytest.approx(((z - t) ** 2).mean(), rel=1e-5)
    assert VALUES.scores(logits) is logits
    label = torch.tensor([0, 3, 1, 1, 2])
    q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    soft = 0.8 * np.eye(4)[label] + 0.2 / 4
    expected = -(soft * np.log(q)).sum(1).mean()
    assert TASKS["single_label"].loss(logits, label, 0.2).item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- neighbours


def test_votes_are_those_of_a_loop_over_neighbours(monkeypatch):
    monkeypatch.setattr("runtime.knn.CHUNK", 7)
    rng = np.random.default_rng(3)
    train, test, label = rng.normal(size=(30, 5)), rng.normal(size=(17, 5)), rng.integers(0, 4, 30)
    mean, deviation = train.mean(0), train.std(0, ddof=1) + 1e-6
    a, b = (train - mean) / deviation, (test - mean) / deviation
    expected = np.zeros((17, 4))
    for row, video in enumerate(b):
        cosine = a @ video / np.linalg.norm(a, axis=1) / np.linalg.norm(video)
        for near in np.argsort(-cosine)[:6]:
            expected[row, label[near]] += np.exp(cosine[near] / 0.07)
    votes = knn_votes(torch.from_numpy(train), torch.from_numpy(label), torch.from_numpy(test), 4, 6)
    np.testing.assert_allclose(votes, expected / expected.sum(1, keepdims=True), rtol=1e-9)
    every = knn_votes(torch.from_numpy(train), torch.from_numpy(label), torch.from_numpy(test), 4, 1000)
    assert every.shape == (17, 4) and (every > 0).all()  # fewer videos than neighbours


# ------------------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize(
    "line, task, expected",
    [
        ("a.mp4 3,1", "multi_label", ("a.mp4", (3, 1))), ("a b.mp4\t2", "multi_label", ("a b.mp4", (2,))),
        ("a.mp4 -1", "multi_label", ("a.mp4", ())), ("a.mp4 300 0,4", "multi_label", ("a.mp4", (0, 4))),
        ('"a, ""b"".mp4" 0', "multi_label", ('a, "b".mp4', (0,))), ("a.mp4, 0,4", "multi_label", ("a.mp4", (0, 4))),
        ('"a 1" 300 2', "multi_label", ("a 1", (2,))),
        ("a.mp4 0.5,-1e-3", "regression", ("a.mp4", (0.5, -0.001))),
        ("a b.mp4  7,8", "regression", ("a b.mp4", (7, 8))),
    ],
)  # fmt: skip
def test_lines_of_several(tmp_path, line, task, expected):
    (tmp_path / "l.csv").write_text(f"# comment\n{line}\n")
    paths, labels = read_list(tmp_path / "l.csv", 5 if task == "multi_label" else 2, task)
    assert (paths, labels) == ([str(tmp_path / expected[0])], [expected[1]])


@pytest.mark.parametrize(
    "line, task, parts",
    [
        ("a.mp4 3,5", "multi_label", ["'5'", "0 to 4", "--nb_classes"]), ("a.mp4 3,-1", "multi_label", ["'-1'"]),
        ("a.mp4 1.5", "multi_label", ["'1.5'"]), ("a.mp4,3", "multi_label", ["'a.mp4,3'"]),
        ("a.mp4 3,", "multi_label", ["''"]), ("a.mp4", "regression", ["'a.mp4'"]),
        ("a.mp4 x", "regression", ["'x'"]), ("a.mp4 nan,1", "regression", ["'nan,1'"]),
        ("a.mp4 1", "regression", ["1", "--nb_classes", "2"]),
        ("a.mp4 1,2,3", "regression", ["3", "--nb_classes", "2"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_of_several_is_said(tmp_path, line, task, parts):
    (tmp_path / "l.csv").write_text(f"b.mp4 1{',2' if task == 'regression' else ''}\n{line}\n")
    with pytest.raises(ListError) as error:
        read_list(tmp_path / "l.csv", 5 if task == "multi_label" else 2, task)
    assert_names(error.value, tmp_path / "l.csv", "line 2", *parts)


def test_targets_are_rows_of_zeros_and_ones_or_the_values(tmp_path):
    (tmp_path / "l.csv").write_text("a.mp4 2,0\nb.mp4 -1\nc.mp4 1\n")
    _, target = read_targets(tmp_path / "l.csv", 3, "multi_label")
    assert target.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]] and target.dtype == torch.float32
    (tmp_path / "l.csv").write_text("a.mp4 2,0.25\nb.mp4 -1,3\n")
    assert read_targets(tmp_path / "l.csv", 2, "regression")[1].tolist() == [[2, 0.25], [-1, 3]]


# ---------------------------------------------------------------------------------------------------------- reports


def test_reports_of_several_labels_and_of_values(tmp_path):
    rng = np.random.default_rng(4)
    probability = torch.from_numpy(rng.random((6, 3)).astype(np.float32))
    target, found = torch.tensor([[1, 0, 1], [0, 0, 0]] * 3).float(), torch.ones(6, dtype=torch.bool)
    paths = [f"{i}.mp4" for i in range(6)]
    result = write_report(tmp_path, Scores(probability, target, found, []), paths, list("abc"), {"list": "l"}, MULTI)
    assert {"mAP", "loss", "videos", "unreadable", "list"} == result.keys()
    rows = [line.split(",") for line in (tmp_path / "per_class.csv").read_text().splitlines()]
    expected = 100 * naive_average_precision(probability[:, 2].tolist(), target[:, 2].tolist())
    assert rows[2] == ["1", "b", "0", ""] and rows[3] == ["2", "c", "3", f"{expected:.2f}"]
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1].startswith('0.mp4,"0,2",')
    assert not (tmp_path / "confusion.png").exists()
    add_best_epoch(tmp_path, {"mAP": 12.5}, 3, False, MULTI)
    assert '"mAP_best": 12.5' in (tmp_path / "test.json").read_text()
    write_report(tmp_path, Scores(target, target * 0 + 1, found, []), paths, list("abc"), {}, VALUES)
    assert '"spearman": null' in (tmp_path / "test.json").read_text()  # not NaN, which is no JSON
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1] == "0.mp4,1,1,1,1,0,1"


# ------------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--task regression --mixup 0.8", ["--task regression", "--mixup", "--cutmix"]),
        ("--task multi_label --cutmix 1", ["--task multi_label", "--mixup"]),
        ("--task multi_label --smoothing 0.1", ["--smoothing 0.1", "--task multi_label"]),
        ("--task multi_label --data_set UCF101", ["--data_set UCF101", "custom"]),
        ("--task regression --allow_missing", ["--allow_missing", "--task regression"]),
        ("--task multi_label", ["--nb_classes", "at least 1"]),
        ("--knn 5 --linear_probe", ["--knn 5", "--linear_probe"]),
        ("--knn 5 --resume x.pth", ["--knn 5", "--resume"]),
        ("--knn 5 --task regression", ["--knn 5", "--task regression"]),
        ("--knn 5 --test_num_segment 2", ["--knn 5", "--test_num_segment"]),
        ("--knn 0", ["--knn 0"]),
    ],
)
def test_flags_that_make_no_sense_together_are_refused(flags, parts):
    flags += "" if "--data_set" in flags else " --data_set custom"
    flags += "" if "at least 1" in parts else " --nb_classes 5"
    with pytest.raises(UsageError, match=naming(*parts)):
        check_flags(parse_args([*flags.split(), "--device", "cpu"]))


def test_tasks_have_defaults_that_fit():
    args = parse_args(["--task", "regression", "--data_set", "custom", "--device", "cpu"])
    check_flags(args)
    assert (args.nb_classes, args.mixup, args.cutmix, args.smoothing) == (1, 0, 0, 0)
    args = parse_args(["--knn", "5"])
    assert (args.test_num_segment, args.test_num_crop, args.mixup) == (1, 1, 0)
