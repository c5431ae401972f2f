"""Checks of arguments: each returns the value in the type that the computations use, or raises with the argument's
name, what was expected, and what was passed.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..choices import CODEBOOKS, OBJECTIVES, TABLE_BITS

Array = NDArray[np.float64]

# Squares of values in this range, and products of a square with an error of 2^-20, are normal float64 numbers. Laws of
# other scales are brought to it (`law.unit_law`).
LEAST_SCALE, LARGEST_SCALE = 2.0**-500, 2.0**500
# Scales that laws may have: clips, which are up to 2^20 times the scale, are normal float64 numbers.
LEAST_LAW, LARGEST_LAW = 2.0**-1000, 2.0**1000


def real_array(name: str, value: ArrayLike) -> Array:
    """`value` as float64; TypeError unless it holds real numbers (not bool, complex, str, None or other objects)."""
    if np.ma.isMaskedArray(value) and np.ma.getmaskarray(value).any():
        raise TypeError(
            f"{name}: expected no masked values, got {int(np.ma.getmaskarray(value).sum())}: pass .compressed()"
        )
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number or an array of real numbers, got {_brief(value)}") from error
    if array.dtype.kind not in "iuf":
        if array.size == 0 and isinstance(value, (list, tuple)):
            return np.empty(array.shape)
        raise TypeError(f"{name}: expected a number or an array of real numbers, got {_brief(value)}")
    return array.astype(np.float64)


def finite_array(name: str, value: ArrayLike) -> Array:
    """`value` as finite float64."""
    array = real_array(name, value)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name}: expected finite values, got {first(array[~np.isfinite(array)])}")
    return array


def positive_array(name: str, value: ArrayLike) -> Array:
    """`value` as finite, positive float64."""
    array = finite_array(name, value)
    if not np.all(array > 0):
        raise ValueError(f"{name}: expected positive values, got {first(array[~(array > 0)])}")
    return array


def scale_array(name: str, value: ArrayLike) -> Array:
    """`value` as positive float64 that may be the scale of a law."""
    array = positive_array(name, value)
    outside = (array < LEAST_LAW) | (array > LARGEST_LAW)
    if np.any(outside):
        raise ValueError(
            f"{name}: expected values from {LEAST_LAW:.1e} to {LARGEST_LAW:.1e}, got {first(array[outside])}: rescale "
            "the values, their clip scales with them"
        )
    return array


def beyond_squares(magnitude: Array) -> NDArray[np.bool_]:
    """Where the squares of magnitudes, and errors relative to them, leave float64's range of full precision."""
    return np.asarray((magnitude < LEAST_SCALE) | (magnitude > LARGEST_SCALE))


def number(name: str, value: Any) -> float:
    """`value` as a finite float; TypeError unless it is one real number."""
    array = real_array(name, value)
    if array.ndim:
        raise TypeError(f"{name}: expected one number, got an array of shape {list(array.shape)}")
    if not np.isfinite(array):
        raise ValueError(f"{name}: expected a finite number, got {float(array)}")
    return float(array)


def count(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        integer = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an integer of at least {least}, got {_brief(value)}") from error
    if integer < least:
        raise ValueError(f"{name}: expected at least {least}, got {integer}")
    return integer


def check_bits(bits: object) -> int:
    """`bits` as an int, or an error naming the range."""
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"bits: expected an integer from 2 to 8, got {_brief(bits)}")
    if int(bits) not in TABLE_BITS:
        raise ValueError(f"bits: expected an integer from 2 to 8, got {bits}")
    return int(bits)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`, or an error listing them."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(choices)}, got {_brief(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_problem(bits: object, codebook: object, objective: object) -> tuple[int, str, str]:
    """The three choices that define a clipping problem, each checked."""
    return (
        check_bits(bits),
        check_choice("codebook", codebook, CODEBOOKS),
        check_choice("objective", objective, OBJECTIVES),
    )


def check_alpha(alpha: ArrayLike) -> Array:
    """`alpha` as float64, finite and not negative (0 stands for the quantizer whose every value is 0)."""
    array = real_array("alpha", alpha)
    bad = ~(np.isfinite(array) & (array >= 0))
    if np.any(bad):
        raise ValueError(f"alpha: expected finite clips of at least 0, got {first(array[bad])}")
    return array


def first(values: Array) -> float:
    """The first of some values, for a message."""
    return float(np.ravel(values)[0])


def _brief(value: object) -> str:
    """The value in a message where that is short, else its type."""
    text = repr(value)
    if isinstance(value, (int, float, complex, str, bytes)) or value is None:
        return text if len(text) <= 60 else type(value).__name__
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + (f" of {dtype}" if dtype is not None else "")
