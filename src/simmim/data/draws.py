"""Random numbers without a state: a hash of (seed, epoch, index), equal on every machine.

Neither depends on a library's version: one reads a digest, the other Philox's raw output (NumPy
keeps that stream for ever, but not what its generators make of it).
"""

import struct
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count

import numpy as np
import numpy.typing as npt


def uniforms(*key: int) -> Iterator[float]:
    """Draw numbers from [0, 1), as many as are asked for; the first eight cost two microseconds.

    Args:
        key: What they depend on, such as (seed, epoch, index).
    """
    for block in count():
        digest = blake2b(struct.pack(f"<{len(key) + 1}q", *key, block)).digest()
        for word in struct.unpack("<8Q", digest):
            yield (word >> 11) * 2.0**-53


def permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Put 0 ... n - 1 in an order that depends on (seed, epoch) alone."""
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    return np.argsort(bits, kind="stable")
