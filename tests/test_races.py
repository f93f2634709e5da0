"""Orders of steps in which two threads or processes once harmed each other.

Each was found by `benchmarks.simulate`; here it is played with the store's real parts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from prefixstore import Namespace, PutState, admin, config, filling, owned
from prefixstore.errors import StoreTimeoutError
from prefixstore.keys import ChunkRef
from prefixstore.leases import LEASE, lease_slots
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.promote import promote
from prefixstore.putting import Putting
from prefixstore.rows import Pending
from tests.store_helpers import WAIT_S, Place, namespace_in, put_content, read_content, refs_of

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def ns(place: Place) -> Iterator[Namespace]:
    with place.open() as store:
        yield namespace_in(store)


def begin(ns: Namespace, putting: Putting, refs: Sequence[ChunkRef]) -> list[tuple[PutState, int]]:
    store, quota = ns.store, ns.store.quotas.of(MEMORY)
    pieces = ns.layout.piece_indices(ns.layout.whole)
    return store.live.write(lambda txn: putting.begin(txn, refs, pieces, quota, time.time()))


def test_a_chunk_is_deleted_while_it_is_written_to_disk(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row came after the deleter's look at the ledger and its entry before the row was deleted:
    an entry without a row was left, so that the chunk could not be stored again."""
    store, [ref] = ns.store, refs_of(ns, 1, 1)
    real, calls = store.index.write, iter(("rows of the spill", "deletion", "the rest"))
    looked, settled = threading.Event(), threading.Event()
    deleter = threading.Thread(target=store.remove_now, args=([ref.key],))

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        call = next(calls, "the rest")
        if call == "deletion":
            looked.set()
            assert settled.wait(WAIT_S)
        result = real(operation, deadline_s)
        if call == "rows of the spill":
            deleter.start()
            assert looked.wait(WAIT_S)
        return result

    monkeypatch.setattr(store.index, "write", write)
    put_content(ns, [ref])
    assert store.flush(WAIT_S)
    settled.set()
    deleter.join(WAIT_S)
    with store.live.read() as txn:
        assert store.ledger.entry(txn, DISK, ref.key) is None
    assert admin.verify(store).sound
    assert put_content(ns, [ref]) == [PutState.STORED]


def test_a_promotion_in_the_middle_of_a_deletion(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process promoted the chunk while its row was about to go: it stayed in memory."""
    store, [ref] = ns.store, refs_of(ns, 1, 1)
    put_content(ns, [ref])
    admin.empty_memory(store)
    real, promoted = store.index.write, []

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        promoted.append(promote(store, ref.key))
        return real(operation, deadline_s)

    monkeypatch.setattr(store.index, "write", write)
    store.remove_now([ref.key])
    monkeypatch.undo()
    assert promoted == [False]
    assert read_content(ns, [ref]) == [MISS]
    assert admin.stats(store)["pending"] == 0
    assert admin.verify(store).sound


def test_a_put_gives_up_only_what_it_claimed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that found no room for a chunk took the claim of another thread with it, which went on
    writing into a slot that was free."""
    with place.open("1MiB", 0) as store:
        ns = namespace_in(store)
        putting = Putting(store.ledger, ns.layout, ns.name, 0, False)
        for seed in range(100, 200):
            filler = refs_of(ns, seed, 1)
            [(state, slot)] = begin(ns, putting, filler)
            if state is PutState.FULL:
                break
            last = filler[0], slot
        store.live.write(lambda txn: putting.abandon(txn, [last]))
        refs = refs_of(ns, 1, 2)  # room for the first only
        real = filling.fill

        def fill(*arguments: Any) -> Any:
            store.live.write(free_one)
            assert begin(ns, putting, refs[1:])[0][0] is PutState.WRITING
            return real(*arguments)

        def free_one(txn: Any) -> None:
            key, record = next(
                (key, record) for key, record in txn.scan("pending") if key != refs[0].key
            )
            pending = Pending.unpack(record)
            store.ledger.end_pending(txn, key, pending)
            store.ledger.free_slot(txn, MEMORY, pending.slot_bytes, pending.slot)

        monkeypatch.setattr(filling, "fill", fill)
        assert put_content(ns, refs, wait=False) == [PutState.STORED, PutState.FULL]
        with store.live.read() as txn:
            assert txn.get("pending", refs[1].key) is not None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pin_while_the_chunk_is_written_to_disk(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """By another process: it was pinned in memory, and its copy on disk could be evicted."""
    store, real, refs = ns.store, ns.store.index.write, refs_of(ns, 1, 3)
    calls: list[str] = []

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        calls.append("rows of the spill")
        if len(calls) > 1:
            return real(operation, deadline_s)
        result = real(operation, deadline_s) if when == "after" else None
        monkeypatch.setattr(store, "on_keeper", lambda job: job())
        assert owned.pin(ns, refs, True) == 3
        return real(operation, deadline_s) if when == "before" else result

    monkeypatch.setattr(store.index, "write", write)
    put_content(ns, refs)
    assert store.flush(WAIT_S)
    monkeypatch.undo()
    for ref in refs:
        row = store.disk.durable_row(ref.key)
        assert row is not None
        assert row.pinned
    assert admin.stats(store)["tiers"]["disk"]["pinned_bytes"] == 3 * ns.layout.slot_bytes
    assert admin.verify(store).sound


# ---------------------------------------------------------------------- what a flush says
def test_two_flushes_at_once_both_tell_of_a_loss(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to be answered took the news away from the other."""
    store = ns.store
    file, real = store.file_of(DISK, ns.layout.slot_bytes), store.drain
    both, answers = threading.Barrier(2), []

    def fail(*_: object) -> None:
        raise OSError(5, "planted: input/output error")

    def drain(deadline_s: float) -> bool:
        both.wait(WAIT_S)  # each has begun
        return real(deadline_s)

    monkeypatch.setattr(file, "write", fail)
    put_content(ns, refs_of(ns, 1, 2))
    monkeypatch.setattr(store, "drain", drain)
    threads = [
        threading.Thread(target=lambda: answers.append(store.flush(WAIT_S))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == [False, False]
    monkeypatch.undo()
    assert store.flush(WAIT_S)


def test_emptying_memory_takes_no_news_from_a_flush(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the disk as a flush does, as does a put into a full tier."""
    file = ns.store.file_of(DISK, ns.layout.slot_bytes)

    def fail(*_: object) -> None:
        raise OSError(5, "planted: input/output error")

    monkeypatch.setattr(file, "write", fail)
    put_content(ns, refs_of(ns, 1, 2))
    admin.empty_memory(ns.store)
    assert not ns.store.flush(WAIT_S)
    assert ns.store.flush(WAIT_S)


def test_what_a_quota_keeps_from_the_disk_is_not_called_flushed(ns: Namespace) -> None:
    ns.store.quotas.set(DISK, 2 * ns.layout.slot_bytes - 1, namespace=ns.name)
    pinned, refs = refs_of(ns, 1, 1), refs_of(ns, 2, 1)
    put_content(ns, pinned, pin=True)
    assert ns.store.flush(WAIT_S)
    put_content(ns, refs)
    flushed = ns.store.flush(WAIT_S)
    assert ns.store.disk.durable_row(refs[0].key) is None
    assert not flushed


def test_an_error_behind_a_refusal_takes_no_news_from_a_flush(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quota took a chunk from the disk, which was too little for the new one; removing its row
    failed, and with it went the news that the new one was refused."""
    store, size = ns.store, ns.layout.slot_bytes
    pinned, older, newer = refs_of(ns, 1, 1), refs_of(ns, 2, 1), refs_of(ns, 3, 1)
    put_content(ns, pinned, pin=True)
    put_content(ns, older)
    assert store.flush(WAIT_S)
    store.quotas.set(DISK, 2 * size - 1, namespace=ns.name)
    failed = threading.Event()
    real = store.index.write

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        if not failed.is_set():
            failed.set()
            raise StoreTimeoutError("planted: the disk is stalled")
        return real(operation, deadline_s)

    monkeypatch.setattr(store.index, "write", write)
    put_content(ns, newer)
    assert failed.wait(WAIT_S)
    flushed = store.flush(WAIT_S)
    assert store.disk.durable_row(newer[0].key) is None
    assert not flushed
    assert store.flush(WAIT_S)
    assert admin.verify(store).sound


def test_a_failed_write_gives_up_no_chunk_of_another_process(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was deleted while it was written, and stored again by another process, whose flush then
    called it flushed: that it had yet to be written was noted no more."""
    store, [ref] = ns.store, refs_of(ns, 1, 1)
    other = (store.ledger.owner + 1).to_bytes(4, "little")
    fails, real = iter((True,)), store.file_of(DISK, ns.layout.slot_bytes).write

    def write(*arguments: Any) -> None:
        if not next(fails, False):
            return real(*arguments)
        store.remove_now([ref.key])
        put_content(ns, [ref])
        store.live.write(lambda txn: txn.put("dirty", ref.key, other))
        raise OSError(5, "planted: input/output error")

    monkeypatch.setattr(store.file_of(DISK, ns.layout.slot_bytes), "write", write)
    monkeypatch.setattr(store.liveness, "is_dead", lambda owner: False)
    put_content(ns, [ref])
    store.flush(WAIT_S)
    with store.live.read() as txn:
        assert txn.get("dirty", ref.key) == other
    monkeypatch.undo()
    assert store.flush(WAIT_S)  # the other is dead: its chunk is taken over
    assert store.disk.durable_row(ref.key) is not None
    assert admin.verify(store).sound


def test_giving_up_is_told_also_when_nobody_saw_it_end(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live index took longer than anybody waits, and then made the write."""
    store, real = ns.store, ns.store.live.write
    failing, ended = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        failing.set()
        raise OSError(5, "planted: input/output error")

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        result = real(operation, deadline_s)
        with store.live.read() as txn:
            clean = txn.count("dirty") == 0
        if failing.is_set() and clean and not ended.is_set():
            ended.set()
            raise StoreTimeoutError("planted: the write has not ended")
        return result

    monkeypatch.setattr(store.live, "write", write)
    monkeypatch.setattr(store.file_of(DISK, ns.layout.slot_bytes), "write", fail)
    put_content(ns, refs_of(ns, 1, 2))
    assert ended.wait(WAIT_S)
    assert not store.flush(WAIT_S)
    assert store.flush(WAIT_S)


# ---------------------------------------------------------------------- the clock
def test_a_clock_that_goes_back_makes_no_lease_longer(ns: Namespace) -> None:
    """Nor a chunk being filled; else a dead rank's slot is lost for as long as the clock went."""
    store, ledger = ns.store, ns.store.ledger
    far = time.time() + 86_400
    store.live.write(lambda txn: lease_slots(ledger, txn, bytes(8), far, []))
    pending = Pending(0, ns.layout.slot_bytes, 7, far, ns.name, bytes(8), (), b"\1", bytes(8))
    store.live.write(lambda txn: ledger.begin_pending(txn, bytes(16), pending))
    store.on_keeper(store.reap)
    with store.live.read() as txn:
        lease, record = txn.get("lease", bytes(8)), txn.get("pending", bytes(16))
    assert lease is not None
    assert record is not None
    soon = time.time() + 1
    assert LEASE.unpack_from(lease)[1] < soon + config.LEASE_S
    assert Pending.unpack(record).deadline_s < soon + config.PENDING_S
    store.live.write(lambda txn: ledger.end_pending(txn, bytes(16), pending))
