"""Rows and ledger agree again, whoever was killed while they differed, or changed both at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefixstore import Namespace, PutState, Store, admin, failpoints
from prefixstore.keys import ChunkRef
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.promote import promote
from prefixstore.rows import Row
from tests.store_helpers import (
    ROOT,
    WAIT_S,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
)

pytest_plugins = ["tests.store_fixtures"]
COUNT = 3
DIES = """
import os, sys
from prefixstore import Store, failpoints
from tests.store_helpers import namespace_in, refs_of
with Store.open(sys.argv[1], create=False) as store:
    ns = namespace_in(store)
    failpoints.set_action(lambda name: name == sys.argv[2] and os._exit(9))
    ns.set_ttl(refs_of(ns, 1, 3), float(sys.argv[3]))
"""


class Killed(BaseException):
    """In place of a signal."""


@pytest.fixture
def ns(place: Place) -> Iterator[Namespace]:
    with place.open() as store:
        yield namespace_in(store)


def filled(ns: Namespace, **options: object) -> list[ChunkRef]:
    refs = refs_of(ns, 1, COUNT)
    assert put_content(ns, refs, **options) == [PutState.STORED] * COUNT
    assert ns.store.flush(WAIT_S)
    return refs


def times_of(store: Store, key: bytes) -> set[int]:
    """When a chunk expires, by every record that says so."""
    with store.live.read() as live, store.index.read() as index:
        rows = [data for txn in (live, index) if (data := txn.get("chunk", key)) is not None]
        entries = {tier: store.ledger.entry(live, tier, key) for tier in (MEMORY, DISK)}
        listed = {(int.from_bytes(name[:4], "big"), name[4]) for name, _ in live.scan("expiry")
                  if name[5:] == key}  # fmt: skip
    said = {(entry.expires_s, tier) for tier, entry in entries.items() if entry is not None}
    assert len(rows) == len(said)
    assert listed == {(time_s, tier) for time_s, tier in said if time_s}
    return {Row.unpack(data).expires_s for data in rows} | {time_s for time_s, _ in said}


@pytest.mark.parametrize("step", ["ttl.announced", "ttl.rows", "ttl.settling"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_kill_in_the_middle_of_a_change_of_time(place: Place, step: str, in_memory: bool) -> None:
    """The keeper that comes next makes it one time: the old or the new."""
    with place.open() as store:
        ns = namespace_in(store)
        refs = filled(ns, ttl_s=1000)
        [before] = times_of(store, refs[0].key)
        if not in_memory:
            admin.empty_memory(store)
        command = [sys.executable, "-c", DIES, str(store.folder), step, "5000"]
        assert subprocess.run(command, cwd=ROOT, timeout=WAIT_S).returncode == 9
        store.on_keeper(store.reap)
        for ref in refs:
            [after] = times_of(store, ref.key)
            assert after == before if step == "ttl.announced" else after > before + 3000
        assert admin.verify(store).sound
        with store.live.read() as txn:
            assert txn.count("unsettled") == 0
        assert set(read_content(ns, refs)) == {MEMORY if in_memory else DISK}
        if not in_memory:  # nor is a chunk kept from memory for it
            assert promote(store, refs[0].key)


def test_a_time_that_is_changed_while_the_chunk_is_written_to_disk(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, whose keeper does not wait for ours: the copy said the old time."""
    store, real = ns.store, ns.store.index.write
    calls: list[str] = []

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        calls.append("rows of the spill")
        if len(calls) == 1:
            monkeypatch.setattr(store, "on_keeper", lambda job: job())
            assert ns.set_ttl(refs, 5000) == COUNT
        return real(operation, deadline_s)

    refs = refs_of(ns, 1, COUNT)
    monkeypatch.setattr(store.index, "write", write)
    put_content(ns, refs, ttl_s=1000)
    assert store.flush(WAIT_S)
    monkeypatch.undo()
    for ref in refs:
        [after] = times_of(store, ref.key)
        assert after > time.time() + 4000
    assert admin.verify(store).sound


@pytest.mark.parametrize("other_s", [1000.0, None])
def test_two_that_change_a_time_at_once(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, other_s: float | None
) -> None:
    """Two processes: each changed the rows, then the ledger; the orders were not the same."""
    store, refs = ns.store, filled(ns)
    monkeypatch.setattr(store, "on_keeper", lambda job: job())

    def other(name: str) -> None:
        if name == "ttl.rows":
            failpoints.set_action(None)
            ns.set_ttl(refs, other_s)

    failpoints.set_action(other)
    try:
        ns.set_ttl(refs, 5000)
    finally:
        failpoints.set_action(None)
    assert all(len(times_of(store, ref.key)) == 1 for ref in refs)
    assert admin.verify(store).sound


def test_a_chunk_stored_again_while_it_is_written_to_disk(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first copy's row was entered for the second: it never expired."""
    store, real, [ref] = ns.store, ns.store.index.write, refs_of(ns, 1, 1)
    calls: list[str] = []

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        calls.append("rows of the spill")
        if len(calls) == 1:
            store.live.write(lambda txn: store.ledger.drop_memory(txn, ref.key))
            put_content(ns, refs_of(ns, 2, 1))  # takes the slot
            assert put_content(ns, [ref], ttl_s=1000) == [PutState.STORED]
        return real(operation, deadline_s)

    monkeypatch.setattr(store.index, "write", write)
    put_content(ns, [ref])
    assert store.flush(WAIT_S)
    monkeypatch.undo()
    assert 0 not in times_of(store, ref.key)
    assert admin.verify(store).sound


def test_a_kill_in_the_middle_of_a_delete_that_met_a_copy_to_disk(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry that the copy made is left without a row: the keeper reclaims its slot."""
    store, real, [ref] = ns.store, ns.store.index.write, refs_of(ns, 1, 1)
    looked, settled, calls = threading.Event(), threading.Event(), iter(("spill", "deletion"))

    def die(name: str) -> None:
        if name == "drop.deleted":
            raise Killed

    def delete() -> None:
        with pytest.raises(Killed):
            store.remove_now([ref.key])
        settled.set()

    deleter = threading.Thread(target=delete)

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        call = next(calls, "")
        if call == "deletion":
            looked.set()
            assert flushed.wait(WAIT_S)
        result = real(operation, deadline_s)
        if call == "spill":
            deleter.start()
            assert looked.wait(WAIT_S)
        return result

    flushed = threading.Event()
    monkeypatch.setattr(store.index, "write", write)
    failpoints.set_action(die)
    try:
        put_content(ns, [ref])
        assert store.flush(WAIT_S)
        flushed.set()
        assert settled.wait(WAIT_S)
    finally:
        failpoints.set_action(None)
    monkeypatch.undo()
    store.on_keeper(store.reap)
    with store.live.read() as txn:
        assert store.ledger.entry(txn, DISK, ref.key) is None
        assert txn.count("unsettled") == 0
    assert admin.verify(store).sound
    assert read_content(ns, [ref]) == [MISS]
    assert put_content(ns, [ref]) == [PutState.STORED]


def test_what_was_prolonged_is_not_dropped_at_its_old_time(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the keeper's look at what has expired and the drop."""
    store, refs = ns.store, filled(ns, ttl_s=1000)
    later, real = time.time() + 2000, store.live.write

    def write(operation: Callable[..., Any], deadline_s: float = 10.0) -> Any:
        monkeypatch.setattr(store.live, "write", real)
        monkeypatch.setattr(store, "on_keeper", lambda job: job())
        assert ns.set_ttl(refs, 50_000) == COUNT
        return real(operation, deadline_s)

    def expire() -> None:
        with monkeypatch.context() as patched:
            patched.setattr("prefixstore.keeper.time.time", lambda: later)
            patched.setattr(store.live, "write", write)
            store.keeper._expire()

    store.on_keeper(expire)
    monkeypatch.undo()
    assert ns.match(refs).num_chunks == COUNT
    assert admin.verify(store).sound
