"""Statistics of predictions and costs: calibration, agreement, recall of classes, the Pareto front."""

import dataclasses
from collections.abc import Sequence

import numpy as np

BINS = 15  # of equal width, as in Guo et al. 2017


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well the confidence of a predictor agrees with how often it is right.

    Attributes:
        ece: expected calibration error in per cent, sum over bins of (images / N) |accuracy - confidence|.
        counts: images in each bin of confidence, (BINS,).
        confidence: their mean confidence in per cent; 0 in an empty bin.
        accuracy: their accuracy in per cent; 0 in an empty bin.
    """

    ece: float
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Return the expected calibration error and the reliability diagram.

    Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", ICML 2017.

    Args:
        confidence: probability of the predicted class, (N,), in [0, 1].
        correct: whether it is the image's class, (N,) bool.
        bins: number of bins of equal width; a bin includes its upper end.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    filled = np.maximum(counts, 1)
    sure = np.bincount(place, confidence, bins) / filled
    right = np.bincount(place, correct.astype(float), bins) / filled
    ece = float((counts * np.abs(right - sure)).sum() / len(confidence))
    return Calibration(100 * ece, tuple(map(int, counts)), _percent(sure), _percent(right))


def _percent(shares: np.ndarray) -> tuple[float, ...]:
    return tuple(float(100 * share) for share in shares)


@dataclasses.dataclass(frozen=True)
class Diversity:
    """How alike several predictors answer.

    Attributes:
        agreement: per cent of the images that two predictors put into the same class, (P, P).
        disagreement: per cent of pairs of predictors and images with different answers; 0 for one predictor.
        error_correlation: Pearson correlation of the errors of two predictors, (P, P); nan if one of them has none.
        all_right, all_wrong: per cent of the images.
    """

    agreement: np.ndarray
    disagreement: float
    error_correlation: np.ndarray
    all_right: float
    all_wrong: float


def diversity(predicted: np.ndarray, labels: np.ndarray) -> Diversity:
    """Compare the answers of predictors.

    Args:
        predicted: the class that each predictor takes each image for, (P, N).
        labels: (N,).
    """
    agreement = 100 * (predicted[:, None] == predicted[None]).mean(-1)
    wrong = predicted != labels
    count = len(predicted)
    pairs = np.triu_indices(count, 1)
    apart = float(100 - agreement[pairs].mean()) if count > 1 else 0.0
    return Diversity(
        agreement,
        apart,
        correlation(wrong.astype(float)),
        float(100 * (~wrong).all(0).mean()),
        float(100 * wrong.all(0).mean()),
    )


def correlation(rows: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of every pair of rows (R, N), as (R, R); nan where a row is constant."""
    centered = rows - rows.mean(-1, keepdims=True)
    norms = np.linalg.norm(centered, axis=-1)
    products = norms[:, None] * norms
    return np.divide(
        centered @ centered.T, products, out=np.full(products.shape, np.nan), where=products > 1e-12
    )


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the images of each class (rows) by the class that they are taken for (columns), (K, K)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def recall_by_class(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return recall in per cent of each predictor and class, (P, K); nan for a class without images."""
    images = np.bincount(labels, minlength=classes)
    right = np.stack([np.bincount(labels[row == labels], minlength=classes) for row in predicted])
    return 100 * np.divide(right, images, out=np.full(right.shape, np.nan), where=images > 0)


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the places of the points that no other point beats, cheapest first.

    A point is beaten by one that costs no more and scores no less, and is better in one of the two.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i]))
    front: list[int] = []
    for i in order:
        last = front[-1] if front else None
        if last is None or scores[i] > scores[last] or (costs[i], scores[i]) == (costs[last], scores[last]):
            front.append(i)
    return front


def most_disputed(predicted: np.ndarray, labels: np.ndarray, number: int) -> list[int]:
    """Return the images that predictors disagree on, those with the most different answers first.

    Args:
        predicted: (P, N).
        labels: (N,); among equals, those with more wrong answers are first.
        number: at most so many.
    """
    in_order = np.sort(predicted, axis=0)
    different = 1 + (in_order[1:] != in_order[:-1]).sum(0)
    wrong = (predicted != labels).sum(0)
    order = np.lexsort((-wrong, -different))
    return [int(i) for i in order[:number] if different[i] > 1]
