"""A store: one folder, opened by any number of processes of a host at once.

Owns the folder's lock file, the two index environments, the slot files and the keeper thread, and
puts them together. What callers do with chunks is in `namespace.Namespace` and `admin`.

    folder/store.json        settings                 folder/index/   durable rows (LMDB)
    folder/disk-<n>.slots    the disk tier            folder/alive    who has it open
    <memory_dir>/prefixstore-<id>-<dev>-<inode>/      the memory tier and the live index

A crash of any process at any point leaves a store the next `open` takes as it is. A reboot takes
the memory tier with it; `open` notices (boot id) and rebuilds the live index from the durable rows.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import TypeVar

from prefixstore import config, opened
from prefixstore.config import Settings
from prefixstore.disk import DiskTier
from prefixstore.errors import (
    ConfigError,
    FormatError,
    RetiredError,
    StoreClosedError,
    StoreError,
    StoreTimeoutError,
)
from prefixstore.formats import open_index
from prefixstore.healing import heal
from prefixstore.identity import ModelIdentity
from prefixstore.index import REPLACED, Txn
from prefixstore.keeper import Keeper
from prefixstore.layout import Layout
from prefixstore.ledger import DISK, MEMORY, Ledger
from prefixstore.liveness import Liveness
from prefixstore.namespace import Namespace
from prefixstore.opening import exclusive, make_folder, settle_settings, translated
from prefixstore.quota import QuotaBook
from prefixstore.recovery import reap, rebuild_live
from prefixstore.registry import Names, NamespaceRecord
from prefixstore.reviving import nobody_holds, open_live
from prefixstore.slots import SlotFile

T = TypeVar("T")


class Store:
    """See the module docstring. Get one with `Store.open`; it is a context manager. Thread-safe."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.live_dir = settings.live_dir(folder)
        self.lost = ""  # why it is of no use any more
        self._users = 0
        self._files: dict[tuple[int, int], SlotFile] = {}
        self._lease_numbers = count(1)  # `next` of it needs no lock
        self.helpers = ThreadPoolExecutor(config.HELPERS, thread_name_prefix="prefixstore-help")
        with ExitStack() as on_error:
            self._open_parts(on_error)
            self.keeper = Keeper(self)
            self.keeper.start()
            self._parts = on_error.pop_all()

    def _open_parts(self, parts: ExitStack) -> None:
        """Open what must be closed again, each with its closing, in the order it depends on."""
        folder = self.folder
        alone = nobody_holds(self.live_dir)  # else somebody has walked the indexes already
        self.index = open_index(folder, walk=alone)
        parts.callback(self.index.close)
        with self.index.read() as txn:
            known = txn.get("meta", b"incarnation")
        self.quotas, self.names = QuotaBook(self.index), Names(self.index)
        # Closed before the index: the next to open this store in this process must pass the index
        # first, and closing the lock file would drop its lock with ours (POSIX locks are the
        # process's).
        self.liveness = Liveness(folder / "alive")
        parts.callback(self._leave)
        self.live, incarnation = open_live(folder, self.live_dir, known, self.liveness, walk=alone)
        parts.callback(self.live.close)
        held = os.open(self.live_dir / "held", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        parts.callback(os.close, held)
        fcntl.flock(held, fcntl.LOCK_SH)
        parts.callback(self._close_files)
        owner = self.live.write(lambda txn: txn.add_int("meta", b"owner", 1))
        self.ledger = Ledger(owner, self._punch, self._overhead)
        self.live.write(self._set_caps)
        if incarnation is not None:
            rebuild_live(self, incarnation)
        self.liveness.become(owner)
        self.disk = DiskTier(
            self.live, self.index, self.ledger, self.file_of, self.quotas.of,
            self.new_lease_id, time.time, config.OP_DEADLINE_S, self.helpers,
        )  # fmt: skip

    def _leave(self) -> None:
        if self.lost != REPLACED:  # else the lock file may be that of one opened in its place
            self.liveness.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()

    # ------------------------------------------------------------------ opening
    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        memory_bytes: int | str | None = None,
        disk_bytes: int | str | None = None,
        memory_dir: str | None = None,
        create: bool = True,
    ) -> Store:
        """Open the store in a folder, creating it unless ``create`` is off.

        Sizes are bytes or text such as ``"8GiB"``. They are kept with the store: leave them out to
        take what is there; give another value to change it (a tier shrinks as its chunks are
        evicted). Raises ConfigError, FormatError, StoreTimeoutError, StoreError.
        """
        path = Path(folder).expanduser().absolute()
        if not create and not (path / config.SETTINGS_FILE).exists():
            raise ConfigError(f"{path} holds no store", "check the path, or create one by serving")
        with translated(path):
            make_folder(path)
            at = path.stat()
        name = (at.st_dev, at.st_ino)
        with opened.lock, translated(path), exclusive(path / ".lock"):
            store = opened.stores.get(name)
            if store is not None and store.gone and store.lost != REPLACED:
                raise StoreClosedError(f"the store {path} {store.lost}", opened.remedy(store.lost))
            settings = settle_settings(path, memory_bytes, disk_bytes, memory_dir)
            if store is None or store.gone:
                store = cls(path, settings)
                opened.stores[name] = store
            elif store.settings != settings:
                store.settings = settings
                store.live.write(store._set_caps)
            store._users += 1
            return store

    # ------------------------------------------------------------------ parts
    def file_of(self, tier: int, slot_bytes: int) -> SlotFile:
        """The slot file of a tier and slot size."""
        file = self._files.get((tier, slot_bytes))
        if file is None:
            where = self.live_dir if tier == MEMORY else self.folder
            name = "memory" if tier == MEMORY else "disk"
            path = where / f"{name}-{slot_bytes}.slots"
            # Without a lock: it may wait for the disk, and others only read. Of two that make one
            # file at once, which is the same to the system, the later takes the earlier's.
            made = SlotFile(path, slot_bytes, mapped=tier == MEMORY)
            file = self._files.setdefault((tier, slot_bytes), made)
            if file is not made:
                made.close()
        return file

    def _punch(self, tier: int, slot_bytes: int, slot: int) -> None:
        self.file_of(tier, slot_bytes).punch(slot)

    def _overhead(self, tier: int) -> int:
        env = self.live if tier == MEMORY else self.index
        return env.file_bytes() + config.SMALL_FILES_BYTES

    def _set_caps(self, txn: Txn) -> None:
        self.ledger.set_cap(txn, MEMORY, self.settings.memory_bytes)
        self.ledger.set_cap(txn, DISK, self.settings.disk_bytes)

    def new_lease_id(self) -> bytes:
        """Eight bytes no other lease has: what had the same number ended long before (LEASE_S)."""
        number = next(self._lease_numbers) % 2**32
        return self.ledger.owner.to_bytes(4, "big") + number.to_bytes(4, "big")

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk tier."""
        return self.settings.disk_bytes > 0

    def reap(self) -> int:
        """Resolve what dead processes left (keeper thread, or before there is one)."""
        is_dead = cache(self.liveness.is_dead)
        resolved = self.live.write(
            lambda txn: reap(
                self.ledger, txn, time.time(), is_dead, self.disk.durable_row, self.index.idle()
            )
        )
        if resolved:
            self.keeper.count("reaped", resolved)
        return resolved

    def remove_now(self, keys: Sequence[bytes]) -> None:
        """Remove chunks from both tiers (keeper thread: it waits for the device)."""
        self.disk.drop(keys, memory=True)

    def heal(self, tier: int, key: bytes, data: bytes) -> None:
        """A chunk failed its checksum: look again on the keeper thread, and if it is damaged drop
        its row, so it can be stored again. Does not wait."""
        with suppress(StoreError):  # the next reader will find it too
            self.keeper.submit(lambda: heal(self, tier, key, data))

    # ------------------------------------------------------------------ use
    def namespace(self, identity: ModelIdentity, layout: Layout) -> Namespace:
        """The part of the store that belongs to one model identity.

        Raises LayoutError when the identity is known with another layout.
        """
        self.check_open()
        return self._opened(NamespaceRecord.register(self.index, identity, layout))

    def namespace_of(self, namespace: bytes) -> Namespace:
        """A namespace that is already known, by its 16 bytes. Raises FormatError if it is not."""
        self.check_open()
        return self._opened(self._record(namespace))

    def _opened(self, record: NamespaceRecord) -> Namespace:
        self.names.entered(record.identity.namespace)
        return Namespace(self, record)

    def layout_of(self, namespace: bytes) -> Layout:
        """The layout of a namespace that has chunks here."""
        return self._record(namespace).layout

    def _record(self, namespace: bytes) -> NamespaceRecord:
        with self.index.read() as txn:
            data = txn.get("namespace", namespace)
        if data is None:
            raise FormatError(
                f"namespace {namespace.hex()} is not in the index", "run verify --fix"
            )
        return NamespaceRecord.unpack(data)

    def namespaces(self) -> list[NamespaceRecord]:
        """All identities that have stored something here."""
        with self.index.read() as txn:
            return [NamespaceRecord.unpack(value) for _, value in txn.scan("namespace")]

    def flush(
        self,
        deadline_s: float = config.OP_DEADLINE_S,
        owns: Callable[[bytes], bool] = lambda _: True,
    ) -> bool:
        """Wait until what this process has put is on disk; False when the deadline came first, or
        chunks of the namespaces asked for had to be given up of which no flush before told."""
        told = self.keeper.given_up.told()  # now: two that wait at once are both told
        return self.drain(deadline_s) and self.keeper.given_up.tell(told, owns)

    def drain(self, deadline_s: float) -> bool:
        """Wait until nothing is left to be written to disk, whatever had to be given up."""
        end = time.monotonic() + deadline_s
        try:
            return self.keeper.submit(lambda: self.keeper.drain_spill(end)).result(deadline_s + 1)
        except (FutureTimeout, StoreError):
            return False

    def on_keeper(self, job: Callable[[], T], deadline_s: float = 60.0) -> T:
        """Run a job on the keeper thread and wait for it. Raises StoreTimeoutError."""
        try:
            return self.keeper.submit(job).result(deadline_s)
        except FutureTimeout:
            raise StoreTimeoutError(
                f"the store {self.folder} did not finish within {deadline_s:.0f} s",
                "the disk is slow or stalled; try again",
            ) from None

    @property
    def gone(self) -> bool:
        """Whether it must be closed and opened again: see `Environment.lost`."""
        return bool(self.lost)

    @property
    def usable(self) -> bool:
        """Whether it is not gone."""
        return not self.lost

    def forsake(self, why: str) -> None:
        """Of a child that was forked: nothing of it may be used. Waits for nothing."""
        self.lost = why
        self.index.forsake()
        self.live.forsake()

    def check_open(self, name: bytes = b"") -> None:
        """Raise StoreClosedError if the store is closed or gone, or that namespace was retired."""
        if self.gone:
            raise StoreClosedError(f"the store {self.folder} {self.lost}", opened.remedy(self.lost))
        if self._users <= 0:
            raise StoreClosedError(f"the store {self.folder} is closed")
        if name and self.names.is_retired(name):
            raise RetiredError(f"namespace {name.hex()} was retired", "open it again")

    def close(self, deadline_s: float = config.OP_DEADLINE_S) -> None:
        """Spill what is left and let go. The last user of the process closes the files."""
        if self.lost == opened.INHERITED:
            return
        with opened.lock:  # to the end: LMDB opens an environment once a process: the next waits
            self._users -= 1
            if self._users != 0:
                return
            for name in [name for name, store in opened.stores.items() if store is self]:
                del opened.stores[name]
            if self.keeper.stop(deadline_s) and self.live.end() and self.index.end():
                self._parts.close()
            # Else the keeper is in the middle of a copy to a stalled disk, or a commit is: their
            # files, and this process as the owner of its slots, must stay until they end with it.
            self.helpers.shutdown(wait=False)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
