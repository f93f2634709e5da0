"""Slots that are registered before they are needed, with a part that plays CUDA."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from connector import ahead
from connector.ahead import Ahead
from connector.registered import RegisteredSlots
from prefixstore import Namespace, Store, admin, holding
from prefixstore.config import HELPERS
from prefixstore.holding import spaces, times_changed
from prefixstore.ledger import MEMORY
from prefixstore.lending import lend
from prefixstore.putting import PutState
from prefixstore.reading import share_out
from prefixstore.rows import Pending
from prefixstore.slots import SlotFile
from tests.connector.test_registered import DEVICES, PlayedCuda, read
from tests.store_helpers import (
    LAYOUT,
    WAIT_S,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
    small_file_system,
    wait_for,
)

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


def all_registered(slots: RegisteredSlots, store: Store) -> bool:
    return registered(slots, store) == every(store)


def every(store: Store) -> set[int]:
    return {one.slot for one in spaces(store, SIZE).found}


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
        wait_for(
            lambda: all(one.free or one.slot < 12 for one in spaces(store, SIZE).found), "rest"
        )
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
        wait_for(
            lambda: all(one.free for one in spaces(store, SIZE).found), "them to be free again"
        )
    assert len(every(store)) == 12, "none was made"


def test_no_more_memory_is_made_than_there_is(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system is smaller than the tier: it goes on with what it has got."""
    slots, store, map_slot = RegisteredSlots(PlayedCuda()), ns.store, SlotFile.map_slot

    def small(file: SlotFile, slot: int) -> memoryview:
        if slot >= 20:
            raise OSError(errno.ENOSPC, "planted")
        return map_slot(file, slot)

    monkeypatch.setattr(SlotFile, "map_slot", small)
    with going(slots, store, make=True) as one:
        one.wait()
        assert registered(slots, store) == every(store) == set(range(20))
        assert one._thread.is_alive()
        assert slots.possible
        refs = refs_of(ns, 1, 4)
        put_content(ns, refs)
        read(slots, ns, refs, "cpu")


def test_a_small_file_system_leaves_a_store_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tier may take 1 GiB, its file system ends at 80 MiB, and two have it."""
    monkeypatch.setattr(holding, "LEFT_BYTES_MIN", 1 << 20)
    with small_file_system(tmp_path / "small", "80m") as small:
        where = tmp_path / "store"
        with Store.open(where, memory_bytes="1GiB", disk_bytes=0, memory_dir=str(small)) as store:
            ns = namespace_in(store)
            slots, second = RegisteredSlots(PlayedCuda()), RegisteredSlots(PlayedCuda())
            with going(slots, store, make=True) as one, going(second, store, make=True) as other:
                one.wait()
                other.wait()
                assert slots.possible
                assert second.possible
                assert 60 << 20 < len(every(store)) * SIZE < 80 << 20
                refs = refs_of(ns, 1, 40)
                assert put_content(ns, refs) == [PutState.STORED] * 40
        with Store.open(where, create=False) as store:
            assert len(read_content(namespace_in(store), refs)) == 40
            assert admin.verify(store).sound


@pytest.mark.parametrize("made", [False, True], ids=["new", "made before"])
def test_ranks_that_start_together_have_all_of_it_when_they_begin(
    ns: Namespace, made: bool
) -> None:
    store = ns.store
    if made:
        with going(RegisteredSlots(PlayedCuda()), store, make=True) as one:
            one.wait()
        assert len(every(store)) > 100
    ranks = [RegisteredSlots(PlayedCuda()) for _ in range(3)]
    with ExitStack() as stack:
        for one in [stack.enter_context(going(slots, store, make=True)) for slots in ranks]:
            one.wait()
        for slots in ranks:  # the last of them may have made more since the first one looked
            wait_for(partial(all_registered, slots, store), "all", 2.0)
        assert len(every(store)) > 100
        assert admin.verify(store).sound


def test_what_is_being_filled_holds_up_nobody(ns: Namespace) -> None:
    """A rank that was killed leaves chunks half filled, for a minute."""
    store = ns.store
    pending = Pending(0, SIZE, 0, 2.0**40, ns.name, bytes(8), (), b"", b"")

    def begin(txn: Any) -> None:
        store.ledger.begin_pending(txn, b"k" * 16, replace(pending, slot=new_slot(txn)))

    def new_slot(txn: Any) -> int:
        return store.ledger.new_slot(txn, MEMORY, SIZE)

    store.live.write(begin)
    slots = RegisteredSlots(PlayedCuda())
    with going(slots, store, make=True) as one:
        one.wait()
        assert len(registered(slots, store)) > 100
        assert spaces(store, SIZE, registered(slots, store)).filling == 1


def test_a_free_slot_without_memory_is_free_no_more(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, map_slot = ns.store, SlotFile.map_slot
    refs = refs_of(ns, 1, 4)
    put_content(ns, refs)
    ns.delete(refs)

    def small(file: SlotFile, slot: int) -> memoryview:
        if slot == 2:
            raise OSError(errno.ENOSPC, "planted")
        return map_slot(file, slot)

    monkeypatch.setattr(SlotFile, "map_slot", small)
    slots = RegisteredSlots(PlayedCuda())
    with going(slots, store, make=False) as one:
        one.wait()
        assert registered(slots, store) == every(store) == {0, 1, 3}
    assert admin.verify(store).sound


def test_a_store_that_comes_late_or_is_opened_anew(ns: Namespace, place: Place) -> None:
    handle: Any = Handle(None)
    slots = RegisteredSlots(PlayedCuda())
    one = Ahead(slots, handle, SIZE, make=True)
    one.wait()  # there is nothing to wait for
    assert every(ns.store) == set()
    handle.store = ns.store
    wait_for(lambda: len(every(ns.store)) > 100, "slots to be made")
    with place.open("2MiB", 0, name="another") as store:
        handle.store = store
        wait_for(lambda: len(every(store)) > 40, "slots to be made there, too")
        wait_for(lambda: registered(slots, store) == every(store), "them to be registered")
        one.close(time.monotonic() + WAIT_S)
    slots.close(time.monotonic() + WAIT_S)


def test_it_is_gentle_while_the_engine_computes(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers: list[int] = []

    def noted(count: int, work: Callable[[int], None], pool: Any, wanted: int) -> None:
        helpers.append(wanted)
        share_out(count, work, pool, wanted)

    monkeypatch.setattr(ahead, "share_out", noted)
    with going(RegisteredSlots(PlayedCuda()), ns.store, make=False) as one:
        for seed, expected in ((1, HELPERS), (2, 0)):
            helpers.clear()
            put_content(ns, refs_of(ns, seed, 3))
            wait_for(lambda: helpers, "them to be registered")
            assert set(helpers) == {expected}
            one.step()


def test_without_a_word_to_cuda_it_waits_for_the_first_step(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks would end the capture of a graph."""
    monkeypatch.setattr(PlayedCuda, "begin", lambda cuda: False)
    slots = RegisteredSlots(PlayedCuda())
    with going(slots, ns.store, make=True) as one:
        one.wait()
        time.sleep(0.1)
        assert every(ns.store) == set()
        one.step()
        wait_for(lambda: len(registered(slots, ns.store)) > 100, "slots to be made")


def test_it_ends_where_cuda_refuses(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slots = RegisteredSlots(PlayedCuda())
    monkeypatch.setattr(PlayedCuda, "register", lambda cuda, memory: False)
    with going(slots, ns.store, make=True) as one:
        one.wait()
        one._thread.join(WAIT_S)
        assert not one._thread.is_alive()
    assert not slots.possible
    assert "goes by way of the host" in caplog.text
    wait_for(lambda: spaces(ns.store, SIZE).held == 0, "nothing to be held")
