"""Following a stored text: the longest run that a prompt has in common with it, around one place.

A stored text is a chain of chunks. Backwards the way is the parent key in a chunk's preimage.
Forwards the key of the next chunk is computed from the prompt's own tokens, as `match` does, so a
text that goes on like the prompt costs one look-up a chunk; only where it stops agreeing in the
middle of a chunk is the table of children asked.

What must hold: each token of a run was compared with the preimage of a row of the same namespace
and salt, so a fingerprint that collides, by chance or by craft, is a miss. A chunk that holds part
of a multimodal item ends a run: its KV depends on the item, which the tokens do not tell. Reads
only; what a crash or an eviction takes away in the middle ends a run early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np
import numpy.typing as npt

from prefixstore.keys import KEY_BYTES
from prefixstore.rows import FLAG_ALONE, ROW_HEAD_BYTES, SCOPE

CHILDREN_MAX = 16  # children with the same first token that are looked at, where a text branches
_NEVER = bytes(4)

RowOf = Callable[[bytes], "bytes | None"]
ChildrenOf = Callable[[bytes], Iterable[bytes]]  # parent key + first token -> keys of children


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens ``[start, stop)`` of the prompt, and the chunks they stand in."""

    start: int
    stop: int
    first: int  # place in the prompt of the first chunk's first token; may be negative
    keys: list[bytes]
    rows: list[bytes]  # encoded

    @property
    def alone(self) -> bool:
        """Whether all of it was encoded alone."""
        return all(row[1] & FLAG_ALONE for row in self.rows)


class Texts:
    """The stored texts of one namespace and salt, in one tier's index."""

    def __init__(
        self,
        row_of: RowOf,
        children_of: ChildrenOf,
        scope: bytes,
        chunk_tokens: int,
        now_s: float,
        rows_max: int,
    ) -> None:
        self.row_of, self._children_of = row_of, children_of
        self.scope, self.chunk_tokens = scope, chunk_tokens
        self._token_bytes = 4 * chunk_tokens
        self._preimage_bytes = KEY_BYTES + 4 * chunk_tokens
        self._now_s = now_s
        self.rows_left = rows_max  # rows that may still be looked at: the bound of all work

    def row(self, key: bytes) -> bytes | None:
        """The row of a chunk that a run may go through; None when there is none such."""
        self.rows_left -= 1
        row = self.row_of(key)
        if row is None or row[SCOPE] != self.scope:
            return None
        tag_bytes = row[2] | row[3] << 8
        if len(row) != ROW_HEAD_BYTES + tag_bytes + self._preimage_bytes:
            return None  # it has multimodal items
        return None if self.expired(row) else row

    def expired(self, row: bytes) -> bool:
        """Whether the chunk's time is over."""
        expires = row[20:24]
        return expires != _NEVER and int.from_bytes(expires, "little") <= self._now_s

    def parent(self, row: bytes) -> bytes:
        """Key of the chunk before."""
        return row[-self._preimage_bytes : -self._token_bytes]

    def token_bytes(self, row: bytes) -> bytes:
        """Its tokens."""
        return row[-self._token_bytes :]

    def children(self, key: bytes, first_token: bytes) -> list[bytes]:
        """Keys of the chunks behind a chunk that begin with a token, at most CHILDREN_MAX."""
        return list(islice(self._children_of(key + first_token), CHILDREN_MAX))


class Prompt:
    """A text that is compared with stored ones: int32 tokens [n]."""

    def __init__(self, tokens: npt.NDArray[np.int32], texts: Texts) -> None:
        self.num_tokens, self.texts = len(tokens), texts
        self._data = tokens.tobytes()

    def run(self, key: bytes, first: int, anchor: int) -> Run | None:
        """The longest run through place ``anchor``, when chunk ``key`` begins at place ``first``.

        None when the chunk is not there or has another token at the anchor.
        """
        row = self.texts.row(key)
        if row is None:
            return None
        start, stop = self._agree(row, first, anchor)
        if start == stop:
            return None
        keys, rows = [key], [row]
        end = first + self.texts.chunk_tokens
        if stop == end:
            stop = self._forward(keys, rows, end)
        before: list[tuple[bytes, bytes]] = []
        if start == first:
            start, first = self._backward(before, row, first)
        return Run(
            start,
            stop,
            first,
            [key for key, _ in reversed(before)] + keys,
            [row for _, row in reversed(before)] + rows,
        )

    def _agree(self, row: bytes, first: int, anchor: int) -> tuple[int, int]:
        """Places around the anchor where prompt and chunk have the same tokens; maybe none."""
        low, high = max(first, 0), min(first + self.texts.chunk_tokens, self.num_tokens)
        ours = self._data[4 * low : 4 * high]
        theirs = self.texts.token_bytes(row)[4 * (low - first) : 4 * (high - first)]
        if ours == theirs:
            return low, high
        split = 4 * (anchor - low)
        stop = anchor + _same_at_start(ours[split:], theirs[split:])
        if stop == anchor:
            return anchor, anchor
        return anchor - _same_at_end(ours[:split], theirs[:split]), stop

    def _backward(
        self, before: list[tuple[bytes, bytes]], row: bytes, first: int
    ) -> tuple[int, int]:
        """Go on from place ``first``, where ``row``'s chunk begins, towards the start.

        Adds the chunks to ``before``, last one first; returns the start of the run and the place
        of the first chunk's first token.
        """
        texts, size = self.texts, self.texts.chunk_tokens
        start = first
        while start == first > 0 and texts.rows_left > 0:
            key = texts.parent(row)
            parent = texts.row(key)
            if parent is None:
                break
            start, stop = self._agree(parent, first - size, first - 1)
            if start == stop:
                return first, first
            row, first = parent, first - size
            before.append((key, row))
        return start, first

    def _forward(self, keys: list[bytes], rows: list[bytes], end: int) -> int:
        """Go on from place ``end``, where the last of the chunks ends; returns the run's end.

        What has the key of a chunk behind one of this namespace and salt is of them too, and has no
        multimodal item: the key is a hash over all of that. This loop is most of what a search of
        a prompt costs that is all there: 3 us a chunk.
        """
        texts, data = self.texts, self._data
        size, row_of = texts.chunk_tokens, texts.row_of
        key, before = keys[-1], len(keys)
        most = min((self.num_tokens - end) // size, texts.rows_left)
        for at in range(4 * end, 4 * (end + most * size), 4 * size):
            preimage = key + data[at : at + 4 * size]
            after = blake2b(preimage, digest_size=KEY_BYTES).digest()
            row = row_of(after)
            if row is None or not row.endswith(preimage) or texts.expired(row):
                break
            key = after
            keys.append(key)
            rows.append(row)
        texts.rows_left -= len(keys) - before
        end += (len(keys) - before) * size
        first_token = data[4 * end : 4 * end + 4]
        stop, branch = end, None
        for child in texts.children(key, first_token) if first_token else ():
            row = texts.row(child)
            if row is not None and texts.parent(row) == key:
                here = self._agree(row, end, end)[1]
                if here > stop:
                    stop, branch = here, (child, row)
        if branch is not None:
            keys.append(branch[0])
            rows.append(branch[1])
        return stop


def _same_at_start(one: bytes, other: bytes) -> int:
    """How many tokens two texts of one length have in common at their start.

    As large integers: for a chunk that takes a tenth of the time of comparing arrays.
    """
    differ = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return (8 * len(one) - differ.bit_length()) // 32


def _same_at_end(one: bytes, other: bytes) -> int:
    """How many tokens two texts of one length have in common at their end."""
    return _same_at_start(one[::-1], other[::-1])
