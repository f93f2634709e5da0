"""Chunks read for callers that hash them: the sums are right, and all else is as with a get."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from prefixstore import Namespace, Store, admin
from prefixstore.errors import LayoutError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.ledger import DISK, MEMORY
from prefixstore.lending import get_unchecked, versions
from prefixstore.namespace import MISS
from prefixstore.rows import Row, pack_address
from prefixstore.slots import aligned_buffer
from prefixstore.testing_data import content_of, outputs
from prefixstore.txn import Txn
from tests.store_helpers import LAYOUT, Place, namespace_in, put_content, refs_of

pytest_plugins = ["tests.store_fixtures"]
COUNT = 6
Sums = list["np.ndarray[tuple[int], np.dtype[np.uint64]] | None"]


@pytest.fixture
def store(place: Place, no_late_readers: None) -> Iterator[Store]:
    with place.open() as store:
        yield store


@pytest.fixture
def on_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[Namespace, list[ChunkRef]]:
    """A namespace whose chunks are on disk only, and stay there."""
    ns = namespace_in(store)
    refs = refs_of(ns, 1, COUNT)
    put_content(ns, refs)
    admin.empty_memory(store)
    monkeypatch.setattr(store.keeper, "promote", lambda key: None)
    return ns, refs


def slot_of(ns: Namespace, tier: int, ref: ChunkRef) -> tuple[Row, int]:
    """Its row, and where its slot begins in the file."""
    with (ns.store.live if tier == MEMORY else ns.store.index).read() as txn:
        data = txn.get("chunk", ref.key)
    assert data is not None
    row = Row.unpack(data)
    return row, row.slot * row.slot_bytes


def flip(ns: Namespace, tier: int, ref: ChunkRef, at: int) -> None:
    """Change a bit of a slot."""
    row, start = slot_of(ns, tier, ref)
    with ns.store.file_of(tier, row.slot_bytes).path.open("r+b") as file:
        file.seek(start + at)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


def region_of(ref: ChunkRef, roi: Roi) -> bytes:
    """What the region of a chunk must hold."""
    content = content_of(ref.key, LAYOUT.payload_bytes)
    shape = LAYOUT.num_layers, LAYOUT.num_planes, LAYOUT.num_heads, -1
    pieces = np.frombuffer(content, np.uint8).reshape(shape)
    layers = slice(roi.layer_start, roi.layer_stop)
    return pieces[layers, :, roi.head_start : roi.head_stop].tobytes()


def sums_of(data: bytes | memoryview) -> list[int]:
    size = LAYOUT.piece_bytes
    return [xxhash.xxh3_64_intdigest(data[at : at + size]) for at in range(0, len(data), size)]


@pytest.mark.parametrize("roi", [LAYOUT.whole, Roi(0, 4, 1, 3), Roi(2, 3, 0, 4)])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_bytes_and_their_sums(
    on_disk: tuple[Namespace, list[ChunkRef]],
    roi: Roi,
    aligned: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From either tier, and by no hash of the payload."""
    ns, refs = on_disk
    in_memory = refs_of(ns, 2, 2)
    put_content(ns, in_memory)
    monkeypatch.setattr(type(LAYOUT), "piece_sums", lambda *_: pytest.fail("hashed by the host"))
    monkeypatch.setattr("prefixstore.namespace.read_checked", lambda *_: pytest.fail("checked"))
    asked = [*refs[:2], *in_memory, *refs[2:]]
    size = LAYOUT.roi_bytes(roi)
    outs = [aligned_buffer(size) if aligned else memoryview(bytearray(size)) for _ in asked]
    sums: Sums = [None] * len(asked)
    told: list[int] = []
    tiers = get_unchecked(
        ns, asked, outs, roi, sums, lambda: told.append(sum(one is not None for one in sums))
    )
    assert tiers == [DISK] * 2 + [MEMORY] * 2 + [DISK] * 4
    for ref, out, found in zip(asked, outs, sums, strict=True):
        expected = region_of(ref, roi)
        assert out == expected
        assert found is not None
        assert found.tolist() == sums_of(expected)
    assert told == list(range(1, len(asked) + 1)), "so few bytes need no helpers"


def test_a_hit_is_noted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a get: it counts for what is evicted, and what is on disk comes to memory."""
    ns = namespace_in(store)
    refs = refs_of(ns, 1, COUNT)
    put_content(ns, refs)
    admin.empty_memory(store)
    touched: list[tuple[int, bytes]] = []
    promoted: list[bytes] = []
    monkeypatch.setattr(store.keeper, "touched", lambda tier, key: touched.append((tier, key)))
    monkeypatch.setattr(store.keeper, "promote", promoted.append)
    absent = refs_of(ns, 3, 1)
    sums: Sums = [None] * 3
    outs = outputs(LAYOUT, 3)
    asked = [refs[0], *absent, refs[1]]
    assert get_unchecked(ns, asked, outs, LAYOUT.whole, sums) == [DISK, MISS, DISK]
    assert sums[1] is None
    assert touched == [(DISK, refs[0].key), (DISK, refs[1].key)]
    assert promoted == [refs[0].key, refs[1].key]


def test_a_changed_payload_is_the_callers_to_find(
    on_disk: tuple[Namespace, list[ChunkRef]],
) -> None:
    ns, refs = on_disk
    flip(ns, DISK, refs[1], 300)
    sums: Sums = [None] * COUNT
    outs = outputs(LAYOUT, COUNT)
    assert get_unchecked(ns, refs, outs, LAYOUT.whole, sums) == [DISK] * COUNT
    right = []
    for out, found in zip(outs, sums, strict=True):
        assert found is not None
        right.append(found.tolist() == sums_of(out))
    assert right == [True, False, *[True] * (COUNT - 2)]
    assert admin.stats(ns.store)["counters"].get("corrupt_disk", 0) == 0


def test_a_changed_trailer_is_found_and_healed(store: Store) -> None:
    """In memory the chunk is had from disk then; in both it is a miss and can be stored again."""
    ns = namespace_in(store)
    refs = refs_of(ns, 1, 2)
    put_content(ns, refs)
    assert store.flush()
    for ref in refs:
        flip(ns, MEMORY, ref, LAYOUT.payload_bytes + 40)
    flip(ns, DISK, refs[1], LAYOUT.payload_bytes + 40)
    sums: Sums = [None] * 2
    outs = outputs(LAYOUT, 2)
    assert get_unchecked(ns, refs, outs, LAYOUT.whole, sums) == [DISK, MISS]
    assert outs[0] == region_of(refs[0], LAYOUT.whole)
    assert (sums[0] is None, sums[1] is None) == (False, True)
    end = time.monotonic() + 15
    while admin.stats(store)["counters"].get("corrupt_disk", 0) < 1:
        assert time.monotonic() < end, "it is not dropped"
        time.sleep(0.01)
    assert ns.match_each(refs[1:]) == [MISS]


def test_what_expired_stays_as_it_is(
    on_disk: tuple[Namespace, list[ChunkRef]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ns, refs = on_disk
    ns.set_ttl(refs[:1], 1000.0)
    later = SimpleNamespace(time=lambda: time.time() + 2000.0)
    with monkeypatch.context() as patched:
        patched.setattr("prefixstore.getting.time", later)
        sums: Sums = [None] * 2
        outs = outputs(LAYOUT, 2)
        assert get_unchecked(ns, refs[:2], outs, LAYOUT.whole, sums) == [MISS, DISK]
    assert sums[0] is None
    assert ns.match_each(refs[:2]) == [DISK, DISK]


def test_bad_buffers_are_refused(on_disk: tuple[Namespace, list[ChunkRef]]) -> None:
    ns, refs = on_disk
    with pytest.raises(LayoutError, match="1 buffers for 2 chunks"):
        get_unchecked(ns, refs[:2], outputs(LAYOUT, 1), LAYOUT.whole, [None] * 2)
    with pytest.raises(LayoutError, match="outside"):
        get_unchecked(ns, refs[:1], outputs(LAYOUT, 1), Roi(0, 4, 3, 5), [None])


def test_versions_are_those_of_the_slots_asked_for_in_their_order(store: Store) -> None:
    size = LAYOUT.slot_bytes
    counts = {3: 7, 0: 2, 300: 5}

    def given_back(txn: Txn) -> None:
        for slot, count in counts.items():
            txn.put_int("punched", pack_address(MEMORY, size, slot), count)

    store.live.write(given_back)
    assert versions(store, size, [300, 3, 1, 0, 3]) == [5, 7, 0, 2, 7]
