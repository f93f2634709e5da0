"""The simulated machine: its files, who is alive, and what a power cut leaves of it."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from benchmarks.simulation.files import File
from benchmarks.simulation.scheduler import Process, Scheduler, active
from benchmarks.simulation.tables import Database, Handle
from prefixstore import index

FOLDER, MEMORY_DIR = "/disk/store", "/memory"
LIVE_DIR = f"{MEMORY_DIR}/prefixstore-sim"
_LMDB: Any = vars(index)["lmdb"]


class Machine:
    """Small files by path, databases and slot files by path. One at a time: `machine`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.texts: dict[str, bytes] = {}
        self.databases: dict[str, Database] = {}
        self.files: dict[str, File] = {}
        self.boots = 1
        self.tokens = 0
        self.alive: list[Process] = []
        self.on_database: Any = lambda path, database: None
        self.on_file: Any = lambda path, file: None
        _machines[:] = [self]

    def database(self, path: str, durable: bool) -> Database:
        if path not in self.databases:
            self.databases[path] = Database(durable)
            self.texts[f"{path}/data.mdb"] = b"%d" % len(self.databases)
            self.on_database(path, self.databases[path])
        return self.databases[path]

    def slot_file(self, path: str, slot_bytes: int, volatile: bool) -> File:
        if path not in self.files:
            self.files[path] = File(slot_bytes, volatile)
            self.on_file(path, self.files[path])
        return self.files[path]

    def remove_tree(self, path: str) -> None:
        for table in (self.texts, self.databases, self.files):
            for name in [name for name in table if name.startswith(path + "/")]:
                del table[name]

    def kill(self, process: Process) -> None:
        """SIGKILL: its threads, its locks."""
        self.scheduler.kill(process)
        if process in self.alive:
            self.alive.remove(process)
        for database in self.databases.values():
            if database.holder is process:
                database.release()

    def power_cut(self) -> None:
        """All processes, all memory, and what no sync has ended for. The power is back at once."""
        for process in list(self.alive):
            self.kill(process)
        self.remove_tree(MEMORY_DIR)
        self.files = {path: file.after_power_cut() for path, file in self.files.items()}
        self.boots += 1

    def fresh_token(self, count: int) -> str:
        self.tokens += 1
        return f"{self.tokens:0{2 * count}x}"


_machines: list[Machine] = []


def machine() -> Machine:
    """The machine of the run under way."""
    return _machines[0]


class SimPath:
    """In place of `pathlib.Path`, as far as the store's opening needs it."""

    def __init__(self, path: object) -> None:
        self._path = str(path)

    def __truediv__(self, name: str) -> SimPath:
        return SimPath(f"{self._path}/{name}")

    def __str__(self) -> str:
        return self._path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimPath) and self._path == other._path

    def __hash__(self) -> int:
        return hash(self._path)

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> SimPath:
        return SimPath(self._path.rpartition("/")[0])

    def mkdir(self, *args: object, **options: object) -> None:
        active().check_alive()

    def exists(self) -> bool:
        return self._path in machine().texts

    is_file = exists

    def read_bytes(self) -> bytes:
        if self._path == "/proc/sys/kernel/random/boot_id":
            return b"boot-%d\n" % machine().boots
        try:
            return machine().texts[self._path]
        except KeyError:
            raise FileNotFoundError(self._path) from None

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_text(self, text: str) -> None:
        active().step(f"write {self.name}")
        machine().texts[self._path] = text.encode()

    def touch(self) -> None:
        self.write_text("")

    def unlink(self, missing_ok: bool = False) -> None:
        active().step(f"unlink {self.name}")
        machine().texts.pop(self._path, None)

    def glob(self, pattern: str) -> list[SimPath]:
        names = [*machine().texts, *machine().files]
        return [
            SimPath(name) for name in names if fnmatch.fnmatchcase(name, f"{self._path}/{pattern}")
        ]

    def stat(self) -> SimpleNamespace:
        if self._path in machine().files:
            file = machine().files[self._path].seen
            return SimpleNamespace(st_size=file.length * file.slot_bytes)
        if self._path not in machine().texts:
            raise FileNotFoundError(self._path)
        return SimpleNamespace(st_ino=int(self.read_bytes()), st_size=0)

    def slot_file(self, slot_bytes: int, volatile: bool) -> File:
        return machine().slot_file(self._path, slot_bytes, volatile)


@dataclass(frozen=True)
class SimSettings:
    """In place of `config.Settings`: caps of a few slots, which a real store refuses."""

    memory_bytes: int
    disk_bytes: int

    def live_dir(self, folder: SimPath) -> SimPath:
        return SimPath(LIVE_DIR)


class SimLiveness:
    """In place of `liveness.Liveness`: who is dead is what the scheduler killed or has ended."""

    def __init__(self, path: object) -> None:
        self.owner = 0
        self._process = active().running.process

    def become(self, owner: int) -> None:
        active().step("become")
        self._process.owner = self.owner = owner
        machine().alive.append(self._process)

    def is_dead(self, owner: int) -> bool:
        active().check_alive()
        return owner != self.owner and all(one.owner != owner for one in machine().alive)

    def alone(self) -> bool:
        return not machine().alive

    def others(self) -> bool:
        return any(one is not self._process for one in machine().alive)

    def close(self) -> None:
        active().check_alive()
        if self._process in machine().alive:
            machine().alive.remove(self._process)


def open_database(path: str, *, sync: bool, **options: object) -> Handle:
    """In place of `lmdb.open`."""
    active().check_alive()
    return Handle(machine().database(path, durable=sync))


def truncate(path: SimPath, size: int) -> None:
    """In place of `os.truncate`."""
    active().step("truncate")
    file = machine().files[str(path)]
    slots = size // file.seen.slot_bytes
    for content in (file.seen, file.synced):  # the change of a length is kept at once: simpler
        content.length = min(content.length, slots)
        for slot in [slot for slot in content.slots if slot >= slots]:
            del content.slots[slot]
    file.unsynced = [change for change in file.unsynced if change.slot < slots]


def fake_lmdb() -> SimpleNamespace:
    """In place of the module ``lmdb``: its errors, and `open_database`."""
    errors = {name: value for name, value in vars(_LMDB).items() if name.endswith("Error")}
    return SimpleNamespace(open=open_database, **errors)


def disk_error() -> Exception:
    """What LMDB raises when a commit cannot be synced."""
    error: Exception = _LMDB.DiskError("simulated: no space left on device")
    return error
