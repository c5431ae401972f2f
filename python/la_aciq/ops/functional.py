"""The operations: input checks and choice of backend.

csrc/ops.cpp declares `torch.ops.la_aciq.*`; the compiled core attaches kernels per device, fakes.py the shapes for
torch.compile; reference.py defines the results. `la_aciq.quantize` and its siblings are the functions of this module.
They work inside torch.compile(fullgraph=True).

Shapes: x is [..., K]; each index of the leading dimensions is a row. A table is float32 [num_entries, groups] with
groups = ceil(K / group_size); group_size None means one group per row. A table [num_entries] or [], or a number, stands
for the same clip in every group. A number must be finite and positive. Tensor values are not validated here, because
that would slow down every call (on the CPU by 1.6 microseconds of a small `linear`'s 30; on a GPU it would wait for the
device): validate a table when you build it. Elements that are quantized under a clip that is not finite and positive
dequantize to 0.

`language_ids` says which entry of the table each row reads: int32 (int64 is converted), matched with the leading
dimensions of x from the left ([batch] for x [batch, tokens, K]; a dimension may be 1). None reads entry 0.

A process that was forked after operations ran on several threads must call torch.set_num_threads(1) first, as for any
operation of PyTorch: OpenMP's threads do not survive the fork, and work handed to them never ends.

The operations are for inference: gradients do not pass through them (PyTorch warns of a backward pass that needs one).
"""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._deprecated import renamed_arguments
from ..choices import ACTIVATION_CLIPS, CODEBOOKS, STATISTICS, ActivationClip, Codebook, Statistic
from . import arrays, reference
from .backends import implementation
from .backends import use_backend as use_backend
from .backends import why_unavailable as why_unavailable
from .streaming import Moments, NanPolicy, check_nan_policy

P = ParamSpec("P")
R = TypeVar("R")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES_OF_MOMENTS = (*_DTYPES, torch.float64)
# The defaults of the operators' last arguments: reference.py has the signatures of csrc/ops.cpp.
_DEFAULTS_OF_MOMENTS = reference.moments.__defaults__ or ()
_DEFAULTS_OF_QUANTIZE = reference.quantize.__defaults__ or ()
_DEFAULTS_OF_QUANTIZE_DYNAMIC = reference.quantize_dynamic.__defaults__ or ()
_FEW_IDS = 64  # up to here Python finds the extremes before torch.aminmax has started
_CLIP_RANGE = (2.0**-149, torch.finfo(torch.float32).max)  # of a clip that stays finite and positive in float32


# --- What a call that fails says ------------------------------------------------------------------------------------

# What a parameter's annotation asks for, in words and as the types that do.
_TYPES: dict[Any, tuple[str, tuple[type, ...]]] = {
    Tensor: ("a tensor", (Tensor,)),
    np.ndarray[Any, Any]: ("an array", (np.ndarray,)),
    float: ("a number", (numbers.Real, torch.SymFloat)),
    int: ("an int", (numbers.Integral, torch.SymInt)),
    bool: ("a bool", (bool, np.bool_)),
    torch.dtype: ("a torch.dtype", (torch.dtype,)),
    type(None): ("None", (type(None),)),
}


def _check_types(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Raises the TypeError that names the first of `arguments` whose type is not what `function`'s signature says."""
    for name, value in arguments.items():
        annotation = function.__annotations__[name]
        accepted = [_TYPES[kind] for kind in get_args(annotation) or (annotation,) if kind in _TYPES]
        if isinstance(value, Tensor) and (reason := arrays.why_not_dense(value)) is not None:
            raise TypeError(f"{name}: {reason}") from None
        if not accepted or any(isinstance(value, types) for _, types in accepted):
            continue
        plain = value is None or isinstance(value, str | numbers.Number)
        got = repr(value) if plain else f"{type(value).__module__}.{type(value).__qualname__}"
        expected = " or ".join(words for words, _ in accepted)
        raise TypeError(f"{name}: expected {expected}, got {got.removeprefix('builtins.')}") from None


# Arguments that had other names in 0.1, by function; the old names work until 0.3.
_OLD_NAMES: dict[str, dict[str, str]] = {
    "moments": {"language": "language_ids", "languages": "num_entries"},
    "moments_state": {"language": "language_ids", "languages": "num_entries"},
    "quantize": {"alpha": "clips", "language": "language_ids"},
    "quantize_dynamic": {"shape": "clip_factor", "language": "language_ids"},
    "dequantize": {"alpha": "clips", "scales": "row_clips", "language": "language_ids"},
    "linear": {"weight_scale": "weight_clip", "clip": "clips", "language": "language_ids"},
}


def _names_misfits(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with clearer errors, and with the old names of its arguments (`_OLD_NAMES`).

    Where a call fails in an error that does not name the argument, an argument whose type is not the signature's is
    named. Good calls pay 0.1 to 0.3 microseconds, less than checks of each argument would take.
    """
    signature = inspect.signature(function)
    renamed = _OLD_NAMES.get(function.__name__, {})
    old_names = frozenset(renamed)

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        if not old_names.isdisjoint(kwargs):
            old = {name: value for name, value in kwargs.items() if name in old_names}
            new = {name: value for name, value in kwargs.items() if name not in old_names}
            return named(*args, **renamed_arguments(function.__name__, old, renamed, new, warn=not is_compiling()))
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError:  # an argument too few or too many, which Python has named
                arguments = {}
            _check_types(function, arguments)
            raise

    return named


# --- Operations -----------------------------------------------------------------------------------------------------


@_names_misfits
def moments(
    x: Any,
    language_ids: Tensor | np.ndarray[Any, Any] | None = None,
    num_entries: int | None = None,
    *,
    histogram: bool = False,
    nan_policy: NanPolicy = "propagate",
) -> Moments:
    """Moments of the real numbers in a tensor or array, in one pass over memory and in float64.

    Reading the result waits for the device of x; use `moments_state` inside a compiled graph.

    Args:
        x: [..., K] of float32, float64, bfloat16 or float16; integers and booleans are read as float64. A tensor, an
            array, or whatever `la_aciq.ops.arrays.tensor_of` reads. Elements that a mask or a nullable column marks as
            missing are not counted. NaN is not missing: see nan_policy.
        language_ids: The entry that each row counts under: int32 or int64, a tensor or a NumPy array, matched with the
            leading dimensions of x from the left. None counts everything under entry 0.
        num_entries: How many entries the result has; needed with language_ids.
        histogram: Count |x| in log-linear bins too (see `la_aciq.Moments`).
        nan_policy: What NaN and infinities do: "propagate", "omit" or "raise", as in SciPy.

    Returns:
        A single sample, or with language_ids or num_entries an array of samples of shape [num_entries].

    Raises:
        TypeError: x is not a dense array of real numbers, or another argument has a type that does not fit.
        ValueError: An argument has a shape or a value that does not fit; or nan_policy is "raise" and x has NaN or Inf.
    """
    check_nan_policy(nan_policy)
    tensor, missing = arrays.tensor_of(x)
    ids = arrays.ids_of(language_ids)
    if missing is not None:
        tensor, ids = _without(tensor, missing, ids)
    state, counts = moments_state(tensor, ids, num_entries, histogram=histogram)
    read: Any = state.numpy(force=True)  # as arrays first: an index into a tensor is an operation of PyTorch
    read_counts: Any = counts.numpy(force=True) if histogram else None
    if language_ids is None and num_entries is None:
        read, read_counts = read[0], read_counts[0] if histogram else None
    return Moments(read, read_counts, nan_policy)


@_names_misfits
def moments_state(
    x: Tensor, language_ids: Tensor | None = None, num_entries: int | None = None, *, histogram: bool = False
) -> tuple[Tensor, Tensor]:
    """The tensors that `moments` reads, left on the device of x; `la_aciq.Moments.from_state` reads them.

    Args:
        x: float32, float64, bfloat16 or float16 [..., K].
        language_ids: The entry that each row counts under: int32 or int64, matched with the leading dimensions of x
            from the left. None counts everything under entry 0.
        num_entries: How many entries the result has; needed with language_ids.
        histogram: Count |x| in log-linear bins too.

    Returns:
        The state, float64 [num_entries, 8], and the histogram, int64 [num_entries, 258, 2], or [num_entries, 0, 2]
        without one.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    if x.dtype not in _DTYPES_OF_MOMENTS:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {_name(x.dtype)}")
    if num_entries is None:
        if language_ids is not None:
            raise ValueError("num_entries: expected the number of entries that language_ids refers to, got None")
        num_entries = 1
    if isinstance(num_entries, bool | np.bool_):
        raise TypeError(f"num_entries: expected an int or None, got {num_entries}")
    if num_entries < 1:
        raise ValueError(f"num_entries: expected at least 1, got {num_entries}")
    if language_ids is not None:
        language_ids = _checked_ids(language_ids, num_entries, x)
    settings = _without_defaults(_DEFAULTS_OF_MOMENTS, language_ids, num_entries, histogram)
    state: tuple[Tensor, Tensor] = implementation("moments", x)(x, *settings)
    return state


@_names_misfits
def quantize(
    x: Tensor,
    clips: Tensor | float,
    language_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    codebook: Codebook = "midrise",
    signs: Tensor | None = None,
    block_size: int | None = None,
    tail_sums: bool = False,
) -> Any:
    """INT4 codes of x under static clips: one streaming pass, no reduction.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        clips: The table of clips, float32 [num_entries, groups], [num_entries], [] or a number.
        language_ids: The entry of the table that each row reads: int32 or int64, matched with the leading dimensions of
            x from the left. None reads entry 0.
        group_size: Elements along K that share a clip, an even number; None for the whole row.
        codebook: "midrise", values (q - 7.5) step with ends exactly +-clip, or "midtread", values (q - 8) step with an
            exact zero; step = 2 clip / 15.
        signs: Quantize rotate(x, signs, block_size) instead of x; see `rotate`.
        block_size: Of that rotation.
        tail_sums: Return sums over each entry and group too.

    Returns:
        Codes, uint8 [..., ceil(K / 2)], two per byte, the even index in the low nibble. NaN takes the code nearest
        zero, +-Inf the end codes. With tail_sums a pair: the codes and float64 [num_entries, groups, 4], the number of
        finite elements, of those with |x| > clip, the sum of |x| over the latter, the number of non-finite elements.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    k = _checked_x(x)
    block = _checked_block(block_size, signs, x, k)
    size = _checked_group_size("group_size", group_size)
    _check_choice("codebook", codebook, CODEBOOKS)
    clips = _checked_table("clips", clips, x, k, size)
    if language_ids is not None:
        language_ids = _checked_ids(language_ids, clips.shape[0], x)
    settings = _without_defaults(_DEFAULTS_OF_QUANTIZE, language_ids, size, codebook, signs, block, tail_sums)
    codes, tail = implementation("quantize", x)(x, clips, *settings)
    return (codes, tail) if tail_sums else codes


@_names_misfits
def quantize_dynamic(
    x: Tensor,
    clip_factor: Tensor | float,
    language_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    statistic: Statistic = "rms",
    codebook: Codebook = "midrise",
    signs: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """INT4 codes of x under clips measured on x: clip_factor times the rms or absmax of each group's finite elements.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        clip_factor: The table of factors, float32 [num_entries, groups], [num_entries], [] or a number.
        language_ids: The entry of the table that each row reads, as in `quantize`.
        group_size: Elements along K that share a clip, an even number; None for the whole row.
        statistic: "rms" or "absmax".
        codebook: "midrise" or "midtread", as in `quantize`.
        signs: Quantize rotate(x, signs, block_size) instead of x; see `rotate`.
        block_size: Of that rotation.

    Returns:
        Codes, uint8 [..., ceil(K / 2)], and row_clips, float32 [..., groups], for `dequantize`. A group of zeros has
        clip 0 and dequantizes to zeros.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    k = _checked_x(x)
    block = _checked_block(block_size, signs, x, k)
    size = _checked_group_size("group_size", group_size)
    _check_choice("statistic", statistic, STATISTICS)
    _check_choice("codebook", codebook, CODEBOOKS)
    clip_factor = _checked_table("clip_factor", clip_factor, x, k, size)
    if language_ids is not None:
        language_ids = _checked_ids(language_ids, clip_factor.shape[0], x)
    settings = _without_defaults(_DEFAULTS_OF_QUANTIZE_DYNAMIC, language_ids, size, statistic, codebook, signs, block)
    codes, row_clips = implementation("quantize_dynamic", x)(x, clip_factor, *settings)
    return codes, row_clips


@_names_misfits
def dequantize(
    codes: Tensor,
    clips: Tensor | float | None = None,
    language_ids: Tensor | None = None,
    *,
    k: int,
    row_clips: Tensor | None = None,
    group_size: int | None = None,
    codebook: Codebook = "midrise",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of INT4 codes, under a table of clips or under one clip per row and group.

    Args:
        codes: uint8 [..., ceil(k / 2)], as `quantize` and `quantize_dynamic` return them.
        clips: The table of clips, as given to `quantize`. Exactly one of clips and row_clips is given.
        language_ids: The entry of the table that each row reads, as in `quantize`; not with row_clips.
        k: Elements of a row.
        row_clips: float32 [..., groups], as `quantize_dynamic` returns them.
        group_size: Elements along k that share a clip, an even number; None for the whole row.
        codebook: "midrise" or "midtread", as in `quantize`.
        dtype: Of the result: float32, bfloat16 or float16.

    Returns:
        Values [..., k] in dtype.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected uint8, got {_name(codes.dtype)}")
    if k is True:
        raise TypeError(f"k: expected an int, got {k}")
    packed = codes.shape
    if k < 1 or not packed or packed[-1] != (k + 1) // 2:
        raise ValueError(f"codes: expected shape [..., {(k + 1) // 2}] for k={k}, got {list(packed)}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {_name(dtype)}")
    _check_choice("codebook", codebook, CODEBOOKS)
    size = _checked_group_size("group_size", group_size)
    if (clips is None) == (row_clips is None):
        raise ValueError("clips, row_clips: expected exactly one of them")
    if row_clips is not None:
        if language_ids is not None:
            raise ValueError("language_ids: has no meaning with row_clips, which hold the clip of every row")
        expected = (*packed[:-1], reference.group_count(k, size))
        if row_clips.dtype != torch.float32:
            raise TypeError(f"row_clips: expected float32, got {_name(row_clips.dtype)}")
        if row_clips.shape != expected:
            raise ValueError(f"row_clips: expected shape {list(expected)}, got {list(row_clips.shape)}")
        _check_device("row_clips", row_clips, codes, "codes")
        table = row_clips
    elif clips is not None:
        table = _checked_table("clips", clips, codes, k, size, "codes")
        if language_ids is not None:
            language_ids = _checked_ids(language_ids, table.shape[0], codes, "codes")
    options: dict[str, Any] = {"k": k}  # and what is not the operator's default, as in linear_options
    if size:
        options["group_size"] = size
    if codebook != "midrise":
        options["codebook"] = codebook
    if row_clips is not None:
        options["per_row"] = True
    if dtype != torch.float32:
        options["dtype"] = dtype
    out: Tensor = implementation("dequantize", codes)(codes, table, language_ids, **options)
    return out


@_names_misfits
def rotate(x: Tensor, signs: Tensor, block_size: int | None = None) -> Tensor:
    """Randomized block Hadamard transform: y = H_b (signs * x) / sqrt(b) in each block of b along the last dimension.

    The transform is orthogonal. H_b is symmetric (Sylvester's order), so signs * rotate(y, ones) undoes it.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        signs: +1 and -1, float32 or int8 [K]. Other values are an error on the CPU; a GPU does not check them, because
            that would wait for the device.
        block_size: b, a power of two that divides K; None for the largest.

    Returns:
        y [..., K] in the dtype of x.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    block = _checked_block(block_size, signs, x, _checked_x(x))
    out: Tensor = implementation("rotate", x)(x, signs, block)
    return out


@_names_misfits
def linear(
    x: Tensor,
    weight: Tensor,
    weight_clip: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
    weight_codebook: Codebook = "midrise",
    signs: Tensor | None = None,
    block_size: int | None = None,
    activation_bits: int = 16,
    activation_clip: ActivationClip = "static",
    clips: Tensor | float | None = None,
    language_ids: Tensor | None = None,
    activation_group_size: int | None = None,
    activation_codebook: Codebook = "midrise",
) -> Tensor:
    """x times INT4 weights.

    On the CPU a row's result is the same to the last bit whatever rows are beside it. On a GPU few rows go through
    another kernel than many, and the last bits may differ.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: Codes uint8 [N, ceil(K / 2)]. On the CPU also int32 [ceil(N / 16), ceil(K / 8), 16] from
            `repack_weight`, where groups, those of the activations too, are multiples of 8 or whole rows.
        weight_clip: Clips of the weight, float32 [N, groups]. With repacked weights, an N that is wrong within 16
            cannot be noticed: outputs that do not exist have code 0, which is not value 0.
        bias: A floating-point tensor [N].
        group_size: Elements along K of the weight that share a clip, an even number; None for the whole row.
        weight_codebook: "midrise" or "midtread", as in `quantize`.
        signs: Rotate x first (see `rotate`); the weight was rotated with the same signs and block.
        block_size: Of that rotation.
        activation_bits: 16 leaves x as it is; 8 or 4 rounds it to that codebook first.
        activation_clip: "static": clips is a table of clips. "rms" or "absmax": clips is a table of factors on that
            statistic of each row's groups.
        clips: The table, as in `quantize` or `quantize_dynamic`; needed with 8 and 4 bits, an error with 16.
        language_ids: The entry of the table that each row reads, as in `quantize`; an error with 16 bits.
        activation_group_size: Elements along K of x that share a clip, an even number; None for the whole row.
        activation_codebook: "midrise" or "midtread".

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    columns = _checked_x(x)
    block = _checked_block(block_size, signs, x, columns)
    size = _checked_group_size("group_size", group_size)
    activation_size = _checked_group_size("activation_group_size", activation_group_size)
    _check_choice("weight_codebook", weight_codebook, CODEBOOKS)
    _check_choice("activation_clip", activation_clip, ACTIVATION_CLIPS)
    _check_choice("activation_codebook", activation_codebook, CODEBOOKS)
    if activation_bits not in (4, 8, 16):
        raise ValueError(f"activation_bits: expected 16, 8 or 4, got {activation_bits}")
    packed, clip_shape = weight.shape, weight_clip.shape
    if weight_clip.dtype != torch.float32:
        raise TypeError(f"weight_clip: expected float32, got {_name(weight_clip.dtype)}")
    if weight.dtype == torch.uint8:
        if len(packed) != 2 or packed[1] != (columns + 1) // 2:
            raise ValueError(f"weight: expected shape [N, {(columns + 1) // 2}] for K={columns}, got {list(packed)}")
        outputs = packed[0]
    elif weight.dtype == torch.int32:
        outputs = clip_shape[0] if clip_shape else 0
        _check_repacked(weight, outputs, columns, x)
        _check_whole_eights("group_size", size, columns)
        _check_whole_eights("activation_group_size", activation_size if activation_bits < 16 else 0, columns)
    else:
        raise TypeError(f"weight: expected uint8 codes, or int32 from repack_weight, got {_name(weight.dtype)}")
    _check_device("weight", weight, x)
    expected = (outputs, reference.group_count(columns, size))
    if clip_shape != expected:
        raise ValueError(f"weight_clip: expected shape {list(expected)}, got {list(clip_shape)}")
    _check_device("weight_clip", weight_clip, x)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias: expected a floating-point tensor, got {_name(bias.dtype)}")
        if bias.shape != (outputs,):
            raise ValueError(f"bias: expected shape {[outputs]}, got {list(bias.shape)}")
        _check_device("bias", bias, x)
    table = None
    if activation_bits < 16:
        if clips is None:
            raise ValueError(
                f"clips: expected the clips of the activations for activation_bits={activation_bits}, got None"
            )
        table = _checked_table("clips", clips, x, columns, activation_size)
        if language_ids is not None:
            language_ids = _checked_ids(language_ids, table.shape[0], x)
    elif clips is not None or language_ids is not None:
        name = "language_ids" if clips is None else "clips"
        raise ValueError(f"{name}: has no meaning with activation_bits=16")
    options = linear_options(
        size, weight_codebook, block, activation_bits, activation_clip, activation_size, activation_codebook
    )
    return linear_unchecked(x, weight, weight_clip, bias, signs, table, language_ids, options)


@_names_misfits
def round_weights(
    weight: Tensor,
    second_moments: Tensor,
    factor: Tensor,
    *,
    group_size: int | None = None,
    codebook: Codebook = "midrise",
) -> tuple[Tensor, Tensor]:
    """INT4 codes and clips of weights, rounded with error feedback under second moments of the layer's inputs.

    Columns are rounded one after the other, and those still to come take over the error (GPTQ, Frantar et al. 2023);
    a group's clip is chosen when the group is reached; a sweep of coordinate descent over clips and codes follows
    (QuantEase, Behdin et al. 2023). Rows do not depend on each other. `la_aciq.nn.weights.quantize_weight` damps and
    factors second moments. On the CPU sums are in float32; on CUDA tensors the operation runs in PyTorch.

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite.
        second_moments: float32 [K, K], H: symmetric, positive definite.
        factor: float32 [K, K], upper triangular U with U^T U = H^-1. What is below its diagonal is not read.
        group_size: Weights along K that share a clip, an even number; None for the whole row.
        codebook: "midrise" or "midtread", as in `quantize`.

    Returns:
        Codes, uint8 [N, ceil(K / 2)], packed as in `quantize`, and clips, float32 [N, groups], which `dequantize` takes
        as `row_clips`. A group of zeros has clip 0 and dequantizes to zeros.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {_name(weight.dtype)}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected shape [N, K] with K >= 1, got {list(weight.shape)}")
    k = weight.shape[1]
    for name, matrix in (("second_moments", second_moments), ("factor", factor)):
        if matrix.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, got {_name(matrix.dtype)}")
        if matrix.shape != (k, k):
            raise ValueError(f"{name}: expected shape {[k, k]}, got {list(matrix.shape)}")
        _check_device(name, matrix, weight, "weight")
    size = _checked_group_size("group_size", group_size)
    _check_choice("codebook", codebook, CODEBOOKS)
    codes, clips = implementation("round_weights", weight)(weight, second_moments, factor, size, codebook)
    return codes, clips


@_names_misfits
def repack_weight(weight: Tensor) -> Tensor:
    """INT4 codes in the order in which the CPU multiplies fastest; `restore_weight` undoes it.

    Args:
        weight: Codes uint8 [N, ceil(K / 2)].

    Returns:
        int32 [ceil(N / 16), ceil(K / 8), 16], which `linear` takes in place of `weight`. Element [p, i, l] holds the
        codes of members 8 i to 8 i + 7 of output 16 p + l, member 8 i + j in bits 4 j to 4 j + 3. Outputs and members
        that do not exist have code 0, which is not value 0; the result does not say N and K.

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    if weight.dtype != torch.uint8:
        raise TypeError(f"weight: expected uint8 codes, got {_name(weight.dtype)}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected shape [N, ceil(K / 2)] with K >= 1, got {list(weight.shape)}")
    return reference.repack(weight)


@_names_misfits
def restore_weight(repacked: Tensor, n: int, k: int) -> Tensor:
    """The codes that `repack_weight` has rearranged, in the portable order.

    Args:
        repacked: int32 [ceil(n / 16), ceil(k / 8), 16].
        n: Outputs. An n that is wrong within 16 cannot be noticed.
        k: Members of an output. A k that is wrong within 8 cannot be noticed.

    Returns:
        uint8 [n, ceil(k / 2)].

    Raises:
        TypeError: An argument has a type or dtype that does not fit; the message names it.
        ValueError: An argument has a shape or a value that does not fit; the message names it.
    """
    if repacked.dtype != torch.int32:
        raise TypeError(f"repacked: expected int32, got {_name(repacked.dtype)}")
    if n < 0 or k < 1 or repacked.shape != _repacked_shape(n, k):
        raise ValueError(
            f"repacked: expected shape {list(_repacked_shape(n, k))} for n={n}, k={k}, got {list(repacked.shape)}"
        )
    return reference.restore(repacked, n, k)


def linear_unchecked(
    x: Tensor,
    weight: Tensor,
    weight_clip: Tensor,
    bias: Tensor | None,
    signs: Tensor | None,
    clips: Tensor | None,
    language_ids: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """`linear` without checks, for a layer that checked its tensors and settings when it was made.

    The ids come from a `LanguageState`, which has checked them. Checks would take a fifth of a small layer's time.

    Args:
        x: As in `linear`.
        weight: As in `linear`.
        weight_clip: As in `linear`.
        bias: As in `linear`.
        signs: As in `linear`.
        clips: As in `linear`, [num_entries, groups].
        language_ids: As in `linear`.
        options: The settings, from `linear_options`.

    Returns:
        [..., N] in the dtype of x.
    """
    if signs is not None:
        options = {**options, "signs": signs}
    if clips is not None:
        options = {**options, "clips": clips}
        if language_ids is not None:
            options["language_ids"] = language_ids
    out: Tensor = implementation("linear", x, clips is not None)(x, weight, weight_clip, bias, **options)
    return out


def linear_options(
    group_size: int = 0,
    weight_codebook: str = "midrise",
    block_size: int = 0,
    activation_bits: int = 16,
    activation_clip: str = "static",
    activation_group_size: int = 0,
    activation_codebook: str = "midrise",
) -> dict[str, Any]:
    """Settings of `linear` that differ from the operator's defaults, for `linear_unchecked`.

    Each setting that a call passes takes a quarter of a microsecond, and all of them half of a small call. The function
    tests them one by one, because a comprehension takes several times as long.

    Args:
        group_size: As in `linear`; 0 stands for None.
        weight_codebook: As in `linear`; 0 stands for None.
        block_size: As in `linear`; 0 stands for None.
        activation_bits: As in `linear`; 0 stands for None.
        activation_clip: As in `linear`; 0 stands for None.
        activation_group_size: As in `linear`; 0 stands for None.
        activation_codebook: As in `linear`; 0 stands for None.

    Returns:
        Keyword arguments of the operator.
    """
    options: dict[str, Any] = {}
    if group_size:
        options["group_size"] = group_size
    if weight_codebook != "midrise":
        options["weight_codebook"] = weight_codebook
    if block_size:
        options["block_size"] = block_size
    if activation_bits != 16:
        options["activation_bits"] = activation_bits
    if activation_clip != "static":
        options["activation_clip"] = activation_clip
    if activation_group_size:
        options["activation_group_size"] = activation_group_size
    if activation_codebook != "midrise":
        options["activation_codebook"] = activation_codebook
    return options


def _without_defaults(defaults: tuple[Any, ...], *settings: Any) -> tuple[Any, ...]:
    """`settings` up to the last that is not the operator's default: each that is handed over takes PyTorch longer than
    this takes to leave it out."""
    count = len(settings)
    while count and settings[count - 1] is defaults[count - 1]:  # == would compare the elements of tensors
        count -= 1
    return settings[:count]


def _without(x: Tensor, missing: Tensor, language_ids: Any) -> tuple[Tensor, Any]:
    """x [M, 1] of the M elements that are not missing, and their ids [M] where there are ids."""
    there = ~missing.to(x.device)
    if isinstance(language_ids, Tensor):
        _check_ids(language_ids, x)
        ids = language_ids.reshape(*language_ids.shape, *[1] * (x.dim() - language_ids.dim()))
        language_ids = ids.expand(x.shape)[there]
    return x[there].unsqueeze(1), language_ids


# --- Checks of arguments --------------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_device(name: str, tensor: Tensor, x: Tensor, like: str = "x") -> None:
    # Asked for last: every look at `device` makes an object.
    if not (tensor.is_cpu and x.is_cpu) and tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} like {like}, got on {tensor.device}")


def _repacked_shape(n: int, k: int) -> tuple[int, int, int]:
    return -(-n // 16), -(-k // 8), 16


def _check_repacked(weight: Tensor, n: int, k: int, x: Tensor) -> None:
    if not (x.is_cpu or x.is_meta):
        raise ValueError(f"weight: expected uint8 codes on {x.device}, got int32: repack_weight is for the CPU")
    if weight.shape != _repacked_shape(n, k):
        raise ValueError(
            f"weight: expected shape {list(_repacked_shape(n, k))} from repack_weight for N={n}, K={k}, "
            f"got {list(weight.shape)}"
        )


def _check_whole_eights(name: str, group_size: int, k: int) -> None:
    if 0 < group_size < k and group_size % 8:
        raise ValueError(f"{name}: expected a multiple of 8 for weights from repack_weight, got {group_size}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def _checked_group_size(name: str, group_size: int | None) -> int:
    if group_size is None or group_size == 0:
        return 0
    if group_size < 2 or group_size % 2:
        raise ValueError(
            f"{name}: expected an even number of at least 2, or None for one group per row, got {group_size}"
        )
    return group_size


def _checked_x(x: Tensor) -> int:
    """K."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float32, bfloat16 or float16, got {_name(x.dtype)}")
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., K] with K >= 1, got {list(shape)}")
    return shape[-1]


def _checked_block(block_size: int | None, signs: Tensor | None, x: Tensor, k: int) -> int:
    """The Hadamard block as the operations take it (0 for None)."""
    block = block_size or 0
    if block is True:
        raise TypeError(f"block_size: expected an int or None, got {block_size}")
    if signs is None:
        if block:
            raise ValueError(f"block_size: has no meaning without signs, got {block}")
        return 0
    if signs.dtype not in (torch.float32, torch.int8):
        raise TypeError(f"signs: expected float32 or int8, got {_name(signs.dtype)}")
    if signs.shape != (k,):
        raise ValueError(f"signs: expected shape {[k]}, got {list(signs.shape)}")
    _check_device("signs", signs, x)
    if block and (block < 0 or block & (block - 1) or k % block):
        raise ValueError(f"block_size: expected a power of two that divides K={k}, got {block}")
    return block


def _checked_table(name: str, table: Tensor | float, x: Tensor, k: int, group_size: int, like: str = "x") -> Tensor:
    """float32 [num_entries, groups] on the device of x, which is the argument called `like`."""
    groups = reference.group_count(k, group_size)
    if not isinstance(table, Tensor):
        if isinstance(table, bool):
            raise TypeError(f"{name}: expected a tensor or a number, got {table}")
        if not _CLIP_RANGE[0] <= table <= _CLIP_RANGE[1]:
            raise ValueError(f"{name}: expected a finite and positive number (in float32), got {table}")
        return torch.full((1, groups), float(table), dtype=torch.float32, device=x.device)
    if table.dtype != torch.float32:
        if not table.is_floating_point():
            raise TypeError(f"{name}: expected a float32 tensor, got {_name(table.dtype)}")
        table = table.to(torch.float32)
    _check_device(name, table, x, like)
    shape = table.shape
    if len(shape) == 1 and shape[0]:
        return table.unsqueeze(1).expand(-1, groups)
    if len(shape) != 2 or shape[1] != groups or shape[0] == 0:
        if not shape:
            return table.expand(1, groups)
        raise ValueError(f"{name}: expected shape [num_entries, {groups}], [num_entries] or [], got {list(shape)}")
    return table


def _check_ids(language_ids: Tensor, x: Tensor, like: str = "x") -> None:
    """dtype, device and shape of ids for the leading dimensions of x, which is the argument called `like`."""
    if language_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"language_ids: expected int32 or int64, got {_name(language_ids.dtype)}")
    _check_device("language_ids", language_ids, x, like)
    shape, lead = language_ids.shape, x.shape[:-1]
    if shape != lead and (
        len(shape) > len(lead) or any(n not in (1, size) for n, size in zip(shape, lead, strict=False))
    ):
        raise ValueError(
            f"language_ids: expected a shape that matches the leading dimensions {list(lead)} of {like} from the left, "
            f"got {list(language_ids.shape)}"
        )


def _checked_ids(language_ids: Tensor, num_entries: int, x: Tensor, like: str = "x") -> Tensor:
    """language_ids as int32 that matches the leading dimensions of x, which is the argument called `like`.

    Ids are compared with the table on the CPU only, where looking at them costs no synchronisation, and not while a
    graph is captured; elsewhere an id out of range reads entry 0.
    """
    _check_ids(language_ids, x, like)
    if (
        not torch.compiler.is_compiling()
        and language_ids.is_cpu
        and type(language_ids) is Tensor
        and (count := language_ids.numel())
    ):
        if count <= _FEW_IDS:
            ids = language_ids.tolist() if language_ids.dim() == 1 else language_ids.flatten().tolist()
            low, high = min(ids), max(ids)
        else:
            low, high = (int(bound) for bound in torch.aminmax(language_ids))
        if low < 0 or high >= num_entries:
            raise ValueError(f"language_ids: expected ids from 0 to {num_entries - 1}, got {low if low < 0 else high}")
    return language_ids if language_ids.dtype == torch.int32 else language_ids.to(torch.int32)
