"""The disk tier: the order of its writes, seen by failing each step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from prefixstore import Namespace, admin
from prefixstore.errors import StoreTimeoutError
from prefixstore.index import Txn
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
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
