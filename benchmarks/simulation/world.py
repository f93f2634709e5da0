"""A run: processes that open one store and use it, and what happens to them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.simulation.files import File, bad_sector, no_room
from benchmarks.simulation.install import installed
from benchmarks.simulation.machine import FOLDER, Machine, SimPath, SimSettings, disk_error
from benchmarks.simulation.model import Model
from benchmarks.simulation.scheduler import Process, Scheduler, Thread, activate
from benchmarks.simulation.tables import Database
from benchmarks.simulation.workload import Client, Workload, judge
from prefixstore.errors import StoreError
from prefixstore.ledger import DISK, MEMORY
from prefixstore.store import Store

STEPS_MAX = 400_000
AUDIT_STEPS = 200
PROCESSES = 3
STALLS_S = (0.001, 0.05, 1.0, 12.0, 70.0)
JUMPS_S = (-3600.0, -30.0, 5.0, 65.0, 4000.0)


@dataclass
class Profile:
    """How often things happen, each once in so many steps; 0: never."""

    kill: int = 0
    power: int = 0
    fault: int = 0  # of calls of the file system, and commits
    stall: int = 0
    jump: int = 0
    operations: int = 120
    memory_slots: int = 8
    disk_slots: int = 16
    quotas: bool = False

    @classmethod
    def drawn(cls, rng: random.Random) -> Profile:
        """The profile of a seed."""

        def maybe(share: float, *values: int) -> int:
            value = rng.choice(values)
            return value if rng.random() < share else 0

        return cls(
            kill=maybe(0.6, 400, 1500, 4000),
            power=maybe(0.4, 2000, 6000),
            fault=maybe(0.4, 15, 60, 300),
            stall=maybe(0.5, 300, 2000),
            jump=maybe(0.15, 1500, 4000),
            operations=rng.choice((60, 120, 240)),
            memory_slots=rng.choice((4, 8, 16)),
            disk_slots=rng.choice((0, 6, 16, 16, 40)),
            quotas=rng.random() < 0.3,
        )


@dataclass
class Result:
    """What came of one seed."""

    seed: int
    failure: str
    digest: str
    steps: int
    simulated_s: float
    counts: Counter[str] = field(default_factory=Counter)


class World:
    """See the module docstring."""

    def __init__(self, seed: int, profile: Profile | None = None) -> None:
        self.seed = seed
        self.scheduler = Scheduler(seed, STEPS_MAX)
        self.rng = self.scheduler.rng
        self.profile = profile or Profile.drawn(self.rng)
        self.machine = Machine(self.scheduler)
        self.model = Model(self.scheduler, self.machine)
        self.counts: Counter[str] = Counter()
        self.workload = Workload(self.model, self.rng, self.counts, self.profile.quotas)
        size = self.workload.slot_bytes
        self.settings = SimSettings(
            self.profile.memory_slots * size, self.profile.disk_slots * size
        )
        self.model.caps = {MEMORY: self.settings.memory_bytes, DISK: self.settings.disk_bytes}
        self.model.lossy = self.profile.quotas or self.profile.fault > 0
        self.calm = False  # nothing happens to anybody any more
        self.ordinal = 0
        self.lock = self.machine.database(f"{FOLDER}/.lock", durable=True)
        self.machine.on_database, self.machine.on_file = self._watch, self._watch_file
        self.scheduler.on_step = self._happen
        self.clients: list[Process] = []

    # ------------------------------------------------------------------ what happens
    def _watch(self, path: str, database: Database) -> None:
        live = path.endswith("/live")
        database.on_commit = self.model.watch_live if live else self.model.watch_index
        if not live:
            database.sync_s = self._sync_s
            database.fault = self._commit_fault

    def _watch_file(self, path: str, file: File) -> None:
        file.sync_s = self._sync_s

        def fault(what: str) -> OSError | None:
            if what in ("allocate", "write") and self._faulty():
                return no_room() if file.volatile or self.rng.random() < 0.5 else bad_sector()
            return bad_sector() if what == "sync" and self._faulty() else None

        file.fault = fault

    def _faulty(self) -> bool:
        often = 0 if self.calm else self.profile.fault
        happens = bool(often) and self.rng.randrange(often) == 0
        self.counts["faults"] += happens
        return happens

    def _commit_fault(self) -> Exception | None:
        return disk_error() if self._faulty() else None

    def _sync_s(self) -> float:
        return self.rng.choice((0.0005, 0.002, 0.02))

    def _drawn(self, often: int) -> bool:
        return bool(often) and self.rng.randrange(often) == 0

    def _happen(self, thread: Thread, label: str) -> None:
        if self.scheduler.steps % AUDIT_STEPS == 0:
            self.model.audit("is audited")
        if self.calm or thread.process not in self.clients:
            return
        profile = self.profile
        if self._drawn(profile.kill):
            self.kill(self.rng.choice(self.clients))
        elif self._drawn(profile.power):
            self.power_cut()
        elif self._drawn(profile.jump):
            self.counts["jumps"] += 1
            self.scheduler.jumped_ns += int(self.rng.choice(JUMPS_S) * 1e9)
        elif self._drawn(profile.stall):
            self.counts["stalls"] += 1
            self.scheduler.sleep_quietly(self.rng.choice(STALLS_S))

    def kill(self, process: Process) -> None:
        """SIGKILL."""
        self.counts["kills"] += 1
        self.scheduler.trace(f"kill {process.name}")
        self.machine.kill(process)
        self.clients.remove(process)
        self.model.killed(process)

    def power_cut(self) -> None:
        """All are killed, and what was not synced is lost in part."""
        self.counts["power_cuts"] += 1
        self.scheduler.trace("power cut")
        for process in list(self.clients):
            self.machine.kill(process)
            self.model.killed(process)
        self.clients.clear()
        self.machine.power_cut()
        self.model.audit("is there after a power cut")

    # ------------------------------------------------------------------ processes
    def _open(self) -> Store:
        self.lock.lock()
        try:
            store = Store(SimPath(FOLDER), self.settings)  # type: ignore[arg-type]
            store._users += 1
        finally:
            self.lock.unlock()
        return store

    def _live(self, process: Process, threads: int) -> None:
        """The main thread of a process."""
        try:
            store = self._open()
        except StoreError as error:
            self.counts["not_opened"] += 1
            self.scheduler.trace(f"not opened: {type(error).__name__}")
        else:
            clients = [Client(self.workload, store, process) for _ in range(threads)]
            running = [
                self.scheduler.spawn(process, f"client{i}", client.work)
                for i, client in enumerate(clients)
            ]
            for thread in running:
                if not thread.finished:
                    self.scheduler.wait(thread.ended)
            store.close()
        self.machine.kill(process)
        self.model.killed(process)
        if process in self.clients:
            self.clients.remove(process)

    def _start(self) -> Process:
        self.ordinal += 1
        process = self.scheduler.process(f"p{self.ordinal}")
        self.clients.append(process)
        threads = self.rng.choice((1, 1, 2))
        self.scheduler.spawn(process, "main", lambda: self._live(process, threads))
        return process

    def _drive(self) -> None:
        """The thread of the world: starts processes until enough was done, then looks."""
        profile, scheduler = self.profile, self.scheduler
        wanted = self.rng.randint(1, PROCESSES)
        while self.counts["operations"] < profile.operations:
            if len(self.clients) < wanted:
                self._start()
            scheduler.sleep(self.rng.choice((0.01, 0.2, 1.0)))
        self.calm = self.workload.ending = True
        if self.rng.random() < 0.3:
            self.power_cut()
        while self.clients:
            scheduler.sleep(1.0)
        self.model.audit("is there when all have ended")
        process = scheduler.process("judge")
        thread = scheduler.spawn(process, "main", self._judge)
        if not thread.finished:
            scheduler.wait(thread.ended)

    def _judge(self) -> None:
        store = self._open()
        self.scheduler.sleep(2.5)
        self.scheduler.jumped_ns += int(200e9)  # the time of every lease and claim is over
        self.scheduler.sleep(3.5)
        judge(self.workload, store, self.machine)
        store.close()

    def run(self, log: list[str] | None = None) -> Result:
        """Run it to its end."""
        self.scheduler.log = log
        activate(self.scheduler)
        try:
            with installed():
                driver = self.scheduler.process("world")
                self.scheduler.spawn(driver, "driver", self._drive)
                self.scheduler.run()
        finally:
            activate(None)
        scheduler = self.scheduler
        return Result(
            self.seed, scheduler.failure, scheduler.digest, scheduler.steps,
            scheduler.now_ns / 1e9, self.counts,
        )  # fmt: skip


def simulate(seed: int, profile: Profile | None = None, log: list[Any] | None = None) -> Result:
    """One run."""
    return World(seed, profile).run(log)
