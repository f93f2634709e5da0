"""Promotion: what is read from disk comes to memory, unless it must not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefixstore import Namespace, admin, failpoints
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.promote import promote
from prefixstore.settling import announce
from tests.store_helpers import (
    LAYOUT,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def ns(place: Place) -> Iterator[Namespace]:
    with place.open() as store:
        yield namespace_in(store)


def test_a_read_from_disk_brings_the_chunk_to_memory(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 4)
    put_content(ns, refs, tag="kept", ttl_s=1000)
    admin.empty_memory(ns.store)
    assert read_content(ns, refs) == [DISK] * 4
    wait_for(lambda: ns.match(refs).tiers == (MEMORY,) * 4, "the promotion")
    assert read_content(ns, refs) == [MEMORY] * 4
    for chunk in admin.list_chunks(ns.store):
        assert (chunk.row.tag, chunk.tiers) == (b"kept", (MEMORY, DISK))
        assert chunk.row.expires_s
    report = admin.verify(ns.store)
    assert report.sound, report


def test_nothing_to_promote(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 2)
    put_content(ns, refs[:1])
    assert ns.store.flush()
    assert not ns.store.on_keeper(lambda: promote(ns.store, refs[0].key))  # is there
    assert not ns.store.on_keeper(lambda: promote(ns.store, refs[1].key))  # is nowhere


def test_a_deleted_chunk_is_not_brought_back(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted between the copy and its commit, as another process may."""
    refs = refs_of(ns, 1, 1)
    put_content(ns, refs)
    admin.empty_memory(ns.store)
    file = ns.store.file_of(DISK, ns.layout.slot_bytes)
    read = file.read

    def read_then_delete(*arguments: object) -> None:
        read(*arguments)  # type: ignore[arg-type]
        ns.store.remove_now([refs[0].key])

    monkeypatch.setattr(file, "read", read_then_delete)
    assert not ns.store.on_keeper(lambda: promote(ns.store, refs[0].key))
    monkeypatch.undo()
    assert read_content(ns, refs) == [MISS]
    assert admin.stats(ns.store)["pending"] == 0
    assert admin.verify(ns.store).sound


@pytest.mark.parametrize("whole", [True, False], ids=["one sum", "sums of pieces"])
@pytest.mark.parametrize("at", [100, LAYOUT.payload_bytes - 9, LAYOUT.payload_bytes + 3])
def test_a_chunk_damaged_on_disk_is_not_promoted(ns: Namespace, at: int, whole: bool) -> None:
    refs = refs_of(ns, 1, 1)
    put_content(ns, refs)
    admin.empty_memory(ns.store)
    row = ns.store.disk.durable_row(refs[0].key)
    assert row is not None
    if not whole:  # as one that a GPU has hashed
        row = row.without_payload_sum()
        ns.store.index.write(lambda txn: txn.put("chunk", refs[0].key, row.pack()))
    ns.store.file_of(DISK, row.slot_bytes).write(row.slot, memoryview(b"garbage"), at)
    assert not ns.store.on_keeper(lambda: promote(ns.store, refs[0].key))
    assert ns.match(refs).tiers == (DISK,)
    assert admin.stats(ns.store)["pending"] == 0


@pytest.mark.parametrize("step", ["evict.claimed", "evict.deleted", "drop.begun"])
def test_a_chunk_that_is_being_removed_is_not_brought_back(ns: Namespace, step: str) -> None:
    """Promoted by another process between two steps of its removal: that left it in memory, after
    the removal had been acknowledged."""
    [ref] = refs_of(ns, 1, 1)
    put_content(ns, [ref])
    admin.empty_memory(ns.store)
    reached: list[object] = []

    def promote_now(name: str) -> None:
        if name == step and not reached:
            reached.append(name)
            promote(ns.store, ref.key)

    failpoints.set_action(promote_now)
    try:
        ns.delete([ref])
    finally:
        failpoints.set_action(None)
    assert reached == [step]
    assert read_content(ns, [ref]) == [MISS]
    assert admin.verify(ns.store).sound


def test_what_is_being_deleted_is_not_promoted(ns: Namespace) -> None:
    """Who deletes a chunk that has no entry yet has announced it, and will delete its row."""
    store, refs = ns.store, refs_of(ns, 1, 1)
    put_content(ns, refs)
    assert store.flush()
    store.live.write(lambda txn: store.ledger.drop_memory(txn, refs[0].key))
    store.live.write(lambda txn: announce(store.ledger, txn, [refs[0].key]))
    assert not store.on_keeper(lambda: promote(store, refs[0].key))
    with store.live.read() as txn:
        assert txn.count("pending") == 0
