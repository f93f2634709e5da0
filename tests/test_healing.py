"""Rows that cannot be used: the damaged are dropped, whoever meets them; the others stay."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from prefixstore import Namespace, Store, admin
from prefixstore.errors import DamagedError
from prefixstore.healing import fault, heal
from prefixstore.keys import ChunkRef
from prefixstore.ledger import DISK, ENTRY, MEMORY
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.rows import Row
from prefixstore.slots import SlotFile
from tests.store_helpers import (
    ROOT,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
)

pytest_plugins = ["tests.store_fixtures"]
COUNT = 6
LONG_AGO = 1 << 28  # a bit of `expires` that was flipped
FIELDS: dict[str, dict[str, Any]] = {
    "namespace": {"namespace": b"nobody's, or so."},
    "preimage": {"preimage": b"other tokens"},
    "expires": {"expires_s": LONG_AGO},
    "slot": {"slot": 4},
    "depth": {"depth": 77},
}


@pytest.fixture
def store(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr("prefixstore.admin.PUNCH_AFTER_S", 0.0)
    with place.open() as store:
        yield store


def filled(store: Store, tier: int, **options: object) -> tuple[Namespace, list[ChunkRef]]:
    """A namespace with chunks in that tier."""
    ns = namespace_in(store)
    refs = refs_of(ns, 1, COUNT)
    assert put_content(ns, refs, **options) == [PutState.STORED] * COUNT
    assert store.flush()
    if tier == DISK:
        admin.empty_memory(store)
    return ns, refs


def row_of(store: Store, tier: int, key: bytes) -> bytes | None:
    with (store.live if tier == MEMORY else store.index).read() as txn:
        return txn.get("chunk", key)


def change_row(store: Store, tier: int, key: bytes, **fields: Any) -> None:
    """Other values in a row, as if its bytes had been changed."""
    data = row_of(store, tier, key)
    assert data is not None
    changed = Row.unpack(data)._replace(**fields).pack()
    (store.live if tier == MEMORY else store.index).write(
        lambda txn: txn.put("chunk", key, changed)
    )


def looked_into(store: Store) -> None:
    """The keeper has done what it was told."""
    for _ in range(2):
        store.on_keeper(lambda: None)


@pytest.mark.parametrize("tier", [MEMORY, DISK])
@pytest.mark.parametrize("field", ["namespace", "preimage", "expires"])
@pytest.mark.parametrize("each", [False, True])
def test_match_alone_heals_a_row(store: Store, tier: int, field: str, each: bool) -> None:
    """No read, no `verify`: what an engine does before it stores."""
    ns, refs = filled(store, tier)
    change_row(store, tier, refs[2].key, **FIELDS[field])
    if each:
        assert ns.match_each(refs)[2] == MISS
    else:
        assert ns.match(refs).num_chunks == 2
    looked_into(store)
    assert row_of(store, tier, refs[2].key) is None
    assert set(put_content(ns, refs)) <= {PutState.EXISTS, PutState.STORED}
    assert ns.match(refs).num_chunks == COUNT
    assert read_content(ns, refs).count(MISS) == 0
    assert admin.verify(store).sound


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_chunk_whose_key_was_changed_can_be_stored_again(store: Store, tier: int) -> None:
    """Nothing finds its row, and the ledger says it exists: the first put says so, the next not."""
    ns, refs = filled(store, tier)
    key, env = refs[2].key, store.live if tier == MEMORY else store.index

    def rename(txn: Any) -> None:
        txn.put("chunk", key[:-1] + bytes([key[-1] ^ 1]), txn.get("chunk", key))
        txn.delete("chunk", key)

    env.write(rename)
    if tier == MEMORY:
        store.on_keeper(lambda: store.disk.drop([key]))
    assert ns.match(refs).num_chunks == 2
    assert put_content(ns, refs)[2] is PutState.EXISTS
    looked_into(store)
    assert put_content(ns, refs)[2] is PutState.STORED
    assert store.flush()
    assert ns.match(refs).num_chunks == COUNT
    assert MISS not in read_content(ns, refs)
    assert admin.verify(store, fix=True).accounting == []


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_get_heals_a_row_whose_time_was_changed(store: Store, tier: int) -> None:
    ns, refs = filled(store, tier)
    change_row(store, tier, refs[2].key, expires_s=LONG_AGO)
    read_content(ns, refs)
    looked_into(store)
    assert row_of(store, tier, refs[2].key) is None


@pytest.mark.parametrize("tier", [MEMORY, DISK])
@pytest.mark.parametrize("slot_bytes", [0, 4096, 1 << 31])
def test_a_row_with_another_slot_size_is_a_miss(store: Store, tier: int, slot_bytes: int) -> None:
    """It names another file, which is not there."""
    ns, refs = filled(store, tier)
    change_row(store, tier, refs[2].key, slot_bytes=slot_bytes)
    assert read_content(ns, refs)[2] in (MISS, DISK)
    looked_into(store)
    assert row_of(store, tier, refs[2].key) is None
    put_content(ns, refs)
    assert store.flush()
    assert MISS not in read_content(ns, refs)
    assert admin.verify(store, fix=True).accounting == []
    assert len([*store.folder.glob("*.slots"), *store.live_dir.glob("*.slots")]) == 2


@pytest.mark.parametrize("tier", [MEMORY, DISK])
@pytest.mark.parametrize("field", FIELDS)
def test_verify_compares_rows_with_keys_and_ledger(store: Store, tier: int, field: str) -> None:
    ns, refs = filled(store, tier)
    change_row(store, tier, refs[2].key, **FIELDS[field])
    found = admin.verify(store)
    assert [one["key"] for one in found.damaged] == [refs[2].key.hex()]
    fixed = admin.verify(store, fix=True)
    assert (fixed.fixed > 0, fixed.accounting) == (True, [])
    assert admin.verify(store).sound
    put_content(ns, refs)
    assert read_content(ns, refs).count(MISS) == 0


def test_a_row_that_is_no_row_is_dropped_at_once(store: Store) -> None:
    """From the disk tier, too, although it does not say where its slot is."""
    ns, refs = filled(store, DISK)
    store.index.write(lambda txn: txn.put("chunk", refs[0].key, b"\x07" * 200))
    assert ns.match(refs).num_chunks == 0
    looked_into(store)
    assert row_of(store, DISK, refs[0].key) is None
    assert admin.verify(store).sound


def no_slot_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a slot was read")

    for name in ("read", "view"):
        monkeypatch.setattr(SlotFile, name, fail)


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_anothers_key_drops_nothing_and_reads_nothing(
    store: Store, tier: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ns, refs = filled(store, tier)
    thief = namespace_in(store, "b")
    forged = [ref._replace(preimage=b"x" * len(ref.preimage)) for ref in refs]
    rows = [row_of(store, tier, ref.key) for ref in refs]
    no_slot_is_read(monkeypatch)
    for asker, asked in ((thief, refs), (thief, forged), (ns, forged)):
        for _ in range(50):
            assert asker.match(asked).num_chunks == 0
            assert set(asker.match_each(asked)) == {MISS}
        looked_into(store)
    assert [row_of(store, tier, ref.key) for ref in refs] == rows
    store.keeper.submit(store.keeper._flush_notes).result(10)
    counters = admin.stats(store)["counters"]
    assert counters["key_collisions"] > 0, "of those who came with the same namespace"
    assert not {"corrupt_memory", "corrupt_disk", "keeper_errors"} & counters.keys()


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_what_has_expired_is_not_damaged(
    store: Store, tier: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read either, however often it is asked for."""
    monkeypatch.setattr("prefixstore.keeper.Keeper._expire", lambda _: None)
    ns, refs = filled(store, tier, ttl_s=1000)
    later = time.time() + 2000
    with monkeypatch.context() as patched:
        no_slot_is_read(patched)
        patched.setattr(time, "time", lambda: later)
        for _ in range(20):
            assert ns.match(refs).num_chunks == 0
            looked_into(store)
    assert row_of(store, tier, refs[0].key) is not None
    assert ns.match(refs).num_chunks == COUNT


# ---------------------------------------------------------------------- beside a writer
def test_a_time_that_is_being_changed_is_no_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`set_ttl` of another process has changed the row, and the ledger not yet."""
    _, refs = filled(store, DISK)
    soon = int(time.time()) - 1  # over already, but not for as long as a write may wait
    before = Row.unpack(row_of(store, DISK, refs[2].key) or b"")
    change_row(store, DISK, refs[2].key, expires_s=soon)
    assert fault(store, DISK, refs[2].key, row_of(store, DISK, refs[2].key) or b"") == ""
    monkeypatch.setattr(store.liveness, "others", lambda: True)
    finish = threading.Timer(
        0.5, lambda: change_row(store, DISK, refs[2].key, expires_s=before.expires_s)
    )
    finish.start()
    assert admin.verify(store).sound
    finish.join()


def test_a_time_that_stays_different_is_reported(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, refs = filled(store, DISK)
    monkeypatch.setattr(store.liveness, "others", lambda: True)
    monkeypatch.setattr("prefixstore.config.OP_DEADLINE_S", 0.5)
    change_row(store, DISK, refs[2].key, expires_s=2**31)
    [line] = admin.verify(store).accounting
    assert "its row says expires_s 2147483648, the ledger 0" in line
    assert admin.verify(store, fix=True).sound


SETTER = """
import sys
from prefixstore import Store
from tests.store_helpers import namespace_in, refs_of
with Store.open(sys.argv[1], create=False) as store:
    ns = namespace_in(store)
    refs = refs_of(ns, 1, 6)
    print("begins", flush=True)
    for nth in range(100_000):
        ns.set_ttl(refs, [None, 1000, 2000][nth % 3])
"""


def test_verify_beside_another_process_that_sets_times(store: Store) -> None:
    filled(store, DISK)
    assert not store.liveness.others()
    command = [sys.executable, "-c", SETTER, str(store.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "begins\n"
            assert store.liveness.others()
            for _ in range(20):
                found = admin.verify(store)
                assert (found.damaged, found.accounting) == ([], [])
                assert child.poll() is None
        finally:
            child.kill()


# ---------------------------------------------------------------------- the ledger's own records
def test_a_record_that_cannot_be_read_is_a_clear_error(place: Place) -> None:
    """`verify` without ``--fix`` only reads; the next to open begins the memory tier anew."""
    with place.open() as store:
        ns, refs = filled(store, MEMORY)

        def cut(txn: Any) -> None:
            for name, value in list(txn.scan("order", b"%c" % MEMORY))[:1]:
                txn.put("order", name, value[:-1])

        store.live.write(cut)
        with pytest.raises(DamagedError, match="end what uses the store and start again"):
            admin.verify(store)
    with place.open() as store:
        ns = namespace_in(store)
        assert admin.verify(store).sound
        assert read_content(ns, refs) == [DISK] * COUNT


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_a_ledger_that_gives_a_chunk_anothers_slot(store: Store, tier: int) -> None:
    """Dropping it must not free that slot: who got it next would overwrite the other chunk."""
    ns, refs = filled(store, tier)
    with store.live.read() as txn:
        first, second = (store.ledger.entry(txn, tier, ref.key) for ref in refs[:2])
    assert first is not None
    assert second is not None

    def misplace(txn: Any) -> None:
        heat = txn.get("heat", b"%c" % tier + refs[0].key)
        entry = first._replace(slot=second.slot)
        txn.put("order", b"%c" % tier + heat[:8] + refs[0].key, ENTRY.pack(*entry))

    store.live.write(misplace)
    assert not admin.verify(store).sound
    row = row_of(store, tier, refs[0].key)
    assert row is not None
    assert store.on_keeper(lambda: heal(store, tier, refs[0].key, row))
    other = refs_of(ns, 2, 3 * COUNT)
    put_content(ns, other)
    assert store.flush()
    assert row_of(store, tier, refs[1].key) is not None
    assert fault(store, tier, refs[1].key, row_of(store, tier, refs[1].key) or b"") == ""
    fixed = admin.verify(store, fix=True)
    assert (fixed.damaged, fixed.accounting) == ([], [])
    assert admin.verify(store).sound


@pytest.mark.parametrize("data", [b'{"identity": "', b"\xff", b"{}", b"[]", b'{"identity": 7}'])
def test_a_namespace_that_cannot_be_read_is_refused_with_a_remedy(
    store: Store, data: bytes
) -> None:
    ns, _ = filled(store, MEMORY)
    store.index.write(lambda txn: txn.put("namespace", ns.name, data))
    for use in (store.namespaces, lambda: namespace_in(store), lambda: store.layout_of(ns.name)):
        with pytest.raises(DamagedError, match="remove its folder `index`"):
            use()
