"""What a classifier is trained to say (--task): its loss, the scores of a view, and the measures of a test.

The names are those of transformers' problem types, and so are the losses: cross entropy for one class per video, binary
cross entropy of each class for several, mean squared error for values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """scores: of a view, from logits float32 [B, K]; a video's are their mean over its views.
    loss: (logits float32 [B, K], target, label smoothing) -> mean loss. Targets are int64 [B] classes (or float [B, K],
    mixed), float32 [B, K] of 0 and 1, or float32 [B, K] values.
    measures: (scores float32 [n, K], target [n] or [n, K], found bool [n]) -> the numbers of a test; the first one
    decides which epoch is best. test.json has all of them.
    """

    name: str
    scores: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor, float], Tensor]
    measures: Callable[[Tensor, Tensor, Tensor], dict[str, float]]
    metrics: tuple[str, ...]  # the measures that are printed and compared
    least: bool = False  # whether the least of the first is the best

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def better(self, value: float, than: float) -> bool:
        return value < than if self.least else value > than

    @property
    def worst(self) -> float:
        """What every measured value is better than."""
        return float("inf") if self.least else -1.0

    def text(self, measures: dict[str, float]) -> str:
        """The metrics in words."""
        return ", ".join(in_words(name, measures[name]) for name in self.metrics)


TITLES = {
    "acc1": "top-1 (%)",
    "acc5": "top-5 (%)",
    "mAP": "mAP (%)",
    "mae": "mean absolute error",
    "spearman": "rank correlation",
}


def in_words(name: str, value: float) -> str:
    """Such as "top-1 81.25 %", for a metric of TITLES."""
    title = TITLES[name].removesuffix(" (%)")
    return f"{title} {value:.4g}" if title == TITLES[name] else f"{title} {value:.2f} %"


def ranking(scores: Tensor) -> Tensor:
    """int64 [n, K]: classes from the most probable on; of equal ones the first comes first."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def correct(scores: Tensor, label: Tensor, found: Tensor, k: int) -> Tensor:
    """bool [n]: whether the label is among the k most probable classes; a video that was not read is wrong."""
    return (ranking(scores)[:, :k] == label[:, None]).any(dim=1) & found


def single_label_measures(scores: Tensor, label: Tensor, found: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in %, mean negative log of the label's probability over the videos read."""
    accuracy = {f"acc{k}": 100 * correct(scores, label, found, k).double().mean().item() for k in (1, 5)}
    chosen = scores.gather(1, label[:, None])[found]
    return accuracy | {"loss": -chosen.clamp(min=1e-12).log().mean().item()}


def macro_f1(predicted: Tensor, label: Tensor, num_classes: int) -> float:
    """Mean over classes of F1 in %: 2 TP / (2 TP + FP + FN). A class that is neither predicted nor a label does not
    count (as in scikit-learn). predicted, label: int64 [n]; predicted -1 (not read) is no class."""
    right = torch.bincount(label[predicted == label], minlength=num_classes).double()
    both = torch.bincount(label, minlength=num_classes) + torch.bincount(
        predicted[predicted >= 0], minlength=num_classes
    )
    return 100 * (2 * right / both)[both > 0].mean().item()


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Sum over the thresholds of precision times the step in recall; videos of one score share a threshold.

    score [n], positive bool [n] with at least one True. No interpolation (scikit-learn's average_precision_score).
    """
    ordered, order = score.sort(descending=True, stable=True)
    hits = positive[order].double().cumsum(0)
    last = torch.ones_like(positive)  # of the videos of its score
    last[:-1] = ordered[:-1] != ordered[1:]
    count = torch.arange(1, len(score) + 1, device=score.device)[last]
    hits = hits[last]
    steps = torch.diff(hits, prepend=hits.new_zeros(1)) / hits[-1]
    return (hits / count * steps).sum().item()


def multi_label_measures(scores: Tensor, target: Tensor, found: Tensor) -> dict[str, float]:
    """mAP in %, the mean over the classes that occur; binary cross entropy over the videos read. A video that was not
    read has the scores 0: it comes last."""
    present = [k for k in range(target.shape[1]) if target[:, k].any()]
    values = [average_precision(scores[:, k], target[:, k] > 0) for k in present]
    loss = F.binary_cross_entropy(scores[found].double().clamp(1e-12, 1 - 1e-12), target[found].double())
    return {"mAP": 100 * sum(values) / len(values) if values else float("nan"), "loss": loss.item()}


def regression_measures(scores: Tensor, target: Tensor, found: Tensor) -> dict[str, float]:
    """Mean absolute error, Spearman's rank correlation (mean over the values of a video; nan where one is constant),
    mean squared error; over the videos read."""
    from scipy.stats import spearmanr

    scores, target = scores[found].double(), target[found].double()
    pairs = zip(scores.T.numpy(), target.T.numpy(), strict=True)
    constant = len(scores) < 2 or bool(((scores == scores[0]).all(0) | (target == target[0]).all(0)).any())
    ranks = [float("nan")] if constant else [float(spearmanr(ours, true).statistic) for ours, true in pairs]
    error = scores - target
    return {"mae": error.abs().mean().item(), "spearman": sum(ranks) / len(ranks), "loss": error.square().mean().item()}


TASKS = {
    task.name: task
    for task in (
        Task(
            "single_label",
            scores=lambda logits: logits.softmax(dim=1),
            loss=lambda logits, target, smoothing: F.cross_entropy(logits, target, label_smoothing=smoothing),
            measures=single_label_measures,
            metrics=("acc1", "acc5"),
        ),
        Task(
            "multi_label",
            scores=torch.sigmoid,
            loss=lambda logits, target, _: F.binary_cross_entropy_with_logits(logits, target),
            measures=multi_label_measures,
            metrics=("mAP",),
        ),
        Task(
            "regression",
            scores=lambda logits: logits,
            loss=lambda logits, target, _: F.mse_loss(logits, target),
            measures=regression_measures,
            metrics=("mae", "spearman"),
            least=True,
        ),
    )
}
SINGLE_LABEL = TASKS["single_label"]
