"""Who is alive: every process that opens a store for writing holds a lock on one byte of a file.

The kernel drops the lock when the process dies, however it dies, so "is owner n dead" is "can its
byte be locked". Unlike a pid this works across containers that share the folder, and is not fooled
by a pid that was given to somebody else. POSIX record locks are not inherited over a fork.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from pathlib import Path

from prefixstore.failpoints import reached

_FLOCK = struct.Struct("hhqqi0q")  # struct flock of Linux, 64 bit


class Liveness:
    """The lock file of a store. One instance a process and store: closing it drops the lock."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self.owner = 0  # 0: this process only reads

    def become(self, owner: int) -> None:
        """Hold the byte of a fresh owner number (the index hands them out, never twice)."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
        self.owner = owner
        reached("open.owner")

    def is_dead(self, owner: int) -> bool:
        """Whether the process with that number has ended."""
        if owner == self.owner:
            return False
        with self._lock:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
            except OSError:
                return False
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, owner)
            return True

    def alone(self) -> bool:
        """Whether no process at all holds the store (this one must not have become an owner)."""
        assert self.owner == 0
        with self._lock:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
            return True

    def others(self) -> bool:
        """Whether another process holds the store. Only asks: takes no lock."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(self._fd, fcntl.F_GETLK, asked)
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Give the byte up."""
        os.close(self._fd)
