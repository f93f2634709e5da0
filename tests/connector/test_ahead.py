"""Slots that are registered before they are needed, with a part that plays CUDA."""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from connector import ahead
from connector.ahead import Ahead
from connector.registered import RegisteredSlots
from prefixstore import Namespace, Store, admin
from prefixstore.holding import spaces, times_changed
from prefixstore.ledger import MEMORY
from prefixstore.lending import lend
from prefixstore.slots import SlotFile
from tests.connector.test_registered import DEVICES, PlayedCuda, read
from tests.store_helpers import LAYOUT, WAIT_S, Place, namespace_in, put_content, refs_of, wait_for

pytest_plugins = ["tests.store_fixtures"]

SIZE = LAYOUT.slot_bytes


class Handle:
    """A store that is open."""

    def __init__(self, store: Store | None) -> None:
        self.store = store

    def get(self) -> Store | None:
        return self.store


@pytest.fixture
def ns(place: Place, monkeypatch: pytest.MonkeyPatch, no_late_readers: None) -> Iterator[Namespace]:
    monkeypatch.setattr(ahead, "LOOK_S", 0.02)
    monkeypatch.setattr(ahead, "BATCH_BYTES", 8 * SIZE)
    with place.open("4MiB", 0) as store:
        yield namespace_in(store)


@contextmanager
def going(slots: RegisteredSlots, store: Store | None, *, make: bool) -> Iterator[Ahead]:
    handle: Any = Handle(store)
    one = Ahead(slots, handle, SIZE, make=make)
    try:
        yield one
    finally:
        one.close(time.monotonic() + WAIT_S)
        slots.close(time.monotonic() + WAIT_S)
        assert not one._thread.is_alive()


def registered(slots: RegisteredSlots, store: Store) -> set[int]:
    return slots.of(store.file_of(MEMORY, SIZE))


def every(store: Store) -> set[int]:
    return {one.slot for one in spaces(store, SIZE)}


@pytest.mark.parametrize("make", DEVICES)
def test_all_of_the_tier_is_registered_and_what_is_stored_there_is_read(
    ns: Namespace, make: Callable[[], PlayedCuda]
) -> None:
    cuda, store = make(), ns.store
    device, slots = "cpu" if isinstance(cuda, PlayedCuda) else "cuda", RegisteredSlots(cuda)
    before = refs_of(ns, 1, 12)
    put_content(ns, before)
    with going(slots, store, make=True):
        wait_for(lambda: len(every(store)) > 100, "slots to be made")
        wait_for(lambda: registered(slots, store) == every(store), "all slots to be registered")
        wait_for(lambda: all(one.free or one.slot < 12 for one in spaces(store, SIZE)), "rest")
        after, changed = refs_of(ns, 2, 40), times_changed(store)
        put_content(ns, after)
        assert times_changed(store) == changed, "no slot was made for them"
        for refs in (before, after):
            read(slots, ns, refs, device)
        assert admin.verify(store).sound


def test_slots_that_others_make_are_registered_free_ones_too(ns: Namespace) -> None:
    slots, store = RegisteredSlots(PlayedCuda()), ns.store
    refs = refs_of(ns, 1, 12)
    with going(slots, store, make=False):
        put_content(ns, refs)
        wait_for(lambda: len(registered(slots, store)) == 12, "the slots to be registered")
        ns.delete(refs[:6])
        admin.empty_memory(store)
        wait_for(lambda: not registered(slots, store), "what was given back to be let go of")
        put_content(ns, refs)
        wait_for(lambda: registered(slots, store) == every(store), "the slots to be registered")
        assert len(lend(ns, refs, ns.layout.whole)) == 12
    ns.delete(refs)
    again = RegisteredSlots(PlayedCuda())
    with going(again, store, make=False):
        wait_for(lambda: registered(again, store) == every(store), "free slots to be registered")
        wait_for(lambda: all(one.free for one in spaces(store, SIZE)), "them to be free again")
    assert len(every(store)) == 12, "none was made"


def test_no_more_memory_is_made_than_there_is(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system is smaller than the tier: it goes on with what it has got."""
    slots, store, map_slot = RegisteredSlots(PlayedCuda()), ns.store, SlotFile.map_slot

    def small(file: SlotFile, slot: int, *, populate: bool = False) -> mmap.mmap:
        if slot >= 20:
            raise OSError(errno.ENOSPC, "planted")
        return map_slot(file, slot, populate=populate)

    monkeypatch.setattr(SlotFile, "map_slot", small)
    with going(slots, store, make=True) as one:
        wait_for(lambda: not one._make, "it to find out")
        wait_for(lambda: registered(slots, store) == set(range(20)), "what there is")
        assert len(every(store)) == 24, "those of the last turn"
        assert one._thread.is_alive()


def test_it_ends_where_cuda_refuses_and_waits_for_a_store(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handle: Any = Handle(None)
    slots = RegisteredSlots(PlayedCuda())
    monkeypatch.setattr(PlayedCuda, "register", lambda cuda, memory: False)
    one = Ahead(slots, handle, SIZE, make=True)
    time.sleep(0.1)
    assert one._thread.is_alive()
    assert every(ns.store) == set()
    handle.store = ns.store
    one._thread.join(WAIT_S)
    assert not one._thread.is_alive()
    assert not slots.possible
    assert "goes by way of the host" in caplog.text
    wait_for(lambda: all(space.free for space in spaces(ns.store, SIZE)), "nothing to be held")
    slots.close(time.monotonic() + WAIT_S)
