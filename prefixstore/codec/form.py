"""What a codec must know of a chunk's bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefixstore.layout import Layout

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of an element


@dataclass(frozen=True, slots=True)
class Form:
    """Pieces of [tokens, elements of a head], and the dtype of these. Pure."""

    layout: Layout
    dtype: str  # the identity's ``kv_dtype``

    @property
    def width(self) -> int:
        """Bytes of an element; 1 for what is not known."""
        width = FLOATS.get(self.dtype, 1)
        return width if self.layout.head_bytes % width == 0 else 1

    @property
    def head_size(self) -> int:
        """Elements of a token in a piece."""
        return self.layout.head_bytes // self.width


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """Round to one of FLOATS, nearest and ties to even; bfloat16 comes as uint16. NaN is not
    kept."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "float16" else "<f4")
