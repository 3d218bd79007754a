"""Classification by nearest neighbours among stored features: no training, and the same numbers every time."""

import torch
from torch import Tensor

CHUNK = 256  # test videos whose similarities to all training videos are held at a time


def standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Features float [n, d] of both with the training features' mean 0 and deviation 1, float64."""
    mean, deviation = train.double().mean(0), train.double().std(0) + 1e-6
    return (train.double() - mean) / deviation, (test.double() - mean) / deviation


def knn_votes(train: Tensor, label: Tensor, test: Tensor, classes: int, neighbours: int) -> Tensor:
    """Share of the votes for each class, float64 [n, classes]: those of the nearest training videos by the cosine of
    standardised features, weighted by exp(cosine / 0.07) (Wu 2018).

    train float [m, d], label int64 [m], test float [n, d].
    """
    train, test = (torch.nn.functional.normalize(x, dim=1) for x in standardized(train, test))
    votes = torch.zeros(len(test), classes, dtype=torch.float64)
    for part, counted in zip(test.split(CHUNK), votes.split(CHUNK), strict=True):
        similarity, nearest = (part @ train.T).topk(min(neighbours, len(train)), dim=1)
        counted.scatter_add_(1, label[nearest], (similarity / 0.07).exp())
    return votes / votes.sum(dim=1, keepdim=True)
