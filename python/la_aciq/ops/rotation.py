"""The randomized block Hadamard rotation's two parameters: its signs and its block size.

The rotation of a row x of K elements is y = H_b (s * x) / sqrt(b) in every block of b elements, H_b the
Sylvester-ordered Hadamard matrix and s a vector of random signs (`la_aciq.rotate`). It is orthogonal, so rotating a
layer's input and, offline, the rows of its weight leaves the layer's output as it was; it spreads outliers over a block
(QuaRot, Ashkboos et al. 2024).
"""

import hashlib

import numpy as np
import numpy.typing as npt


def block_size(k: int) -> int:
    """The largest power of two that divides k: the block that rows of k >= 1 elements are rotated in (576 -> 64)."""
    block = 1
    while k % (2 * block) == 0:  # not k & -k: PyTorch has no bitwise operations on symbolic sizes
        block *= 2
    return block


def signs(k: int, seed: int) -> npt.NDArray[np.int8]:
    """The k signs (int8, +1 or -1) of rows of k elements under a seed.

    They are the bits of SHAKE-128 over the seed and k, so that they do not depend on any library's random generator:
    a checkpoint made today unfolds the same way on every platform and version.
    """
    digest = hashlib.shake_128(f"la-aciq rotation {seed} {k}".encode()).digest((k + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8), count=k)
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)
