"""Whether the pages of an LMDB file hang together, before LMDB itself follows them.

LMDB has no checksums and trusts its pages: where one was overwritten, a look-up can run out of the
map or into an assertion, and the process is gone. This walks every page that can be reached from
the newest meta page (of all tables, and of the list of free pages) and checks what LMDB relies on:
each page is what it says and where it belongs, nodes and keys lie inside their pages, keys ascend
and are where a look-up goes for them, nothing is reached twice, nothing that is in use is on the
free list. What the values say is not looked at:
rows are checked when they are read.

Layout: ``mdb.c`` of LMDB 0.9 (structs MDB_page, MDB_node, MDB_db, MDB_meta), little-endian, 64 bit.
Reads the file only, and with ``pread``: through a mapping a bad sector, or a file that is cut while
this looks at it, would be the SIGBUS it is there to prevent. 600 MB/s from the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefixstore.index_nodes import (
    BIG,
    BRANCH,
    LEAF,
    NODE_HEAD_BYTES,
    OVERFLOW,
    PAGE_HEAD_BYTES,
    SUB,
    Keys,
    Nodes,
    Numbers,
    Pages,
    gather,
    nodes_of,
)
from prefixstore.index_nodes import (
    Damaged as Damaged,
)

_MAGIC, _NONE = 0xBEEFC0DE, 2**64 - 1
_META_DBS, _DB, _META_LAST, _META_TXN = 24, 48, 120, 128  # behind the page's head
_DEPTH_MAX = 32
_BATCH = 2048  # pages looked at together
_META_READS = 1000
_UNWRITTEN_MAX = 1 << 14  # pages at the end
_INTEGER_KEYS = 8  # a flag of tables; and the size of such keys
_FREE_LIST = "the free list"


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
    with path.open("rb", buffering=0) as file:
        meta = _newest_meta(file.fileno(), page_bytes)
        size = os.fstat(file.fileno()).st_size  # only now: at least as large as that state needs
        # The last pages need not be there: those freed by the transaction that took them are not
        # written. Nor need there be as many as the file has.
        if meta.last > size // page_bytes + _UNWRITTEN_MAX:
            raise Damaged(f"it ends at page {size // page_bytes}, and has {meta.last + 1}")
        pages = _File(file.fileno(), page_bytes, min(size // page_bytes, meta.last + 1))
        walk = _Walk(pages, meta.last + 1, meta.txn)
        walk.table(meta.free, _FREE_LIST)
        walk.table(meta.main, "the tables")
        walk.check_free()
    return int(walk.used.sum())


class _File:
    """The pages of the file, read when they are asked for."""

    def __init__(self, fd: int, page_bytes: int, count: int) -> None:
        self._fd, self.page_bytes, self.count = fd, page_bytes, count

    def pages(self, numbers: Numbers) -> Pages:
        """Copies of those pages. Raises Damaged, OSError."""
        size = self.page_bytes
        found = np.empty((len(numbers), size), np.uint8)
        view = found.data.cast("B")
        for nth, number in enumerate(numbers.tolist()):
            if os.preadv(self._fd, [view[nth * size : (nth + 1) * size]], number * size) != size:
                raise Damaged(f"it ends before page {number}")
        return found

    def run(self, first: int, num_bytes: int) -> bytes:
        """So many bytes from the beginning of a page on. Raises Damaged, OSError."""
        found = os.pread(self._fd, num_bytes, first * self.page_bytes)
        if len(found) != num_bytes:
            raise Damaged(f"it ends behind page {first}")
        return found


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


def _newest_meta(fd: int, page_bytes: int) -> _Meta:
    """LMDB's choice: the later transaction of the two."""
    data = os.pread(fd, 2 * page_bytes, 0)
    for _ in range(_META_READS):  # one may be half written: until it reads the same twice
        again = os.pread(fd, 2 * page_bytes, 0)
        if again == data:
            break
        data = again
    if len(data) < 2 * page_bytes:
        raise Damaged(f"it has {len(data)} bytes")
    found = []
    for body in (data[PAGE_HEAD_BYTES:page_bytes], data[page_bytes + PAGE_HEAD_BYTES :]):
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

    def __init__(self, file: _File, count: int, txn: int) -> None:
        self._file, self._txn = file, txn
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
        if not (0 < table.depth <= _DEPTH_MAX and table.root < self._file.count):
            raise Damaged(f"{what}: {table.depth} levels from page {table.root}")
        level = np.array([table.root], np.int64)
        bounds = [b""]  # of each page: no key in it is smaller, each of the page before it is
        for below in range(table.depth - 1, -1, -1):
            self._claim(level, what)
            next_level: list[Numbers] = []
            next_bounds: list[bytes] = []
            for start in range(0, len(level), _BATCH):
                part = level[start : start + _BATCH]
                pages = self._file.pages(part)
                nodes = nodes_of(pages, part, BRANCH if below else LEAF, what)
                keys = Keys(pages, nodes, what == _FREE_LIST)
                between = bounds[start : start + len(part) + 1]
                if not keys.ascend(between, implied=below > 0):
                    raise Damaged(f"{what}: keys that are not in order")
                if below:
                    next_level.append(nodes.low | nodes.flags << 32)
                    next_bounds += keys.separators(between)
                else:
                    self._values(pages, nodes, what)
            if below:
                level, bounds = np.concatenate(next_level), next_bounds

    def _claim(self, numbers: Numbers, what: str) -> None:
        """These pages are of that table, and of nothing else."""
        if len(numbers) and (numbers.min() < 2 or numbers.max() >= self._file.count):
            raise Damaged(f"{what}: a page that does not exist")
        if len(np.unique(numbers)) != len(numbers) or self.used[numbers].any():
            raise Damaged(f"{what}: a page is reached twice")
        self.used[numbers] = True

    def _values(self, pages: Pages, nodes: Nodes, what: str) -> None:
        """What hangs on leaves: values on pages of their own, and tables."""
        start = nodes.at + NODE_HEAD_BYTES + nodes.key_bytes
        big, sub = (nodes.flags & BIG) > 0, (nodes.flags & SUB) > 0
        size = pages.shape[1]
        firsts = gather(pages, nodes.page[big], start[big], 8)
        for first, length in zip(firsts.tolist(), nodes.low[big].tolist(), strict=True):
            if not 2 <= first < self._file.count:
                raise Damaged(f"{what}: a page that does not exist")
            head = self._file.run(first, PAGE_HEAD_BYTES)
            fine = int.from_bytes(head[:8], "little") == first and head[10] == OVERFLOW
            count = int.from_bytes(head[12:16], "little")  # more than needed, if it was larger once
            if (
                not fine
                or count * size < length + PAGE_HEAD_BYTES
                or first + count > self._file.count
            ):
                raise Damaged(f"{what}: page {first} is not what belongs there")
            self._claim(np.arange(first, first + count), what)
        if what == _FREE_LIST:
            if (nodes.key_bytes != _INTEGER_KEYS).any():
                raise Damaged(f"{what}: a key that is no number")
            self._free_keys.append(gather(pages, nodes.page, nodes.at + NODE_HEAD_BYTES, 8))
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

    def _bytes_of(self, pages: Pages, nodes: Nodes, start: Numbers) -> Iterator[bytes]:
        for page, at, length, flags in zip(nodes.page, start, nodes.low, nodes.flags, strict=True):
            if flags & BIG:
                first = int(pages[page, at : at + 8].copy().view("<u8")[0])
                yield self._file.run(first, PAGE_HEAD_BYTES + int(length))[PAGE_HEAD_BYTES:]
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
