"""SIGKILL at random instants: what was acknowledged stays, nothing wrong is served or leaked."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore import Store, admin
from prefixstore.config import MIB
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS
from tests.store_helpers import (
    Place,
    namespace_in,
    read_content,
    refs_of,
    start_child,
    wait_for,
    writer_lock_held,
)

pytest_plugins = ["tests.store_fixtures"]
ROUNDS, AT_ONCE = 10, 4
ROLES = ("writer", "writer", "reader", "evictor", "writer", "evictor")


class Victims:
    """Processes at work, and what the dead ones had been told. None outlives its context."""

    def __init__(self, store_folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = store_folder, rng
        self.running: list[subprocess.Popen[str]] = []
        self.flushed: list[tuple[int, int]] = []
        self.started = self.killed = 0

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.running:
            child.kill()
            child.communicate()

    def start(self, role: str, number: int | None = None) -> subprocess.Popen[str]:
        self.started += 1
        number = self.started if number is None else number
        seed = self.rng.randrange(2**31)
        log = self.folder.with_suffix(".log")
        child = start_child("tests.crash.victim", role, self.folder, number, seed, log=log)
        self.running.append(child)
        return child

    def wait_ready(self, child: subprocess.Popen[str], word: str = "ready") -> None:
        assert child.stdout is not None
        if not select.select([child.stdout], [], [], 30)[0]:
            child.send_signal(signal.SIGABRT)  # faulthandler then logs where it is
            child.wait()
        line = child.stdout.readline()
        assert line == f"{word}\n", (line, self.log())

    def log(self) -> str:
        """The end of what the processes had to say on stderr."""
        return self.folder.with_suffix(".log").read_text()[-4000:]

    def say_go(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()

    def kill(self, children: list[subprocess.Popen[str]]) -> None:
        """Kill all before waiting for any, then read their last words."""
        for child in children:
            child.kill()
        for child in children:
            out, _ = child.communicate()
            self.running.remove(child)
            assert child.returncode == -9, f"ended by itself: {out[-500:]}\n{self.log()}"
            self.killed += 1
            for line in out.splitlines():
                if line.startswith("flushed ") and len(line.split()) == 3:
                    _, prompt, count = line.split()
                    self.flushed.append((int(prompt), int(count)))


def check_after(store: Store, victims: Victims, thorough: bool = True) -> None:
    """With survivors at work or without: the store is sound and serves what it promised."""
    store.on_keeper(store.reap)
    ns = namespace_in(store)
    checked = victims.flushed if thorough else victims.flushed[-5:]
    for prompt, count in checked:
        # The last line of a killed writer may be cut inside a number: no such line is taken, as
        # only whole lines have three words and end in a newline within the pipe's atomic write.
        tiers = read_content(ns, refs_of(ns, prompt, count))
        assert MISS not in tiers, (prompt, tiers, admin.stats(store)["counters"])
    if thorough:
        report = admin.verify(store)
        assert report.sound, report


@pytest.fixture
def victims(place: Place) -> Iterator[Victims]:
    seed = int(os.environ.get("PREFIXSTORE_TEST_SEED", time.time_ns() % 10**9))
    print(f"PREFIXSTORE_TEST_SEED={seed}")
    with Victims(place.folder / "store", random.Random(seed)) as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_at_random_instants(place: Place, victims: Victims) -> None:
    """Writers, readers and evictors, several at once; survivors stay at work meanwhile."""
    rng = victims.rng
    # The disk holds everything, so that what is flushed is evicted by nobody.
    with place.open(4 * MIB, 2048 * MIB) as store:
        namespace_in(store)
        folder = store.folder
    for number in range(ROUNDS):
        missing = AT_ONCE + 1 - len(victims.running)
        for child in [victims.start(rng.choice(ROLES)) for _ in range(missing)]:
            victims.wait_ready(child)
        time.sleep(rng.choice([0, 0.02, 0.1, 0.4]) * rng.random())
        victims.kill(rng.sample(victims.running, AT_ONCE))
        survivors_too = number % 4 == 3
        if survivors_too:
            victims.kill(list(victims.running))
        with Store.open(folder) as store:
            check_after(store, victims, thorough=survivors_too)
    victims.kill(list(victims.running))
    assert victims.killed >= 4 * ROUNDS
    assert len(victims.flushed) > ROUNDS
    with Store.open(folder) as store:
        check_after(store, victims)
        check_nothing_leaks(store)
        assert admin.stats(store)["counters"].get("corrupt_disk", 0) == 0
    print(f"{victims.killed} kills, {len(victims.flushed)} flushes acknowledged")


def check_nothing_leaks(store: Store) -> None:
    """Everything the dead held is free again: no leases, no claims, and a tier can be emptied."""
    wait_for(lambda: admin.stats(store)["tiers"]["memory"]["dirty_chunks"] == 0, "orphans' spill")
    store.on_keeper(store.reap)
    found = admin.stats(store)
    assert found["leases"] == 0
    with store.live.read() as txn:
        assert txn.count("claim") == 0
        assert txn.count("leased") == 0
        # Parts whose other ranks never came are kept for a while: their writer did finish.
        pending = len(list(store.ledger.pending_slots(txn)))
    admin.empty_memory(store)
    tier = admin.stats(store)["tiers"]["memory"]
    assert tier["chunks"] == tier["free_bytes"] == 0
    slot_bytes = namespace_in(store).layout.slot_bytes
    assert tier["allocated_bytes"] == pending * slot_bytes
    admin.remove(store, admin.Selection(everything=True))
    tier = admin.stats(store)["tiers"]["disk"]
    assert tier["chunks"] == 0
    assert tier["allocated_bytes"] == tier["free_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_under_eviction(place: Place, victims: Victims) -> None:
    """On a store where every put evicts, so that kills fall into evictions of both tiers."""
    rng = victims.rng
    with place.open(2 * MIB, 6 * MIB) as store:
        namespace_in(store)
        folder = store.folder
    for _ in range(4):
        while len(victims.running) < 4:
            victims.wait_ready(victims.start(rng.choice(["writer", "evictor", "evictor"])))
        time.sleep(0.5 * rng.random())
        victims.kill(rng.sample(victims.running, 3))
        victims.flushed.clear()  # the disk is too small for promises
        with Store.open(folder) as store:
            check_after(store, victims)
    victims.kill(list(victims.running))
    with Store.open(folder) as store:
        victims.flushed.clear()
        check_after(store, victims)
        check_nothing_leaks(store)


def test_several_survivors_take_over_unspilled_chunks_once(place: Place, victims: Victims) -> None:
    """Two keepers that find the same orphans must not both enter them.

    The durable index is held, so that neither can be done before the other has begun.
    """
    with place.open() as store:
        namespace_in(store)
        folder = store.folder
    survivors = [victims.start("idle"), victims.start("idle")]
    for child in survivors:
        victims.wait_ready(child)
    writer = victims.start("put", 5)
    victims.wait_ready(writer)
    with writer_lock_held(folder / "index"):
        victims.say_go(writer)
        victims.wait_ready(writer, "put")
        victims.kill([writer])
        time.sleep(3.0)  # housekeeping is once a second
    with Store.open(folder) as store:
        ns = namespace_in(store)
        wait_for(
            lambda: admin.stats(store)["tiers"]["memory"]["dirty_chunks"] == 0, "orphans' spill"
        )
        report = admin.verify(store)
        assert report.sound, report
        tier = admin.stats(store)["tiers"]["disk"]
        assert tier["chunks"] == 16
        admin.empty_memory(store)
        assert MISS not in read_content(ns, refs_of(ns, 5, 16))
        for child in survivors:
            child.communicate("\n")
        store.on_keeper(store.reap)
        check_nothing_leaks(store)


def test_what_a_killed_process_put_is_there(place: Place, victims: Victims) -> None:
    """A put that returned is in the memory tier for every process, also if its writer dies at once.

    The file of the memory tier is new to the reader: it maps what the dead process has written.
    """
    with place.open() as store:
        ns = namespace_in(store)
        child = victims.start("put", 5)
        victims.wait_ready(child)
        with writer_lock_held(store.index.folder):
            victims.say_go(child)
            victims.wait_ready(child, "put")
            victims.kill([child])
            assert read_content(ns, refs_of(ns, 5, 16)) == [MEMORY] * 16
        wait_for(lambda: admin.stats(store)["tiers"]["disk"]["chunks"] == 16, "orphans' spill")
