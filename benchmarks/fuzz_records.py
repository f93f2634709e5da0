"""Fuzzing targets: what stands in the index and in slots, as a damaged or hostile disk gives it."""

from __future__ import annotations

import atexit
import os
import shutil
import struct
import tempfile
from functools import lru_cache
from pathlib import Path

from benchmarks.fuzz_target import Target
from prefixstore import ledger
from prefixstore.errors import FormatError
from prefixstore.layout import TRAILER_HEAD_BYTES, Layout, Roi, checksum, pack_sums
from prefixstore.ledger import MEMORY, Entry
from prefixstore.reading import pieces_match
from prefixstore.registry import NamespaceRecord
from prefixstore.rows import (
    CLAIM_EVICT,
    Claim,
    Pending,
    Row,
    pack_address,
    readable,
    same_place,
    unpack_address,
)
from prefixstore.segment_index import fingerprints_of, unpack_sources
from prefixstore.segment_text import Prompt, Texts
from prefixstore.testing_data import identity_for

LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=16)
KEY = bytes(range(16))
SCOPE = b"N" * 16 + b"S" * 8
ROIS = (LAYOUT.whole, Roi(0, 1, 0, 2), Roi(1, 2, 1, 2))


@lru_cache(1)
def scratch() -> Path:
    """A folder of this process, in memory if there is one."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="prefixstore-fuzz-", dir=shared))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def a_row(slot: int = 1) -> Row:
    """A row of a chunk of four tokens."""
    preimage = KEY + bytes(range(16))
    digests = (b"N" * 16, b"S" * 8, b"T" * 16, b"P" * 16)
    return Row(2, 3, slot, LAYOUT.slot_bytes, 1, 0, *digests, b"tag", preimage)


# ---------------------------------------------------------------------- rows
def parse_row(data: bytes) -> None:
    """A row, by itself and in all that reads it without decoding it."""
    texts = Texts(lambda _: data, lambda _: (), SCOPE, 4, 1000.0, 64)
    run = Prompt(bytes(range(16)) * 3, texts).run(KEY, 4, 5)
    assert run is None or (0 <= run.start < run.stop <= 12 and data[24:48] == SCOPE)
    same_place(data, a_row().pack())
    row = Row.unpack(data)
    assert readable(data) == row
    assert Row.unpack(row.pack()) == row
    assert same_place(row.pack(), row.with_pin(True).without_payload_sum().pack())


RECORDS = 6


def parse_record(data: bytes) -> None:
    """One of the small records, by its first byte."""
    kind, data = data[0] % RECORDS if data else 0, data[1:]
    if kind == 0:
        claim = Claim.unpack(data)
        assert claim.pack() == data
    elif kind == 1:
        pending = Pending.unpack(data)
        assert len(pending.sums) >= 8 * len(pending.present)
        assert len(pending.pack()) == len(data)
    elif kind == 2:
        assert pack_address(*unpack_address(data)) == data[:9]
    elif kind == 3:
        sources = unpack_sources(data)
        assert len(sources) == len(data) // 24
    elif kind == 4:
        assert len(fingerprints_of(data)) <= len(data) // 8 + 1
    else:
        assert ledger.ENTRY.pack(*Entry(*ledger.ENTRY.unpack(data))) == data


def record_seeds() -> list[bytes]:
    """Good records."""
    pending = Pending(1, 4096, 7, 1e9, b"N" * 16, b"S" * 8, (5, 6), b"\1\0", bytes(16))
    return [
        b"\0" + Claim(5, CLAIM_EVICT, KEY).pack(),
        b"\1" + pending.pack(),
        b"\2" + pack_address(MEMORY, 4096, 1),
        b"\3" + struct.pack(">II16s", 1, 2, KEY) * 2,
        b"\4" + KEY + b"\5\0\0\0" + bytes(16),
        b"\5" + ledger.ENTRY.pack(4096, 1, 2, 0, b"N" * 16, b"S" * 8),
    ]


def parse_namespace(data: bytes) -> None:
    """What is entered of a model."""
    record = NamespaceRecord.unpack(data)
    assert NamespaceRecord.unpack(record.pack()) == record
    assert record.given.namespace


def namespace_seeds() -> list[bytes]:
    """Good ones."""
    identity = identity_for("fuzz", LAYOUT)
    return [NamespaceRecord(identity, LAYOUT, forward).pack() for forward in ("", '{"a":1}')]


# ---------------------------------------------------------------------- slots
def parse_slot(data: bytes) -> None:
    """A slot against a row: never an exception, and good only if every byte is what was summed."""
    which, data = data[0] % len(ROIS) if data else 0, data[1:].ljust(LAYOUT.slot_bytes, b"\0")
    roi = ROIS[which]
    size, table = LAYOUT.roi_bytes(roi), LAYOUT.trailer_bytes
    payload, trailer = data[:size], memoryview(data[size : size + table])
    row = Row(0, 0, 0, 0, 0, 0, b"", b"", good_slot(which)[1], b"", b"", b"")
    if pieces_match(LAYOUT, KEY, row, memoryview(payload), roi, trailer):
        assert payload + bytes(trailer) == good_slot(which)[0]
    # And against a row that was made for the trailer, as a forger would.
    row = Row(0, 0, 0, 0, 0, 0, b"", b"", checksum(trailer), b"", b"", b"")
    if pieces_match(LAYOUT, KEY, row, memoryview(payload), roi, trailer):
        sums = pack_sums(LAYOUT.piece_sums(payload))
        there = [
            bytes(trailer[TRAILER_HEAD_BYTES + 8 * i :][:8]) for i in LAYOUT.piece_indices(roi)
        ]
        assert b"".join(there) == sums
        assert trailer[8:24] == KEY


@lru_cache(len(ROIS))
def good_slot(which: int) -> tuple[bytes, bytes]:
    """Region and trailer of a good slot, and the trailer's sum."""
    whole = bytes(range(256)) * (LAYOUT.payload_bytes // 256)
    trailer = LAYOUT.trailer(KEY, pack_sums(LAYOUT.piece_sums(whole)))
    region = b"".join(
        whole[run.slot_offset : run.slot_offset + run.num_bytes] for run in LAYOUT.runs(ROIS[which])
    )
    return region + trailer, checksum(trailer)


TARGETS = [
    Target("row", parse_row, (ValueError,), lambda: [a_row().pack()]),
    Target("records", parse_record, (struct.error,), record_seeds),
    Target("namespace_record", parse_namespace, (FormatError,), namespace_seeds, "json"),
    Target(
        "slot", parse_slot, (), lambda: [bytes([i]) + good_slot(i)[0] for i in range(len(ROIS))]
    ),
]  # fmt: skip
