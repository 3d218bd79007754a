"""What a few seeds tell: intervals and the paired test."""

import math
import statistics
from typing import NamedTuple

UNDECIDED = "not decided"


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


class Paired(NamedTuple):
    """Two methods compared by runs of equal seeds, in % of top-1."""

    difference: float  # mean
    half: float  # half the width of its 95 % interval over seeds
    p: float | None  # of the paired t test; None where all differences are equal
    pairs: int
    test_error: float  # see error_of_test; 0 where the number of videos is not known
    detectable: float  # see detectable

    @property
    def width(self) -> float:
        """Half the width of the interval with both errors, of the seeds and of the test set."""
        return math.hypot(self.half, self.test_error)

    def verdict(self, least: bool = False) -> str:
        """ "ahead" or "behind" where that interval excludes 0, else UNDECIDED. least: whether less is better."""
        if abs(self.difference) <= self.width:
            return UNDECIDED
        return "ahead" if (self.difference > 0) != least else "behind"


def paired(ours: list[float], theirs: list[float], videos: int | None = None) -> Paired:
    """Of equally many accuracies, two or more; those of one seed have one index. videos: in the test."""
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    difference, half = interval(differences)
    assert half is not None
    p = float(ttest_rel(ours, theirs).pvalue) if half else None
    error = error_of_test((statistics.fmean(ours), statistics.fmean(theirs)), videos) if videos else 0.0
    return Paired(difference, half, p, len(ours), error, detectable(statistics.stdev(differences), len(ours)))


def detectable(deviation: float, pairs: int, power: float = 0.8) -> float:
    """The smallest true mean difference that a two-sided paired t test at 5 % finds with this power.

    deviation: standard deviation of the differences of a pair; pairs: two or more.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    freedom, critical = pairs - 1, t.ppf(0.975, pairs - 1)

    def missing(effect: float) -> float:
        return power - nct.sf(critical, freedom, effect * pairs**0.5)  # the other side's share is nothing

    enough = 1.0
    while missing(enough) > 0:
        enough *= 2
    return float(brentq(missing, 0, enough)) * deviation


def error_of_test(percents: tuple[float, float], videos: int) -> float:
    """Half the width of the 95 % interval (%) of the difference of two accuracies that so many test videos leave, as if
    each were tested on videos of its own: an upper bound for two methods on the same videos."""
    variance = sum(percent / 100 * (1 - percent / 100) / videos for percent in percents)
    return 196 * variance**0.5
