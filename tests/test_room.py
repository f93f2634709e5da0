"""Caps hold, whatever is pinned and however the index grows."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from prefixstore import PutState, Store, admin
from prefixstore.config import MIB
from prefixstore.index import Txn
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS
from prefixstore.room import make_room
from tests.store_helpers import (
    ROOT,
    WAIT_S,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
    space_taken,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]
CAP, PINNED = 4 * MIB, 50  # chunks of 32 KiB: 1.6 MiB
READER = """
import sys, time
from prefixstore import Store
with Store.open(sys.argv[1], create=False) as store, store.live.read() as txn:
    txn.count("order")
    print("reads", flush=True)
    time.sleep(60)
"""


def numbers(store: Store, tier: str) -> dict[str, int]:
    return dict(admin.stats(store)["tiers"][tier])


def some_writes(store: Store, count: int) -> None:
    """As of hits: each a commit that changes a few pages."""

    def note(nth: int, txn: Txn) -> None:
        txn.put("counter", b"planted%d" % (nth % 50), bytes(1000))

    for nth in range(count):
        store.live.write(partial(note, nth))


def grow(store: Store, num_bytes: int) -> None:
    """Have the live index take so many bytes: somebody reads for long while others write."""
    with store.live.read() as txn:
        txn.count("order")
        while store.live.file_bytes() < num_bytes:
            some_writes(store, 20)


@pytest.mark.parametrize("disk", [0, "16MiB"])
def test_pinned_chunks_give_way_to_the_index(place: Place, disk: object) -> None:
    """Those of memory only from the ends of prompts on; the others are read from disk, pinned."""
    with place.open(CAP, disk) as store:  # type: ignore[arg-type]
        ns = namespace_in(store)
        refs = refs_of(ns, 1, PINNED)
        put_content(ns, refs, pin=True)
        assert numbers(store, "memory")["pinned_bytes"] == PINNED * ns.layout.slot_bytes
        assert not disk or store.flush(WAIT_S)
        grow(store, CAP - 20 * ns.layout.slot_bytes)
        wait_for(lambda: space_taken(store.live_dir) <= CAP, "the tier to shrink")
        assert 0 < numbers(store, "memory")["chunks"] < 20
        tiers = read_content(ns, refs)
        left = tiers.count(MEMORY)
        assert tiers[:left] == [MEMORY] * left
        if disk:
            assert MISS not in tiers
            assert numbers(store, "disk")["pinned_bytes"] == PINNED * ns.layout.slot_bytes
        assert admin.stats(store)["counters"]["pinned_evicted_bytes"] > 0
        assert admin.verify(store).sound


def test_an_index_that_has_grown_is_small_again_when_opened(place: Place) -> None:
    """LMDB keeps its pages: the tier had no room for chunks any more, until a reboot."""
    with place.open(CAP, 0) as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 10)
        put_content(ns, refs, pin=True, ttl_s=10_000)
        grow(store, CAP // 2)
        before = store.live.file_bytes()
    with place.open(CAP, 0) as store:
        ns = namespace_in(store)
        assert store.live.file_bytes() < before // 2
        assert read_content(ns, refs) == [MEMORY] * 10
        assert numbers(store, "memory")["pinned_bytes"] == 10 * ns.layout.slot_bytes
        assert set(put_content(ns, refs_of(ns, 2, 60))) == {PutState.STORED}
        assert admin.verify(store).sound


def test_an_index_in_use_is_not_made_anew(place: Place) -> None:
    with place.open(CAP, 0) as store:
        grow(store, CAP // 2)
        path = store.live_dir / "live" / "data.mdb"
        inode = path.stat().st_ino
        command = [sys.executable, "-c", READER.replace("time.sleep(60)", ""), str(store.folder)]
        assert subprocess.run(command, cwd=ROOT, timeout=WAIT_S, check=False).returncode == 0
        assert path.stat().st_ino == inode
        assert not store.gone


def test_what_a_killed_commit_has_left_counts(place: Place) -> None:
    """LMDB writes a commit's pages behind those that it counts, and then its first page."""
    with place.open(CAP, 0) as store:
        ns = namespace_in(store)
        put_content(ns, refs_of(ns, 1, 150))
        with open(store.live_dir / "live" / "data.mdb", "ab") as file:
            file.write(bytes(8 * ns.layout.slot_bytes))
        wait_for(lambda: space_taken(store.live_dir) <= CAP, "the tier to shrink")
        assert admin.verify(store).sound


def test_a_cap_below_what_is_pinned_holds(place: Place) -> None:
    with place.open("8MiB", "8MiB") as store:
        ns = namespace_in(store)
        assert store.flush(WAIT_S)
        put_content(ns, refs_of(ns, 1, 100), pin=True)
        assert store.flush(WAIT_S)
    with place.open("2MiB", "2MiB") as store:
        for tier in ("memory", "disk"):
            wait_for(lambda tier=tier: fits(store, tier), f"the {tier} tier to shrink")  # type: ignore[misc]
        assert read_content(namespace_in(store), refs_of(ns, 1, 5)) != [MISS] * 5
        assert admin.verify(store).sound


def fits(store: Store, tier: str) -> bool:
    found = numbers(store, tier)
    return found["allocated_bytes"] + found["index_bytes"] <= 2 * MIB


def test_no_more_is_evicted_than_must_be(place: Place) -> None:
    """What was freed a moment ago is not given back yet: nothing else must go for it."""
    with place.open(CAP, 0) as store:
        ns = namespace_in(store)
        put_content(ns, refs_of(ns, 1, PINNED), pin=True)
        grow(store, CAP - 20 * ns.layout.slot_bytes)
        store.on_keeper(lambda: make_room(store))
        after = numbers(store, "memory")["chunks"]
        for _ in range(3):
            store.on_keeper(lambda: make_room(store))
        assert numbers(store, "memory")["chunks"] >= after - 1, "but for what the index grows"


def test_a_killed_reader_does_not_have_the_index_grow(place: Place) -> None:
    """The keeper looks for them once a second: by then it had taken megabytes."""
    with place.open() as store:
        command = [sys.executable, "-c", READER, str(store.folder)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "reads\n"
            child.kill()
        some_writes(store, 50)
        before = store.live.file_bytes()
        store.on_keeper(lambda: some_writes(store, 300))  # so that it does nothing else
        assert store.live.file_bytes() < before + MIB
