"""Layouts and regions against plain array slicing."""

from __future__ import annotations

import random

import pytest
import xxhash

from prefixstore.errors import LayoutError
from prefixstore.layout import TRAILER_MAGIC, Layout, Roi, checksum
from prefixstore.testing_data import region_of, regions

SIZES = [(1, 1, 1, 1, 1), (3, 2, 4, 2, 5), (2, 1, 3, 4, 1), (4, 2, 1, 8, 16), (5, 3, 2, 1, 7)]


@pytest.mark.parametrize("sizes", SIZES)
def test_runs_cut_what_slicing_cuts(sizes: tuple[int, int, int, int, int]) -> None:
    layout = Layout(*sizes)
    payload = random.Random(1).randbytes(layout.payload_bytes)
    for roi in regions(layout):
        expected = region_of(payload, layout, roi)
        out = bytearray(layout.roi_bytes(roi))
        for run in layout.runs(roi):
            out[run.buffer_offset : run.buffer_offset + run.num_bytes] = payload[
                run.slot_offset : run.slot_offset + run.num_bytes
            ]
        assert out == expected, roi
        pieces = [
            payload[at * layout.piece_bytes : (at + 1) * layout.piece_bytes]
            for at in layout.piece_indices(roi)
        ]
        assert b"".join(pieces) == expected
        assert layout.piece_sums(expected) == [xxhash.xxh3_64_intdigest(piece) for piece in pieces]


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(sizes: tuple[int, int, int, int, int]) -> None:
    layout = Layout(*sizes)
    layers, planes, heads, tokens, head_bytes = sizes
    assert layout.payload_bytes == layers * planes * heads * tokens * head_bytes
    assert layout.trailer_bytes == 32 + 8 * layers * planes * heads
    used = layout.payload_bytes + layout.trailer_bytes
    assert layout.slot_bytes % 4096 == 0
    assert used <= layout.slot_bytes < used + 4096
    assert layout.runs(layout.whole) == [type(layout.slot_run)(0, 0, layout.payload_bytes)]
    assert Layout(**layout.to_json()) == layout


def test_all_heads_are_one_run_and_some_heads_one_a_plane() -> None:
    layout = Layout(4, 2, 8, 16, 64)
    assert len(layout.runs(Roi(1, 3, 0, 8))) == 1
    assert len(layout.runs(Roi(1, 3, 2, 4))) == 2 * 2


def test_the_trailer_says_whose_it_is() -> None:
    layout = Layout(1, 2, 1, 1, 1)
    trailer = layout.trailer(b"k" * 16, b"s" * 16)
    assert trailer == TRAILER_MAGIC + b"k" * 16 + bytes(8) + b"s" * 16
    assert len(trailer) == layout.trailer_bytes


def test_checksum_is_xxh3_128() -> None:
    assert checksum(b"").hex() == "99aa06d3014798d86001c324468d497f"  # XXH3's published vector


@pytest.mark.parametrize("bad", [0, -1, 1.0, "1", None])
@pytest.mark.parametrize("at", range(5))
def test_sizes_that_are_none_are_refused(at: int, bad: object) -> None:
    sizes: list[object] = [2] * 5
    sizes[at] = bad
    with pytest.raises(LayoutError, match="whole number above 0"):
        Layout(*sizes)  # type: ignore[arg-type]


def test_a_chunk_over_the_limit_is_refused() -> None:
    with pytest.raises(LayoutError, match="over the limit"):
        Layout(128, 2, 128, 512, 256)


@pytest.mark.parametrize(
    "roi",
    [Roi(0, 0, 0, 1), Roi(1, 0, 0, 1), Roi(0, 3, 0, 1), Roi(-1, 1, 0, 1), Roi(0, 1, 0, 4),
     Roi(0, 1, 2, 2), Roi(0, 1, -1, 2)],
)  # fmt: skip
def test_regions_outside_are_refused(roi: Roi) -> None:
    layout = Layout(2, 2, 3, 4, 4)
    with pytest.raises(LayoutError, match="outside"):
        layout.check(roi)
