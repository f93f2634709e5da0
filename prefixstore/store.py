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

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefixstore import config
from prefixstore.config import Settings, load_settings, new_settings, parse_bytes, save_settings
from prefixstore.disk import DiskTier
from prefixstore.errors import (
    ConfigError,
    FormatError,
    StoreClosedError,
    StoreError,
    StoreTimeoutError,
)
from prefixstore.identity import ModelIdentity
from prefixstore.index import Environment, Txn
from prefixstore.keeper import Keeper
from prefixstore.layout import Layout
from prefixstore.ledger import (
    DISK,
    MEMORY,
    TABLES,
    TIER_NAMES,
    Entry,
    Ledger,
    Quota,
    add_int,
    put_int,
)
from prefixstore.liveness import Liveness
from prefixstore.namespace import Namespace, NamespaceRecord
from prefixstore.promote import promote
from prefixstore.rows import Row, same_place
from prefixstore.slots import SlotFile

logger = logging.getLogger("prefixstore")
INDEX_TABLES = ("meta", "chunk", "namespace", "quota")
_open_stores: dict[tuple[int, int, int], Store] = {}
_open_lock = threading.Lock()


def _forget_after_fork() -> None:
    """LMDB environments and threads do not survive a fork; the child opens its own."""
    _open_stores.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


class Store:
    """See the module docstring. Get one with `Store.open`; it is a context manager. Thread-safe."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.live_dir = settings.live_dir(folder)
        self.liveness = Liveness(folder / "alive")
        self.gone = False
        self.adopted: set[bytes] = set()
        self._users = 0
        self._files: dict[tuple[int, int], SlotFile] = {}
        self._files_lock = threading.Lock()
        self._lease_counter = 0
        self._quota_cache: tuple[float, dict[int, Quota]] = (0.0, {})
        self.index = Environment(folder / "index", INDEX_TABLES, durable=True)
        incarnation = self._revive_live_dir()
        self.live = Environment(self.live_dir / "live", TABLES, durable=False)
        self._held = os.open(self.live_dir / "held", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._held, fcntl.LOCK_SH)
        owner = self.live.write(lambda txn: add_int(txn, "meta", b"owner", 1))
        self.ledger = Ledger(owner, self._punch, self._overhead)
        self.live.write(self._set_caps)
        if incarnation is not None:
            self._rebuild(incarnation)
        self.liveness.become(owner)
        self.disk = DiskTier(
            self.live, self.index, self.ledger, self.file_of, self.quota,
            self.new_lease_id, time.time, config.OP_DEADLINE_S,
        )  # fmt: skip
        self.keeper = Keeper(self)

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
        evicted). Raises ConfigError, FormatError, StoreTimeoutError.
        """
        path = Path(folder).expanduser().absolute()
        if not create and not (path / config.SETTINGS_FILE).exists():
            raise ConfigError(f"{path} holds no store", "check the path, or create one by serving")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create {path}: {error.strerror}", "give a writable folder") from error
        at = path.stat()
        name = (os.getpid(), at.st_dev, at.st_ino)
        with _open_lock, _exclusive(path / ".lock"):
            store = _open_stores.get(name)
            settings = _settle_settings(path, memory_bytes, disk_bytes, memory_dir)
            if store is None or store.gone:
                store = cls(path, settings)
                store.keeper.start()
                _open_stores[name] = store
            elif store.settings != settings:
                store.settings = settings
                store.live.write(store._set_caps)
            store._users += 1
            return store

    def _revive_live_dir(self) -> str | None:
        """Make the live folder usable. Returns the new incarnation's name if it had to be wiped."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        marker = self.live_dir / "incarnation"
        with self.index.read() as txn:
            known = txn.get("meta", b"incarnation")
        if known is not None and marker.is_file() and marker.read_bytes() == known:
            if known.decode().endswith(boot):
                return None
        if not self.liveness.alone():
            raise ConfigError(
                f"{self.folder} is open in a process that has another memory tier than {self.live_dir}",
                "containers that share a store must share its memory_dir (for example /dev/shm) too",
            )
        _remove_stale(Path(self.settings.memory_dir))
        shutil.rmtree(self.live_dir, ignore_errors=True)
        try:
            self.live_dir.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"cannot create the memory tier {self.live_dir}: {error.strerror}",
                "give memory_dir a writable folder in memory, such as /dev/shm",
            ) from error
        (self.live_dir / "origin").write_text(str(self.folder))
        return f"{secrets.token_hex(8)} {boot}"

    def _rebuild(self, incarnation: str) -> None:
        """Enter the durable rows into a fresh live index, oldest first, then declare it usable."""
        with self.index.read() as txn:
            rows = []
            for key, data in txn.scan("chunk"):
                row = Row.unpack(data)
                entry = Entry(row.slot_bytes, row.slot, row.depth, row.namespace, row.salt)
                rows.append((row.created_s, -row.depth, key, entry, row.pinned, row.expires_s))
        rows.sort(key=lambda item: item[:2])
        self.live.write(
            lambda txn: self.ledger.adopt_disk(txn, (item[2:] for item in rows)),
            config.OPEN_DEADLINE_S,
        )
        self.index.write(lambda txn: txn.put("meta", b"incarnation", incarnation.encode()))
        (self.live_dir / "incarnation").write_text(incarnation)

    # ------------------------------------------------------------------ parts
    def file_of(self, tier: int, slot_bytes: int) -> SlotFile:
        """The slot file of a tier and slot size."""
        with self._files_lock:
            file = self._files.get((tier, slot_bytes))
            if file is None:
                where = self.live_dir if tier == MEMORY else self.folder
                name = "memory" if tier == MEMORY else "disk"
                path = where / f"{name}-{slot_bytes}.slots"
                file = SlotFile(path, slot_bytes, mapped=tier == MEMORY)
                self._files[tier, slot_bytes] = file
            return file

    def _punch(self, tier: int, slot_bytes: int, slot: int) -> None:
        self.file_of(tier, slot_bytes).punch(slot)

    def _overhead(self, tier: int) -> int:
        return (self.live if tier == MEMORY else self.index).file_bytes()

    def _set_caps(self, txn: Txn) -> None:
        self.ledger.set_cap(txn, MEMORY, self.settings.memory_bytes)
        self.ledger.set_cap(txn, DISK, self.settings.disk_bytes)

    def new_lease_id(self) -> bytes:
        """Eight bytes no other lease has."""
        with self._files_lock:
            self._lease_counter += 1
            return self.ledger.owner.to_bytes(4, "big") + self._lease_counter.to_bytes(4, "big")

    def quota(self, tier: int) -> Quota:
        """Byte limits of a tier; read from the index at most once a second."""
        read_at, cached = self._quota_cache
        if tier not in cached or time.monotonic() - read_at > 1.0:
            cached = {t: Quota({}, {}) for t in (MEMORY, DISK)}
            with self.index.read() as txn:
                for name, value in txn.scan("quota"):
                    limits = cached[name[1]].namespaces if name[:1] == b"n" else cached[name[1]].salts
                    limits[name[2:]] = int.from_bytes(value, "little")
            self._quota_cache = (time.monotonic(), cached)
        return cached[tier]

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk tier."""
        return self.settings.disk_bytes > 0

    def disk_row(self, key: bytes) -> Row | None:
        """The durable row of a chunk."""
        with self.index.read() as txn:
            data = txn.get("chunk", key)
        return None if data is None else Row.unpack(data)

    def reap(self) -> int:
        """Resolve what dead processes left (keeper thread, or before there is one)."""

        def durable(key: bytes) -> tuple[Entry, bool, int] | None:
            row = self.disk_row(key)
            if row is None:
                return None
            entry = Entry(row.slot_bytes, row.slot, row.depth, row.namespace, row.salt)
            return entry, row.pinned, row.expires_s

        dead: dict[int, bool] = {}

        def is_dead(owner: int) -> bool:
            if owner not in dead:
                dead[owner] = self.liveness.is_dead(owner)
            return dead[owner]

        resolved = self.live.write(
            lambda txn: self.ledger.reap(txn, time.time(), is_dead, durable)
        )
        if resolved:
            self.keeper.count("reaped", resolved)
        return resolved

    def remove_now(self, keys: Sequence[bytes]) -> None:
        """Remove chunks from both tiers (keeper thread: it waits for the device)."""
        self.live.write(lambda txn: [self.ledger.drop_memory(txn, key) for key in keys])
        self.disk.drop(keys)

    def heal(self, tier: int, key: bytes, data: bytes) -> None:
        """A chunk failed its checksum: drop its row so that it can be stored again. Does not wait."""
        self.keeper.count(f"corrupt_{TIER_NAMES[tier]}")
        logger.warning("chunk %s in the %s tier is damaged; dropped", key.hex(), TIER_NAMES[tier])
        env = self.live if tier == MEMORY else self.index

        def drop() -> None:
            with env.read() as txn:
                now = txn.get("chunk", key)
            if now is None or not same_place(now, data):
                return
            if tier == MEMORY:
                self.live.write(lambda txn: self.ledger.drop_memory(txn, key))
            else:
                self.disk.drop([key])

        self.keeper.submit(drop)

    def promote(self, key: bytes) -> None:
        """Have a chunk that was read from disk copied to the memory tier. Does not wait."""
        self.keeper.submit(lambda: promote(self, key))

    # ------------------------------------------------------------------ use
    def namespace(self, identity: ModelIdentity, layout: Layout) -> Namespace:
        """The part of the store that belongs to one model identity.

        Raises LayoutError when the identity is known with another layout.
        """
        self.check_open()
        record = NamespaceRecord.register(self.index, identity, layout)
        return Namespace(self, record)

    def namespace_of(self, namespace: bytes) -> Namespace:
        """A namespace that is already known, by its 16 bytes. Raises FormatError if it is not."""
        self.check_open()
        return Namespace(self, self._record(namespace))

    def layout_of(self, namespace: bytes) -> Layout:
        """The layout of a namespace that has chunks here."""
        return self._record(namespace).layout

    def _record(self, namespace: bytes) -> NamespaceRecord:
        with self.index.read() as txn:
            data = txn.get("namespace", namespace)
        if data is None:
            raise FormatError(f"namespace {namespace.hex()} is not in the index", "run verify --fix")
        return NamespaceRecord.unpack(data)

    def namespaces(self) -> list[NamespaceRecord]:
        """All identities that have stored something here."""
        with self.index.read() as txn:
            return [NamespaceRecord.unpack(value) for _, value in txn.scan("namespace")]

    def set_quota(self, tier: int, limit_bytes: int | None, *, namespace: bytes = b"", salt: bytes = b"") -> None:
        """Bound the bytes one namespace, or one salt (its `keys.salt_digest`), has in a tier."""
        if bool(namespace) == bool(salt):
            raise ConfigError("a quota is for a namespace or for a salt", "give exactly one")
        name = (b"n%c" % tier + namespace) if namespace else (b"s%c" % tier + salt)

        def change(txn: Txn) -> None:
            if limit_bytes is None:
                txn.delete("quota", name)
            else:
                put_int(txn, "quota", name, limit_bytes)

        self.index.write(change)
        self._quota_cache = (0.0, {})

    def flush(self, deadline_s: float = config.OP_DEADLINE_S) -> bool:
        """Wait until what this process has put is on disk; False when the deadline came first."""
        end = time.monotonic() + deadline_s
        try:
            return self.keeper.submit(lambda: self.keeper.drain_spill(end)).result(deadline_s + 1)
        except (TimeoutError, StoreError):
            return False

    def check_open(self) -> None:
        """Raise StoreClosedError when the store is closed or its folder was removed."""
        if self.gone:
            raise StoreClosedError(
                f"the store {self.folder} was removed or replaced while open", "open it again"
            )
        if self._users <= 0:
            raise StoreClosedError(f"the store {self.folder} is closed")

    def close(self, deadline_s: float = config.OP_DEADLINE_S) -> None:
        """Spill what is left and let go. The last user of the process closes the files."""
        with _open_lock:
            self._users -= 1
            if self._users > 0:
                return
            for name in [name for name, store in _open_stores.items() if store is self]:
                del _open_stores[name]
        self.keeper.stop(deadline_s)
        self.live.close()
        self.index.close()
        for file in self._files.values():
            file.close()
        os.close(self._held)
        self.liveness.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _settle_settings(
    folder: Path,
    memory_bytes: int | str | None,
    disk_bytes: int | str | None,
    memory_dir: str | None,
) -> Settings:
    """Read the settings, create them, or apply the changes asked for."""
    there = load_settings(folder)
    memory = None if memory_bytes is None else parse_bytes(memory_bytes)
    disk = None if disk_bytes is None else parse_bytes(disk_bytes)
    if there is None:
        others = [entry for entry in os.listdir(folder) if entry not in (".lock", "alive")]
        if others:
            raise ConfigError(
                f"{folder} is not empty and holds no store (found {others[0]!r})",
                "give an empty or new folder",
            )
        settings = new_settings(
            config.DEFAULT_MEMORY_BYTES if memory is None else memory,
            config.DEFAULT_DISK_BYTES if disk is None else disk,
            memory_dir or default_memory_dir(),
        )
    else:
        settings = Settings(
            there.store_id,
            there.memory_bytes if memory is None else memory,
            there.disk_bytes if disk is None else disk,
            there.memory_dir if memory_dir is None else memory_dir,
        )
    if settings != there:
        save_settings(folder, settings)
    return settings


def default_memory_dir() -> str:
    """Where the memory tier goes: shared memory if there is any, else the folder for temporaries."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"


def _remove_stale(memory_dir: Path) -> None:
    """Free the memory of stores whose folder is gone and that no process holds."""
    for path in memory_dir.glob("prefixstore-*-*-*"):
        with contextlib.suppress(OSError, StoreError):
            origin = Path((path / "origin").read_text())
            settings = load_settings(origin) if origin.is_dir() else None
            if settings is not None and settings.live_dir(origin) == path:
                continue
            held = os.open(path / "held", os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; raises StoreTimeoutError when another process keeps it too long."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + config.OPEN_DEADLINE_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StoreTimeoutError(
                        f"another process has been opening {path.parent} for {config.OPEN_DEADLINE_S:.0f} s",
                        "wait for it, or end it",
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)
