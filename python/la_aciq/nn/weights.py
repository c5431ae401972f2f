"""INT4 weights: the codes of a weight matrix, and the clip of each group of them.

Rounding to nearest takes each weight for itself. `feedback` looks at what the layer computes: for its inputs x_t, with
second moments H = sum_t x_t x_t^T, replacing the weight W by Q changes the outputs by

    sum_t |(W - Q) x_t|^2 = tr((W - Q) H (W - Q)^T),

which is quadratic in Q and the same problem for every row. It is made small in three steps:

1. Column after column is rounded, and the columns still to come take over its error as well as they can (GPTQ, Frantar
   et al. 2023). With H^-1 = U^T U, U upper triangular, the error e_j of column j, divided by U_jj, changes column k by
   -U_jk e_j / U_jj.
2. When a group is reached, its clip is the one of least |U_gg^-T e|^2, e the group's errors when it is rounded to
   nearest: what is left of their effect once the later columns have taken over what they can.
3. Coordinate descent over the result (QuantEase, Behdin et al. 2023): group after group, the clip's least squares given
   the codes, and then each code given all others.

H is damped: a small share of its mean diagonal is added to the diagonal, so that inputs that were never seen, or too
few of them, leave the weights they touch rounded to nearest.
"""

import hashlib
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import ops
from ..choices import Codebook

# The clips tried for a group of weights, as shares of its largest magnitude: first coarsely, then around the best of
# those. Over groups of 64 or more Gaussian weights the squared error is within 0.2 % of that of the best of 1001 clips,
# over groups of 16 within 1 %.
_COARSE = [0.4 + 0.05 * i for i in range(17)]
_FINE = [0.01 * i for i in range(-4, 5) if i]
# Weights worked on at once: the three float32 copies of them stay in a core's own cache.
_CHUNK = 1 << 17


def weight_clips(weight: Tensor, group_size: int, codebook: Codebook = "midrise") -> Tensor:
    """The INT4 clip of each group of weights with the least squared error, searched over 25 clips.

    Args:
        weight: [N, K] of any float dtype, finite.
        group_size: weights along K that share a clip; 0 means one group per output.
        codebook: "midrise" or "midtread".

    Returns:
        float32 [N, groups] on the weight's device; a group of zeros gets the clip 0, which dequantizes to exactly 0.
    """
    n, k = weight.shape
    group = group_size or k
    groups = -(-k // group)
    clips = torch.empty((n, groups), dtype=torch.float32, device=weight.device)
    rows_at_once = max(_CHUNK // max(k, 1), 1)
    for start in range(0, n, rows_at_once):
        # A short last group is filled with zeros; `padding` takes their error (a quarter of a step squared in mid-rise)
        # off again.
        rows = nn.functional.pad(weight[start : start + rows_at_once].float(), (0, groups * group - k))
        padding = torch.zeros(groups, dtype=torch.float32, device=weight.device)
        padding[-1] = 0.25 * (groups * group - k) if codebook == "midrise" else 0.0
        clips[start : start + rows_at_once] = _best_clips(rows.view(-1, groups, group), codebook, padding)
    return clips


def _best_clips(rows: Tensor, codebook: Codebook, padding: Tensor) -> Tensor:
    """Clips [rows, groups] of weights [rows, groups, group]; padding [groups] is no weight's share of the error."""
    largest = rows.abs().amax(dim=-1)
    steps_in_largest = 7.5 / largest.clamp(min=torch.finfo(torch.float32).tiny)
    scaled, level = torch.empty_like(rows), torch.empty_like(rows)
    best = torch.full_like(largest, torch.inf)
    best_share = torch.ones_like(largest)

    def attempt(share: Tensor | float) -> None:
        nonlocal best, best_share
        torch.mul(rows, (steps_in_largest / share).unsqueeze(-1), out=scaled)
        if codebook == "midrise":
            scaled.sub_(0.5)  # floor(x) + 1/2 is as far from x as round(x - 1/2) from x - 1/2
        torch.round(scaled, out=level).clamp_(-8, 7).sub_(scaled)
        error = (torch.linalg.vector_norm(level, dim=-1).square() - padding) * share**2
        better = error < best
        best, best_share = torch.where(better, error, best), torch.where(better, share, best_share)

    for share in _COARSE:
        attempt(share)
    coarse = best_share
    for offset in _FINE:
        attempt(coarse + offset)
    return best_share * largest


# Clips tried for a group that is reached by the feedback, as shares of its largest magnitude, and then around the best.
_REACHED = [0.44 + 0.04 * i for i in range(15)]
_AROUND = (-0.02, 0.02)
_DAMPING = 0.01
_SWEEPS = 1
# A clip's least squares are a refinement: one far from the clip searched for comes of rounding errors in H.
_LEAST_RATIO, _LARGEST_RATIO = 0.7, 1.4
# Columns that are rounded before the rest of the matrix hears of it, and weights worked on at once (64 MiB of each of
# five float32 copies).
_BLOCK = 128
_AT_ONCE = 1 << 24


class Rounding:
    """Second moments that weights are rounded by: one input's, made ready once for all the weights that read it.

    Attributes: k: the number of inputs. digest: SHA-256 of the second moments as float32.
    """

    def __init__(self, second_moments: Tensor) -> None:
        """Take the second moments of an input.

        Args:
            second_moments: [K, K], the sum (or any multiple) of x x^T over inputs x, symmetric.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        shape = list(second_moments.shape)
        bad = int((~torch.isfinite(second_moments)).sum())
        if len(shape) != 2 or shape[0] != shape[1] or bad:
            raise ValueError(
                f"second_moments: expected finite values of shape [K, K], got {shape} with {bad} not finite"
            )
        self.k: int = shape[0]
        self._second_moments = second_moments
        self._factors: tuple[Tensor, Tensor] | None = None

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self._second_moments.float().cpu().contiguous().numpy().data).hexdigest()

    def _cholesky(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The damped second moments H and their lower Cholesky factor, float64 [K, K]."""
        damped = _damped(self._second_moments.to(device, torch.float64))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            raise ValueError(
                "second_moments: expected those of some inputs, got a matrix that is not positive semidefinite"
            )
        return damped, lower

    def check(self, device: torch.device) -> None:
        """Raises `ValueError` when the second moments cannot be any inputs': when they are indefinite."""
        if self._factors is None:
            self._cholesky(device)

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """H, damped, and U, upper triangular with U^T U = H^-1: float32 [K, K]. Raises `ValueError` as `check` does."""
        if self._factors is None or self._factors[0].device != device:
            # Of the two Cholesky decompositions the first is of a matrix with the damping on its diagonal.
            damped, lower = self._cholesky(device)
            upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            self._factors = damped.float(), upper.float()
        return self._factors


def quantize_weight(
    weight: Tensor, group_size: int, codebook: Codebook = "midrise", second_moments: Tensor | Rounding | None = None
) -> tuple[Tensor, Tensor]:
    """INT4 codes and clips of a weight, each group with its own clip.

    Args:
        weight: [N, K] of any float dtype, finite.
        group_size: weights along K that share a clip; 0 means one group per output.
        codebook: "midrise" or "midtread".
        second_moments: [K, K], the sum (or any multiple) of x x^T over inputs x of the layer, symmetric and finite, or
            the `Rounding` made of them; with it the weights are rounded with error feedback, without it to nearest.

    Returns:
        Codes uint8 [N, ceil(K / 2)] and clips float32 [N, groups], on the weight's device.

    Raises:
        ValueError: second moments that do not fit the weight, or that cannot be any inputs'.
    """
    if second_moments is None:
        values, clips = weight.float(), weight_clips(weight, group_size, codebook)
    else:
        values, clips = feedback(weight, second_moments, group_size, codebook)
    row = torch.arange(weight.shape[0], dtype=torch.int32, device=weight.device)
    # Each output is a "language" with an entry in the table of clips. Feedback returns values of the codebook already;
    # to quantize them is to look up their codes.
    codes: Tensor = ops.quantize(values, clips, row, group_size=group_size, codebook=codebook)
    return codes, clips


def feedback(
    weight: Tensor, second_moments: Tensor | Rounding, group_size: int, codebook: Codebook = "midrise"
) -> tuple[Tensor, Tensor]:
    """Values of the codebook, float32 [N, K], and clips, float32 [N, groups], with a small error of the layer's output.

    This module's text says how. Time and memory: about 3 N K^2 multiplications and 6 float64 matrices [K, K].

    Args:
        weight: as in `quantize_weight`.
        second_moments: as in `quantize_weight`.
        group_size: as in `quantize_weight`.
        codebook: as in `quantize_weight`.

    Returns:
        The values and the clips, on the weight's device.

    Raises:
        ValueError: as `quantize_weight`.
    """
    n, k = weight.shape
    rounding = second_moments if isinstance(second_moments, Rounding) else Rounding(second_moments)
    if rounding.k != k:
        raise ValueError(
            f"second_moments: expected finite values of shape {[k, k]} for a weight of shape {[n, k]}, got shape "
            f"{[rounding.k, rounding.k]}"
        )
    problem = _Problem(*rounding.factors(weight.device), group_size or k, 0.5 * (codebook == "midrise"))
    values = torch.empty((n, k), dtype=torch.float32, device=weight.device)
    clips = torch.empty((n, -(-k // problem.group)), dtype=torch.float32, device=weight.device)
    rows_at_once = max(_AT_ONCE // max(k, 1), 1)
    for start in range(0, n, rows_at_once):
        rows = slice(start, start + rows_at_once)
        columns = weight[rows].float().T.contiguous()  # [K, rows]: a column of the weight lies together
        rounded, steps = problem.round(columns.clone())
        for _ in range(_SWEEPS):
            problem.descend(columns, rounded, steps)
        values[rows], clips[rows] = rounded.T, steps.T * 7.5
    return values, clips


def _damped(h: Tensor) -> Tensor:
    """H [K, K], divided by its mean diagonal and damped; an input that was never other than zero gets a diagonal of
    one.
    """
    diagonal = h.diagonal().clone()
    seen = diagonal > 0
    mean = diagonal[seen].mean() if bool(seen.any()) else diagonal.new_ones(())
    h = h / mean
    h.diagonal().copy_(torch.where(seen, diagonal / mean, 1.0) + _DAMPING)
    return h


class _Problem:
    """Rounding columns [K, rows] of a weight, the transpose of some of its rows, under damped second moments.

    h: [K, K]. u: upper triangular with u^T u = h^-1. group: columns that share a clip. half: 0.5 where the codebook's
    values are odd multiples of half a step, 0 where they are multiples of a step.
    """

    def __init__(self, h: Tensor, u: Tensor, group: int, half: float) -> None:
        self.h, self.u, self.group, self.half = h, u, group, half

    def nearest(self, x: Tensor, step: Tensor) -> Tensor:
        """The value of the codebook nearest x, elementwise; a step of 0 has the value 0 alone."""
        level = (x / step.clamp(min=torch.finfo(torch.float32).tiny)).sub_(self.half).round_().clamp_(-8, 7)
        return level.add_(self.half).mul_(step)

    def round(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Values [K, rows] and steps [groups, rows]; `columns` is used up."""
        k = len(columns)
        values = torch.empty_like(columns)
        steps = torch.empty((-(-k // self.group), columns.shape[1]), dtype=columns.dtype, device=columns.device)
        for i, (first, last) in enumerate(_spans(0, k, self.group)):
            steps[i] = self._reached(columns, first, last)
            for a, b in _spans(first, last, _BLOCK):
                errors = torch.empty_like(columns[a:b])
                for j in range(a, b):
                    values[j] = self.nearest(columns[j], steps[i])
                    errors[j - a] = (columns[j] - values[j]) / self.u[j, j]
                    columns[j + 1 : b].addr_(self.u[j, j + 1 : b], errors[j - a], alpha=-1)
                columns[b:].addmm_(self.u[a:b, b:].T, errors, alpha=-1)
        return values, steps

    def _reached(self, columns: Tensor, first: int, last: int) -> Tensor:
        """The steps [rows] of the group of these columns."""
        group = columns[first:last]
        # Within a group of several blocks each block's errors are weighed for themselves.
        weigh = [
            (a - first, b - first, torch.linalg.inv(self.u[a:b, a:b]).T.contiguous())
            for a, b in _spans(first, last, _BLOCK)
        ]
        largest = group.abs().amax(dim=0) / 7.5
        best, best_share = torch.full_like(largest, torch.inf), torch.ones_like(largest)

        def attempt(share: Tensor) -> None:
            nonlocal best, best_share
            errors = group - self.nearest(group, share * largest)
            error = sum(((m @ errors[a:b]).square().sum(dim=0) for a, b, m in weigh), torch.zeros_like(largest))
            better = error < best
            best, best_share = torch.where(better, error, best), torch.where(better, share, best_share)

        for share in _REACHED:
            attempt(torch.full_like(largest, share))
        coarse = best_share
        for offset in _AROUND:
            attempt(coarse + offset)
        return best_share * largest

    def descend(self, columns: Tensor, values: Tensor, steps: Tensor) -> None:
        """One sweep of coordinate descent from values [K, rows] and steps [groups, rows], in place."""
        pull = self.h @ (columns - values)  # minus half the error's gradient
        for i, (first, last) in enumerate(_spans(0, len(columns), self.group)):
            h = self.h[first:last, first:last].contiguous()
            group, before = values[first:last], values[first:last].clone()
            local = pull[first:last].clone()
            tiny = torch.finfo(torch.float32).tiny
            # The step, given the codes: values are step * levels.
            levels = group / steps[i].clamp(min=tiny)
            ratio = 1 + (levels * local).sum(dim=0) / ((levels * (h @ levels)).sum(dim=0) * steps[i]).clamp(min=tiny)
            ratio = torch.where((ratio > _LEAST_RATIO) & (ratio < _LARGEST_RATIO), ratio, 1.0)
            steps[i] *= ratio
            group *= ratio
            local.addmm_(h, group - before, alpha=-1)
            # The codes, each given all others.
            for a, b in _spans(0, last - first, _BLOCK):
                start = group[a:b].clone()
                for j in range(a, b):
                    old = group[j].clone()
                    group[j] = self.nearest(old + local[j] / h[j, j], steps[i])
                    local[j + 1 : b].addr_(h[j, j + 1 : b], group[j] - old, alpha=-1)
                local[b:].addmm_(h[b:, a:b], group[a:b] - start, alpha=-1)
            pull.addmm_(self.h[:, first:last], group - before, alpha=-1)


def _spans(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """[first, last) in pieces of `size`, the last one maybe shorter."""
    return [(a, min(a + size, last)) for a in range(first, last, size)]
