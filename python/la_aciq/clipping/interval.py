"""A 95 % interval on the convex model's best clip of the law that samples come from.

At the best clip alpha of a law E(|X| - alpha)+ = c alpha, c = 1 / (3 K). Whether a clip may be the law's is thus a test
of a mean, and the interval holds the clips that the test does not reject: a score interval (Rao; Wilson 1927 for a
proportion). It needs no symmetry of the estimate's error. Two things are taken from the hypothesis instead of the
sample, which has few values beyond the clip:

- the mean excess is c alpha, so that its second moment is c alpha times the ratio E((|X| - a)+)^2 / E(|X| - a)+ of the
  values seen beyond the smaller a of alpha and the estimate;
- the third moment likewise, whose effect on the test's level is removed to first order (Cornish and Fisher 1938).

What is left is of second order in the statistic's skewness over sqrt(n), which grows with the tail and falls with the
number of values beyond the clip. Beyond `MOST_SKEWNESS` there is no interval. A third of the samples, drawn by a seed
made of their values, decides that, and the others give the interval: samples that decided on themselves would pass
where their tail is heavier than the law's, and miss its clip more often. benchmarks/results/clip-intervals.json has the
simulated coverage.

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
MOST_SKEWNESS = 0.25
LEAST_SAMPLES = 256


def clip_interval(samples: Array, alpha: float, bits: int) -> tuple[float, float] | None:
    """The interval in units of X, or None where it would not hold.

    Args:
        samples: float64 [n], drawn independently.
        alpha: their best clip under the convex model.
        bits: 2 to 8.
    """
    x = np.sort(np.abs(samples))
    if len(x) < LEAST_SAMPLES:
        return None
    # The seed is of the values: the same ranks in every sample would not be an independent part of it.
    deciding = np.random.default_rng(zlib.crc32(x.tobytes())).permutation(len(x)) < len(x) // 3
    decision, rest = _Score(x[deciding], alpha, bits), _Score(x[~deciding], alpha, bits)
    _, skewness = decision.at(np.array([alpha]))
    if not skewness[0] * np.sqrt(deciding.sum() / (~deciding).sum()) <= MOST_SKEWNESS:
        return None
    low, high = rest.end(_NORMAL), rest.end(-_NORMAL)
    return None if low is None or high is None else (min(low, alpha), max(high, alpha))


class _Score:
    """The test of every clip, from sums of powers beyond it, in units of the estimate."""

    def __init__(self, magnitudes: Array, alpha: float, bits: int) -> None:
        self.alpha, self.c = alpha, noise_factor(bits)
        self.x = magnitudes / alpha
        self.sums = [np.concatenate([np.cumsum((self.x**k)[::-1])[::-1], [0.0]]) / len(self.x) for k in range(4)]

    def _excess(self, a: Array) -> tuple[Array, Array, Array]:
        """E((|X| - a)+)^k of the samples for k = 1, 2, 3."""
        s = [total[np.searchsorted(self.x, a, side="right")] for total in self.sums]
        return (
            s[1] - a * s[0],
            s[2] - 2 * a * s[1] + a**2 * s[0],
            s[3] - 3 * a * s[2] + 3 * a**2 * s[1] - a**3 * s[0],
        )

    def at(self, clips: Array) -> tuple[Array, Array]:
        """Normal deviate of clips [clips], and skewness over sqrt(n); positive where a clip is below the law's."""
        a = clips / self.alpha
        mean = self.c * a
        first, second, third = self._excess(np.minimum(a, 1.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            second, third = mean * second / first, mean * third / first
            variance = second - mean**2
            skewness = (third - 3 * mean * second + 2 * mean**3) / variance**1.5 / np.sqrt(len(self.x))
            deviate = (self._excess(a)[0] - mean) / np.sqrt(variance / len(self.x))
            z = deviate - skewness * (deviate**2 - 1) / 6
        return z, np.where(np.isfinite(skewness), skewness, np.inf)

    def end(self, level: float) -> float | None:
        """The first clip outward from the estimate whose deviate is `level`; None without one in a factor 4."""
        clips = self.alpha * np.geomspace(1, 0.25 if level > 0 else 4, 281)
        for _ in range(3):
            z, _skewness = self.at(clips)
            beyond = np.flatnonzero((z - level) * np.sign(level) >= 0)
            if not beyond.size:
                return None
            first = max(int(beyond[0]), 1)
            clips = np.linspace(clips[first - 1], clips[first], 65)
        return float(clips[-1])
