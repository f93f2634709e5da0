"""The journal: what it says of changes, and that it forgets the oldest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixstore import Store, admin, journal
from prefixstore.glance import Watcher
from prefixstore.index import Environment, Txn
from prefixstore.ledger import DISK, MEMORY, TABLES
from prefixstore.testing_data import content_of, tokens_of
from tests.store_helpers import LAYOUT, Place, namespace_in, wait_for

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Environment]:
    found = Environment(tmp_path / "live", TABLES, durable=False)
    yield found
    found.close()


def note(txn: Txn, number: int) -> None:
    journal.note(txn, number % 2 == 0, MEMORY, number.to_bytes(16, "big"), bytes(16), 4096, number)


def test_it_keeps_the_last_changes_and_counts_the_lost(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "CHANGES_MIN", 10)  # of a tier without a cap
    for number in range(1, 26):
        env.write(lambda txn, number=number: note(txn, number))  # type: ignore[misc]
    with env.read() as txn:
        assert txn.count("change") == 10
        assert journal.newest(txn) == 25
        found, last, lost = journal.since(txn, 20)
        assert ([one.depth for one in found], last, lost) == ([21, 22, 23, 24, 25], 25, 0)
        assert [one.entered for one in found] == [False, True, False, True, False]
        found, last, lost = journal.since(txn, 3)
        assert (len(found), last, lost) == (10, 25, 12)
        assert journal.since(txn, 25) == ([], 25, 0)


def test_a_transaction_that_fails_leaves_no_change(env: Environment) -> None:
    def fail(txn: Txn) -> None:
        note(txn, 1)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        env.write(fail)
    with env.read() as txn:
        assert journal.since(txn, 0) == ([], 0, 0)


def test_the_way_of_a_chunk_through_the_tiers(place: Place, no_late_readers: None) -> None:
    with place.open("4MiB", "16MiB") as store:
        watcher, ns = Watcher(store), namespace_in(store)
        refs = ns.chain(tokens_of(1, 2, LAYOUT)).refs()
        ns.put(refs, [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs])
        assert store.flush(10)
        assert kinds(watcher) == [("stored", MEMORY)] * 2 + [("written", DISK)] * 2
        admin.empty_memory(store)
        changes, _ = watcher.changes()
        assert [(one.kind, one.tier, one.elsewhere) for one in changes] == [
            ("removed", MEMORY, True)
        ] * 2
        ns.get(refs[:1], [memoryview(bytearray(LAYOUT.payload_bytes))])
        wait_for(lambda: 1 in ns.match(refs).tiers, "the promotion")
        admin.remove(store, admin.Selection(everything=True))
        after = kinds(watcher)
        assert after[0] == ("promoted", MEMORY)
        assert sorted(after[1:]) == [("removed", MEMORY), ("removed", DISK), ("removed", DISK)]


def kinds(watcher: Watcher) -> list[tuple[str, int]]:
    changes, lost = watcher.changes()
    assert lost == 0
    return [(one.kind, one.tier) for one in changes]


def test_a_glance_agrees_with_the_statistics(place: Place) -> None:
    with place.open("4MiB", "16MiB") as store:
        ns = namespace_in(store)
        refs = ns.chain(tokens_of(1, 5, LAYOUT)).refs()
        ns.put(refs, [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs], pin=True)
        assert store.flush(10)
        glance, told = Watcher(store).glance(), admin.stats(store)
        [space] = glance.spaces
        assert space.to_json()["chunks"] == {"memory": 5, "disk": 5}
        for name, tier in told["tiers"].items():
            mine = glance.tiers[name]
            assert mine["used_bytes"] == tier["allocated_bytes"] - tier["free_bytes"]
            for field in ("cap_bytes", "pinned_bytes", "allocated_bytes", "index_bytes"):
                assert mine[field] == tier[field]
            assert mine["unwritten_chunks"] == tier["dirty_chunks"]
        assert glance.counters == told["counters"]


def test_it_takes_no_more_than_is_said(tmp_path: Path, store_of_nothing: Store) -> None:
    before = store_of_nothing.live.file_bytes()

    def fill(txn: Txn) -> None:
        for number in range(journal.CHANGES_MAX):
            note(txn, number)

    for _ in range(3):
        store_of_nothing.live.write(fill)
    assert store_of_nothing.live.file_bytes() - before < 3 << 20  # twice, for copy on write


@pytest.fixture
def store_of_nothing(place: Place) -> Iterator[Store]:
    with place.open("8MiB", 0) as store:
        yield store
