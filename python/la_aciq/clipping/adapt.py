"""Clips that follow what is served: one fixed-point step from the tail sums that the quantize kernel returns.

Under the convex model the best clip of a law is the root of E(|X| - a)+ = c a, with c = 1 / (3 (2^B - 1)^2). Newton's
step for it needs nothing but sums over the clipped values,

    a <- E(|X|; |X| > a) / (P(|X| > a) + c),

which is OCTAV's iteration (Sakr et al. 2022) with the density inside the clip left in. Tables hold clips of the exact
error, which lie elsewhere, and groups differ; so each entry has a c of its own, the one whose root on the calibration
data is the entry itself. Then nothing moves while the data stay as they were calibrated, a law that is scaled moves its
clip by the same scale, and one that changes shape moves it to where it clips the same share relative to its size.

A step is damped and bounded, needs a number of values, and leaves every entry that has too few as it is. Everything
here is a function of values: a server keeps the `Adapted` it uses, and the one before it to go back to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._deprecated import old_arguments, old_fields
from .checks import Array, number, real_array


@dataclass(frozen=True)
class AdaptationRule:
    """How far and how fast clips may move.

    minimum: values of an entry and group that a step of its clip needs. damping: the share of the step, in logarithms,
    that is taken. step: the largest factor, up or down, of one step. span: the largest factor between a clip and the
    calibrated one, up or down.
    """

    minimum: int = 16384
    damping: float = 0.5
    step: float = 1.25
    span: float = 4.0

    def __post_init__(self) -> None:
        if number("minimum", self.minimum) < 1:
            raise ValueError(f"minimum: expected at least 1 value, got {self.minimum}")
        for name in ("damping", "step", "span"):
            number(name, getattr(self, name))
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a number above 0 and at most 1, got {self.damping}")
        for name in ("step", "span"):
            if not 1 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}: expected a finite factor above 1, got {getattr(self, name)}")


@old_fields(alpha="clips")
@dataclass(frozen=True)
class Adapted:
    """The clips of one layer as they are now.

    Attributes:
        clips: float64 [entries, groups], in units of the layer's input.
        calibrated: float64 [entries, groups], where they started.
        balance: c of each clip, float64 [entries, groups]; NaN where calibration had no values beyond the clip. Such a
            clip never moves.
        moved: int64 [entries], the steps that each entry has taken.
        version: how many updates there were; an update that moves nothing does not count.
    """

    clips: Array
    calibrated: Array
    balance: Array
    moved: NDArray[np.int64]
    version: int = 0


@old_arguments(alpha="clips")
def start(clips: ArrayLike, tail_sums: ArrayLike) -> Adapted:
    """Clips as calibrated.

    Args:
        clips: [entries, groups], finite and positive.
        tail_sums: float64 [entries, groups, 3 or more] of the calibration data at these clips: the number of values,
            of those above the clip in magnitude, and the latter's sum of magnitudes (as `quantize(...,
            tail_sums=True)` returns them, or from `SiteStats.tail_sums`).

    Returns:
        The clips, which `update` moves.

    Raises:
        TypeError: an argument does not hold real numbers.
        ValueError: clips that are not finite and positive, or sums that no values have at these clips.
    """
    table = real_array("clips", clips)
    if table.ndim != 2 or not np.all(np.isfinite(table) & (table > 0)):
        raise ValueError(f"clips: expected finite and positive [entries, groups], got shape {list(table.shape)}")
    count, clipped, total = _checked(tail_sums, table)
    with np.errstate(divide="ignore", invalid="ignore"):
        balance = (total / table - clipped) / count
    # Calibration data that were never clipped have no balance to keep.
    balance = np.where(balance > 0, balance, np.nan)
    return Adapted(table, table.copy(), balance, np.zeros(len(table), dtype=np.int64))


@old_arguments(rows="entries")
def update(
    now: Adapted, tail_sums: ArrayLike, entries: Sequence[int] | None = None, rule: AdaptationRule | None = None
) -> Adapted:
    """The clips after one step, for the values that were quantized with `now.clips`.

    Args:
        now: the clips before the step.
        tail_sums: as for `start`, of what was served since the last update.
        entries: indices of the entries that may move. None: all. An entry that was not served has no values and does
            not move either.
        rule: how far clips may move. None: `AdaptationRule()`.

    Returns:
        The clips after the step: `now` itself where nothing moves.

    Raises:
        TypeError: the sums are not real numbers.
        ValueError: sums that cannot be, such as more values clipped than there were. The caller keeps `now`.
    """
    rule = rule or AdaptationRule()
    count, clipped, total = _checked(tail_sums, now.clips)
    may = np.zeros(now.clips.shape, dtype=bool)
    may[slice(None) if entries is None else list(entries)] = True
    may &= (count >= rule.minimum) & np.isfinite(now.balance)
    with np.errstate(divide="ignore", invalid="ignore"):
        target = (total / count) / (clipped / count + now.balance)
        # No value was clipped: the root is below, but by how much the sums do not say.
        factor = np.where(clipped > 0, target / now.clips, 1 / rule.step)
        factor = np.exp(rule.damping * np.log(np.clip(factor, rule.step**-4, rule.step**4)))
        factor = np.clip(factor, 1 / rule.step, rule.step)
        moved = np.clip(now.clips * factor, now.calibrated / rule.span, now.calibrated * rule.span)
    clips = np.where(may, moved, now.clips)
    changed = clips != now.clips
    if not changed.any():
        return now
    return replace(now, clips=clips, moved=now.moved + changed.any(axis=1), version=now.version + 1)


@old_arguments(rows="entries")
def rolled_back(now: Adapted, entries: Sequence[int] | None = None) -> Adapted:
    """The calibrated clips again, as a new version.

    Args:
        now: the clips that moved.
        entries: indices of the entries to roll back. None: all.

    Returns:
        The clips, with the version after `now`'s.
    """
    again = slice(None) if entries is None else list(entries)
    clips, moved = now.clips.copy(), now.moved.copy()
    clips[again], moved[again] = now.calibrated[again], 0
    return replace(now, clips=clips, moved=moved, version=now.version + 1)


def _checked(tail_sums: ArrayLike, clips: Array) -> tuple[Array, Array, Array]:
    """Count, clipped count and clipped sum, [entries, groups] each, when they can be those of values at these clips."""
    sums = real_array("tail_sums", tail_sums)
    if sums.ndim != 3 or sums.shape[:2] != clips.shape or sums.shape[2] < 3:
        raise ValueError(f"tail_sums: expected shape {[*clips.shape, 3]} or more sums, got {list(sums.shape)}")
    count, clipped, total = sums[..., 0], sums[..., 1], sums[..., 2]
    # Sums of float32 magnitudes; the table may hold the clip in float32.
    possible = (clipped >= 0) & (clipped <= count) & (total >= clipped * clips * (1 - 1e-6)) & np.isfinite(total)
    possible &= np.isfinite(count) & ((clipped > 0) | (total == 0))
    if not possible.all():
        entry, group = np.argwhere(~possible)[0]
        raise ValueError(
            f"tail_sums: expected those of values at these clips, got {sums[entry, group, :3].tolist()} "
            f"(values, clipped, sum of clipped) at the clip {clips[entry, group]} for entry {entry}, group {group}"
        )
    return count, clipped, total
