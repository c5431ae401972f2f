"""Second moments of linear layers' inputs: per site the sum of x x^T over all tokens, for rounding weights by.

They are a quarter to a whole of a model's size in float32, and kept apart from the other statistics, in a file that is
opened but not read: a site's matrix is read when it is asked for.
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
        """The second moments in matrices.

        Args:
            matrices: by site float32 [K, K], symmetric.

        Returns:
            The second moments; they hold copies of the upper triangles.
        """
        return cls({site: triangle(matrix) for site, matrix in matrices.items()})

    @classmethod
    def open(cls, file: str | os.PathLike[str], sizes: Mapping[str, int]) -> "SecondMoments":
        """The second moments in a file that `save` wrote.

        The file is mapped into memory: it may be replaced or removed while in use.

        Args:
            file: the file.
            sizes: K of each site that the file has to hold.

        Returns:
            The second moments; a matrix is read when it is asked for.

        Raises:
            LaAciqError: the file is not such a file.
        """
        try:
            return cls(_File(Path(file), sizes))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise LaAciqError(f"{str(file)!r} does not hold the second moments of this profile: {error}") from error

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file of the triangles by site.

        Args:
            file: the file; an existing one is replaced.
        """
        safetensors.numpy.save_file({site: self._triangles[site] for site in self}, file)

    def __add__(self, other: "SecondMoments") -> "SecondMoments":
        """Of the tokens of both; exact to float32 rounding. A site that one lacks is the other's."""
        sites = dict.fromkeys([*self, *other])
        return SecondMoments(
            {site: sum(moments._triangles[site] for moments in (self, other) if site in moments) for site in sites}  # type: ignore[misc]
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
            stored = opened.get_slice(site)
            if stored.get_shape() != [k * (k + 1) // 2] or stored.get_dtype() != "F32":
                raise ValueError(
                    f"site {site!r} is {stored.get_dtype()} {stored.get_shape()}; expected F32 {[k * (k + 1) // 2]}"
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
