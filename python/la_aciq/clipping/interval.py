"""A 95 % interval on the convex model's best clip of the law that samples come from.

At the best clip alpha of a law E(|X| - alpha)+ = c alpha, c = 1 / (3 K). Whether a clip may be the law's is thus a test
of a mean, and the interval holds the clips that the test does not reject: a score interval (Rao; Wilson 1927 for a
proportion). It needs no symmetry of the estimate's error. The hypothesis gives the mean excess, m = c alpha; the second
and third moments of the excess are m times their ratios to the mean among the values seen beyond the smaller one of
alpha and the estimate.

Let d be the mean excess less m in standard deviations, gamma the skewness of the mean of n excesses, and q the
covariance of that mean with the estimated variance, each in standard deviations or relative. With e_k the moments of
the excess, v = e_2 - m^2 its variance:

    gamma = (e_3 - 3 m e_2 + 2 m^3) / (v^1.5 sqrt n),    q = (e_3 / e_2 - e_2 / m) e_2 / (v^1.5 sqrt n).

To first order in 1 / sqrt n the statistic d has the mean -q / 2 and the third cumulant gamma - 3 q, so that

    z = d - gamma (d^2 - 1) / 6 + q d^2 / 2

is a normal deviate (Cornish and Fisher 1938; Hall 1992 for a mean in units of its estimated deviation). Without q,
samples whose large values are missing, which have a small mean and a small variance, would put the interval below the
law's clip two to three times as often as above it.

What is left is of second order: it grows with the tail, and falls with the number of values beyond the clip. Where
gamma, under the hypothesis or as the values have it, is above `MOST_SKEWNESS` there is no interval. A third of the
samples decides that, and the others give the interval: samples that decided on themselves would pass where their tail
is lighter than the law's, and miss its clip more often. The third is drawn by a seed made of the values: the same ranks
in every sample would not be an independent part of it. benchmarks/results/clip-intervals.json has the simulated
coverage.

The other objectives have no interval. The in-range error of samples jumps at every value, so that its minimizer has no
normal limit. The exact error of samples is rough, as values pass thresholds within the width of an interval; no
interval has been validated for it, so none is given.
"""

from __future__ import annotations

import zlib

import numpy as np

from .checks import Array
from .objectives import noise_factor

_NORMAL = 1.959963985  # of which 95 % of a normal deviate are smaller in magnitude
MOST_SKEWNESS = 0.15
LEAST_SAMPLES = 256
# The ends are at most this factor from the estimate, so that values below the estimate over it play no part.
REACH = 1.25


def clip_interval(samples: Array, alpha: float, bits: int) -> tuple[float, float] | None:
    """The interval in units of X, or None where it would not hold.

    Args:
        samples: float64 [n], drawn independently.
        alpha: their best clip under the convex model.
        bits: 2 to 8.
    """
    magnitudes = np.abs(samples)
    return tail_interval(np.sort(magnitudes[magnitudes > alpha / REACH]), len(samples), alpha, bits)


def tail_interval(tail: Array, n: int, alpha: float, bits: int) -> tuple[float, float] | None:
    """`clip_interval` of n samples, of which `tail` are the magnitudes above alpha / REACH, ascending."""
    if n < LEAST_SAMPLES:
        return None
    rng = np.random.default_rng(zlib.crc32(tail.tobytes()))
    deciding = rng.random(len(tail)) < 1 / 3
    n_deciding = int(deciding.sum()) + int(rng.binomial(n - len(tail), 1 / 3))
    decision = _Score(tail[deciding], n_deciding, alpha, bits)
    rest = _Score(tail[~deciding], n - n_deciding, alpha, bits)
    if not decision.skewness() * np.sqrt(n_deciding / max(n - n_deciding, 1)) <= MOST_SKEWNESS:
        return None
    low, high = rest.end(_NORMAL), rest.end(-_NORMAL)
    return None if low is None or high is None else (min(low, alpha), max(high, alpha))


class _Score:
    """The test of every clip, from sums of powers beyond it, in units of the estimate."""

    def __init__(self, tail: Array, n: int, alpha: float, bits: int) -> None:
        self.alpha, self.n, self.c = alpha, n, noise_factor(bits)
        self.x = tail / alpha
        self.sums = [np.concatenate([np.cumsum((self.x**k)[::-1])[::-1], [0.0]]) / max(n, 1) for k in range(4)]

    def _excess(self, a: Array) -> tuple[Array, Array, Array]:
        """E((|X| - a)+)^k of the samples for k = 1, 2, 3."""
        s = [total[np.searchsorted(self.x, a, side="right")] for total in self.sums]
        return (
            s[1] - a * s[0],
            s[2] - 2 * a * s[1] + a**2 * s[0],
            s[3] - 3 * a * s[2] + 3 * a**2 * s[1] - a**3 * s[0],
        )

    def skewness(self) -> float:
        """gamma at the estimate: the larger one of what the hypothesis gives and what the values give.

        A few values that happen to lie just above the clip would let the hypothesis expect many of them. The values'
        skewness is at least 1 / sqrt of how many they are.
        """
        one = np.ones(1)
        _, second, third = self._excess(one)
        with np.errstate(divide="ignore", invalid="ignore"):
            seen = third / second**1.5 / np.sqrt(self.n)
        _, expected = self.at(one * self.alpha)
        largest = float(np.maximum(seen, expected)[0])
        return largest if np.isfinite(largest) else np.inf

    def at(self, clips: Array) -> tuple[Array, Array]:
        """Normal deviate of clips [clips], positive where a clip is below the law's, and gamma under its hypothesis."""
        a = clips / self.alpha
        mean = self.c * a
        first, second, third = self._excess(np.minimum(a, 1.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            second, third = mean * second / first, mean * third / first
            variance = second - mean**2
            scale = variance**1.5 * np.sqrt(self.n)
            skewness = (third - 3 * mean * second + 2 * mean**3) / scale
            covariance = (third - second**2 / mean) / scale
            deviate = (self._excess(a)[0] - mean) / np.sqrt(variance / self.n)
            z = deviate - skewness * (deviate**2 - 1) / 6 + covariance * deviate**2 / 2
        return z, skewness

    def end(self, level: float) -> float | None:
        """The first clip outward from the estimate whose deviate is `level`; None without one in a factor `REACH`."""
        clips = self.alpha * np.geomspace(1, 1 / REACH if level > 0 else REACH, 65)
        for _ in range(3):
            z, _skewness = self.at(clips)
            beyond = np.flatnonzero((z - level) * np.sign(level) >= 0)
            if not beyond.size:
                return None
            first = max(int(beyond[0]), 1)
            clips = np.linspace(clips[first - 1], clips[first], 65)
        return float(clips[-1])
