"""Random numbers that every version of numpy and torch makes alike: two environments need share seeds only."""

import math

import numpy as np


def uniform(*shape: int, seed: tuple[int, ...]) -> np.ndarray:
    """fp32 numbers in [-1, 1), multiples of 2^-23: the top 24 bits of PCG64's raw output."""
    raw = np.random.PCG64(list(seed)).random_raw(math.prod(shape))
    return ((raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1).astype(np.float32).reshape(shape)


def integers(low: int, high: int, *shape: int, seed: tuple[int, ...]) -> np.ndarray:
    """int64 numbers from low to high - 1."""
    raw = np.random.PCG64(list(seed)).random_raw(math.prod(shape))
    return (low + (raw >> np.uint64(11)) % np.uint64(high - low)).astype(np.int64).reshape(shape)
