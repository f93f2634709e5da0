"""The disk tier: the order of its writes, seen by failing each step of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from prefixstore import Namespace, admin
from prefixstore.config import PENDING_S
from prefixstore.errors import StoreTimeoutError
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.putting import Labels, PutState
from tests.store_helpers import Place, namespace_in, put_content, read_content, refs_of, wait_for

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def ns(place: Place) -> Iterator[Namespace]:
    with place.open() as store:
        yield namespace_in(store)


def sound(ns: Namespace) -> None:
    ns.store.on_keeper(ns.store.reap)
    report = admin.verify(ns.store)
    assert report.sound, report
    with ns.store.live.read() as txn:
        assert txn.count("claim") == txn.count("leased") == 0


@pytest.mark.parametrize("step", ["allocate", "write", "sync"])
def test_a_failed_write_keeps_the_chunk_in_memory(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """No row speaks of bytes that did not get to the device."""
    refs = refs_of(ns, 1, 3)
    file = ns.store.file_of(DISK, ns.layout.slot_bytes)

    def fail(*_: object) -> None:
        raise OSError(5, "planted: input/output error")

    monkeypatch.setattr(file, step, fail)
    put_content(ns, refs)
    ns.store.flush(5)
    assert all(ns.store.disk.durable_row(ref.key) is None for ref in refs)
    assert read_content(ns, refs) == [MEMORY] * 3
    monkeypatch.undo()
    sound(ns)


@pytest.mark.parametrize("call", range(2))
def test_an_eviction_that_stops_half_way_is_finished(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """As when the process died: between leaving the order and the row, or the row and the slot."""
    refs = refs_of(ns, 1, 4)
    put_content(ns, refs)
    admin.empty_memory(ns.store)
    env = [ns.store.index, ns.store.live][call]
    write, seen = env.write, [0]

    def stop(operation: Callable[[Txn], object], deadline_s: float = 1.0) -> object:
        seen[0] += 1
        if seen[0] == 1 + call:  # the live index is written first, then the durable one, then live
            raise StoreTimeoutError("planted")
        return write(operation, deadline_s)

    def drop() -> None:
        monkeypatch.setattr(env, "write", stop)
        try:
            ns.store.disk.drop([ref.key for ref in refs[:2]])
        finally:
            monkeypatch.undo()

    with pytest.raises(StoreTimeoutError, match="planted"):
        ns.store.on_keeper(drop)
    ns.store.on_keeper(ns.store.reap)
    sound(ns)
    tiers = read_content(ns, refs)
    assert tiers[2:] == [DISK, DISK]
    if call == 1:
        assert tiers[:2] == [MISS, MISS]


def test_a_chunk_deleted_while_it_is_spilled_stays_deleted(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process deletes between the durable row and its entry into the order.

    What it deletes is the memory tier's chunk: of the disk's it cannot know yet.
    """
    refs = refs_of(ns, 1, 1)
    store = ns.store
    write, done = store.index.write, [False]

    def write_then_delete(operation: Callable[[Txn], object], deadline_s: float = 1.0) -> object:
        result = write(operation, deadline_s)
        if not done[0]:
            done[0] = True
            store.remove_now([refs[0].key])
        return result

    monkeypatch.setattr(store.index, "write", write_then_delete)
    put_content(ns, refs)
    wait_for(lambda: done[0], "the spill")
    store.flush(5)
    monkeypatch.undo()
    store.on_keeper(store.reap)
    assert read_content(ns, refs) == [MISS]
    sound(ns)


def test_a_deletion_leaves_what_was_stored_behind_it(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken the chunk out of memory; its row, if any, it deletes in a second transaction."""
    store, refs = ns.store, refs_of(ns, 1, 1)
    monkeypatch.setattr(store.keeper, "_spill_some", lambda: None)
    put_content(ns, refs)
    write = store.index.write

    def late(operation: Callable[[Txn], object], deadline_s: float = 10.0) -> object:
        if operation.__name__ == "delete_unknown":
            monkeypatch.undo()
            put_content(ns, refs)
            assert store.flush()
        return write(operation, deadline_s)

    monkeypatch.setattr(store.index, "write", late)
    store.disk.drop([refs[0].key], memory=True)
    assert ns.match(refs).num_chunks == 1
    assert store.flush()
    assert store.disk.durable_row(refs[0].key) is not None
    sound(ns)


def test_a_claim_that_could_not_be_given_up_ends_with_its_time(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, refs = ns.store, refs_of(ns, 1, 1)

    def broken(*_: object) -> list[None]:
        monkeypatch.setattr(store.live, "submit", refused)
        raise RuntimeError("no device")

    def refused(*_: object) -> None:
        raise StoreTimeoutError("1024 writes already wait", "wait")

    with pytest.raises(RuntimeError, match="no device"):
        ns.put_by(refs, broken, ns.layout.whole, Labels())
    monkeypatch.undo()
    assert store.on_keeper(store.reap) == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + PENDING_S + 1)
    assert store.on_keeper(store.reap) == 1
    monkeypatch.undo()
    assert put_content(ns, refs) == [PutState.STORED]
    sound(ns)
