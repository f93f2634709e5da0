"""Means by which benchmarks break a store from outside: file systems, locks, limits of a process.

What must hold: leaving a context ends its fault, however it is left. Where mounting is not
permitted `small_file_system` says so, and who asked leaves its fault out.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixstore import Store
from prefixstore.index import Txn

HELD_WAIT_S = 30.0
FILL_BYTES = 64 << 10


class NotPermittedError(RuntimeError):
    """This process may not do what the fault takes (mounting)."""


@contextmanager
def mounted(folder: Path, *options: str, kind: str = "tmpfs") -> Iterator[Path]:
    """A tmpfs with those options over a folder. Raises NotPermittedError."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", kind, *(word for one in options for word in ("-o", one)), kind]
    if (
        shutil.which("mount") is None
        or subprocess.run([*words, str(folder)], capture_output=True).returncode
    ):
        raise NotPermittedError("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[int]:
    """A file system without room; yields how many bytes it took."""
    ballast = folder / "ballast"
    taken = 0
    try:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    taken += file.write(bytes(FILL_BYTES))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        yield taken
    finally:
        ballast.unlink(missing_ok=True)


@contextmanager
def writer_lock_held(folder: Path, *, durable: bool = False) -> Iterator[None]:
    """This process keeps the writer lock of the store's live index, or of the durable one."""
    held, let_go = threading.Event(), threading.Event()

    def hold(_: Txn) -> None:
        held.set()
        let_go.wait(HELD_WAIT_S)

    with Store.open(folder, create=False) as store:
        ended = (store.index if durable else store.live).submit(hold)
        try:
            if not held.wait(HELD_WAIT_S):
                raise TimeoutError("somebody else holds the writer lock")
            yield
        finally:
            let_go.set()
            ended.result(HELD_WAIT_S)
