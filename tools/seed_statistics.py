"""What a few seeds tell: intervals and the paired test."""

import statistics


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t (None for a single value)."""
    from scipy.stats import ttest_1samp

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    if min(values) == max(values):  # t is not defined
        return mean, 0.0
    return mean, float(ttest_1samp(values, mean).confidence_interval(0.95).high) - mean


def wilson(percent: float, videos: int) -> tuple[float, float]:
    """95 % interval in % of the accuracy that one test on that many videos gave."""
    from scipy.stats import binomtest

    low, high = binomtest(round(percent / 100 * videos), videos).proportion_ci(0.95, method="wilson")
    return 100 * float(low), 100 * float(high)


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float, float | None, int]:
    """Of equally many values, two or more; those of one seed have one index.

    Returns: mean difference, half the width of its 95 % interval, p of the paired t test (None where all differences
    are equal), number of pairs.
    """
    from scipy.stats import ttest_rel

    difference, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    assert half is not None
    return difference, half, float(ttest_rel(ours, theirs).pvalue) if half else None, len(ours)
