"""Whether the pages of an LMDB file hang together, before LMDB itself follows them.

LMDB has no checksums and trusts its pages: where one was overwritten, a look-up can run out of the
map or into an assertion, and the process is gone. This walks every page that can be reached from
the newest meta page (of all tables, and of the list of free pages) and checks what LMDB relies on:
each page is what it says and where it belongs, nodes and keys lie inside their pages, keys ascend
and are where a look-up goes for them, nothing is reached twice, nothing that is in use is on the
free list. What the values say is not looked at:
rows are checked when they are read.

Layout: ``mdb.c`` of LMDB 0.9 (structs MDB_page, MDB_node, MDB_db, MDB_meta), little-endian, 64 bit.
Reads the file only; 1 GB/s from the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

_HEAD = 16
_NODE = 8
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_BIG, _SUB = 0x01, 0x02  # of a leaf's node: its value is on pages of its own; it is a table
_MAGIC, _NONE = 0xBEEFC0DE, 2**64 - 1
_META_DBS, _DB, _META_LAST, _META_TXN = 24, 48, 120, 128  # behind the page's head
_DEPTH_MAX = 32
_BATCH = 2048  # pages looked at together
_META_READS = 1000
_UNWRITTEN_MAX = 1 << 14  # pages at the end
_INTEGER_KEYS = 8  # a flag of tables; and the size of such keys
_FREE_LIST = "the free list"

Pages = npt.NDArray[np.uint8]  # [n, page size]
Numbers = npt.NDArray[np.int64]


class Damaged(Exception):  # noqa: N818  (what the index is)
    """The pages do not hang together; says where."""


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes of some pages, one after the other: which page each is of, and where."""

    page: Numbers  # index among the pages looked at
    at: Numbers  # offset in its page
    low: Numbers  # of a leaf: bytes of the value; of a branch: the page below
    flags: Numbers
    key_bytes: Numbers


def check_pages(path: Path, page_bytes: int) -> int:
    """Check the file of an LMDB environment; how many pages are in use. Raises Damaged.

    Nobody may write to it meanwhile, or a read transaction must be open (LMDB then leaves the pages
    of its snapshot alone), begun before this is called.
    """
    try:
        return _check(path, page_bytes)
    except (OverflowError, ValueError, IndexError, OSError) as error:
        raise Damaged(f"it cannot be read: {error}") from error


def _check(path: Path, page_bytes: int) -> int:
    meta = _newest_meta(path, page_bytes)
    size = path.stat().st_size  # only now: it is at least as large as that state needs
    pages = np.memmap(path, np.uint8, "r", shape=(size // page_bytes, page_bytes))
    # The last pages need not be there: those freed by the transaction that took them are not
    # written. Nor need there be as many as the file has.
    if meta.last > len(pages) + _UNWRITTEN_MAX:
        raise Damaged(f"it ends at page {len(pages)}, and has {meta.last + 1}")
    walk = _Walk(pages[: meta.last + 1], meta.last + 1, meta.txn)
    walk.table(meta.free, _FREE_LIST)
    walk.table(meta.main, "the tables")
    walk.check_free()
    return int(walk.used.sum())


@dataclass(frozen=True, slots=True)
class _Table:
    root: int
    depth: int
    flags: int


@dataclass(frozen=True, slots=True)
class _Meta:
    last: int
    txn: int
    free: _Table
    main: _Table


def _newest_meta(path: Path, page_bytes: int) -> _Meta:
    """LMDB's choice: the later transaction of the two."""
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), 2 * page_bytes, 0)
        for _ in range(_META_READS):  # one may be half written: until it reads the same twice
            again = os.pread(file.fileno(), 2 * page_bytes, 0)
            if again == data:
                break
            data = again
    if len(data) < 2 * page_bytes:
        raise Damaged(f"it has {len(data)} bytes")
    found = []
    for body in (data[_HEAD:page_bytes], data[page_bytes + _HEAD :]):
        magic, version, last, txn = (
            int.from_bytes(body[at : at + width], "little")
            for at, width in ((0, 4), (4, 4), (_META_LAST, 8), (_META_TXN, 8))
        )
        if magic == _MAGIC and version == 1:
            dbs = [_table_of(body[at : at + _DB]) for at in (_META_DBS, _META_DBS + _DB)]
            found.append(_Meta(last, txn, *dbs))
    if not found:
        raise Damaged("it has no meta page")
    return max(found, key=lambda one: one.txn)


def _table_of(record: bytes) -> _Table:
    flags, depth, root = (
        int.from_bytes(record[at:stop], "little") for at, stop in ((4, 6), (6, 8), (40, 48))
    )
    return _Table(root, depth, flags)


class _Walk:
    """Goes through tables, level by level; ``used`` are the pages it has been to."""

    def __init__(self, pages: Pages, count: int, txn: int) -> None:
        self._pages, self._txn = pages, txn
        self.used = np.zeros(count, bool)
        self.used[:2] = True
        self._free: list[Numbers] = []
        self._free_keys: list[Numbers] = []

    def table(self, table: _Table, what: str) -> None:
        """One table and those in it."""
        if table.flags != (_INTEGER_KEYS if what == _FREE_LIST else 0):
            raise Damaged(f"{what}: flags {table.flags}")
        if table.root == _NONE:
            return
        if not (0 < table.depth <= _DEPTH_MAX and table.root < len(self._pages)):
            raise Damaged(f"{what}: {table.depth} levels from page {table.root}")
        level = np.array([table.root], np.int64)
        bounds = [b""]  # of each page: no key in it is smaller, each of the page before it is
        for below in range(table.depth - 1, -1, -1):
            self._claim(level, what)
            next_level: list[Numbers] = []
            next_bounds: list[bytes] = []
            for start in range(0, len(level), _BATCH):
                part = level[start : start + _BATCH]
                nodes = self._nodes(part, _BRANCH if below else _LEAF, what)
                keys = _Keys(self._pages[part], nodes, what == _FREE_LIST)
                between = bounds[start : start + len(part) + 1]
                if not keys.ascend(between, implied=below > 0):
                    raise Damaged(f"{what}: keys that are not in order")
                if below:
                    next_level.append(nodes.low | nodes.flags << 32)
                    next_bounds += keys.separators(between)
                else:
                    self._values(part, nodes, what)
            if below:
                level, bounds = np.concatenate(next_level), next_bounds

    def _claim(self, numbers: Numbers, what: str) -> None:
        """These pages are of that table, and of nothing else."""
        if len(numbers) and (numbers.min() < 2 or numbers.max() >= len(self._pages)):
            raise Damaged(f"{what}: a page that does not exist")
        if len(np.unique(numbers)) != len(numbers) or self.used[numbers].any():
            raise Damaged(f"{what}: a page is reached twice")
        self.used[numbers] = True

    def _nodes(self, numbers: Numbers, kind: int, what: str) -> _Nodes:
        """The nodes of pages of that kind, all inside of them."""
        pages = self._pages[numbers]
        size = pages.shape[1]
        head = pages[:, :_HEAD]
        own = head[:, :8].copy().view("<u8")[:, 0]
        flags, lower, upper = head[:, 10:16].copy().view("<u2").astype(np.int64).T
        wrong = (
            (own != numbers.astype(np.uint64)) | (flags != kind) | (lower < _HEAD)
            | (lower % 2 > 0) | (upper < lower) | (upper > size)
        )  # fmt: skip
        if wrong.any():
            raise Damaged(f"{what}: page {numbers[wrong][0]} is not what belongs there")
        counts = (lower - _HEAD) // 2
        if (counts < (2 if kind == _BRANCH else 1)).any():
            raise Damaged(f"{what}: a page without nodes")
        page = np.repeat(np.arange(len(numbers)), counts)
        nth = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
        at = _gather(pages, page, _HEAD + 2 * nth, 2)
        if (at < upper[page]).any() or (at % 2 > 0).any() or (at > size - _NODE).any():
            raise Damaged(f"{what}: a node outside of its page")
        fields = [_gather(pages, page, at + offset, 2) for offset in (0, 2, 4, 6)]
        nodes = _Nodes(page, at, fields[0] | fields[1] << 16, fields[2], fields[3])
        taken = nodes.key_bytes + _NODE
        if kind == _LEAF:
            taken = taken + np.where(nodes.flags & _BIG, 8, nodes.low)
        taken = taken + taken % 2  # one after the other without a gap, so none overlaps
        full = np.bincount(page, taken, len(numbers)) == size - upper
        if (at + taken > size).any() or not full.all():
            raise Damaged(f"{what}: nodes that overlap, or end outside of their page")
        return nodes

    def _values(self, numbers: Numbers, nodes: _Nodes, what: str) -> None:
        """What hangs on leaves: values on pages of their own, and tables."""
        start = nodes.at + _NODE + nodes.key_bytes
        big, sub = (nodes.flags & _BIG) > 0, (nodes.flags & _SUB) > 0
        pages = self._pages[numbers]
        size = pages.shape[1]
        firsts = _gather(pages, nodes.page[big], start[big], 8)
        for first, length in zip(firsts.tolist(), nodes.low[big].tolist(), strict=True):
            if not 2 <= first < len(self._pages):
                raise Damaged(f"{what}: a page that does not exist")
            head = self._pages[first, :_HEAD].tobytes()
            fine = int.from_bytes(head[:8], "little") == first and head[10] == _OVERFLOW
            count = int.from_bytes(head[12:16], "little")  # more than needed, if it was larger once
            if not fine or count * size < length + _HEAD or first + count > len(self._pages):
                raise Damaged(f"{what}: page {first} is not what belongs there")
            self._claim(np.arange(first, first + count), what)
        if what == _FREE_LIST:
            if (nodes.key_bytes != _INTEGER_KEYS).any():
                raise Damaged(f"{what}: a key that is no number")
            self._free_keys.append(_gather(pages, nodes.page, nodes.at + _NODE, 8))
            for value in self._bytes_of(pages, nodes, start):
                numbers_in = np.frombuffer(value, "<u8")
                if int(numbers_in[0]) != len(numbers_in) - 1:
                    raise Damaged(f"{what}: a record of another length than it says")
                self._free.append(numbers_in[1:].astype(np.int64))
        for place in np.flatnonzero(sub):
            if nodes.low[place] != _DB:
                raise Damaged(f"{what}: a table of {nodes.low[place]} bytes")
            page, at = nodes.page[place], start[place]
            key = pages[page, at - nodes.key_bytes[place] : at].tobytes()
            self.table(_table_of(pages[page, at : at + _DB].tobytes()), f"table {key!r}")

    def _bytes_of(self, pages: Pages, nodes: _Nodes, start: Numbers) -> Iterator[bytes]:
        for page, at, length, flags in zip(nodes.page, start, nodes.low, nodes.flags, strict=True):
            if flags & _BIG:
                first = int(pages[page, at : at + 8].copy().view("<u8")[0])
                count = -(-(int(length) + _HEAD) // pages.shape[1])
                whole = self._pages[first : first + count].tobytes()
                yield whole[_HEAD : _HEAD + int(length)]
            else:
                yield pages[page, at : at + length].tobytes()

    def check_free(self) -> None:
        """No page that is in use is on the free list, and none is there twice; its keys, which are
        transactions, ascend."""
        keys = np.concatenate(self._free_keys) if self._free_keys else np.zeros(0, np.int64)
        if (np.diff(keys) <= 0).any() or (keys < 0).any() or (keys > self._txn).any():
            raise Damaged("the free list: its transactions are not in order")
        free = np.concatenate(self._free) if self._free else np.zeros(0, np.int64)
        if len(free) and (free.min() < 2 or free.max() >= len(self.used)):
            raise Damaged("the free list: a page that does not exist")
        if self.used[free].any() or len(np.unique(free)) != len(free):
            raise Damaged("the free list: a page that is in use")


class _Keys:
    """The keys of some pages, which LMDB compares as bytes, those of the free list as numbers."""

    def __init__(self, pages: Pages, nodes: _Nodes, numbers: bool) -> None:
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
        at = np.minimum(self._nodes.at[:, None] + _NODE + column, self._pages.shape[1] - 1)
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
        start = int(self._nodes.at[nth]) + _NODE
        stop = start + int(self._nodes.key_bytes[nth])
        return self._pages[self._nodes.page[nth], start:stop].tobytes()[:: self._step]


def _gather(pages: Pages, page: Numbers, at: Numbers, width: int) -> Numbers:
    """Little-endian numbers of so many bytes at those places."""
    if len(at) and (at.min() < 0 or at.max() > pages.shape[1] - width):
        raise Damaged("a node outside of its page")
    value = np.zeros(len(at), np.int64)
    for byte in range(width):
        value |= pages[page, at + byte].astype(np.int64) << (8 * byte)
    return value
