"""The keeper: flush means durable, housekeeping happens whatever the load, nothing is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from prefixstore import PutState, admin, config
from prefixstore.ledger import DISK
from prefixstore.namespace import MISS
from tests.store_helpers import Place, namespace_in, put_content, read_content, refs_of, wait_for

pytest_plugins = ["tests.store_fixtures"]


def test_what_a_full_queue_drops_is_spilled_all_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is bounded; a chunk it has no room for must not stay dirty for ever."""
    monkeypatch.setattr(config, "JOBS_MAX", 4)
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 40)
        assert put_content(ns, refs) == [PutState.STORED] * 40
        wait_for(lambda: store.flush(5), "the flush")
        wait_for(lambda: admin.stats(store)["tiers"]["disk"]["chunks"] == 40, "the spill of all")


def test_a_flush_that_says_so_has_written_all(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many, however small the queue: after a flush the memory tier may go."""
    monkeypatch.setattr(config, "JOBS_MAX", 4)
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 40)
        put_content(ns, refs)
        if store.flush(10):
            assert admin.stats(store)["tiers"]["disk"]["chunks"] == 40


def test_a_disk_that_takes_nothing_is_not_called_flushed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks then stay in memory, and are evictable, but nobody is told they are on disk."""
    with place.open() as store:
        ns = namespace_in(store)
        file = store.file_of(DISK, ns.layout.slot_bytes)

        def fail(*_: object) -> None:
            raise OSError(28, "planted: no space left on device")

        monkeypatch.setattr(file, "write", fail)
        monkeypatch.setattr(file, "allocate", fail)
        refs = refs_of(ns, 1, 4)
        assert put_content(ns, refs) == [PutState.STORED] * 4
        flushed = store.flush(5)
        assert MISS not in read_content(ns, refs)
        assert admin.stats(store)["tiers"]["disk"]["chunks"] == 0
        assert not flushed, "flush said that chunks are on disk which are not"
        monkeypatch.undo()
        assert admin.verify(store).sound


def test_housekeeping_is_not_starved_by_jobs(place: Place) -> None:
    """Chunks expire and statistics appear while the queue is never empty."""
    with place.open() as store:
        ns = namespace_in(store)
        ended = threading.Event()

        def busy() -> None:
            if not ended.is_set():
                store.keeper.submit(busy)

        job: Callable[[], None] = busy
        store.keeper.submit(job)
        put_content(ns, refs_of(ns, 1, 3), ttl_s=0.5)
        try:
            wait_for(lambda: admin.stats(store)["counters"].get("chunks_expired"), "the expiry", 8)
        finally:
            ended.set()


def test_a_failing_job_does_not_end_the_keeper(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)

        def fail() -> None:
            raise ValueError("planted")

        with pytest.raises(ValueError, match="planted"):
            store.keeper.submit(fail).result(10)
        put_content(ns, refs_of(ns, 1, 2))
        assert store.flush()
        wait_for(lambda: admin.stats(store)["counters"].get("keeper_errors") == 1, "the count")


def test_closing_spills_what_is_left(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 60)
        put_content(ns, refs)
    with place.open(None, None) as store:
        assert admin.stats(store)["tiers"]["disk"]["chunks"] == 60
        assert admin.stats(store)["tiers"]["memory"]["dirty_chunks"] == 0
