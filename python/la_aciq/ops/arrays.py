"""Arrays of other packages as tensors, with the elements that they say are missing.

An element is missing where a NumPy mask is True, where a nullable column of pandas, polars or pyarrow has no value, and
where a MaskedTensor of PyTorch is not valid. A missing element is not a sample: it is not counted, and it is not NaN.
"""

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def tensor_of(x: Any) -> tuple[Tensor, Tensor | None]:
    """A floating-point tensor of real numbers, and which of its elements are missing.

    Args:
        x: A dense tensor or a NumPy array of any real dtype; a MaskedArray; a Series, DataFrame, Index or extension
            array of pandas; a Series or DataFrame of polars; an Array, ChunkedArray or Table of pyarrow; whatever NumPy
            reads as an array (xarray.DataArray, nested lists, numbers); an object with `__dlpack__`.

    Returns:
        The tensor, on the memory of x where PyTorch can express it, and bool of the same shape, True where an element
        is missing, or None where none is. Integers and booleans become float64; float16, float32 and float64 stay.

    Raises:
        TypeError: x is sparse, nested, quantized, without data, ragged, or does not hold real numbers.
    """
    if isinstance(x, Tensor):
        return _checked_tensor(x)
    array, mask = _array_of(x)
    if isinstance(array, Tensor):
        return _checked_tensor(array)
    if array.dtype.kind in "biu" or array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    missing = torch.tensor(mask) if mask is not None and mask.any() else None
    return _on_same_memory(array), missing


def ids_of(language_ids: Any) -> Any:
    """Language ids from a NumPy array of integers as a tensor; anything else is returned as it is.

    Raises:
        TypeError: An array of anything but integers, or a masked one.
    """
    if not isinstance(language_ids, np.ndarray):
        return language_ids
    if isinstance(language_ids, np.ma.MaskedArray):
        raise TypeError("language_ids: expected an id for every row, got a masked array; fill it first")
    if language_ids.dtype.kind not in "iu":
        raise TypeError(f"language_ids: expected integers, got {language_ids.dtype}")
    if language_ids.dtype == np.uint64 and language_ids.size and language_ids.max() > np.iinfo(np.int64).max:
        raise ValueError(f"language_ids: expected ids of entries, got {language_ids.max()}")
    return torch.from_numpy(language_ids.astype(np.int64))


def why_not_dense(x: Tensor) -> str | None:
    """What is to be said of a tensor that the operations do not take whatever its dtype, or None."""
    if x.is_nested:
        return "expected one dense tensor, got a nested tensor; pass its parts one by one, or torch.cat of them"
    if x.layout != torch.strided:
        return f"expected a dense tensor, got layout {x.layout}; call to_dense() first"
    if x.is_quantized:
        return f"expected a floating-point tensor, got the quantized {x.dtype}; call dequantize() first"
    return None


def _checked_tensor(x: Tensor) -> tuple[Tensor, Tensor | None]:
    missing = None
    if type(x).__name__ == "MaskedTensor":
        masked: Any = x
        x, missing = masked.get_data(), ~masked.get_mask()
    if (reason := why_not_dense(x)) is not None:
        raise TypeError(f"x: {reason}")
    if x.is_meta:
        raise TypeError("x: expected a tensor with data, got one on the meta device")
    if x.is_complex():
        raise TypeError(f"x: expected real numbers, got {x.dtype}; pass its real and imaginary part one by one")
    return x if x.is_floating_point() else x.to(torch.float64), missing


def _real(array: Array, source: Any) -> Array:
    if array.dtype.kind not in "biuf":
        name = f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
        hint = "; call toarray() first" if hasattr(source, "toarray") else ""
        raise TypeError(f"x: expected a tensor or an array of real numbers, got {name} of dtype {array.dtype}{hint}")
    return array


def _array_of(x: Any) -> tuple[Array | Tensor, Mask | None]:
    """An array of real numbers, or a tensor where x has DLPack alone, and which elements are missing (None: none)."""
    package = type(x).__module__.partition(".")[0]
    if isinstance(x, np.ma.MaskedArray):
        return _real(np.asarray(x.data), x), None if x.mask is np.ma.nomask else np.ma.getmaskarray(x)
    if package in ("pandas", "polars", "pyarrow"):
        return _from_columns(x, package)
    if isinstance(x, list | tuple) and any(_may_be_masked(item) for item in x):
        parts = [_array_of(item) for item in x]
        try:
            values = np.stack([np.asarray(array) for array, _ in parts])
            masks = [np.zeros(np.shape(array), bool) if mask is None else mask for array, mask in parts]
            return values, np.stack(masks)
        except ValueError as error:
            raise TypeError(f"x: expected a tensor or an array of real numbers: {error}") from error
    if not hasattr(x, "__array__") and hasattr(x, "__dlpack__"):
        try:
            return torch.utils.dlpack.from_dlpack(x), None
        except (RuntimeError, BufferError, ValueError) as error:
            raise TypeError(f"x: its __dlpack__ gives no tensor: {error}") from error
    try:
        return _real(np.asarray(x), x), None
    except (ValueError, RuntimeError) as error:
        raise TypeError(f"x: expected a tensor or an array of real numbers: {error}") from error
    except TypeError as error:
        if str(error).startswith("x: "):
            raise
        raise TypeError(f"x: expected a tensor or an array of real numbers: {error}") from error


def _may_be_masked(item: Any) -> bool:
    """Whether NumPy may lose a mask when it makes an array of a list with this item."""
    if isinstance(item, list | tuple):
        return any(_may_be_masked(part) for part in item)
    return isinstance(item, np.ma.MaskedArray) or type(item).__module__.partition(".")[0] in (
        "pandas",
        "polars",
        "pyarrow",
    )


def _from_columns(x: Any, package: str) -> tuple[Array, Mask | None]:
    """Of a column or a table with columns."""
    columns = _columns_of(x, package)
    if columns is None:
        return {"pandas": _from_pandas, "polars": _from_polars, "pyarrow": _from_pyarrow}[package](x)
    parts = [_from_columns(column, package) for column in columns]
    if not parts:
        return np.zeros((len(x), 0)), None
    values = np.stack([array for array, _ in parts], axis=1)
    masks = [np.zeros(len(array), bool) if mask is None else mask for array, mask in parts]
    return values, np.stack(masks, axis=1)


def _columns_of(x: Any, package: str) -> list[Any] | None:
    """The columns of a table, or None for what is a column itself."""
    if package == "pandas" and hasattr(x, "columns"):
        return [x.iloc[:, i] for i in range(x.shape[1])]
    if package == "polars" and hasattr(x, "get_columns"):
        return list(x.get_columns())
    if package == "pyarrow" and hasattr(x, "columns"):
        return list(x.columns)
    return None


def _unsuitable(x: Any) -> TypeError:
    name = f"{type(x).__module__}.{type(x).__qualname__}"
    kind = getattr(x, "dtype", getattr(x, "type", None))
    return TypeError(f"x: expected columns of real numbers, got {name}" + ("" if kind is None else f" of {kind}"))


def _from_pandas(x: Any) -> tuple[Array, Mask | None]:
    """A Series, an Index or an extension array. NaN of a column of NumPy's dtypes is a NaN, pd.NA is missing."""
    dtype = getattr(x, "dtype", None)
    types = sys.modules["pandas"].api.types
    if dtype is None or not (types.is_numeric_dtype(dtype) or types.is_bool_dtype(dtype)):
        raise _unsuitable(x)
    if isinstance(dtype, np.dtype) or not hasattr(dtype, "na_value") or getattr(dtype, "subtype", None) is not None:
        return _real(np.asarray(x), x), None
    mask = np.asarray(x.isna(), dtype=bool)
    return _real(np.asarray(x.to_numpy(dtype=np.float64, na_value=np.nan)), x), mask


def _from_polars(x: Any) -> tuple[Array, Mask | None]:
    dtype = getattr(x, "dtype", None)
    polars = sys.modules["polars"]
    if dtype is None or not (dtype.is_numeric() or dtype == polars.Boolean):
        raise _unsuitable(x)
    if not x.null_count() and dtype != polars.Boolean:
        return _real(x.to_numpy(), x), None
    mask = x.is_null().to_numpy()
    return x.cast(polars.Float64).fill_null(0.0).to_numpy(), mask


def _from_pyarrow(x: Any) -> tuple[Array, Mask | None]:
    kind = getattr(x, "type", None)
    types = sys.modules["pyarrow"].types
    if kind is None or not hasattr(x, "is_null") or not (types.is_primitive(kind) or types.is_boolean(kind)):
        raise _unsuitable(x)
    if types.is_temporal(kind):
        raise _unsuitable(x)
    mask = x.is_null().to_numpy(zero_copy_only=False) if hasattr(x, "buffers") else x.is_null().to_numpy()
    kept = x.drop_null()
    values = kept.to_numpy(zero_copy_only=False) if hasattr(kept, "buffers") else kept.to_numpy()
    array = np.zeros(len(x), dtype=_real(np.asarray(values), x).dtype)
    array[~mask] = values
    return array, mask


class _Shared:
    """An array's memory, offered as writable: torch.from_numpy warns of read-only arrays, and nothing here writes."""

    def __init__(self, array: Array) -> None:
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _on_same_memory(array: Array) -> Tensor:
    """A tensor on the memory of a NumPy array where PyTorch can express its strides, else on a copy."""
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = np.asarray(_Shared(array))
    return torch.from_numpy(array)
