"""What `benchmarks.engine_safety` does to the store while the engine serves: a fault at a time.

Owns the store's folder and the memory tier's, on small file systems where mounting is permitted;
else the second is in /dev/shm, for a GPU reads no memory tier that is files of a disk.
A fault goes on beside the requests for up to LAST_S; what it did to the store stays.
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.fault_means import NotPermittedError, filled, mounted, writer_lock_held
from benchmarks.server_process import ServerProcess
from benchmarks.soak_faults import damage
from prefixstore import Store, admin
from prefixstore.errors import StoreError

BEGIN_WITHIN_S = 0.3  # of a wave's begin
LAST_S = 1.5  # at most
JOIN_S = 60.0
FILE_SYSTEM = "24m"


class Where(Enum):
    """Where an engine has its store."""

    FOLDER = auto()
    SERVER = auto()
    SERVER_AND_FOLDER = auto()


class Faults:
    """The place of the store and what may happen to it."""

    def __init__(self, parent: Path, rng: random.Random) -> None:
        self._rng, self._stack = rng, ExitStack()
        self._thread: threading.Thread | None = None
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()  # the fault itself could not be made: by its error
        self.memory_dir = parent / "memory"
        self.memory_dir.mkdir()
        self._disk = parent / "disk"
        self.kinds: dict[str, Callable[[], None]] = {
            "slots damaged": self._damage,
            "disk file cut": self._cut,
            "memory emptied": self._empty,
            "chunks removed": self._remove_chunks,
            "writer lock of the live index held": lambda: self._lock(durable=False),
            "writer lock of the durable index held": lambda: self._lock(durable=True),
            "folder removed": self._remove_folder,
        }
        try:
            for folder, size in ((self._disk, FILE_SYSTEM), (self.memory_dir, FILE_SYSTEM)):
                self._stack.enter_context(mounted(folder, f"size={size}"))
            self.kinds["disk full"] = lambda: self._fill(self._disk)
            self.kinds["memory full"] = lambda: self._fill(self.memory_dir)
            self.kinds["file system read-only"] = self._read_only
        except NotPermittedError:
            self._disk.mkdir(exist_ok=True)
            in_memory = TemporaryDirectory(prefix="prefixstore-safety-", dir="/dev/shm")
            self.memory_dir = Path(self._stack.enter_context(in_memory))
        self.folder = self._disk / "store"
        self._tiers = {"memory": "8MiB", "disk": "12MiB", "memory_dir": str(self.memory_dir)}
        self._front = parent / "front"

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._stack.close()

    @contextmanager
    def place(self, where: Where) -> Iterator[dict[str, Any]]:
        """Where an engine has its store, as its connector is told."""
        if where is Where.FOLDER:
            yield {"dir": str(self.folder), **self._tiers}
            return
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self._tiers.items()]
        with ServerProcess(self.folder, *options) as server:
            of_server = {
                "server stopped": lambda: self._stop(server),
                "server killed": lambda: self._kill(server),
            }
            self.kinds |= of_server
            in_front: dict[str, Any] = {}
            if where is Where.SERVER_AND_FOLDER:
                self._front.mkdir(exist_ok=True)
                memory = {"memory": "1MiB", "memory_dir": str(self._front)}
                in_front = {"dir": str(self._front / "store"), "disk": "2MiB", **memory}
            try:
                yield {"url": server.url, "stall_ms": 1000, **in_front}
            finally:
                self.end()
                for name in of_server:
                    del self.kinds[name]

    def begin(self) -> None:
        """Have one of the faults happen from now on, unless another is still under way."""
        if self._thread is not None and self._thread.is_alive():
            return
        name = self._rng.choice(sorted(self.kinds))
        self._thread = threading.Thread(target=self._do, args=(name, self._rng.random()))
        self._thread.start()

    def end(self) -> None:
        """Wait for the end of the fault under way."""
        if self._thread is not None:
            self._thread.join(JOIN_S)
            if self._thread.is_alive():
                raise TimeoutError("a fault does not end")

    def _do(self, name: str, share: float) -> None:
        time.sleep(share * BEGIN_WITHIN_S)
        try:
            self.kinds[name]()
            self.done[name] += 1
        except (OSError, StoreError) as error:  # the store is not there, after a fault before
            self.failed[f"{name}: {type(error).__name__}"] += 1

    def _last(self) -> None:
        time.sleep(self._rng.uniform(0.1, LAST_S))

    # ------------------------------------------------------------------ the faults
    def _damage(self) -> None:
        for folder in (self.folder, *self.memory_dir.glob("prefixstore-*")):
            damage(folder, self._rng, 20, "*.slots")

    def _cut(self) -> None:
        for path in self.folder.glob("disk-*.slots"):
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 3)

    def _empty(self) -> None:
        with Store.open(self.folder, create=False) as store:
            admin.empty_memory(store, 2.0)

    def _remove_chunks(self) -> None:
        with Store.open(self.folder, create=False) as store:
            admin.remove(store, admin.Selection(everything=True))

    def _lock(self, durable: bool) -> None:
        with writer_lock_held(self.folder, durable=durable):
            self._last()

    def _remove_folder(self) -> None:
        with suppress(FileNotFoundError):  # what the engine is making at the same time
            shutil.rmtree(self.folder)

    def _stop(self, server: ServerProcess) -> None:
        server.signal(signal.SIGSTOP)
        try:
            self._last()
        finally:
            server.signal(signal.SIGCONT)

    def _kill(self, server: ServerProcess) -> None:
        server.kill()
        self._last()
        server.start()

    def _fill(self, folder: Path) -> None:
        with filled(folder):
            self._last()

    def _read_only(self) -> None:
        """What the engine has open stays as it was; what it opens next is empty and read-only."""
        with mounted(self._disk, "ro,size=4k"):
            self._last()
