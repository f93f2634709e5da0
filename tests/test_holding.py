"""Slots that are held: nobody else's meanwhile, free after, also when the holder dies."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from prefixstore import Namespace, Store, admin, holding
from prefixstore.config import HIGH_SHARE
from prefixstore.errors import StoreError
from prefixstore.holding import Space, Spaces, held_free, held_new, spaces, times_changed
from prefixstore.ledger import MEMORY
from prefixstore.putting import PutState
from prefixstore.room import make_room
from prefixstore.rows import CLAIM_HELD, Claim, Pending, pack_address
from tests.store_helpers import (
    LAYOUT,
    Place,
    namespace_in,
    on_keeper,
    put_content,
    read_content,
    refs_of,
    small_file_system,
    start_child,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]

SIZE = LAYOUT.slot_bytes


@pytest.fixture
def ns(place: Place, no_late_readers: None) -> Iterator[Namespace]:
    with place.open("4MiB", 0) as store:
        yield namespace_in(store)


def room(store: Store) -> float:
    """Slots the tier may have before housekeeping begins to evict."""
    with store.live.read() as txn:
        return HIGH_SHARE * store.ledger.cap(txn, MEMORY) / SIZE


def every(store: Store) -> list[Space]:
    return spaces(store, SIZE).found


def free_slots(store: Store) -> set[int]:
    return {one.slot for one in every(store) if one.free}


def test_new_slots_are_as_many_as_the_tier_has_room_for(ns: Namespace) -> None:
    store = ns.store
    most = 2 * store.settings.memory_bytes // SIZE
    before = room(store)
    with held_new(store, SIZE, most) as held:
        count = len(held.spaces)
        assert room(store) - 1 <= count <= before, "the index has grown meanwhile"
        assert spaces(store, SIZE) == Spaces([], count, 0), "they may have no pages yet"
        with held_new(store, SIZE, most) as more:
            assert more.spaces == []
        assert admin.verify(store).sound
    wait_for(lambda: len(free_slots(store)) == count, "the slots to be free")
    assert admin.verify(store).sound


def test_new_slots_leave_room_in_their_file_system(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ns.store
    found = os.statvfs(store.live_dir)
    left = found.f_bavail * found.f_frsize - 10 * SIZE - SIZE // 2
    monkeypatch.setattr(holding, "LEFT_BYTES_MIN", left)
    monkeypatch.setattr(holding, "LEFT_SHARE", 0)
    with held_new(store, SIZE, 4) as first, held_new(store, SIZE, 100) as more:
        assert len(first.spaces) == 4
        # Others may use the file system meanwhile; those held are not made, and count all the same.
        assert 0 < len(more.spaces) <= 6
    monkeypatch.setattr(holding, "LEFT_BYTES_MIN", 2 * left)
    with held_new(store, SIZE, 1) as none:
        assert none.spaces == []


def test_chunks_go_to_slots_that_were_made(ns: Namespace) -> None:
    store = ns.store
    with held_new(store, SIZE, 8) as held:
        made = {one.slot for one in held.spaces}
        put_content(ns, refs_of(ns, 1, 2))
        assert {one.slot for one in every(store)} == {8, 9}
    wait_for(lambda: free_slots(store) == made, "the slots to be free")
    before = times_changed(store)
    refs = refs_of(ns, 2, 8)
    put_content(ns, refs)
    assert free_slots(store) == set()
    assert times_changed(store) == before, "no slot was made for them"
    assert len(read_content(ns, refs)) == 8
    assert [one.slot for one in spaces(store, SIZE, set(range(10)) - {3}).found] == [3]
    assert admin.verify(store).sound


def test_what_could_not_be_made_is_given_back(ns: Namespace) -> None:
    store = ns.store
    before = times_changed(store)[0]
    with held_new(store, SIZE, 8) as held:
        held.unmade.update({2, 5})
    wait_for(lambda: len(free_slots(store)) == 6, "the slots to be free")
    assert free_slots(store) == {0, 1, 3, 4, 6, 7}
    assert times_changed(store) == (before + 6 * SIZE, 2)
    assert admin.verify(store).sound


def test_a_held_slot_is_neither_filled_nor_given_back(ns: Namespace) -> None:
    store = ns.store
    refs = refs_of(ns, 1, 6)
    put_content(ns, refs)
    ns.delete(refs)
    with store.live.read() as txn:
        freed = txn.get("free", pack_address(MEMORY, SIZE, 4))
    with held_free(store, SIZE, [4, 5, 99]) as held:
        assert [one.slot for one in held.spaces] == [4, 5], "that are free"
        admin.empty_memory(store)
        assert spaces(store, SIZE) == Spaces([], 2, 0)
        states = put_content(ns, refs_of(ns, 2, store.settings.memory_bytes // SIZE))
        assert PutState.STORED in states
        stored = {chunk.row.slot for chunk in admin.list_chunks(store)}
        assert stored.isdisjoint({4, 5})
        on_keeper(store, store.keeper._store.reap)
        assert free_slots(store).isdisjoint({4, 5}), "not taken for left from an error"
        assert admin.verify(store).sound
    wait_for(lambda: free_slots(store) >= {4, 5}, "the slots to be free")
    with store.live.read() as txn:
        assert txn.get("free", pack_address(MEMORY, SIZE, 4)) == freed, "and when it came to be"
    with held_free(store, SIZE, [4]) as again:
        assert [(one.slot, one.version) for one in again.spaces] == [(4, 0)], "it kept its pages"


def test_nothing_is_evicted_because_the_last_free_slots_are_held(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ns.store
    refs = refs_of(ns, 1, 20)
    put_content(ns, refs)
    ns.delete(refs[:2])
    monkeypatch.setattr(type(store.ledger), "cap", lambda *_: int(20 * SIZE / 0.99))
    with held_free(store, SIZE, [0, 1]) as held:
        assert len(held.spaces) == 2
        on_keeper(store, partial(make_room, store))
        assert all(ns.match_each(refs[2:]))
    wait_for(lambda: free_slots(store) == {0, 1}, "the slots to be free")
    put_content(ns, refs_of(ns, 2, 2))
    on_keeper(store, partial(make_room, store))
    assert not all(ns.match_each(refs[2:])), "where none is free or held, room is made"


def test_what_is_held_when_its_end_fails_is_freed_later(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ns.store
    submit = store.live.submit
    refused: list[object] = []

    def full(operation: object) -> object:
        if store.ledger.held and not refused:  # it is what ends it
            refused.append(operation)
            raise StoreError("planted")
        return submit(operation)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(store.live, "submit", full)
        with held_new(store, SIZE, 3):
            pass
        assert refused
    with store.live.read() as txn:
        held = [Claim.unpack(record).kind for _, record in txn.scan("claim")]
    assert held == [CLAIM_HELD] * 3
    wait_for(lambda: len(free_slots(store)) == 3, "the keeper to free them")


def test_slots_that_are_being_filled_are_not_said_to_have_pages(ns: Namespace) -> None:
    store = ns.store
    pending = Pending(7, SIZE, 0, 2.0**40, ns.name, bytes(8), (store.ledger.owner,), b"", b"")

    def begin(txn: object) -> None:
        for _ in range(8):
            slot = store.ledger.new_slot(txn, MEMORY, SIZE)  # type: ignore[arg-type]
            if slot < 7:
                store.ledger.free_slot(txn, MEMORY, SIZE, slot)  # type: ignore[arg-type]
        store.ledger.begin_pending(txn, b"k" * 16, pending)  # type: ignore[arg-type]

    store.live.write(begin)
    found = spaces(store, SIZE)
    assert ({one.slot for one in found.found}, found.held, found.filling) == (set(range(7)), 0, 1)
    assert spaces(store, SIZE, set(range(8))) == Spaces([], 0, 0)


def test_what_a_dead_process_held_is_free(place: Place, ns: Namespace) -> None:
    child = start_child("tests.test_holding", place.folder / "store")
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    assert spaces(ns.store, SIZE) == Spaces([], 5, 0)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    wait_for(lambda: len(free_slots(ns.store)) == 5, "the slots to be free")
    assert admin.verify(ns.store).sound


def test_a_small_file_system_keeps_room_for_the_index(tmp_path: Path) -> None:
    """The tier may take 1 GiB, its file system ends at 80 MiB, as a container's may."""
    with small_file_system(tmp_path / "small", "80m") as small:
        where = tmp_path / "store"
        with Store.open(where, memory_bytes="1GiB", disk_bytes=0, memory_dir=str(small)) as store:
            ns = namespace_in(store)
            with held_new(store, SIZE, 10_000) as held:
                file = store.file_of(MEMORY, SIZE)
                kept = [file.map_slot(one.slot) for one in held.spaces]
            assert 8 << 20 < len(kept) * SIZE <= 16 << 20
            refs = refs_of(ns, 1, 8)
            assert put_content(ns, refs) == [PutState.STORED] * 8
        with Store.open(where, create=False) as store:
            assert len(read_content(namespace_in(store), refs)) == 8


if __name__ == "__main__":
    with Store.open(sys.argv[1], create=False) as opened, held_new(opened, SIZE, 5):
        print("held", flush=True)
        signal.pause()
        os._exit(1)
