"""Names that survive a power loss: a file is found afterwards only if its folder was synced, too.

ext4 and XFS sync the name of a new file with the file; POSIX promises it of nobody. What is synced
here is so each time a process opens a store: who made a file may have been killed before it could.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NOT_POSSIBLE = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EROFS)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the device, where that can be had. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_POSSIBLE:  # not ours to read, so we did not make anything in it
            return
        raise
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_POSSIBLE:
            raise
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it. Raises
    OSError.

    Who is killed before that leaves ``.<name>.<pid>`` behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:  # also when interrupted, for nobody else knows the file's name
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, for good. Raises OSError."""
    above = []
    while not path.is_dir():
        above.append(path)
        path = path.parent
    for folder in reversed(above):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    if not above:
        sync_folder(path.parent)
