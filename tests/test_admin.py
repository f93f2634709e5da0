"""Operators' view: lists, counts, pins, removals agree with what was put."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from prefixstore import Namespace, admin
from prefixstore.accounting import rows_without_slot
from prefixstore.errors import ConfigError
from prefixstore.index import Txn
from prefixstore.keys import salt_digest
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from tests.store_helpers import Place, namespace_in, put_content, read_content, refs_of

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def ns(place: Place) -> Iterator[Namespace]:
    with place.open() as store:
        yield namespace_in(store)


def test_lists_say_what_was_put(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 3, salt=b"alice")
    put_content(ns, refs, tag="system prompt", pin=True, ttl_s=1000)
    assert ns.store.flush()
    listed = {chunk.key: chunk for chunk in admin.list_chunks(ns.store)}
    assert list(listed) == sorted(ref.key for ref in refs)
    for depth, ref in enumerate(refs):
        chunk = listed[ref.key]
        assert chunk.tiers == (MEMORY, DISK)
        found = chunk.to_json()
        assert found["depth"] == depth
        assert (found["tag"], found["pinned"]) == ("system prompt", True)
        assert found["salt"] == salt_digest(b"alice").hex()
        assert 1000 <= found["expires_s"] - found["created_s"] <= 1002
        assert chunk.row.preimage == ref.preimage


def test_selections(ns: Namespace) -> None:
    other = namespace_in(ns.store, "b")
    tagged, plain = refs_of(ns, 1, 2), refs_of(ns, 2, 3)
    put_content(ns, tagged, tag="x")
    put_content(ns, plain)
    put_content(other, refs_of(other, 1, 4))

    def count(**conditions: object) -> int:
        chosen = admin.Selection(**conditions)  # type: ignore[arg-type]
        return len(list(admin.list_chunks(ns.store, chosen)))

    assert count(everything=True) == 9
    assert count(tag=b"x") == 2
    assert count(namespace=ns.identity.namespace) == count(namespace=ns.identity.namespace[:8]) == 5
    assert count(key=plain[0].key) == 1
    assert count(key=plain[0].key, tag=b"x") == 0
    with pytest.raises(ConfigError, match="nothing selected"):
        admin.Selection()


def test_remove_from_every_tier(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 6)
    put_content(ns, refs)
    assert ns.store.flush()
    seen: list[tuple[int, int]] = []
    chosen = admin.Selection(namespace=ns.identity.namespace)
    assert admin.remove(ns.store, chosen, lambda *at: seen.append(at)) == 6
    assert seen == [(6, 6)]
    assert read_content(ns, refs) == [MISS] * 6
    assert list(admin.list_chunks(ns.store)) == []
    report = admin.verify(ns.store)
    assert report.sound, report


def test_pin_and_unpin(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 2)
    put_content(ns, refs)
    assert ns.store.flush()
    chosen = admin.Selection(key=refs[0].key)
    assert admin.pin(ns.store, chosen) == (1, 0)
    admin.empty_memory(ns.store)
    assert ns.match(refs).tiers == (MEMORY, DISK)
    slot_bytes = ns.layout.slot_bytes
    tiers = admin.stats(ns.store)["tiers"]
    assert [tiers[name]["pinned_bytes"] for name in ("memory", "disk")] == [slot_bytes] * 2
    assert admin.pin(ns.store, chosen, False) == (1, 0)
    admin.empty_memory(ns.store)
    assert ns.match(refs).tiers == (DISK, DISK)
    tiers = admin.stats(ns.store)["tiers"]
    assert [tiers[name]["pinned_bytes"] for name in ("memory", "disk")] == [0, 0]


def test_pins_have_a_share_only(ns: Namespace) -> None:
    """Half a tier at most, so that there is always room to serve with."""
    refs = refs_of(ns, 1, 60)
    for ref in refs:
        put_content(ns, [ref])
    assert ns.store.flush()
    done, refused = admin.pin(ns.store, admin.Selection(everything=True))
    assert done + refused == 60
    tiers = admin.stats(ns.store)["tiers"]
    for name in ("memory", "disk"):
        assert 0 < tiers[name]["pinned_bytes"] <= tiers[name]["cap_bytes"] / 2


def test_stats_count(ns: Namespace) -> None:
    refs = refs_of(ns, 1, 5)
    put_content(ns, refs)
    put_content(ns, refs)
    assert ns.store.flush()
    found = admin.stats(ns.store)
    for name in ("memory", "disk"):
        tier = found["tiers"][name]
        assert tier["chunks"] == 5
        assert tier["allocated_bytes"] - tier["free_bytes"] == 5 * ns.layout.slot_bytes
    [space] = found["namespaces"]
    assert space["bytes"] == dict.fromkeys(("memory", "disk"), 5 * ns.layout.slot_bytes)


def test_verify_takes_no_chunk_that_goes_meanwhile_for_a_fault(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads one index after the other: what another process removes in between looked as if it
    had a slot without a row."""
    store = ns.store
    [ref] = refs_of(ns, 1, 1)
    put_content(ns, [ref])
    assert store.flush()
    read_index, here = store.index.read, threading.get_ident()
    left = [ref.key]

    def removed_before() -> AbstractContextManager[Txn]:
        if left and threading.get_ident() == here:  # not when the keeper reads
            store.on_keeper(lambda: store.remove_now([left.pop()]))
        return read_index()

    with monkeypatch.context() as patch:
        patch.setattr(store.index, "read", removed_before)
        assert rows_without_slot(store, DISK) == {}
    assert left == []
    assert admin.verify(store).sound


def test_verify_finds_a_row_that_is_gone(ns: Namespace) -> None:
    """And a row that has none."""
    refs = refs_of(ns, 2, 3)
    put_content(ns, refs)
    assert ns.store.flush()
    ns.store.index.write(lambda txn: txn.delete("chunk", refs[0].key))
    assert list(rows_without_slot(ns.store, DISK)) == [refs[0].key]
