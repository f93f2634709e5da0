"""What the store does when the system fails it: a fork, no descriptors, an index that cannot be
written, a clock that is set back. Each was found by `benchmarks.faults`.

A short run of it is at the end.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import faults
from benchmarks.faults_inside import Load, Outcome
from benchmarks.soak_client import SIZE
from prefixstore import Namespace, Store, admin, config
from prefixstore.errors import StoreClosedError, StoreError
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.serve.listening import OutOfFiles
from tests.store_helpers import (
    LAYOUT,
    Panics,
    Place,
    namespace_in,
    put_content,
    read_content,
    refs_of,
    wait_for,
)

pytest_plugins = ["tests.store_fixtures"]
CHILD_S = 20
DAY_S = 86_400
SEED = int(os.environ.get("PREFIXSTORE_TEST_SEED", "1"))
SECONDS = 1.2


def in_child(ns: Namespace, folder: str) -> int:
    """What a forked child sees of its parent's store; 0 if all is as it should be."""
    refs = refs_of(ns, 1, 2)
    works: list[Callable[[], object]] = [
        lambda: ns.match(refs),
        lambda: read_content(ns, refs),
        lambda: put_content(ns, refs),
        lambda: ns.lease(refs, [MEMORY] * 2),
        lambda: ns.store.live.write(lambda txn: None),
        lambda: Store.open(folder),
    ]
    for number, work in enumerate(works):
        try:
            work()
        except StoreClosedError:
            continue
        return 10 + number
    ns.store.close()
    return 0


def test_a_forked_child_is_told_at_once_and_the_parent_goes_on(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 2)
        put_content(ns, refs)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(CHILD_S)  # a call that waits for a thread that is not there waits 10 s
            status = 1
            with suppress(BaseException):
                status = in_child(ns, str(store.folder))
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert read_content(ns, refs) == [MEMORY] * 2
        assert store.flush()
        assert admin.verify(store).sound


def test_without_descriptors_errors_are_ours_and_reads_go_on(place: Place) -> None:
    with place.open() as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 2)
        put_content(ns, refs)
        assert store.flush()  # then its memory is mapped, which takes a descriptor
        other = namespace_in(store, "other", LAYOUT.__class__(4, 2, 4, 8, 252))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.open("/dev/null", os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, limits[1]))
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            with pytest.raises(StoreError, match="Too many open files"):
                place.open(name="another")
            states = put_content(other, refs_of(other, 1, 2))
            assert read_content(ns, refs) == [MEMORY] * 2
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in taken:
                os.close(descriptor)
        assert states == [PutState.FULL] * 2
        assert put_content(other, refs_of(other, 1, 2)) == [PutState.STORED] * 2
        assert admin.verify(store).sound


def test_an_index_that_lmdb_gives_up_is_opened_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error while it wrote its first page, LMDB refuses everything until it is closed."""
    store = place.open()
    ns = namespace_in(store)
    refs = refs_of(ns, 1, 2)
    put_content(ns, refs)
    assert store.flush()
    monkeypatch.setattr(store.index, "_env", Panics(store.index._env))
    wait_for(lambda: store.gone, "the keeper to notice")
    with pytest.raises(StoreClosedError, match=r"input/output error in its index.*open it again"):
        ns.match(refs)
    with pytest.raises(StoreClosedError, match="close it"):
        place.open()
    store.close()
    with place.open() as again:
        assert again.ledger.owner != store.ledger.owner
        assert again.liveness.is_dead(store.ledger.owner)
        assert MISS not in read_content(namespace_in(again), refs)
        assert admin.verify(again).sound


def test_nothing_is_given_up_because_the_index_is(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written to disk is written once the store was opened again."""
    store = place.open()
    ns = namespace_in(store)
    refs = refs_of(ns, 1, 2)

    def put_unnoticed() -> None:
        monkeypatch.setattr(store.index, "_env", Panics(store.index._env))
        put_content(ns, refs)

    store.on_keeper(put_unnoticed)  # on its thread: it would notice before they are there
    for ref in refs * 5:  # as often as writes that fail are given up
        with suppress(StoreError):
            put_content(ns, [ref])
            assert not store.flush()
    wait_for(lambda: store.gone, "the keeper to notice")
    assert not store.flush()
    store.close()
    with place.open() as again:
        assert again.flush()
        admin.empty_memory(again)
        assert read_content(namespace_in(again), refs) == [DISK] * 2


def test_a_memory_tier_that_was_removed_is_noticed(place: Place) -> None:
    """No other process could open the store as long as this one went on without it."""
    store = place.open()
    ns = namespace_in(store)
    refs = refs_of(ns, 1, 2)
    put_content(ns, refs)
    assert store.flush()
    store.live_dir.rename(store.live_dir.with_name("away"))
    wait_for(lambda: store.gone, "the keeper to notice")
    with pytest.raises(StoreClosedError, match=r"lost its memory tier.*open it again"):
        ns.match(refs)
    store.close()
    with place.open() as again:
        assert read_content(namespace_in(again), refs) == [DISK] * 2
        assert admin.verify(again).sound


def test_nothing_lasts_longer_because_the_clock_was_set_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease, a chunk half written and a freed slot of a day that is not yet."""

    def clock(ahead_s: float) -> SimpleNamespace:
        return SimpleNamespace(
            time=lambda: time.time() + ahead_s, monotonic=time.monotonic, sleep=time.sleep
        )

    later = clock(DAY_S)
    with place.open(disk_bytes=0) as store:
        ns = namespace_in(store)
        refs = refs_of(ns, 1, 3)
        put_content(ns, refs[:2])
        with monkeypatch.context() as patch:
            for module in ("namespace", "ledger", "filling"):
                patch.setattr(f"prefixstore.{module}.time", later)
            ns.lease(refs[:1], [MEMORY])
            half = ns.layout.whole.__class__(0, 2, 0, 4)
            ns.put(refs[2:], [bytes(ns.layout.roi_bytes(half))], roi=half, group=7)
            ns.delete(refs[1:2])
        with store.live.read() as txn:
            assert (txn.count("lease"), txn.count("pending"), txn.count("free")) == (1, 1, 1)
        store.on_keeper(store.reap)  # none lasts longer than one that was made now
        soon = max(config.LEASE_S, config.PENDING_S) + 1
        with monkeypatch.context() as patch:
            patch.setattr("prefixstore.store.time", clock(soon))
            store.on_keeper(store.reap)
        with store.live.read() as txn:
            left = txn.count("lease"), txn.count("pending"), txn.count("free")
        assert left == (0, 0, 2)
        assert store.live.write(lambda txn: store.ledger.give_back_one(txn, MEMORY))
        assert admin.verify(store).sound


def test_a_server_without_descriptors_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    handler = OutOfFiles()
    loop = asyncio.new_event_loop()
    try:
        for _ in range(100):
            trouble = OSError(errno.EMFILE, "Too many open files")
            handler(
                loop, {"message": "socket.accept() out of system resource", "exception": trouble}
            )
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        handler(loop, {"message": "something else", "exception": ValueError("planted")})
        assert len(caplog.records) == 2
    finally:
        loop.close()


# ---------------------------------------------------------------------- the harness
@pytest.mark.parametrize("name", ["sync fails", "memory all leased", "network half-open"])
def test_a_short_run(name: str) -> None:
    found = faults.run([name], SECONDS, SEED)
    if not found:
        pytest.skip("there is no means for this fault here")
    assert found[name].detail.strip("; ") == ""
    _, bars = faults.rows_and_bars({name: replace(found[name], bars=[])})  # they are of time
    assert [bar.shortfall() for bar in bars if not bar.ok] == []


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, None),
        ({"wrong": 1}, "wrong"),
        ({"stuck": 2}, "stuck"),
        ({"recovered": False}, "not recovered"),
        ({"operations": 0}, "without an operation"),
        ({"bars": [("goodput", 0.7, 0.8, ">=")]}, "goodput"),
    ],
)
def test_what_a_fault_must_not_do_is_named(changes: dict[str, Any], missed: str | None) -> None:
    good = Outcome(operations=10, recovered=True)
    _, bars = faults.rows_and_bars({"a": good, "b": replace(good, **changes)})
    assert [bar.name for bar in bars if not bar.ok] == [name for name in [missed] if name]


def test_a_client_that_meets_wrong_bytes_or_a_foreign_error_is_counted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.open() as store:
        monkeypatch.setattr("benchmarks.soak_client.payload_of", lambda key: os.urandom(SIZE))
        load = Load(store, SEED)
        wait_for(lambda: any(one["wrong: bytes"] for one in load.counts), "wrong bytes")
        monkeypatch.setattr(Namespace, "get", lambda *_: 1 // 0)
        wait_for(
            lambda: any("wrong: ZeroDivisionError" in " ".join(one) for one in load.counts),
            "the exception",
        )
        assert load.end()[1] == 0
