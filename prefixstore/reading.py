"""Reading a slot and checking what was read against its row."""

from __future__ import annotations

from collections.abc import Callable

from prefixstore.layout import TRAILER_HEAD_BYTES, TRAILER_MAGIC, Layout, Roi, checksum
from prefixstore.rows import FLAG_PAYLOAD_SUM, Row
from prefixstore.slots import SlotFile


def read_unchecked(
    file: SlotFile, layout: Layout, key: bytes, row: Row, out: memoryview, roi: Roi
) -> Callable[[], bool]:
    """Read a region of a slot into ``out``; returns the function that verifies what was read.

    It checks the copy, not the slot, so nothing can change between check and use. The whole payload
    is checked by one hash if its row has it, a region by those of its pieces. Raises OSError.
    """
    file.read(row.slot, layout.runs(roi), out)
    if roi == layout.whole and row.flags & FLAG_PAYLOAD_SUM:
        return lambda: checksum(out) == row.payload_sum
    trailer = memoryview(bytearray(layout.trailer_bytes))
    file.read(row.slot, [layout.trailer_run], trailer)
    return lambda: pieces_match(layout, key, row, out, roi, trailer)


def read_checked(
    file: SlotFile, layout: Layout, key: bytes, row: Row, out: memoryview, roi: Roi
) -> bool:
    """Read a region and verify it at once; False also when it cannot be read."""
    try:
        return read_unchecked(file, layout, key, row, out, roi)()
    except OSError:
        return False


def pieces_match(
    layout: Layout, key: bytes, row: Row, out: memoryview, roi: Roi, trailer: memoryview
) -> bool:
    """Whether a region agrees with the checksums in its trailer, and that one with the row."""
    if checksum(trailer) != row.trailer_sum or trailer[:24] != TRAILER_MAGIC + key:
        return False
    table = trailer[TRAILER_HEAD_BYTES:].cast("Q")
    return [table[i] for i in layout.piece_indices(roi)] == layout.piece_sums(out)
