"""Losses of a model on text, and how sure one can be of a difference between two models' losses.

All differences are paired: both models read the same windows, and the bootstrap resamples segments of them. A segment
is up to 128 consecutive predicted tokens of one window; losses within a text are correlated over short distances, and
a segment is long enough to carry most of that correlation inside it.

The intervals are about the stretch of text that was read: they say how another draw of such segments would differ, not
how another document, let alone another language, would.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..calibration import Window
from ..errors import LaAciqError
from ..nn import language

Float64 = NDArray[np.float64]

SEGMENT = 128  # predicted tokens
TAIL_NATS = 0.5  # per token; about the loss of going from one good model to one a quarter of its size
RESAMPLES = 2000
CONFIDENCE = 0.95
_RESAMPLES_AT_ONCE = 1 << 22  # entries of the matrix of counts


def token_losses(
    model: nn.Module, windows: Sequence[Window], tag: str, step: Callable[[], object] | None = None
) -> list[NDArray[np.float32]]:
    """Negative log-likelihood, in nats, of each predicted token: float32 [t - 1] per window of t ids.

    The windows are read one at a time under the language `tag`. `step` is called after each, for progress.
    """
    device = next(model.parameters()).device
    losses = []
    for window in windows:
        ids = torch.from_numpy(np.ascontiguousarray(window.ids)).to(device)
        with torch.inference_mode(), language(tag):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            nats = nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
        if not bool(torch.isfinite(nats).all()):
            raise LaAciqError(
                f"the model's loss on the text for {tag!r} is not finite; its weights or dtype are broken"
            )
        losses.append(nats.float().cpu().numpy())
        if step is not None:
            step()
    return losses


def segment_sums(values: Sequence[NDArray[np.generic]]) -> Float64:
    """Sums over the segments of each window: float64 [segments], windows one after the other."""
    return np.concatenate([np.add.reduceat(v.astype(np.float64), np.arange(0, len(v), SEGMENT)) for v in values])


def bootstrap_ratios(
    numerator: Float64, denominator: Float64, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = 0
) -> Float64:
    """sum(numerator) / sum(denominator) over segments drawn with replacement: float64 [resamples].

    numerator, denominator: float64 [segments], the latter positive in sum. The same seed draws the same segments, so
    that replicates of two quantities on the same segments are paired.
    """
    n = len(numerator)
    random = np.random.default_rng(seed)
    both = np.stack([numerator, denominator], axis=1)
    at_once = max(_RESAMPLES_AT_ONCE // n, 1)
    sums = np.concatenate(
        [
            random.multinomial(n, np.full(n, 1 / n), size=min(at_once, resamples - start)) @ both
            for start in range(0, resamples, at_once)
        ]
    )
    ratios: Float64 = sums[:, 0] / sums[:, 1]
    return ratios


def interval(replicates: Float64, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of bootstrap replicates."""
    low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def tail_rate(difference: Float64, tokens: Float64, threshold: float = TAIL_NATS) -> float:
    """The share of segments whose loss rose by more than `threshold` nats per token.

    difference: float64 [segments], sums of the loss differences in nats; tokens: float64 [segments], predicted tokens.
    """
    return float(np.mean(difference > threshold * tokens))
