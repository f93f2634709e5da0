"""A folder in front of a pool: the contracts, write-back, and what a second host finds."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from prefixstore import admin, behind, owned
from prefixstore.errors import RemoteError
from prefixstore.found import REMOTE
from prefixstore.fronted import FrontedNamespace, FrontedStore
from prefixstore.interface import NamespaceLike, open_store
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState
from prefixstore.segment_testing import SegmentContract
from prefixstore.testing import NamespaceFactory, StoreContract
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    content_of,
    identity_for,
    region_of,
    tokens_of,
    wait_for,
)  # fmt: skip
from tests.pool.contract import read
from tests.pool.servers import Redis, redis
from tests.store_helpers import WAIT_S, Place

pytest_plugins = ["tests.store_fixtures"]
SIZE = CONTRACT_LAYOUT.payload_bytes


@pytest.fixture
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@contextmanager
def host(
    server: Redis, place: Place, name: str = "one", memory: str = "4MiB"
) -> Iterator[FrontedStore]:
    """A host of its own with the pool behind its folder."""
    store = open_store(
        server.url, front=str(place.folder / name), memory_bytes=memory, disk_bytes=0,
        memory_dir=str(place.memory_dir), deadline_s=2.0,
    )  # fmt: skip
    assert isinstance(store, FrontedStore)
    with store:
        yield store


class TestFronted(StoreContract):
    """What the front evicts the pool still has, so only the front's leases and pins count."""

    @pytest.fixture
    def namespace(self, server: Redis, place: Place) -> Iterator[NamespaceFactory]:
        with host(server, place) as store:
            yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)
            assert admin.verify(store.front).sound

    def settle(self, namespace: NamespaceLike) -> None:
        flush(namespace)

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        flush(namespace)
        assert namespace.delete(refs) == len(refs)

    def test_a_pinned_chunk_stays(self, namespace: NamespaceFactory) -> None:
        """In front, under pressure that evicts there what is not pinned."""
        ns = namespace("a")
        assert isinstance(ns, FrontedNamespace)
        pinned, other = ns.chain(tokens_of(13, 2)), ns.chain(tokens_of(14, 2))
        self.put(ns, pinned.refs(), pin=True)
        self.put(ns, other.refs())
        self.press(ns)
        assert ns.match(other).tiers == (REMOTE,) * 2
        assert ns.match(pinned).tiers == (MEMORY,) * 2

    def test_a_lease_protects(self, namespace: NamespaceFactory) -> None:
        """In front."""
        ns = namespace("a")
        chain, other = ns.chain(tokens_of(15, 2)), ns.chain(tokens_of(16, 2))
        self.put(ns, chain.refs() + other.refs())
        lease, held = ns.lease(chain.refs(), ns.match(chain).tiers)
        assert held == 2
        self.press(ns)
        assert ns.match(other).tiers == (REMOTE,) * 2
        assert ns.match(chain).tiers == (MEMORY,) * 2
        ns.release(lease)


class TestSegmentsFronted(SegmentContract):
    @pytest.fixture
    def namespace(self, server: Redis, place: Place) -> Iterator[NamespaceFactory]:
        with host(server, place) as store:
            yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)

    def settle(self, namespace: NamespaceLike) -> None:
        flush(namespace)

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        flush(namespace)
        assert namespace.delete(refs) == len(refs)


def flush(ns: NamespaceLike) -> None:
    """Until what was put is in the pool."""
    assert isinstance(ns, FrontedNamespace)
    assert ns.behind is not None
    assert ns.behind.flush(30.0)


def chunks(ns: NamespaceLike, count: int = 6, seed: int = 1) -> tuple[list[ChunkRef], list[bytes]]:
    refs = ns.chain(tokens_of(seed, count)).refs()
    return refs, [content_of(ref.key, SIZE) for ref in refs]


def test_another_host_with_an_empty_folder_finds_everything(server: Redis, place: Place) -> None:
    """The model by its name, prefixes at once, segments soon, staleness; and reads them once."""
    text = tokens_of(1, 60)
    values = np.linspace(0, 1, 240, dtype=np.float32).reshape(60, 4)
    with host(server, place, "one") as one:
        ns = one.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = ns.chain(text).refs()
        ns.put(refs, [content_of(ref.key, SIZE) for ref in refs], alone=True)
        assert one.flush()
        assert ns.note_staleness(refs, values) == 60
    with host(server, place, "two") as two:
        theirs = two.namespace_of(ns.name)
        assert (theirs.identity, theirs.layout) == (ns.identity, ns.layout)
        assert theirs.match(theirs.chain(text)).tiers == (REMOTE,) * 60
        wait_for(lambda: theirs.find_segments(text[1:]) != [], "the segments")
        [found] = theirs.find_segments([7, *text[10:150]])
        assert (found.start, found.num_tokens, found.source_start) == (1, 140, 10)
        assert found.alone
        assert set(found.tiers) == {REMOTE}
        assert read(theirs, found.refs) == list(found.tiers)
        assert set(theirs.match(refs[2:37]).tiers) == {MEMORY}
        noted = theirs.staleness_of(refs)
        for row, expected in zip(noted, values, strict=True):
            assert row is not None
            assert (row == expected.astype(np.float16)).all()


def test_ranks_fill_a_chunk_in_front_and_the_pool_gets_it_whole(
    server: Redis, place: Place
) -> None:
    with host(server, place) as one, host(server, place, "two") as two:
        ns = one.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = chunks(ns)
        for heads, state in (((0, 1), PutState.PARTIAL), ((1, 2), PutState.STORED)):
            roi = Roi(0, CONTRACT_LAYOUT.num_layers, *heads)
            parts = [region_of(whole, CONTRACT_LAYOUT, roi) for whole in data]
            assert ns.put(refs, parts, roi=roi, group=5) == [state] * 6
        assert one.flush()
        assert read(two.namespace_of(ns.name), refs) == [REMOTE] * 6


def test_a_put_does_not_wait_for_the_pool(
    server: Redis, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which stands still here as long as the test says."""
    go_on = threading.Event()
    real = PooledNamespace.put

    def slow(self: PooledNamespace, *args: object, **told: object) -> list[PutState]:
        assert go_on.wait(30.0)
        return real(self, *args, **told)  # type: ignore[arg-type]

    monkeypatch.setattr(PooledNamespace, "put", slow)
    with host(server, place) as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = chunks(ns)
        assert ns.put(refs, data) == [PutState.STORED] * 6
        assert read(ns, refs) == [MEMORY] * 6
        assert not store.flush(0.05)
        go_on.set()
        assert store.flush()
        assert isinstance(store.remote, PooledStore)
        assert store.remote.namespace_of(ns.name).match(refs).num_chunks == 6


def test_what_waits_has_a_bound(
    server: Redis, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it the oldest are not copied; they stay in front."""
    monkeypatch.setattr(behind, "QUEUE_MAX", 4)
    with host(server, place) as store:
        assert store.behind is not None
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = chunks(ns, 10)
        with store.behind._changed:  # the thread cannot take any
            ns.put(refs, data)
        assert store.flush()
        assert store.behind.counted() == Counter(made=4, lost=6)
        there = store.remote.namespace_of(ns.name).match_each(refs)
        assert [tier != MISS for tier in there] == [False] * 6 + [True] * 4
        assert read(ns, refs) == [MEMORY] * 10


def test_what_became_of_copies_is_counted(
    server: Redis, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is waiting, made, lost or refused, and nothing else."""
    monkeypatch.setattr(behind, "AGAIN_S", 0.05)
    with host(server, place) as store:
        ns, copies = store.namespace(identity_for("a"), CONTRACT_LAYOUT), store.behind
        assert copies is not None
        refs, data = chunks(ns, 6)
        ns.put(refs, data)
        assert store.flush()
        ns.put(refs[:2], data[:2])
        assert store.flush()
        assert copies.counted() == Counter(made=8)
        server.ask("CONFIG", "SET", "maxmemory", "1")
        refs, data = chunks(ns, 3, seed=2)
        ns.put(refs, data)
        assert store.flush()
        assert copies.counted() == Counter(made=8, refused=3)
        server.ask("CONFIG", "SET", "maxmemory", "0")
        refs, data = chunks(ns, 5, seed=3)
        with copies._changed:  # the thread cannot take any
            ns.put(refs, data)
            assert copies.counted() == Counter(made=8, refused=3, waiting=5)
            owned.delete(store.front.namespace_of(ns.name), refs[:2])
        assert store.flush()
        assert copies.counted() == Counter(made=11, refused=3, lost=2)
        refs, data = chunks(ns, 2, seed=5)
        with copies._changed:
            ns.put(refs, data, ttl_s=0.05)
            time.sleep(0.1)
        assert store.flush()
        assert copies.counted() == Counter(made=11, refused=3, lost=4)
        server.kill()
        refs, data = chunks(ns, 4, seed=4)
        ns.put(refs, data)
        wait_for(lambda: not store.remote.usable, "the pool to be missed")
        assert copies.counted() == Counter(made=11, refused=3, lost=4, waiting=4)
        monkeypatch.setattr(behind, "CLOSE_S", 0.1)
    assert copies.counted() == Counter(made=11, refused=3, lost=8)


def test_a_time_to_live_goes_along(server: Redis, place: Place) -> None:
    with host(server, place) as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = chunks(ns, 2)
        ns.put(refs[:1], data[:1], ttl_s=3600.0)
        ns.put(refs[1:], data[1:])
        assert store.flush()
        prefix = f"prefixstore/1/{ns.name.hex()}/"
        brief = server.ask("TTL", prefix + refs[0].key.hex())
        assert isinstance(brief, int)
        assert 3500 < brief <= 3602
        assert server.ask("TTL", prefix + refs[1].key.hex()) == -1


def test_without_the_pool_the_folder_goes_on(
    server: Redis, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start, and when it is lost; what was put meanwhile is copied when it comes back,
    however often that was tried in vain."""
    monkeypatch.setattr(behind, "ATTEMPTS_MAX", 1)
    monkeypatch.setattr(behind, "AGAIN_S", 0.05)
    server.kill()
    with host(server, place) as store:
        store.check_open()
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = chunks(ns)
        assert ns.put(refs, data) == [PutState.STORED] * 6
        assert read(ns, refs) == [MEMORY] * 6
        # As another process of the engine finds the model, which the pool was never told of.
        assert store.namespace_of(ns.name).match(refs).tiers == (MEMORY,) * 6
        absent = ns.chain(tokens_of(2, 3)).refs()
        assert ns.match(absent).num_chunks == 0
        assert read(ns, absent) == [MISS] * 3
        with pytest.raises(RemoteError):
            ns.delete(refs)
        assert not store.flush(0.5)
        server.start()
        assert store.flush(30.0)
        with host(server, place, "two") as two:
            assert read(two.namespace_of(ns.name), refs) == [REMOTE] * 6


def test_what_is_deleted_is_not_copied_behind_it(
    server: Redis, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a copy that waits, nor by one that is under way."""
    begun, go_on = threading.Event(), threading.Event()
    copied = behind.Behind._copy

    def held_up(self: behind.Behind, batch: Any) -> Any:
        begun.set()
        assert go_on.wait(WAIT_S)
        return copied(self, batch)

    monkeypatch.setattr(behind.Behind, "_copy", held_up)
    monkeypatch.setattr(behind, "BATCH_BYTES", 1)
    with host(server, place) as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = chunks(ns)
        ns.put(refs, data)
        assert begun.wait(WAIT_S)
        threading.Timer(0.2, go_on.set).start()
        assert ns.delete(refs) == 1, "the one that was under way"
        assert store.flush(30.0)
        with host(server, place, "two") as two:
            assert read(two.namespace_of(ns.name), refs) == [MISS] * 6
