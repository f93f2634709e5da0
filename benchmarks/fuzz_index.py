"""Fuzzing targets: an index some of whose values, or whose pages, were changed."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache

from benchmarks.fuzz_records import KEY, LAYOUT, a_row, scratch
from benchmarks.fuzz_target import Target
from prefixstore import index_check, journal, ledger, recovery
from prefixstore.errors import StoreError
from prefixstore.index import Environment, Txn
from prefixstore.leases import lease_slots, release
from prefixstore.ledger import DISK, MEMORY, Entry, Ledger
from prefixstore.rows import CLAIM_EVICT, Claim, Pending, pack_address, readable

NOW_S = 1000.0
_TABLES = tuple(sorted(ledger.TABLES))


@lru_cache(1)
def live() -> tuple[Environment, Ledger]:
    """An index with some of everything in it."""
    env = Environment(scratch() / "live", ledger.TABLES, durable=False)
    books = Ledger(7, lambda tier, size, slot: None, lambda tier: 0)
    env.write(lambda txn: _fill(books, txn))
    return env, books


def _fill(books: Ledger, txn: Txn) -> None:
    size = LAYOUT.slot_bytes
    for tier in (MEMORY, DISK):
        books.set_cap(txn, tier, 16 * size)
        for n in range(6):
            slot = books.claim_slot(txn, tier, size)
            assert slot is not None
            key = bytes([tier, n]) + bytes(14)
            entry = Entry(size, slot, n, 2000 * (n == 2), b"N" * 16, b"S" * 8)
            books.insert(txn, tier, key, entry)
            if tier == MEMORY:
                txn.put("chunk", key, a_row(slot).pack())
        books.set_pinned(txn, tier, bytes([tier, 5]) + bytes(14), True)
        spare = books.claim_slot(txn, tier, size)
        assert spare is not None
        txn.put("claim", pack_address(tier, size, spare), Claim(9, CLAIM_EVICT, KEY).pack())
    pending = Pending(7, size, 0, 900.0, b"N" * 16, b"S" * 8, (), b"", b"")
    txn.put("pending", b"p" * 16, pending.pack())
    lease_slots(books, txn, b"l" * 16, 900.0, [pack_address(MEMORY, size, 0)])
    txn.put("dirty", bytes([MEMORY, 1]) + bytes(14), books.mark)


class _UndoError(StoreError):
    """Raised at the end of a write, so that nothing of it is kept."""


def parse_live(data: bytes) -> None:
    """An index some of whose values were changed: all that walks it, reading and writing.

    ``data``: (table, which of its records, where in it, how many bytes, those bytes) again and
    again. What is changed is committed, as damage is, and put back at the end.
    """
    env, books = live()
    before: list[tuple[str, bytes, bytes]] = []

    def damage(txn: Txn) -> None:
        at = 0
        while at + 4 <= len(data) and len(before) < 8:
            table, which, offset, count = data[at : at + 4]
            count = min(count, len(data) - at - 4)
            name = _TABLES[table % len(_TABLES)]
            there = list(txn.scan(name))
            if there:
                key, value = there[which % len(there)]
                patch = data[at + 4 : at + 4 + count]
                offset %= len(value) + 1
                before.append((name, key, value))
                kept = value[offset + count :] if count else b""  # none: it is cut there
                txn.put(name, key, value[:offset] + patch + kept)
            at += 4 + count

    env.write(damage)
    failed: StoreError | None = None
    try:
        for work in (_look, _mend, _use):
            try:
                if work is _look:
                    with env.read() as txn:
                        _look(books, txn)
                else:
                    env.write(lambda txn, work=work: work(books, txn))  # type: ignore[misc]
            except _UndoError:
                pass
            except StoreError as error:
                failed = error
    finally:

        def mend(txn: Txn) -> None:
            for one in reversed(before):
                txn.put(*one)

        env.write(mend)
    if failed is not None:
        raise failed


def _look(books: Ledger, txn: Txn) -> None:
    changes, last, missed = journal.since(txn, 2)
    assert missed >= 0 or last < len(changes)
    assert all(change.kind for change in changes)
    for tier in (MEMORY, DISK):
        list(books.occupied(txn, tier))
        list(books.entries(txn, tier))
        books.cap(txn, tier)
    list(books.pending_slots(txn))
    for _, record in txn.scan("claim"):
        Claim.unpack(record)


def _mend(books: Ledger, txn: Txn) -> None:
    recovery.reap(books, txn, NOW_S, lambda owner: owner == 9, readable, own_claims=True)
    release(books, txn, b"l" * 16)
    raise _UndoError("done")


def _use(books: Ledger, txn: Txn) -> None:
    for tier in (MEMORY, DISK):
        for key, _ in books.victims(txn, tier, 2 * LAYOUT.slot_bytes):
            books.touch(txn, tier, [key])
            books.set_pinned(txn, tier, key, True)
            books.set_pinned(txn, tier, key, False)
        for _ in range(20):
            slot = books.claim_slot(txn, tier, LAYOUT.slot_bytes)
            if slot is None:
                break
        books.trim(txn, tier)
    for n in range(6):
        books.drop_memory(txn, bytes([MEMORY, n]) + bytes(14))
        books.detach(txn, DISK, bytes([DISK, n]) + bytes(14))
    raise _UndoError("done")


# ---------------------------------------------------------------------- pages of the index
_PAGES_MAX = 12
_SMALL = ("chunk", "meta", "namespace")


@lru_cache(1)
def pages() -> bytes:
    """The file of a small index: a table of two levels, free pages, a value on pages of its own."""
    env = Environment(scratch() / "pages", _SMALL, durable=False)

    def fill(txn: Txn) -> None:
        for n in range(24):
            txn.put("chunk", bytes([n]) * 16, bytes([n]) * 200)
        txn.put("namespace", KEY, b"v" * 5000)

    env.write(fill)
    env.write(lambda txn: [txn.delete("chunk", bytes([n]) * 16) for n in range(6)])
    env.write(lambda txn: txn.put("meta", b"m", bytes(8)))
    data_file = env.folder / "data.mdb"
    env.close()
    return data_file.read_bytes()


def parse_pages(data: bytes) -> None:
    """An index whose pages were changed: refused, or read to its last value without harm.

    ``data``: (page, place in it, how many bytes, those bytes) again and again.
    """
    file = bytearray(pages())
    at = 0
    while at + 4 <= len(data):
        page, low, high, count = data[at : at + 4]
        place = 4096 * (page % _PAGES_MAX) + (low | high << 8) % 4096
        file[place : place + count] = data[at + 4 : at + 4 + count].ljust(count, b"\0")
        at += 4 + count
    folder = scratch() / f"damaged-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / "data.mdb").write_bytes(file[: len(pages())])
    with suppress(FileNotFoundError):
        (folder / "lock.mdb").unlink()
    index_check.check_pages(folder / "data.mdb", 4096)
    env = Environment(folder, _SMALL, durable=False)
    try:
        with env.read() as txn:
            for table in _SMALL:
                for key, value in txn.scan(table):
                    assert txn.get(table, key) == value
    finally:
        env.close()


def parse_pages_opening(data: bytes) -> None:
    """The same; where LMDB itself reads before the walk, it opens what is damaged as well."""
    try:
        parse_pages(data)
    except index_check.Damaged:
        if data[0] % _PAGES_MAX >= 2:  # no meta page
            raise
        Environment(scratch() / f"damaged-{os.getpid()}", _SMALL, durable=False).close()
        raise


TARGETS = [
    Target(
        "live_index", parse_live, (StoreError,),
        lambda: [bytes((table, 0, at, 1, 255)) for table in range(len(_TABLES)) for at in (0, 7)],
    ),
    Target(
        "index_pages", parse_pages_opening, (StoreError, index_check.Damaged),
        lambda: [bytes((n, 16, 0, 2, 255, 0)) for n in range(_PAGES_MAX)] + [b""],
    ),
]  # fmt: skip
