"""What the store is measured beside: memcpy, plain files, one file, LMDB values; and cold files.

Owns the files each of them makes in the folder it is given.  What must hold: each moves exactly the
bytes it is handed, from and to the caller's buffers, so that all see the same access pattern; a
file that `drop_page_cache` returned for has no page in the page cache, which mincore(2) confirmed.
Leftovers of a crash lie in the benchmark's own folder and go with it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from prefixstore.index import Environment, Txn

Bytes = npt.NDArray[np.uint8]

FILL_BYTES = 8 << 20
RESIDENT_SHARE_MAX = 0.01  # of a file's pages, for it to count as cold
LMDB_VALUES_PER_COMMIT = 32
READ_THREADS = 4  # as many as LMCache's fs_native takes
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class Medium(Protocol):
    """A place on disk that keeps values by their number."""

    def write(self, values: Sequence[Bytes]) -> None:
        """Store all values; they are durable when this returns."""

    def read(self, outs: Sequence[Bytes]) -> None:
        """Read value i into ``outs[i]``."""

    def cool(self) -> None:
        """Take the bytes out of the page cache."""

    def remove(self) -> None:
        """Delete everything."""


def aligned(num_bytes: int) -> Bytes:
    """A buffer that begins at a page, as engines' own do, with memory behind every page of it.

    numpy places large arrays 16 bytes into a page, and there both memcpy and pread (``rep movsb``)
    ran at 1.4 to 2.7 GB/s on an AMD EPYC instead of 7 to 9, which would hide every difference.
    """
    whole = np.ones(num_bytes + mmap.PAGESIZE, np.uint8)
    start = -whole.ctypes.data % mmap.PAGESIZE
    return whole[start : start + num_bytes]


def copy_all(sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
    """The limit of the memory tier: numpy's copy, buffer by buffer."""
    for source, target in zip(sources, targets, strict=True):
        np.copyto(target, source)


class OneFile:
    """The limit of the disk tier: one file, written and read in order, one fsync."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "one-file"

    def write(self, values: Sequence[Bytes]) -> None:
        """See `Medium`."""
        with open(self._path, "wb", buffering=0) as file:
            for value in values:
                _write_all(file.fileno(), value)
            os.fsync(file.fileno())

    def read(self, outs: Sequence[Bytes]) -> None:
        """See `Medium`."""
        with open(self._path, "rb", buffering=0) as file:
            for out in outs:
                _read_all(file.fileno(), out)

    def read_in_parallel(self, outs: Sequence[Bytes], *, direct: bool) -> None:
        """All a machine can do: nothing is checked, and READ_THREADS copy at once; ``direct``: past
        the page cache, which not every file system can (OSError)."""
        size = outs[0].nbytes

        def read(number: int) -> None:
            left, at = outs[number].data, number * size
            while len(left):
                got = os.preadv(descriptor, [left], at)
                left, at = left[got:], at + got

        descriptor = os.open(self._path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                for _ in pool.map(read, range(len(outs))):
                    pass
        finally:
            os.close(descriptor)

    def cool(self) -> None:
        """See `Medium`."""
        drop_page_cache([self._path])

    def remove(self) -> None:
        """See `Medium`."""
        self._path.unlink(missing_ok=True)


class PlainFiles:
    """One file a value, each with its own fsync."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "files"
        self._folder.mkdir(exist_ok=True)

    def write(self, values: Sequence[Bytes]) -> None:
        """See `Medium`."""
        for number, value in enumerate(values):
            with open(self._folder / f"{number}", "wb", buffering=0) as file:
                _write_all(file.fileno(), value)
                os.fsync(file.fileno())

    def read(self, outs: Sequence[Bytes]) -> None:
        """See `Medium`."""
        for number, out in enumerate(outs):
            with open(self._folder / f"{number}", "rb", buffering=0) as file:
                _read_all(file.fileno(), out)

    def cool(self) -> None:
        """See `Medium`."""
        drop_page_cache(self._folder.iterdir())

    def remove(self) -> None:
        """See `Medium`."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()


class LmdbValues:
    """The payload itself as LMDB values, a few in each durable commit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "lmdb"
        self._env: Environment | None = None

    def write(self, values: Sequence[Bytes]) -> None:
        """See `Medium`."""
        env = self._open()
        for at in range(0, len(values), LMDB_VALUES_PER_COMMIT):
            part = values[at : at + LMDB_VALUES_PER_COMMIT]
            env.write(partial(self._put, first=at, values=part), deadline_s=120.0)

    @staticmethod
    def _put(txn: Txn, first: int, values: Sequence[Bytes]) -> None:
        for number, value in enumerate(values, first):
            txn.put("value", number.to_bytes(4, "big"), cast(bytes, value.data))

    def read(self, outs: Sequence[Bytes]) -> None:
        """See `Medium`."""
        with self._open().read() as txn:
            for number, out in enumerate(outs):
                value = txn.get("value", number.to_bytes(4, "big"))
                if value is None:
                    raise RuntimeError(f"LMDB has no value {number}")
                out[:] = np.frombuffer(value, np.uint8)

    def cool(self) -> None:
        """See `Medium`; mapped pages cannot be dropped, so it is closed first."""
        self._close()
        drop_page_cache([self._folder / "data.mdb"])

    def remove(self) -> None:
        """See `Medium`."""
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def _open(self) -> Environment:
        if self._env is None:
            self._env = Environment(self._folder, ("value",), durable=True)
        return self._env


def drop_page_cache(paths: Iterable[Path]) -> None:
    """Take files out of the page cache; RuntimeError if the kernel keeps more than 1 % of one."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            share = resident_share(descriptor)
        finally:
            os.close(descriptor)
        if share > RESIDENT_SHARE_MAX:
            raise RuntimeError(f"{path}: {100 * share:.0f} % stayed in the page cache; not cold")


def fill_page_cache(paths: Iterable[Path]) -> None:
    """Read files through it; RuntimeError if the kernel does not keep 99 % of one."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(FILL_BYTES):
                pass
            share = resident_share(file.fileno())
        if share < 1 - RESIDENT_SHARE_MAX:
            raise RuntimeError(f"{path}: {100 * share:.0f} % are in the page cache; not warm")


def resident_share(descriptor: int) -> float:
    """Share of an open file's pages that are in the page cache, by mincore(2)."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    vector = np.zeros(pages, np.uint8)
    with mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        mapped = np.frombuffer(mapping, np.uint8)
        failed = _libc.mincore(mapped.ctypes.data, size, vector.ctypes.data)
        del mapped  # the mapping cannot be closed while an array looks into it
    if failed:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return float((vector & 1).mean())


def _write_all(descriptor: int, value: Bytes) -> None:
    data = value.data
    while len(data):
        data = data[os.write(descriptor, data) :]


def _read_all(descriptor: int, out: Bytes) -> None:
    left = out.data
    while len(left):
        got = os.readv(descriptor, [left])
        if got == 0:
            raise RuntimeError("a file ends before its value")
        left = left[got:]
