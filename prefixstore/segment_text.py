"""Following a stored text: the longest run that a prompt has in common with it, around one place.

A stored text is a chain of chunks. Backwards the way is the parent key in a chunk's preimage: one
look-up a chunk. Forwards the key of the next chunk is computed from the prompt's own tokens, as
`match` does: one look-up and one hash a chunk; only where the text stops agreeing in the middle of
a chunk is the table of children asked.

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
from typing import Literal

import numpy as np
import numpy.typing as npt

from prefixstore.keys import KEY_BYTES
from prefixstore.rows import FLAG_ALONE, ROW_HEAD_BYTES, SCOPE

CHILDREN_MAX = 16  # children with the same first token that are looked at, where a text branches
_NEVER = bytes(4)
_EXPIRES_AND_SCOPE = slice(20, SCOPE.stop)  # of an encoded row

RowOf = Callable[[bytes], "bytes | None"]
ChildrenOf = Callable[[bytes], Iterable[bytes]]  # parent key + first token -> keys of children


@dataclass(slots=True)
class Run:
    """Tokens ``[start, stop)`` of the prompt, and the chunks they stand in.

    Their rows are not kept: they are half of the memory that a search would write to.
    """

    start: int
    stop: int
    first: int  # place in the prompt of the first chunk's first token; may be negative
    depth: int  # of the first chunk
    keys: list[bytes]
    preimages: list[bytes]
    flags: bytearray  # of the rows

    @property
    def alone(self) -> bool:
        """Whether all of it was encoded alone."""
        return all(flag & FLAG_ALONE for flag in self.flags)


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
        self.preimage = slice(-self._preimage_bytes, None)  # of a row: what its key is the hash of
        self._plain_bytes = ROW_HEAD_BYTES + self._preimage_bytes  # of a row without tag and items
        self._lasting = _NEVER + scope  # expires_s and scope of a row that does not expire
        self._now_s = now_s
        self.rows_left = rows_max  # rows that may still be looked at: the bound of all work

    def row(self, key: bytes) -> bytes | None:
        """The row of a chunk that a run may go through; None when there is none such."""
        self.rows_left -= 1
        row = self.row_of(key)
        return row if row is not None and self.usable(row) else None

    def usable(self, row: bytes) -> bool:
        """Whether it is of this namespace and salt, lives, and has no multimodal items."""
        if len(row) < self._plain_bytes:  # damaged, or of shorter chunks
            return False
        tag_bytes = row[2] | row[3] << 8
        if len(row) - tag_bytes != self._plain_bytes:
            return False
        if row[_EXPIRES_AND_SCOPE] == self._lasting:
            return True
        return row[SCOPE] == self.scope and not self.expired(row)

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
    """A text that is compared with stored ones: tokens as int32, little-endian."""

    def __init__(self, tokens: bytes | npt.NDArray[np.int32], texts: Texts) -> None:
        self.texts = texts
        self._data = bytes(tokens)
        self.num_tokens = len(self._data) // 4

    def run(self, key: bytes, first: int, anchor: int) -> Run | None:
        """The longest run through place ``anchor``, when chunk ``key`` begins at place ``first``.

        None when the chunk is not there or has another token at the anchor.
        """
        texts = self.texts
        row = texts.row(key)
        if row is None:
            return None
        start, stop = self._agree(row, first, anchor)
        if start == stop:
            return None
        depth = int.from_bytes(row[4:8], "little")
        run = Run(start, stop, first, depth, [key], [row[texts.preimage]], bytearray([row[1]]))
        if start == first:
            self._backward(run)
        if stop == first + texts.chunk_tokens:
            self._forward(run)
        return run

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

    def _backward(self, run: Run) -> None:
        """Go on from the one chunk of a run, which agrees from its first token on, backwards.

        This loop is what a search costs of a prompt that is all there: half of it is look-ups.
        """
        texts, data, size = self.texts, self._data, self.texts.chunk_tokens
        row_of, usable, of_row = texts.row_of, texts.usable, texts.preimage
        keys, preimages, flags = run.keys, run.preimages, run.flags
        key, first = preimages[0][:KEY_BYTES], run.first
        most = min(first // size, texts.rows_left)
        for at in range(4 * first, 4 * (first - most * size), -4 * size):
            row = row_of(key)
            if row is None or not row.endswith(data[at - 4 * size : at]) or not usable(row):
                break
            preimage = row[of_row]
            keys.append(key)
            preimages.append(preimage)
            flags.append(row[1])
            key = preimage[:KEY_BYTES]
        added = len(keys) - 1
        texts.rows_left -= added + 1  # and the one that it stopped at
        run.start = first = first - added * size
        if first > 0 and (row := texts.row(key)) is not None:
            start, stop = self._agree(row, first - size, first - 1)
            if start < stop:
                run.start = start
                keys.append(key)
                preimages.append(row[of_row])
                flags.append(row[1])
                added += 1
        keys.reverse()
        preimages.reverse()
        flags.reverse()
        run.first -= added * size
        run.depth -= added

    def _forward(self, run: Run) -> None:
        """Go on from the last chunk of a run, which agrees up to its last token, forwards.

        What has the key of a chunk behind one of this namespace and salt is of them too, and has no
        multimodal item: the key is a hash over all of that.
        """
        texts, data = self.texts, self._data
        size, row_of = texts.chunk_tokens, texts.row_of
        keys, preimages, flags = run.keys, run.preimages, run.flags
        key, before, end = keys[-1], len(keys), run.stop
        most = min((self.num_tokens - end) // size, texts.rows_left)
        for at in range(4 * end, 4 * (end + most * size), 4 * size):
            preimage = key + data[at : at + 4 * size]
            after = blake2b(preimage, digest_size=KEY_BYTES).digest()
            row = row_of(after)
            if row is None or not row.endswith(preimage) or texts.expired(row):
                break
            key = after
            keys.append(key)
            preimages.append(preimage)
            flags.append(row[1])
        texts.rows_left -= len(keys) - before + 1
        end += (len(keys) - before) * size
        first_token = data[4 * end : 4 * end + 4]
        run.stop, branch = end, None
        for child in texts.children(key, first_token) if first_token else ():
            row = texts.row(child)
            if row is not None and texts.parent(row) == key:
                here = self._agree(row, end, end)[1]
                if here > run.stop:
                    run.stop, branch = here, (child, row)
        if branch is not None:
            child, row = branch
            keys.append(child)
            preimages.append(row[texts.preimage])
            flags.append(row[1])


def _same_at_start(one: bytes, other: bytes, order: Literal["big", "little"] = "big") -> int:
    """How many tokens two texts of one length have in common at their start.

    As large integers: for a chunk that takes a tenth of the time of comparing arrays.
    """
    differ = int.from_bytes(one, order) ^ int.from_bytes(other, order)
    return (8 * len(one) - differ.bit_length()) // 32


def _same_at_end(one: bytes, other: bytes) -> int:
    """How many tokens two texts of one length have in common at their end."""
    return _same_at_start(one, other, "little")
