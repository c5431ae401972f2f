"""INT4 weights: the codes of a weight matrix, and the clip of each group of them.

Rounding to nearest takes each weight for itself. Error feedback looks at what the layer computes: for its inputs x_t,
with second moments H = sum_t x_t x_t^T, replacing the weight W by Q changes the outputs by

    sum_t |(W - Q) x_t|^2 = tr((W - Q) H (W - Q)^T),

which is quadratic in Q and the same problem for every row. `ops.round_weights` makes it small in three steps:

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
from collections.abc import Iterator
from contextlib import contextmanager
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


_DAMPING = 0.01
# LAPACK hands matrices that are smaller to threads in pieces so short that one thread that is not running holds up the
# other: beside a busy process, 1536 inputs took ten times as long with two threads as with one.
_THREADS_FROM = 4096
# A triangular matrix this small is inverted column by column.
_SMALL = 192


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

    def _decomposed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The damped second moments H and R, upper triangular with R R^T = H: float64 [K, K]."""
        damped = _damped(self._second_moments.to(device, torch.float64))
        # The lower Cholesky factor of the reversed matrix, reversed.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if bool(failed):
            raise ValueError(
                "second_moments: expected those of some inputs, got a matrix that is not positive semidefinite"
            )
        return damped, lower.flip(0, 1)

    def check(self, device: torch.device) -> None:
        """Raises `ValueError` when the second moments cannot be any inputs': when they are indefinite."""
        if self._factors is None:
            with _few_threads(self.k, device):
                self._decomposed(device)

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """H, damped, and U, upper triangular with U^T U = H^-1: float32 [K, K]. Raises `ValueError` as `check` does."""
        if self._factors is None or self._factors[0].device != device:
            with _few_threads(self.k, device):
                damped, upper = self._decomposed(device)
                self._factors = damped.float(), _inverse(upper).float()
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
        clips = weight_clips(weight, group_size, codebook)
        row = torch.arange(weight.shape[0], dtype=torch.int32, device=weight.device)
        # Each output is a "language" with an entry in the table of clips.
        codes: Tensor = ops.quantize(weight.float(), clips, row, group_size=group_size, codebook=codebook)
        return codes, clips
    n, k = weight.shape
    rounding = second_moments if isinstance(second_moments, Rounding) else Rounding(second_moments)
    if rounding.k != k:
        raise ValueError(
            f"second_moments: expected finite values of shape {[k, k]} for a weight of shape {[n, k]}, got shape "
            f"{[rounding.k, rounding.k]}"
        )
    factors = rounding.factors(weight.device)
    if weight.dtype == torch.float64:
        weight = weight.float()
    return ops.round_weights(weight, *factors, group_size=group_size, codebook=codebook)


@contextmanager
def _few_threads(k: int, device: torch.device) -> Iterator[None]:
    """Runs linear algebra on [K, K] matrices on one thread where more do not pay (`_THREADS_FROM`)."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or k >= _THREADS_FROM or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix [K, K], by products of its halves: half as long as solving for it."""
    k = len(upper)
    if k <= _SMALL:
        identity = torch.eye(k, dtype=upper.dtype, device=upper.device)
        solved: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return solved
    half = k // 2
    inverse = torch.zeros_like(upper)
    inverse[:half, :half] = _inverse(upper[:half, :half])
    inverse[half:, half:] = _inverse(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ (upper[:half, half:] @ inverse[half:, half:])
    return inverse


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
