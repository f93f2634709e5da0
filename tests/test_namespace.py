"""What a namespace promises beyond `prefixstore.testing`: errors, quotas, deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from prefixstore import Layout, Namespace, PutState, Roi, admin
from prefixstore.errors import ConfigError, LayoutError, StoreClosedError, StoreTimeoutError
from prefixstore.filling import Claimed, Copied
from prefixstore.keys import salt_digest
from prefixstore.ledger import DISK, MEMORY, Ledger
from prefixstore.namespace import MISS
from prefixstore.putting import Putting, labels_for
from prefixstore.slots import SlotFile
from prefixstore.testing_data import content_of, identity_for, outputs, region_of
from tests.store_helpers import (
    LAYOUT,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
    wait_for,
    writer_lock_held,
)

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def ns(place: Place) -> Iterator[Namespace]:
    with place.open() as store:
        yield namespace_in(store)


def pending_of(ns: Namespace) -> int:
    found = admin.stats(ns.store)["pending"]
    assert isinstance(found, int)
    return found


# ---------------------------------------------------------------------- bad input
def test_one_layout_for_an_identity(place: Place) -> None:
    with place.open() as store:
        namespace_in(store, "a", LAYOUT)
        other = Layout(4, 2, 4, 8, 252)
        with pytest.raises(LayoutError, match="layout"):
            store.namespace(identity_for("a", LAYOUT), other)
        namespace_in(store, "b", other)
        assert {record.layout for record in store.namespaces()} == {LAYOUT, other}


def test_known_namespaces_are_found_by_their_bytes(ns: Namespace) -> None:
    again = ns.store.namespace_of(ns.identity.namespace)
    assert (again.identity, again.layout) == (ns.identity, ns.layout)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_put_wants_a_buffer_for_each_chunk(ns: Namespace, count: int) -> None:
    """A mistake must not leave slots claimed for bytes that never come."""
    refs = refs_of(ns, 1, 2)
    with pytest.raises((LayoutError, ValueError)):
        ns.put(refs, [bytes(ns.layout.payload_bytes)] * count)
    assert pending_of(ns) == 0
    assert put_content(ns, refs) == [PutState.STORED] * 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_get_wants_a_buffer_for_each_chunk(ns: Namespace, count: int) -> None:
    refs = refs_of(ns, 1, 2)
    put_content(ns, refs)
    with pytest.raises((LayoutError, ValueError)):
        ns.get(refs, outputs(ns.layout, count))


def test_get_refuses_a_buffer_it_cannot_write(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 1)
    put_content(ns, refs)
    with pytest.raises((LayoutError, TypeError)):
        ns.get(refs, [memoryview(bytes(ns.layout.payload_bytes))])
    assert read_content(ns, refs) == [MEMORY]


@pytest.mark.parametrize(
    ("options", "error"),
    [({"ttl_s": 0}, "ttl_s"), ({"ttl_s": -1.0}, "ttl_s"), ({"tag": "x" * 65}, "tag")],
)
def test_bad_labels_are_refused(ns: Namespace, options: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        put_content(ns, refs_of(ns, 1, 1), **options)
    assert pending_of(ns) == 0


@pytest.mark.parametrize(
    ("group", "depth"), [(-1, 0), (2**64 - 1, 0), (2**64, 0), (0, -1), (0, 2**32)]
)
def test_numbers_that_no_record_holds_are_refused(ns: Namespace, group: int, depth: int) -> None:
    """Nothing is written, of its neighbours either, and nothing is taken for damage."""
    fine, other = refs_of(ns, 1, 2)
    with pytest.raises(ConfigError, match=r"group=|of depth"):
        put_content(ns, [fine, other._replace(depth=depth)], group=group)
    assert pending_of(ns) == 0
    assert not (ns.store.live_dir / "damaged").exists()
    assert ns.match([fine, other]).num_chunks == 0
    most = [fine, other._replace(depth=2**32 - 1)]
    assert put_content(ns, most, group=2**64 - 2) == [PutState.STORED] * 2
    ns.store.flush()
    assert admin.verify(ns.store).sound


def test_any_buffer_of_the_right_size_will_do(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 3)
    data = [content_of(ref.key, ns.layout.payload_bytes) for ref in refs]
    wide = memoryview(bytearray(data[2])).cast("B", (2, ns.layout.payload_bytes // 2))
    assert ns.put(refs, [data[0], bytearray(data[1]), wide]) == [PutState.STORED] * 3
    assert read_content(ns, refs) == [MEMORY] * 3


@pytest.mark.parametrize("roi", [LAYOUT.whole, Roi(1, 3, 1, 2)], ids=["whole", "part"])
def test_sums_the_caller_has_are_what_is_checked(ns: Namespace, roi: Roi) -> None:
    """As of a GPU, which hashes what it copies from: what does not fit them is a miss."""
    refs = refs_of(ns, 1, 3)
    whole = [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs]
    buffers = [region_of(one, LAYOUT, roi) for one in whole]
    sums = [np.array(LAYOUT.piece_sums(memoryview(one)), np.uint64) for one in buffers]
    sums[1][-1] += np.uint64(1)

    def copy(file: SlotFile, claimed: Sequence[Claimed]) -> list[Copied | None]:
        for one in claimed:
            for run in LAYOUT.runs(roi):
                data = run.in_buffer(memoryview(buffers[one.number]))
                file.write(one.slot, data, run.slot_offset)
        return [None if one.number == 3 else Copied(sums[one.number]) for one in claimed]

    buffers.append(buffers[0])
    more = [*refs, *refs_of(ns, 2, 1)]  # the last finds no room
    told = labels_for()
    states = ns.put_by(more, copy, roi, told, wait=False)
    done = PutState.STORED if roi == LAYOUT.whole else PutState.PARTIAL
    assert states == [done] * 3 + [PutState.FULL]
    if roi != LAYOUT.whole:
        for other in (Roi(0, 1, 0, 4), Roi(3, 4, 0, 4), Roi(1, 3, 0, 1), Roi(1, 3, 2, 4)):
            ns.put(refs, [region_of(one, LAYOUT, other) for one in whole], roi=other)
    outs = outputs(LAYOUT, 3)
    assert [tier != MISS for tier in ns.get(refs, outs)] == [True, False, True]
    assert [bytes(outs[i]) for i in (0, 2)] == [whole[i] for i in (0, 2)]
    assert ns.match(more[3:]).num_chunks == 0
    assert put_content(ns, more[3:]) == [PutState.STORED]  # its claim is gone


# ---------------------------------------------------------------------- regions, without a checksum
def test_parts_survive_the_disk(ns: Namespace) -> None:
    """A chunk of several ranks has no checksum of the whole; it is checked by its pieces."""
    refs = refs_of(ns, 1, 4)
    data = [content_of(ref.key, ns.layout.payload_bytes) for ref in refs]
    for heads in ((0, 2), (2, 3), (3, 4)):
        roi = Roi(0, ns.layout.num_layers, *heads)
        ns.put(refs, [region_of(one, ns.layout, roi) for one in data], roi=roi)
    assert ns.store.flush()
    admin.empty_memory(ns.store)
    roi = Roi(1, 3, 1, 4)
    outs = outputs(ns.layout, 4, roi)
    assert ns.get(refs, outs, roi=roi) == [DISK] * 4
    assert outs == [region_of(one, ns.layout, roi) for one in data]
    assert admin.verify(ns.store).sound


def test_a_part_put_twice_changes_nothing(ns: Namespace) -> None:
    """A rank that repeats its part does not complete the chunk in another's place."""
    refs = refs_of(ns, 1, 1)
    data = content_of(refs[0].key, ns.layout.payload_bytes)
    low, high = Roi(0, 4, 0, 2), Roi(0, 4, 2, 4)
    for _ in range(3):
        assert ns.put(refs, [region_of(data, ns.layout, low)], roi=low) == [PutState.PARTIAL]
    assert ns.match(refs).num_chunks == 0
    assert ns.put(refs, [region_of(data, ns.layout, high)], roi=high) == [PutState.STORED]
    assert read_content(ns, refs) == [MEMORY]


# ---------------------------------------------------------------------- quotas
def used(ns: Namespace, tier: str) -> int:
    [space] = [
        s
        for s in admin.stats(ns.store)["namespaces"]
        if s["namespace"] == ns.identity.namespace_hex
    ]
    return int(space["bytes"].get(tier, 0))


@pytest.mark.parametrize("batch", [1, 32], ids=["singly", "in one batch"])
@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_namespace_keeps_to_its_quota(place: Place, tier: int, batch: int) -> None:
    """In either tier, whether chunks come one by one or all at once; others are not hindered."""
    with place.open() as store:
        ns, free = namespace_in(store, "a"), namespace_in(store, "b")
        limit = 5 * LAYOUT.slot_bytes
        store.quotas.set(tier, limit, namespace=ns.identity.namespace)
        name = {MEMORY: "memory", DISK: "disk"}[tier]
        for at in range(0, 32, batch):
            put_content(ns, refs_of(ns, 1, 32)[at : at + batch])
            store.flush()
            assert used(ns, name) <= limit
        assert used(ns, name) > 0
        assert put_content(free, refs_of(free, 1, 32)) == [PutState.STORED] * 32
        assert store.flush()
        assert used(free, name) == 32 * LAYOUT.slot_bytes
        assert admin.verify(store).sound


def test_a_salt_keeps_to_its_quota(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        limit = 3 * LAYOUT.slot_bytes
        store.quotas.set(MEMORY, limit, salt=salt_digest(b"alice"))
        for ref in refs_of(ns, 1, 12, salt=b"alice"):
            put_content(ns, [ref])
            store.flush()
            assert used(ns, "memory") <= limit
        put_content(ns, refs_of(ns, 1, 12, salt=b"bob"))
        assert used(ns, "memory") > limit
        store.quotas.set(MEMORY, None, salt=salt_digest(b"alice"))
        before = used(ns, "memory")
        put_content(ns, refs_of(ns, 2, 12, salt=b"alice"))
        assert used(ns, "memory") == before + 12 * LAYOUT.slot_bytes


def test_a_quota_is_for_one_thing(place: Place) -> None:
    with place.open() as store:
        for wrong in ({}, {"namespace": b"n" * 16, "salt": b"s" * 8}):
            with pytest.raises(ConfigError, match="exactly one"):
                store.quotas.set(MEMORY, 1, **wrong)


@pytest.mark.parametrize("limit", [-1, 2**64])
def test_a_quota_that_no_record_holds_is_refused(place: Place, limit: int) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        groups = [(tier, most, b"g" * 16, ns.name) for tier, most in ((MEMORY, 1), (DISK, limit))]
        with pytest.raises(ConfigError, match=f"a quota of {limit} bytes"):
            store.quotas.set_groups(groups)
        with pytest.raises(ConfigError, match=f"a quota of {limit} bytes"):
            store.quotas.set(MEMORY, limit, namespace=ns.name)
        assert PutState.STORED in put_content(ns, refs_of(ns, 1, 2))
        assert admin.verify(store).sound


# ---------------------------------------------------------------------- a foreign writer
def test_a_held_writer_lock_stalls_puts_only(ns: Namespace) -> None:
    """Reads go on; a put gives up while the lock is still held, and nothing is left of it."""
    there, new = refs_of(ns, 1, 2), refs_of(ns, 2, 2)
    put_content(ns, there)
    ns.store.flush()
    with writer_lock_held(ns.store.live.folder) as let_go:
        with pytest.raises(StoreTimeoutError):
            put_content(ns, new, deadline_s=0.2)
        assert ns.match(there).num_chunks == 2
        assert read_content(ns, there) == [MEMORY, MEMORY]
        assert ns.match(new).num_chunks == 0
        let_go()
    wait_for(
        lambda: set(put_content(ns, new)) <= {PutState.STORED, PutState.EXISTS},
        "the chunks of the put that timed out to be storable",
        wait_s=10,
    )
    assert read_content(ns, new) == [MEMORY, MEMORY]
    assert pending_of(ns) == 0
    assert admin.verify(ns.store).sound


def test_a_lock_let_go_in_time_is_waited_for(ns: Namespace) -> None:
    with writer_lock_held(ns.store.live.folder) as let_go:
        timer = threading.Timer(0.3, let_go)
        timer.start()
        assert put_content(ns, refs_of(ns, 1, 2), deadline_s=20) == [PutState.STORED] * 2
        timer.join()


def test_a_held_durable_index_does_not_stall_puts(ns: Namespace) -> None:
    """The disk's index is written by the keeper: memory takes and serves chunks meanwhile."""
    refs = refs_of(ns, 1, 4)
    with writer_lock_held(ns.store.index.folder):
        assert put_content(ns, refs, deadline_s=5) == [PutState.STORED] * 4
        assert read_content(ns, refs) == [MEMORY] * 4
        assert not ns.store.flush(0.1)
    wait_for(lambda: ns.store.flush(1), "the spill after the lock was let go")
    admin.empty_memory(ns.store)
    assert read_content(ns, refs) == [DISK] * 4


# ---------------------------------------------------------------------- time to live
def test_a_time_to_live_ends_with_its_chunk(ns: Namespace) -> None:
    """A chunk that was deleted and stored again lives by its own time, not by its predecessor's."""
    [ref] = refs_of(ns, 1, 1)
    [brief] = refs_of(ns, 2, 1)
    put_content(ns, [ref, brief], ttl_s=1)
    admin.remove(ns.store, admin.Selection(key=ref.key))
    assert put_content(ns, [ref]) == [PutState.STORED]
    wait_for(lambda: admin.stats(ns.store)["counters"].get("chunks_expired"), "the expiry")
    assert not list(admin.list_chunks(ns.store, admin.Selection(key=brief.key)))
    assert read_content(ns, [ref]) == [MEMORY]


def test_an_expired_chunk_does_not_bar_its_successor(ns: Namespace) -> None:
    """No one is told EXISTS of what no one is given."""
    refs = refs_of(ns, 1, 1)
    put_content(ns, refs, ttl_s=0.1)
    wait_for(lambda: ns.match(refs).num_chunks == 0, "the end of the time to live")
    assert put_content(ns, refs) == [PutState.STORED]
    assert read_content(ns, refs) == [MEMORY]


# ---------------------------------------------------------------------- closed
def test_a_closed_store_says_so(place: Place) -> None:
    store = place.open()
    ns = namespace_in(store)
    refs = refs_of(ns, 1, 1)
    put_content(ns, refs)
    store.close()
    for call in (
        lambda: ns.match(refs),
        lambda: put_content(ns, refs),
        lambda: read_content(ns, refs),
        lambda: ns.lease(refs, [MEMORY]),
        lambda: store.namespace(ns.identity, ns.layout),
    ):
        with pytest.raises(StoreClosedError, match="closed"):
            call()


# ---------------------------------------------------------------------- two writers of one group
def test_two_processes_that_put_the_same_whole_chunk(place: Place) -> None:
    """With the default group: one stores it, the other is told that it is there or being stored.

    Nobody may write into the slot after the row is committed: it may be another chunk's by then.
    """
    with place.open() as store:
        ns = namespace_in(store)
        putting = Putting(store.ledger, ns.layout, ns.identity.namespace, 0, store.has_disk)
        other = Ledger(store.ledger.owner + 1000, lambda *_: None, lambda tier: 0)
        theirs = Putting(other, ns.layout, ns.identity.namespace, 0, store.has_disk)
        refs, quota = refs_of(ns, 1, 1), store.quotas.of(MEMORY)
        pieces = ns.layout.piece_indices(ns.layout.whole)
        now = time.time()
        [(first, slot)] = store.live.write(lambda txn: putting.begin(txn, refs, pieces, quota, now))
        [(second, _)] = store.live.write(lambda txn: theirs.begin(txn, refs, pieces, quota, now))
        store.live.write(lambda txn: theirs.abandon(txn, [(refs[0], slot)]))
        store.live.write(lambda txn: putting.abandon(txn, [(refs[0], slot)]))
        assert (first, second) == (PutState.WRITING, PutState.BUSY)
