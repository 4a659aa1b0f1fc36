"""Randomness that depends on keys alone, not on state, library version or process history.

NumPy's generators may change their streams between versions, which would change the order of a run that is resumed
after an upgrade. These few lines of integer arithmetic (the finalizer of SplitMix64) cannot.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(seed: int, stream: str, *parts: int) -> int:
    """A 64-bit key for (seed, stream name, integers). Different arguments give independent keys."""
    text = "/".join([str(int(seed)), stream, *(str(int(part)) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits(key: int, counters: NDArray[Any]) -> NDArray[np.uint64]:
    """64 random bits for each counter, uint64 of the same shape: counter i gives the same bits in any batch."""
    with np.errstate(over="ignore"):
        x = (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        # A second round: with one, two keys that differ by a multiple of the step would give shifted streams.
        x = x ^ (x >> np.uint64(31)) ^ np.uint64(key >> 1)
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 as unsigned integers of the smallest sufficient type (uint16 up to 65,536).

    Sorting (random high bits, index in the low bits) settles ties by index, so the result is the same on every
    machine, and a plain sort is several times faster than an argsort.
    """
    if n <= 1:
        return np.zeros(n, dtype=np.uint16)
    width = np.uint64((n - 1).bit_length())
    index = np.arange(n, dtype=np.uint64)
    keys = (bits(key, index) << width) | index
    keys.sort()
    keys &= (np.uint64(1) << width) - np.uint64(1)
    return keys.astype(np.uint16 if n <= 1 << 16 else np.uint32 if n <= 1 << 32 else np.uint64)
