"""Random numbers that are the same on every machine and in every release.

Torch promises its random streams neither across releases nor across processors (its vectorised normal distribution
differs from the plain one in the last bits), so numbers are made here from counters: splitmix64 (Steele, Lea and Flood
2014) in integers, turned into floating numbers by exact operations only.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK16 = np.uint64(0xFFFF)
_MEAN = 2 * 65535  # of the sum of four 16-bit numbers
_DEVIATION = (4 * (65536**2 - 1) / 12) ** 0.5


def stream(*key: object) -> int:
    """The 64-bit number that names one stream of numbers."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def words(name: int, count: int, start: int = 0) -> NDArray[np.uint64]:
    """`count` 64-bit words of the stream, from number `start` on."""
    counter = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.uint64(name) + counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normals(name: int, count: int) -> NDArray[np.float64]:
    """Numbers of mean 0 and variance 1, near-normal: the sum of four uniform 16-bit numbers (within 3.5)."""
    made = np.empty(count)
    step = 1 << 20
    for start in range(0, count, step):
        w = words(name, min(step, count - start), start)
        total = sum((w >> np.uint64(shift)) & _MASK16 for shift in (0, 16, 32, 48))
        made[start : start + step] = (np.asarray(total).astype(np.int64) - _MEAN) / _DEVIATION
    return made


def signs(name: int, count: int) -> NDArray[np.float64]:
    """+1 and -1, evenly."""
    return (words(name, count) >> np.uint64(63)).astype(np.float64) * 2 - 1


def below(name: int, count: int, limit: int) -> NDArray[np.int64]:
    """Whole numbers from 0 to `limit` - 1, evenly but for a bias of `limit` / 2**32."""
    return ((words(name, count) >> np.uint64(32)).astype(np.int64) * limit) >> 32
