"""Keyed randomness: a draw depends on (seed, stream, step, index) and on nothing else.

Not on the rank, the worker, the micro-batch or the history of the process: so an interrupted run equals an
uninterrupted one bit for bit, another world size sees the same noise, and sample i is the same image in any batch.
Numbers are drawn on the CPU, so that every device gets the same ones.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def keyed_rng(seed: int, stream: str, step: int, index: int) -> np.random.Generator:
    """The generator of one draw. The key is a 128-bit hash, so collisions between draws do not occur in practice."""
    text = struct.pack("<qqq", seed, step, index) + stream.encode()
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little"))
    )


def keyed_normal(seed: int, stream: str, step: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 on the CPU: [len(indices), *shape], row i keyed by indices[i]."""
    out = np.empty((len(indices), math.prod(shape)), np.float32)
    for row, index in zip(out, indices):
        keyed_rng(seed, stream, step, int(index)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(out).view(len(indices), *shape)


def keyed_uniform(seed: int, stream: str, step: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float32 on the CPU: [len(indices), *shape], row i keyed by indices[i]."""
    out = np.empty((len(indices), math.prod(shape)), np.float32)
    for row, index in zip(out, indices):
        keyed_rng(seed, stream, step, int(index)).random(dtype=np.float32, out=row)
    return torch.from_numpy(out).view(len(indices), *shape)
