"""Second moments of linear layers' inputs: per site the sum of x x^T over all tokens, for rounding weights by.

They are a quarter to a whole of a model's size in float32, and kept apart from the other statistics, in a file that is
opened but not read: a site's matrix is made when it is asked for.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from ..errors import LaAciqError

Float32 = NDArray[np.float32]


class SecondMoments(Mapping[str, Float32]):
    """Symmetric matrices float32 [K, K] by site, of which the upper triangles are kept: rows one after the other,
    float32 [K (K + 1) / 2].
    """

    def __init__(self, triangles: Mapping[str, Float32]) -> None:
        self._triangles = triangles

    @classmethod
    def of(cls, matrices: Mapping[str, Float32]) -> "SecondMoments":
        """Of matrices [K, K], whose upper triangles are taken."""
        return cls({site: triangle(matrix) for site, matrix in matrices.items()})

    @classmethod
    def open(cls, file: str | os.PathLike[str], sizes: Mapping[str, int]) -> "SecondMoments":
        """A file that `save` wrote, of the sites in `sizes` with their K.

        It is mapped into memory: it may be replaced or removed while in use. Raises `LaAciqError` when it is not such a
        file.
        """
        try:
            return cls(_File(Path(file), sizes))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise LaAciqError(f"{str(file)!r} does not hold the second moments of this profile: {error}") from error

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file of the triangles by site."""
        safetensors.numpy.save_file({site: self._triangles[site] for site in self}, file)

    def __add__(self, other: "SecondMoments") -> "SecondMoments":
        """Of the tokens of both; exact to float32 rounding. A site that one lacks is the other's."""
        sites = dict.fromkeys([*self, *other])
        return SecondMoments(
            {site: sum(part._triangles[site] for part in (self, other) if site in part) for site in sites}  # type: ignore[misc]
        )

    def __getitem__(self, site: str) -> Float32:
        triangle = self._triangles[site]
        k = _size(len(triangle))
        matrix = np.empty((k, k), dtype=np.float32)
        start = 0
        for i in range(k):
            matrix[i, i:] = matrix[i:, i] = triangle[start : start + k - i]
            start += k - i
        if not np.isfinite(matrix).all() or (matrix.diagonal() < 0).any():
            raise LaAciqError(f"the second moments of site {site!r} are not those of finite data")
        return matrix

    def __deepcopy__(self, memo: Any) -> "SecondMoments":
        return self  # nothing changes it

    def __reduce__(self) -> Any:
        return SecondMoments, (dict(self._triangles),)

    def __iter__(self) -> Iterator[str]:
        return iter(self._triangles)

    def __len__(self) -> int:
        return len(self._triangles)


class _File(Mapping[str, Float32]):
    """The triangles in a file, each read when it is asked for."""

    def __init__(self, file: Path, sizes: Mapping[str, int]) -> None:
        opened: Any = safetensors.safe_open(file, "numpy")
        self._open, self._sites = opened, list(opened.keys())
        if unexpected := set(self._sites) ^ set(sizes):
            raise ValueError(f"site {min(unexpected)!r} is missing or not the profile's")
        for site, k in sizes.items():
            part = opened.get_slice(site)
            if part.get_shape() != [k * (k + 1) // 2] or part.get_dtype() != "F32":
                raise ValueError(
                    f"site {site!r} is {part.get_dtype()} {part.get_shape()}; expected F32 {[k * (k + 1) // 2]}"
                )

    def __getitem__(self, site: str) -> Float32:
        if site not in self._sites:
            raise KeyError(site)
        triangle: Float32 = self._open.get_tensor(site)
        return triangle

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def triangle(matrix: Float32) -> Float32:
    """The upper triangle of a matrix [K, K], row by row: float32 [K (K + 1) / 2]."""
    return np.concatenate([matrix[i, i:] for i in range(len(matrix))], dtype=np.float32)


def _size(elements: int) -> int:
    """K of a triangle of K (K + 1) / 2 elements."""
    return (math.isqrt(8 * elements + 1) - 1) // 2
