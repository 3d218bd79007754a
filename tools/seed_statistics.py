"""What a few seeds tell: intervals and the paired test."""

import math
import statistics


def interval(values):
    """Mean, and half the width of its 95 % interval by Student's t (None of one value)."""
    import scipy.stats

    n = len(values)
    if n < 2:
        return values[0], None
    return statistics.fmean(values), float(scipy.stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def wilson(percent, videos):
    """95 % interval in % of the accuracy that one test on so many videos gave."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, spread = percent / 100, z * z / videos
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / videos + spread / (4 * videos)) / (1 + spread)
    return 100 * (middle - half), 100 * (middle + half)


def paired(ours, theirs):
    """Of equally many values, those of one seed at one place.

    Returns: mean difference, half the width of its 95 % interval, p of the paired t test (None where all differences
    are equal, which leaves it nothing to divide by), number of pairs.
    """
    import scipy.stats

    difference, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    p = float(scipy.stats.ttest_rel(ours, theirs).pvalue) if half else None
    return difference, half, p, len(ours)
