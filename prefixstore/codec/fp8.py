"""fp8: each element as e4m3 (4 bits of exponent, 3 of mantissa; OCP 8-bit floating point, without
infinities), after a scale for each token and head that brings the largest to 448.

    a piece: f32 scale of each token | e4m3 of each element
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from prefixstore.codec import FP8
from prefixstore.codec.lossy import Codes, Floats, Lossy

LARGEST = np.float32(448)


class Scaled:
    """See the module docstring, and `lossy.Rule`."""

    def coded_bytes(self, tokens: int, head_size: int) -> int:
        """See `lossy.Rule`."""
        return tokens * (4 + head_size)

    def encode(self, values: Floats) -> Codes:
        """See `lossy.Rule`. By way of float16, whose rounding comes first: a value in 250 is then
        the neighbour of the nearest, a table instead of arithmetic on bits pays for that."""
        scales = (np.abs(values).max(-1) / LARGEST).astype(np.float32)
        scaled = values / np.where(scales > 0, scales, np.float32(1))[..., None]
        codes = _encoding()[scaled.astype(np.float16).view(np.uint16)]
        parts = (scales.astype("<f4").view(np.uint8), codes.reshape(len(values), -1))
        return np.concatenate(parts, 1)

    def decode(self, codes: Codes, tokens: int, head_size: int) -> Floats:
        """See `lossy.Rule`."""
        scales = np.ascontiguousarray(codes[:, : 4 * tokens]).view("<f4")
        values: Floats = decoding()[codes[:, 4 * tokens :]].reshape(-1, tokens, head_size)
        values *= scales[..., None]
        return values


@lru_cache(maxsize=1)
def decoding() -> Floats:
    """The value of each code: float32 [256]. 0x7f and 0xff are NaN."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, codes & 7
    steps = 2.0 ** (np.maximum(exponents, 1) - 10)
    values = (np.where(exponents > 0, 8 + mantissas, mantissas) * steps).astype(np.float32)
    values[127] = np.nan
    return np.concatenate([values, -values])


@lru_cache(maxsize=1)
def _encoding() -> Codes:
    """The code of each finite float16, by its bits: the nearest, of two the even one; uint8
    [65536]."""
    known = decoding()[:127].astype(np.float64)
    borders = (known[1:] + known[:-1]) / 2
    values = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)
    below, above = np.searchsorted(borders, values), np.searchsorted(borders, values, "right")
    codes = np.where(below % 2, above, below).astype(np.uint8)
    return np.concatenate([codes, codes | 0x80])


CODEC = Lossy(FP8, 2, Scaled(), Scaled())
