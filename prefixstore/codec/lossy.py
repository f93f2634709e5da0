"""With loss: the elements of a piece rounded to 8 bits, with scales beside them.

A rule says how a piece is rounded; K and V may have different ones. What must hold: what is decoded
is the same on every machine, since the sums of a chunk are made of that: each step is one operation
of IEEE 754 in float32, and one rounding to the dtype (nearest, ties to even). Values that are not
finite, before or after, are not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from prefixstore.codec.form import Form
from prefixstore.errors import DamagedError
from prefixstore.layout import Buffer

_BLOCK_BYTES = 128 << 10  # of a payload, rounded at a time: its copies stay in the cache
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


class Rule(Protocol):
    """How a piece is rounded; ``values`` are float32 [pieces, tokens, head size]."""

    def coded_bytes(self, tokens: int, head_size: int) -> int:
        """Bytes of a piece."""

    def encode(self, values: Floats) -> Codes:
        """uint8 [pieces, bytes]."""

    def decode(self, codes: Codes, tokens: int, head_size: int) -> Floats:
        """The values that remain."""


class Lossy:
    """See the module docstring, and `form.Codec`."""

    is_exact = False

    def __init__(self, name: str, number: int, keys: Rule, values: Rule) -> None:
        self.name, self.number = name, number
        self._rules = {True: keys, False: values}

    def encode(self, form: Form, payload: memoryview) -> list[Buffer] | None:
        """See `form.Codec`."""
        layout, tokens, head_size = form.layout, form.layout.chunk_tokens, form.head_size
        if form.width == 1:
            return None
        rows = np.frombuffer(payload, np.uint8).reshape(-1, layout.piece_bytes)
        coded: list[Buffer] = [b""] * len(rows)
        for is_key, pieces in self._blocks(form, range(len(rows))):
            rule = self._rules[is_key]
            if rule.coded_bytes(tokens, head_size) >= layout.piece_bytes:
                return None
            values = to_float32(rows[pieces], form.dtype).reshape(-1, tokens, head_size)
            if not np.isfinite(values).all():
                return None
            with np.errstate(all="ignore"):  # of what it gives, see below
                codes = rule.encode(values)
                rounded = from_float32(rule.decode(codes, tokens, head_size), form.dtype)
            if not np.isfinite(to_float32(rounded.view(np.uint8), form.dtype)).all():
                return None
            for piece, row in zip(pieces, codes, strict=True):
                coded[piece] = row.tobytes()
        return coded

    def decode(
        self, form: Form, which: Sequence[int], coded: Sequence[memoryview], out: memoryview
    ) -> None:
        """See `form.Codec`."""
        layout, tokens, head_size = form.layout, form.layout.chunk_tokens, form.head_size
        rows = np.frombuffer(out, np.uint8).reshape(-1, layout.piece_bytes)
        for is_key, places in self._blocks(form, which):
            rule = self._rules[is_key]
            size = rule.coded_bytes(tokens, head_size)
            if any(coded[place].nbytes != size for place in places):
                raise DamagedError(f"a piece of {self.name} of another size")
            codes = np.frombuffer(b"".join(coded[place] for place in places), np.uint8)
            # Scales that somebody made up may be anything; what comes of them fails its sum.
            with np.errstate(all="ignore"):
                values = rule.decode(codes.reshape(-1, size), tokens, head_size)
                rounded = from_float32(values, form.dtype)
            rows[places] = rounded.view(np.uint8).reshape(len(places), -1)

    def _blocks(self, form: Form, which: Sequence[int]) -> list[tuple[bool, list[int]]]:
        """Places in ``which`` that are rounded together, by one rule."""
        step = max(1, _BLOCK_BYTES // form.layout.piece_bytes)
        kinds = [form.is_key(piece) for piece in which]
        found = []
        for is_key in (True, False):
            places = [place for place, kind in enumerate(kinds) if kind == is_key]
            found += [(is_key, places[at : at + step]) for at in range(0, len(places), step)]
        return found


def to_float32(data: npt.NDArray[np.uint8], dtype: str) -> Floats:
    """Elements of float32, float16 or bfloat16 (their bytes, in the last dimension) as float32."""
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f2" if dtype == "float16" else "<f4").astype(np.float32)


def from_float32(values: Floats, dtype: str) -> npt.NDArray[np.generic]:
    """Round to a dtype, nearest and ties to even; bfloat16 comes as uint16. NaN is not kept."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "float16" else "<f4")
