"""int8: K for each channel, V for each token, between the smallest and the largest of them, as KIVI
does with fewer bits (Liu et al., arXiv 2402.02750): K has channels that are large in all tokens.

    a piece: f32 smallest of each channel or token | f32 step of each | u8 of each element

An element is ``smallest + step * code``. MLA's latents, which are one plane, go like V.
"""

from __future__ import annotations

import numpy as np

from prefixstore.codec import INT8
from prefixstore.codec.lossy import Codes, Floats, Lossy

_MOST = np.float32(255)


class Between:
    """See the module docstring, and `lossy.Rule`. ``axis``: along which values share a scale."""

    def __init__(self, axis: int) -> None:
        self._axis = axis

    def _scales(self, tokens: int, head_size: int) -> int:
        return head_size if self._axis == 1 else tokens

    def coded_bytes(self, tokens: int, head_size: int) -> int:
        """See `lossy.Rule`."""
        return 8 * self._scales(tokens, head_size) + tokens * head_size

    def encode(self, values: Floats) -> Codes:
        """See `lossy.Rule`."""
        smallest = values.min(self._axis, keepdims=True)
        steps = (values.max(self._axis, keepdims=True) - smallest) / _MOST
        codes = np.rint((values - smallest) / np.where(steps > 0, steps, np.float32(1)))
        codes = np.clip(codes, 0, _MOST).astype(np.uint8)  # a step that was rounded down: 256
        count = len(values)
        head = np.concatenate([smallest.reshape(count, -1), steps.reshape(count, -1)], 1)
        head = np.ascontiguousarray(head, "<f4").view(np.uint8)
        return np.concatenate([head, codes.reshape(count, -1)], 1)

    def decode(self, codes: Codes, tokens: int, head_size: int) -> Floats:
        """See `lossy.Rule`."""
        number = self._scales(tokens, head_size)
        head = np.ascontiguousarray(codes[:, : 8 * number]).view("<f4")
        shape = (-1, 1, number) if self._axis == 1 else (-1, number, 1)
        values = codes[:, 8 * number :].astype(np.float32).reshape(-1, tokens, head_size)
        values *= head[:, number:].reshape(shape)
        values += head[:, :number].reshape(shape)
        return values


CODEC = Lossy(INT8, 3, Between(1), Between(2))
