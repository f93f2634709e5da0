"""Slot files: an array of equal slots in one sparse file.

Memory tier and disk tier use the same class. The memory tier's file lies in tmpfs, so every process
of the host shares its pages and a dead process leaves them behind. It is written with ``pwrite``
and read through a mapping; the disk tier's file is read with ``preadv``. Why: writing to a fresh
mapping takes a page fault for every 4 KiB (1.5 GB/s here, ``pwrite`` 5.3), and with no memory left
it is a SIGBUS where ``pwrite`` is an ENOSPC; a mapped read is as fast as memcpy (15 GB/s where
``preadv`` has 1.6). On disk a bad sector is an EIO for ``preadv`` but a SIGBUS in a mapping.

The disk tier is written and read with O_DIRECT where the file system can and memory is aligned:
its bytes are in the memory tier, or will be, so the page cache would hold them twice; the copy is
what a write costs most; and a few threads read at the device's speed, whatever the kernel would
read ahead. What the page cache has all the same is read from there.

``punch`` gives the space of a slot back. Which slots are in use is the index's business; a crash
here leaves bytes nobody refers to.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from prefixstore.config import GIB, PAGE_BYTES
from prefixstore.folders import sync_folder
from prefixstore.layout import Run

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_POPULATE_WRITE = 23
_MAP_AHEAD_BYTES = GIB
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
]  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_SAMPLES = 3  # pages of a run that stand for all of them: asking for 8 MiB takes a tenth of a read


class ShortFileError(OSError):
    """A slot file ends before the slot does."""


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes without holding the interpreter lock (assigning to a memoryview holds it)."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def aligned_buffer(num_bytes: int) -> memoryview:
    """A new buffer of zeros that begins at a page, so that it can be read into with O_DIRECT."""
    return memoryview(mmap.mmap(-1, num_bytes))


class SlotFile:
    """One file of equal slots. ``mapped`` tells the memory tier from the disk tier."""

    def __init__(self, path: Path, slot_bytes: int, *, mapped: bool) -> None:
        self.path, self.slot_bytes, self.mapped = path, slot_bytes, mapped
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not mapped:
            sync_folder(path.parent)
        self._direct_fd = -1 if mapped else _open_direct(path)
        self._map: memoryview | None = None
        self._map_lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether it is no longer in use."""
        return self._fd < 0

    def num_slots(self) -> int:
        """Slots the file is long enough for."""
        return os.fstat(self._fd).st_size // self.slot_bytes

    def allocate(self, slot: int) -> None:
        """Reserve space for a slot, so that a full disk is found out before bytes are written.

        Raises OSError (ENOSPC).
        """
        os.posix_fallocate(self._fd, slot * self.slot_bytes, self.slot_bytes)

    def punch(self, slot: int) -> None:
        """Give the space of a slot back to the file system."""
        at = slot * self.slot_bytes
        if _libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, at, self.slot_bytes) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path))

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot of a mapped file, to be read. They must have been written."""
        stop = (slot + 1) * self.slot_bytes
        mapping = self._map
        if mapping is None or stop > len(mapping):
            mapping = self._remap(stop)
        return mapping[stop - self.slot_bytes : stop]

    def map_slot(self, slot: int) -> memoryview:
        """A writable mapping of one slot of a mapped file, for devices that want one, as long as
        the view is held; only who has claimed the slot may write. Its pages are made and mapped,
        which several threads can do at once (`allocate` takes a lock of the file's). Raises
        OSError, ENOSPC where there is no memory."""
        stop = (slot + 1) * self.slot_bytes
        if os.fstat(self._fd).st_size < stop:
            os.posix_fallocate(self._fd, stop - PAGE_BYTES, PAGE_BYTES)
        found = self._mapping(stop - self.slot_bytes)
        if _libc.madvise(ctypes.addressof(found), self.slot_bytes, _POPULATE_WRITE):
            code = ctypes.get_errno()
            if code == errno.EFAULT:  # touching it would be a SIGBUS
                code = errno.ENOSPC
            if code != errno.EINVAL:
                raise OSError(code, os.strerror(code), str(self.path))
            self.allocate(slot)  # before Linux 5.14
        return memoryview(found).cast("B")

    def _mapping(self, offset: int) -> ctypes.Array[ctypes.c_ubyte]:
        """Not by `mmap.mmap`, which takes a descriptor for each: there are thousands of slots."""
        rights, size = mmap.PROT_READ | mmap.PROT_WRITE, self.slot_bytes
        address = _libc.mmap(None, size, rights, mmap.MAP_SHARED, self._fd, offset)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path))
        found = (ctypes.c_ubyte * size).from_address(address)
        # Not at exit: a device may still use it.
        weakref.finalize(found, _libc.munmap, address, size).atexit = False
        return found

    def _remap(self, need_bytes: int) -> memoryview:
        """Map the file as long as it is now; old views keep the old mapping alive."""
        with self._map_lock:
            if self._map is not None and need_bytes <= len(self._map):
                return self._map
            size = os.fstat(self._fd).st_size
            if size < need_bytes:
                raise ShortFileError(f"{self.path} has {size} bytes, slot ends at {need_bytes}")
            # Map well beyond the need, so that growth remaps rarely. The file is made long enough
            # by one page at the new end: ftruncate could shrink what another process has mapped.
            ahead = (need_bytes + min(need_bytes, _MAP_AHEAD_BYTES)) // PAGE_BYTES * PAGE_BYTES
            if self.mapped and size < ahead:
                with suppress(OSError):  # no memory to look ahead: map what is there
                    os.posix_fallocate(self._fd, ahead - PAGE_BYTES, PAGE_BYTES)
                    size = ahead
            self._map = memoryview(mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
            return self._map

    def read(self, slot: int, runs: Sequence[Run], out: memoryview) -> None:
        """Read runs of a slot into a buffer. Raises OSError."""
        base = slot * self.slot_bytes
        if self.mapped:
            view = self.view(slot)
            for run in runs:
                copy(run.in_buffer(out), run.in_slot(view))
            return
        direct = self._direct_fd >= 0 and not self._is_cached(slot, runs[0])
        for run in runs:
            at, part = base + run.slot_offset, run.in_buffer(out)
            if direct:
                with suppress(OSError):  # memory not aligned, a bad sector: as all else below
                    while whole := len(part) // PAGE_BYTES * PAGE_BYTES:
                        got = os.preadv(self._direct_fd, [part[:whole]], at)
                        if got == 0:
                            break
                        part, at = part[got:], at + got
            while len(part):
                got = os.preadv(self._fd, [part], at)
                if got == 0:
                    raise ShortFileError(f"{self.path} ends before byte {at + len(part)}")
                part, at = part[got:], at + got

    def peek(self, slot: int, offset: int, num_bytes: int) -> bytes:
        """Bytes of a slot as the file has them, which may have lost its pages: to read those by a
        mapping would make new ones, or end the process where there is no room. Raises OSError."""
        return os.pread(self._fd, num_bytes, slot * self.slot_bytes + offset)

    def _is_cached(self, slot: int, run: Run) -> bool:
        """Whether a run is in the page cache, by a sample. The mapping is only asked about, never
        read: see the module docstring."""
        try:
            of_run = run.in_slot(self.view(slot))
        except OSError:  # read on: that says what is wrong
            return False
        start = np.frombuffer(of_run, np.uint8).ctypes.data
        resident = ctypes.c_ubyte()
        for nth in range(_SAMPLES):
            page = start + nth * (run.num_bytes - 1) // (_SAMPLES - 1)
            page -= page % mmap.PAGESIZE
            if _libc.mincore(page, 1, ctypes.byref(resident)) != 0 or not resident.value & 1:
                return False
        return True

    def send(self, target_fd: int, slot: int, offset: int, count: int) -> int:
        """Send bytes of a slot to a socket without a copy of ours; how many. Raises OSError.

        They are not checked: who receives them compares them with their checksums.
        """
        sent = os.sendfile(target_fd, self._fd, slot * self.slot_bytes + offset, count)
        if sent == 0:
            raise ShortFileError(f"{self.path} ends within slot {slot}")
        return sent

    def write(self, slot: int, data: memoryview, offset: int = 0) -> None:
        """Write bytes into a slot. Raises OSError; the slot's content is then unknown."""
        at = slot * self.slot_bytes + offset
        if self._direct_fd >= 0 and len(data) == self.slot_bytes:
            with suppress(OSError):  # memory not aligned, a device that cannot: as all else below
                put = os.pwrite(self._direct_fd, data, at)
                data, at = data[put:], at + put
        while len(data):
            put = os.pwrite(self._fd, data, at)
            data, at = data[put:], at + put

    def sync(self) -> None:
        """Wait until what was written is on the device. After an OSError it counts as lost."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file; views that are still held keep their mapping. Later calls do nothing.

        What uses the file after gets EBADF, never the file that has its number by then.
        """
        descriptors = self._fd, self._direct_fd
        self._fd, self._direct_fd, self._map = -1, -1, None
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def _open_direct(path: Path) -> int:
    """A descriptor that passes by the page cache; -1 where there is no such thing (tmpfs)."""
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1
