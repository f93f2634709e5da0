"""SIGKILL at random instants: what was acknowledged stays, nothing wrong is served or leaked."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.crash import Run
from benchmarks.crash_roles import SCENES, Scene
from prefixstore import Store, admin
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
KILLS = 12
SEED = int(os.environ.get("PREFIXSTORE_TEST_SEED", "1"))


class Victims:
    """Processes at work. None outlives its context."""

    def __init__(self, store_folder: Path) -> None:
        self.folder = store_folder
        self.running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.running:
            child.kill()
            child.communicate()

    def start(self, role: str, number: int = 0) -> subprocess.Popen[str]:
        log = self.folder.with_suffix(".log")
        child = start_child("tests.crash.victim", role, self.folder, number, log=log)
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
        """Kill all before waiting for any."""
        for child in children:
            child.kill()
        for child in children:
            out, _ = child.communicate()
            self.running.remove(child)
            assert child.returncode == -9, f"ended by itself: {out[-500:]}\n{self.log()}"


@pytest.fixture
def victims(place: Place) -> Iterator[Victims]:
    with Victims(place.folder / "store") as found:
        yield found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_kills_at_any_moment(scene: Scene) -> None:
    """What is done and what must hold is that of `benchmarks.crash`, which kills thousands."""
    run = Run(KILLS, SEED, [scene])
    run.go()
    assert run.faults == []
    assert run.all_killed() >= KILLS
    assert run.promised > 0 or not scene.roomy


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("prefixstore.store.reap", lambda *_: 0),
        ("prefixstore.disk.delete_row", lambda *_: None),
    ],
)
def test_a_harness_that_sees_what_is_left_out(
    what: str, instead: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the dead's leases and claims not ended, or rows not deleted, it would say so: the
    processes are forked, so they have the fault as well."""
    monkeypatch.setattr(what, instead)
    run = Run(20 * KILLS, SEED, SCENES[:1])  # it ends with the first fault
    run.go()
    assert run.faults


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
