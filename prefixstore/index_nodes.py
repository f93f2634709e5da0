"""The nodes of LMDB pages, many at once: where they and their keys lie. Part of `index_check`.

Whatever the bytes are, nothing outside of the pages is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAGE_HEAD_BYTES = 16
NODE_HEAD_BYTES = 8
BRANCH, LEAF, OVERFLOW = 0x01, 0x02, 0x04
BIG, SUB = 0x01, 0x02  # of a leaf's node: its value is on pages of its own; it is a table

Pages = npt.NDArray[np.uint8]  # [n, page size]
Numbers = npt.NDArray[np.int64]


class Damaged(Exception):  # noqa: N818  (what the index is)
    """The pages do not hang together; says where."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of some pages, one after the other: which page each is of, and where."""

    page: Numbers  # index among the pages looked at
    at: Numbers  # offset in its page
    low: Numbers  # of a leaf: bytes of the value; of a branch: the page below
    flags: Numbers
    key_bytes: Numbers


def nodes_of(pages: Pages, numbers: Numbers, kind: int, what: str) -> Nodes:
    """The nodes of pages of that kind, all inside of them."""
    size = pages.shape[1]
    head = pages[:, :PAGE_HEAD_BYTES]
    own = head[:, :8].copy().view("<u8")[:, 0]
    flags, lower, upper = head[:, 10:16].copy().view("<u2").astype(np.int64).T
    wrong = (
        (own != numbers.astype(np.uint64)) | (flags != kind) | (lower < PAGE_HEAD_BYTES)
        | (lower % 2 > 0) | (upper < lower) | (upper > size)
    )  # fmt: skip
    if wrong.any():
        raise Damaged(f"{what}: page {numbers[wrong][0]} is not what belongs there")
    counts = (lower - PAGE_HEAD_BYTES) // 2
    if (counts < (2 if kind == BRANCH else 1)).any():
        raise Damaged(f"{what}: a page without nodes")
    page = np.repeat(np.arange(len(numbers)), counts)
    nth = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = gather(pages, page, PAGE_HEAD_BYTES + 2 * nth, 2)
    if (at < upper[page]).any() or (at % 2 > 0).any() or (at > size - NODE_HEAD_BYTES).any():
        raise Damaged(f"{what}: a node outside of its page")
    fields = [gather(pages, page, at + offset, 2) for offset in (0, 2, 4, 6)]
    nodes = Nodes(page, at, fields[0] | fields[1] << 16, fields[2], fields[3])
    taken = nodes.key_bytes + NODE_HEAD_BYTES
    if kind == LEAF:
        taken = taken + np.where(nodes.flags & BIG, 8, nodes.low)
    taken = taken + taken % 2  # one after the other without a gap, so none overlaps
    full = np.bincount(page, taken, len(numbers)) == size - upper
    if (at + taken > size).any() or not full.all():
        raise Damaged(f"{what}: nodes that overlap, or end outside of their page")
    return nodes


class Keys:
    """The keys of some pages, which LMDB compares as bytes, those of the free list as numbers."""

    def __init__(self, pages: Pages, nodes: Nodes, numbers: bool) -> None:
        self._pages, self._nodes = pages, nodes
        self._step = -1 if numbers else 1  # little-endian
        new_page = np.flatnonzero(np.diff(nodes.page)) + 1
        self._first = [0, *new_page.tolist()]
        self._last = [*(new_page - 1).tolist(), len(nodes.page) - 1]

    def ascend(self, bounds: list[bytes], *, implied: bool) -> bool:
        """Whether keys ascend within each page and between the bounds of the pages; the last page
        may have no upper one. ``implied``: the first of each page is not looked at (a branch's)."""
        pages = self._nodes.page
        width = int(self._nodes.key_bytes.max(initial=0))
        column = np.arange(width)
        at = np.minimum(
            self._nodes.at[:, None] + NODE_HEAD_BYTES + column, self._pages.shape[1] - 1
        )
        inside = column < self._nodes.key_bytes[:, None]
        padded = np.where(inside, self._pages[pages[:, None], at], 0)[:, :: self._step]
        # A shorter key that the longer one begins with comes first: the length decides then.
        lengths = self._nodes.key_bytes.astype(">u2")[:, None].view(np.uint8)
        rows = np.ascontiguousarray(np.hstack([padded, lengths]), np.uint8)
        strings = rows.view(f"S{width + 2}")[:, 0]
        compared = pages[1:] == pages[:-1]
        if implied:
            compared[self._first] = False
        if (strings[1:] <= strings[:-1])[compared].any():
            return False
        firsts = [self.key(nth + implied) for nth in self._first]
        lasts = [self.key(nth) for nth in self._last]
        return all(map(bytes.__ge__, firsts, bounds)) and all(map(bytes.__lt__, lasts, bounds[1:]))

    def separators(self, bounds: list[bytes]) -> list[bytes]:
        """The lower bounds of the pages below: the keys, with the first of each page implied."""
        keys = [self.key(nth) for nth in range(len(self._nodes.page))]
        for nth, bound in zip(self._first, bounds, strict=False):
            keys[nth] = bound
        return keys

    def key(self, nth: int) -> bytes:
        """One of them, such that bytes compare as LMDB does."""
        start = int(self._nodes.at[nth]) + NODE_HEAD_BYTES
        stop = start + int(self._nodes.key_bytes[nth])
        return self._pages[self._nodes.page[nth], start:stop].tobytes()[:: self._step]


def gather(pages: Pages, page: Numbers, at: Numbers, width: int) -> Numbers:
    """Little-endian numbers of so many bytes at those places."""
    if len(at) and (at.min() < 0 or at.max() > pages.shape[1] - width):
        raise Damaged("a node outside of its page")
    value = np.zeros(len(at), np.int64)
    for byte in range(width):
        value |= pages[page, at + byte].astype(np.int64) << (8 * byte)
    return value
