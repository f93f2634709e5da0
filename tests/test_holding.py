"""Slots that are held: nobody else's meanwhile, free after, also when the holder dies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from prefixstore import Namespace, Store, admin
from prefixstore.config import HIGH_SHARE
from prefixstore.holding import held_free, held_new, spaces, times_changed
from prefixstore.ledger import MEMORY
from prefixstore.putting import PutState
from tests.store_helpers import (
    LAYOUT,
    Place,
    namespace_in,
    on_keeper,
    put_content,
    read_content,
    refs_of,
    start_child,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]

SIZE = LAYOUT.slot_bytes


@pytest.fixture
def ns(place: Place, no_late_readers: None) -> Iterator[Namespace]:
    with place.open("4MiB", 0) as store:
        yield namespace_in(store)


def sound(store: Store) -> None:
    """All that is counted is so."""
    assert admin.verify(store).sound


def room(store: Store) -> float:
    """Slots the tier may have before housekeeping begins to evict."""
    with store.live.read() as txn:
        return HIGH_SHARE * store.ledger.cap(txn, MEMORY) / SIZE


def free_slots(store: Store) -> set[int]:
    return {one.slot for one in spaces(store, SIZE) if one.free}


def test_new_slots_are_as_many_as_the_tier_has_room_for(ns: Namespace) -> None:
    store = ns.store
    most = 2 * store.settings.memory_bytes // SIZE
    before = room(store)
    with held_new(store, SIZE, most) as held:
        count = len(held)
        assert room(store) - 1 <= count <= before, "the index has grown meanwhile"
        assert free_slots(store) == set(), "they are held"
        with held_new(store, SIZE, most) as more:
            assert more == []
        sound(store)
    wait_for(lambda: len(free_slots(store)) == count, "the slots to be free")
    sound(store)


def test_chunks_go_to_slots_that_were_made(ns: Namespace) -> None:
    store = ns.store
    with held_new(store, SIZE, 8) as held:
        made = {one.slot for one in held}
        put_content(ns, refs_of(ns, 1, 2))
        assert {one.slot for one in spaces(store, SIZE)}.isdisjoint(free_slots(store))
    wait_for(lambda: free_slots(store) == made, "the slots to be free")
    before = times_changed(store)
    refs = refs_of(ns, 2, 8)
    put_content(ns, refs)
    assert free_slots(store) == set()
    assert times_changed(store) == before, "no slot was made for them"
    assert len(read_content(ns, refs)) == 8
    known = {one.slot for one in spaces(store, SIZE)} - {3}
    assert [one.slot for one in spaces(store, SIZE, known)] == [3]
    sound(store)


def test_a_held_slot_is_neither_filled_nor_given_back(ns: Namespace) -> None:
    store = ns.store
    refs = refs_of(ns, 1, 6)
    put_content(ns, refs)
    ns.delete(refs)
    with held_free(store, SIZE, [4, 5, 99]) as held:
        assert [one.slot for one in held] == [4, 5], "that are free"
        admin.empty_memory(store)
        assert [one.slot for one in spaces(store, SIZE)] == [4, 5]
        capacity = store.settings.memory_bytes // SIZE
        states = put_content(ns, refs_of(ns, 2, capacity))
        assert PutState.STORED in states
        stored = {chunk.row.slot for chunk in admin.list_chunks(store)}
        assert stored.isdisjoint({4, 5})
        sound(store)
    wait_for(lambda: free_slots(store) >= {4, 5}, "the slots to be free")
    with held_free(store, SIZE, [4]) as held:
        assert [(one.slot, one.version) for one in held] == [(4, 0)], "it kept its pages"
    with held_free(store, SIZE, [4]) as held:
        on_keeper(store, store.keeper._store.reap)
        assert free_slots(store).isdisjoint({4}), "it is not taken for one left from an error"


def test_what_a_dead_process_held_is_free(place: Place, ns: Namespace) -> None:
    child = start_child("tests.test_holding", place.folder / "store")
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    assert free_slots(ns.store) == set()
    assert len(spaces(ns.store, SIZE)) == 5
    child.send_signal(signal.SIGKILL)
    child.communicate()
    wait_for(lambda: len(free_slots(ns.store)) == 5, "the slots to be free")
    sound(ns.store)


if __name__ == "__main__":
    with Store.open(sys.argv[1], create=False) as opened, held_new(opened, SIZE, 5):
        print("held", flush=True)
        signal.pause()
        os._exit(1)
