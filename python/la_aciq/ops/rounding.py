"""INT4 weights rounded with error feedback, in PyTorch and any floating-point dtype.

In float64 this is the definition (`reference.round_weights`), in float32 what runs on CUDA tensors.
la_aciq/nn/weights.py says where the steps come from.

1. Column after column is rounded, and the columns still to come take over its error as well as they can.
2. When a group is reached, its clip is the one of least |U_gg^-T e|^2, e the group's errors when it is rounded to
   nearest. Within a group of several blocks each block's errors are weighed for themselves.
3. A sweep of coordinate descent: group after group, the clip's least squares given the codes, and then each code given
   all others.
"""

import torch
from torch import Tensor

# Clips tried for a group that is reached, as shares of its largest magnitude, and then around the best.
_SHARES = [0.44 + 0.04 * i for i in range(15)]
_AROUND = (-0.02, 0.02)
# A clip's least squares are a refinement: one far from the clip searched for comes of rounding errors in H.
_LEAST_RATIO, _LARGEST_RATIO = 0.7, 1.4
# Columns that are rounded before the rest of the matrix hears of it, and whose errors are weighed together.
_BLOCK = 128
# Weights worked on at once (64 MiB of each of five float32 copies).
_AT_ONCE = 1 << 24


def round_weights(
    weight: Tensor, second_moments: Tensor, factor: Tensor, group_size: int, codebook: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] in 0 .. 15, not packed, and clips float32 [N, groups]; computed in `dtype`."""
    n, k = weight.shape
    group = min(group_size, k) if group_size else k
    half = 0.5 if codebook == "midrise" else 0.0
    problem = _Problem(second_moments.to(dtype), factor.to(dtype), group, half)
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    clips = torch.empty((n, -(-k // group)), dtype=torch.float32, device=weight.device)
    rows_at_once = max(_AT_ONCE // max(k, 1), 1)
    for start in range(0, n, rows_at_once):
        rows = slice(start, start + rows_at_once)
        columns = weight[rows].to(dtype).T.contiguous()  # [K, rows]: a column of the weight lies together
        levels, steps = problem.round(columns.clone())
        problem.descend(columns, levels, steps)
        # A group whose clip is 0 has the value 0, whatever its codes: that nearest zero.
        zero = steps.repeat_interleave(group, dim=0)[:k] <= 0
        codes[rows] = torch.where(zero, 8, levels - half + 8).T.to(torch.uint8)
        clips[rows] = (steps * 7.5).T.float()
    return codes, clips


class _Problem:
    """Rounding columns [K, rows] of a weight, the transpose of some of its rows, under damped second moments.

    h: [K, K]. u: upper triangular with u^T u = h^-1. group: columns that share a clip. half: 0.5 where the codebook's
    values are odd multiples of half a step, 0 where they are multiples of a step. Levels are values in steps.
    """

    def __init__(self, h: Tensor, u: Tensor, group: int, half: float) -> None:
        self.h, self.u, self.group, self.half = h, u, group, half
        self.tiny = torch.finfo(torch.float32).tiny

    def nearest(self, x: Tensor, step: Tensor) -> Tensor:
        """The level nearest x, elementwise; a step of 0 has the value 0 alone."""
        level = (x / step.clamp(min=self.tiny)).sub_(self.half).round_().clamp_(-8, 7)
        return level.nan_to_num_(nan=0.0).add_(self.half)

    def round(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [K, rows] and steps [groups, rows]; `columns` is used up."""
        k = len(columns)
        levels = torch.empty_like(columns)
        steps = torch.empty((-(-k // self.group), columns.shape[1]), dtype=columns.dtype, device=columns.device)
        for i, (first, last) in enumerate(_spans(0, k, self.group)):
            steps[i] = self._reached(columns, first, last)
            for a, b in _spans(first, last, _BLOCK):
                errors = torch.empty_like(columns[a:b])
                for j in range(a, b):
                    levels[j] = self.nearest(columns[j], steps[i])
                    errors[j - a] = (columns[j] - levels[j] * steps[i]) / self.u[j, j]
                    columns[j + 1 : b].addr_(self.u[j, j + 1 : b], errors[j - a], alpha=-1)
                columns[b:].addmm_(self.u[a:b, b:].T, errors, alpha=-1)
        return levels, steps

    def _reached(self, columns: Tensor, first: int, last: int) -> Tensor:
        """The steps [rows] of the group of these columns."""
        group = columns[first:last]
        weigh = [
            (a - first, b - first, torch.linalg.inv(self.u[a:b, a:b]).T.contiguous())
            for a, b in _spans(first, last, _BLOCK)
        ]
        largest = group.abs().amax(dim=0) / 7.5
        best, best_share = torch.full_like(largest, torch.inf), torch.ones_like(largest)

        def attempt(share: Tensor) -> None:
            nonlocal best, best_share
            step = share * largest
            errors = group - self.nearest(group, step) * step
            error = sum(((m @ errors[a:b]).square().sum(dim=0) for a, b, m in weigh), torch.zeros_like(largest))
            better = error < best
            best, best_share = torch.where(better, error, best), torch.where(better, share, best_share)

        for share in _SHARES:
            attempt(torch.full_like(largest, share))
        coarse = best_share
        for offset in _AROUND:
            attempt(coarse + offset)
        return best_share * largest

    def descend(self, columns: Tensor, levels: Tensor, steps: Tensor) -> None:
        """One sweep of coordinate descent from levels [K, rows] and steps [groups, rows], in place."""
        values = levels * steps.repeat_interleave(self.group, dim=0)[: len(columns)]
        pull = self.h @ (columns - values)  # minus half the error's gradient
        for i, (first, last) in enumerate(_spans(0, len(columns), self.group)):
            h = self.h[first:last, first:last].contiguous()
            group, before = values[first:last], values[first:last].clone()
            group_levels, local = levels[first:last], pull[first:last].clone()
            # The step, given the codes.
            curvature = (group_levels * (h @ group_levels)).sum(dim=0) * steps[i]
            ratio = 1 + (group_levels * local).sum(dim=0) / curvature.clamp(min=self.tiny)
            ratio = torch.where((ratio > _LEAST_RATIO) & (ratio < _LARGEST_RATIO), ratio, 1.0)
            steps[i] *= ratio
            group *= ratio
            local.addmm_(h, group - before, alpha=-1)
            # The codes, each given all others.
            for a, b in _spans(0, last - first, _BLOCK):
                start = group[a:b].clone()
                for j in range(a, b):
                    old = group[j].clone()
                    group_levels[j] = self.nearest(old + local[j] / h[j, j], steps[i])
                    group[j] = group_levels[j] * steps[i]
                    local[j + 1 : b].addr_(h[j, j + 1 : b], group[j] - old, alpha=-1)
                local[b:].addmm_(h[b:, a:b], group[a:b] - start, alpha=-1)
            pull.addmm_(self.h[:, first:last], group - before, alpha=-1)


def _spans(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """[first, last) in pieces of `size`, the last one maybe shorter."""
    return [(a, min(a + size, last)) for a in range(first, last, size)]
