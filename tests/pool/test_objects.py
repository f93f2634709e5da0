"""The objects of a chunk: the golden vector of docs/format.md, how payloads are cut; bad ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import xxhash

from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem
from prefixstore.layout import Layout, Roi
from prefixstore.pool.backend import Put
from prefixstore.pool.objects import Shape, make_trailer, read_head, read_trailer, trailer_size
from prefixstore.putting import Labels

FORMAT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
LAYOUT = Layout(2, 2, 2, 4, 8)
NAMESPACE = bytes(range(16))
PAYLOAD = bytes(range(256))
SHAPE = Shape.of(NAMESPACE, LAYOUT, 4 << 20)


@pytest.fixture
def ref(monkeypatch: pytest.MonkeyPatch) -> ChunkRef:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    items = [MultimodalItem(2, 4, bytes(range(8)))]
    return KeyChain(NAMESPACE, 4, range(1, 9), items=items).refs()[0]


def test_golden_vector(ref: ChunkRef) -> None:
    trailer = make_trailer(SHAPE, ref, NAMESPACE, PAYLOAD, Labels())
    digest = xxhash.xxh3_128_hexdigest(trailer)
    assert f"its trailer has {len(trailer)} bytes and the xxh3_128\n`{digest}`" in FORMAT
    found = read_trailer(memoryview(trailer), SHAPE, NAMESPACE, ref)
    assert found is not None
    for roi in (LAYOUT.whole, Roi(1, 2, 0, 1)):
        out = b"".join(
            PAYLOAD[r.slot_offset : r.slot_offset + r.num_bytes] for r in LAYOUT.runs(roi)
        )
        assert found.vouches_for(memoryview(out), LAYOUT, roi)
        for at in range(len(out)):
            wrong = bytearray(out)
            wrong[at] ^= 1
            assert not found.vouches_for(memoryview(wrong), LAYOUT, roi)


def test_a_trailers_size_is_known_before_it_is_made(ref: ChunkRef) -> None:
    for labels in (Labels(), Labels(expires_s=1_700_000_100, tag=b"a tag", alone=True)):
        made = make_trailer(SHAPE, ref, NAMESPACE, PAYLOAD, labels)
        assert trailer_size(SHAPE, ref, labels) == len(made)
        put = Put("name", [PAYLOAD], lambda made=made: made, len(made))  # type: ignore[misc]
        assert b"".join(put.whole) == PAYLOAD + made
        assert put.num_bytes == len(PAYLOAD + made)


def test_no_other_bytes_are_a_trailer(ref: ChunkRef) -> None:
    """Each bit flipped, each length, another chunk, namespace, layout or way to cut."""
    labels = Labels(expires_s=1_700_000_100, tag=b"a tag", alone=True)
    trailer = make_trailer(SHAPE, ref, NAMESPACE, PAYLOAD, labels)
    assert read_trailer(memoryview(trailer + b"more"), SHAPE, NAMESPACE, ref) is not None
    for at in range(8 * len(trailer)):
        wrong = bytearray(trailer)
        wrong[at // 8] ^= 1 << at % 8
        assert read_trailer(memoryview(wrong), SHAPE, NAMESPACE, ref) is None, at
    for size in range(len(trailer)):
        assert read_trailer(memoryview(trailer[:size]), SHAPE, NAMESPACE, ref) is None
    other = KeyChain(NAMESPACE, 4, range(2, 10)).refs()[0]
    assert read_trailer(memoryview(trailer), SHAPE, NAMESPACE, other) is None
    bare = other._replace(preimage=b"")
    assert read_trailer(memoryview(trailer), SHAPE, NAMESPACE, bare) is None
    assert read_trailer(memoryview(trailer), SHAPE, bytes(16), ref) is None
    large = Layout(99, 2, 9, 4, 8)
    for layout, part_bytes in ((LAYOUT, 128), (large, 4 << 20)):
        shape = Shape.of(NAMESPACE, layout, part_bytes)
        assert read_trailer(memoryview(trailer), shape, NAMESPACE, ref) is None


def test_a_trailer_that_is_out_of_date(ref: ChunkRef, monkeypatch: pytest.MonkeyPatch) -> None:
    trailer = make_trailer(SHAPE, ref, NAMESPACE, PAYLOAD, Labels(expires_s=1_700_000_100))
    assert read_head(memoryview(trailer), SHAPE, NAMESPACE, ref.key) is not None
    monkeypatch.setattr("time.time", lambda: 1_700_000_100.0)
    assert read_head(memoryview(trailer), SHAPE, NAMESPACE, ref.key) is None


@pytest.mark.parametrize("writer", [0, 1, (1 << 32) - 1])
@pytest.mark.parametrize("part_bytes", [1, 7, 64, 100, 255, 256, 257, 1000])
def test_cuts_are_the_payload(part_bytes: int, writer: int) -> None:
    """Any range, read from the objects that a payload was cut into, is that range."""
    key, rng = b"k" * 16, random.Random(part_bytes)
    shape = Shape.of(NAMESPACE, LAYOUT, part_bytes).by(writer)
    objects = {
        shape.part_of(key, i): PAYLOAD[i * part_bytes : (i + 1) * part_bytes]
        for i in range(shape.num_parts)
    }
    objects[shape.object_of(key)] = PAYLOAD[shape.last_start :]
    assert shape.last_bytes == len(objects[shape.object_of(key)])
    assert b"".join(objects.values()) == PAYLOAD
    coded = {shape.coded(256, 9).part_of(key, i) for i in range(shape.num_parts)}
    assert not coded & set(objects)
    assert not set(shape.by(2).names_of(key)[1:-1]) & set(objects)
    assert set(objects) | {shape.staleness_of(key)} | coded == set(shape.names_of(key))
    assert all(objects.values()), "an object of no bytes"
    for _ in range(200):
        start, stop = sorted(rng.sample(range(257), 2))
        out = memoryview(bytearray(stop - start))
        for name, (offset, cut) in shape.cut(key, start, out):
            assert offset + cut.nbytes <= len(objects[name])
            cut[:] = objects[name][offset : offset + cut.nbytes]
        assert out == PAYLOAD[start:stop]
