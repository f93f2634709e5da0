"""What a codec must know of a chunk's bytes, and what a codec is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefixstore.layout import Buffer, Layout

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

    def is_key(self, piece: int) -> bool:
        """Whether a piece is of K; of one plane alone (MLA's latents) none is."""
        layout = self.layout
        return layout.num_planes == 2 and piece // layout.num_heads % 2 == 0


class Codec(Protocol):
    """Makes pieces smaller, each by itself, so that a region can be read alone. Pure: what a call
    gives depends on its arguments (and the version of zstd), so threads may share a codec."""

    name: str
    number: int  # in what is stored
    is_exact: bool  # gives back every byte

    def encode(self, form: Form, payload: memoryview) -> list[Buffer] | None:
        """Each piece of a payload, none longer than it was; one that is as long is the piece
        itself. None: it cannot take these values, or nothing gets smaller."""

    def decode(
        self, form: Form, which: Sequence[int], coded: Sequence[memoryview], out: memoryview
    ) -> None:
        """Fill ``out`` with the pieces ``which`` (their numbers), one after the other. Raises
        DamagedError for bytes that are none of this codec; never takes more memory than some times
        what it has to fill."""
