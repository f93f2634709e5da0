"""A folder in front of a server: the contract of a store, and what each of the two is for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefixstore import admin
from prefixstore.client.remote import RemoteStore
from prefixstore.copying import copies_to
from prefixstore.errors import StoreTimeoutError
from prefixstore.fronted import REMOTE, FrontedNamespace, FrontedStore
from prefixstore.interface import NamespaceLike, open_store
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.rows import readable
from prefixstore.segment_testing import SegmentContract
from prefixstore.store import Store
from prefixstore.testing import NamespaceFactory, StoreContract
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    content_of,
    identity_for,
    outputs,
    region_of,
    tokens_of,
    wait_for,
)  # fmt: skip
from tests.serve.support import ALICE, Running, running, tokens_file
from tests.store_helpers import WAIT_S, Place

pytest_plugins = ["tests.store_fixtures"]
SIZE = CONTRACT_LAYOUT.payload_bytes


@contextmanager
def fronted(
    server: Running, folder: Path, memory: str = "1MiB", token: str = ""
) -> Iterator[FrontedStore]:
    """The server behind a folder of its own."""
    (folder / "near").mkdir(exist_ok=True)
    store = open_store(
        server.address, token=token, front=str(folder / "front"), memory_bytes=memory,
        disk_bytes=0, memory_dir=str(folder / "near"), deadline_s=2.0,
    )  # fmt: skip
    assert isinstance(store, FrontedStore)
    with store:
        yield store


class TestFronted(StoreContract):
    """With a front half as large as what is behind it."""

    capacity_chunks = 512

    @pytest.fixture
    def namespace(self, place: Place, tmp_path: Path) -> Iterator[NamespaceFactory]:
        with (
            place.open("2MiB", 0) as store,
            running(store) as server,
            fronted(server, tmp_path) as both,
        ):
            yield lambda label: both.namespace(identity_for(label), CONTRACT_LAYOUT)
            assert admin.verify(store).sound
            assert admin.verify(both.front).sound

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        assert isinstance(namespace, FrontedNamespace)
        assert namespace.delete(refs) == len(refs)


class TestSegmentsFronted(SegmentContract):
    """As a tenant, whose keys are not those of a folder."""

    @pytest.fixture
    def namespace(self, place: Place, tmp_path: Path) -> Iterator[NamespaceFactory]:
        with (
            place.open("4MiB", 0) as store,
            running(store, tokens=tokens_file(tmp_path)) as server,
            fronted(server, tmp_path, "4MiB", ALICE) as both,
        ):
            yield lambda label: both.namespace(identity_for(label), CONTRACT_LAYOUT)

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        assert isinstance(namespace, FrontedNamespace)
        assert namespace.delete(refs) == len(refs)


@pytest.fixture
def behind(place: Place) -> Iterator[tuple[Store, Running]]:
    """The store behind, and its server."""
    with place.open("2MiB", 0) as store, running(store) as server:
        yield store, server


def refs_and_data(ns: NamespaceLike, count: int = 6) -> tuple[list[ChunkRef], list[bytes]]:
    refs = ns.chain(tokens_of(1, count)).refs()
    return refs, [content_of(ref.key, SIZE) for ref in refs]


def read(ns: NamespaceLike, refs: Sequence[ChunkRef], data: Sequence[bytes]) -> list[int]:
    """The tiers; what is no miss must be right."""
    outs = outputs(CONTRACT_LAYOUT, len(refs))
    tiers = ns.get(refs, outs)
    for tier, out, expected in zip(tiers, outs, data, strict=True):
        assert tier == MISS or out == expected
    return tiers


def test_what_another_put_is_read_from_the_server_once(
    behind: tuple[Store, Running], tmp_path: Path
) -> None:
    _, server = behind
    with fronted(server, tmp_path) as both, server.open() as other:
        theirs = other.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(theirs)
        theirs.put(refs, data)
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert ns.match(refs).tiers == (REMOTE,) * 6
        lease, held = ns.lease(refs, ns.match(refs).tiers)
        assert held == 6
        ns.release(lease)
        assert read(ns, refs, data) == [REMOTE] * 6
        assert ns.match(refs).tiers == (MEMORY,) * 6
        assert read(ns, refs, data) == [MEMORY] * 6


def test_a_region_is_read_through_but_not_copied(
    behind: tuple[Store, Running], tmp_path: Path
) -> None:
    _, server = behind
    with fronted(server, tmp_path) as both, server.open() as other:
        theirs = other.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(theirs)
        theirs.put(refs, data)
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        roi = Roi(0, 1, 0, 1)
        size = CONTRACT_LAYOUT.roi_bytes(roi)
        outs = [memoryview(bytearray(size)) for _ in refs]
        assert ns.get(refs, outs, roi) == [REMOTE] * 6
        for out, whole in zip(outs, data, strict=True):
            assert out == region_of(whole, CONTRACT_LAYOUT, roi)
        assert ns.match(refs).tiers == (REMOTE,) * 6


def test_prefetching_ends_when_it_is_no_longer_wanted(
    behind: tuple[Store, Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixstore.fronted.FETCH_BYTES", 2 * SIZE)
    _, server = behind
    with fronted(server, tmp_path) as both, server.open() as other:
        theirs = other.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(theirs)
        theirs.put(refs, data)
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        answers = iter([True, False])
        assert ns.prefetch(refs, lambda: next(answers)) == 2
        assert ns.match(refs).tiers == (MEMORY,) * 2 + (REMOTE,) * 4
        assert ns.prefetch(refs, lambda: True) == 4, "those that were not there"
        assert read(ns, refs, data) == [MEMORY] * 6


def test_without_the_server_the_front_goes_on(place: Place, tmp_path: Path) -> None:
    socket = str(tmp_path / "socket")
    with place.open("2MiB", 0) as store, ExitStack() as parts:
        with running(store, uds=socket) as server:
            both = parts.enter_context(fronted(server, tmp_path))
            ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
            refs, data = refs_and_data(ns)
            assert ns.put(refs[:4], data[:4]) == [PutState.STORED] * 4
        assert ns.match(refs).tiers == (MEMORY,) * 4
        assert ns.put(refs[4:], data[4:]) == [PutState.STORED] * 2, "stored in front"
        assert read(ns, refs, data) == [MEMORY] * 6
        assert both.usable
        with running(store, uds=socket), server.open() as other:
            wait_for(lambda: both.remote.usable, "the pause after failures to end")
            assert both.namespace_of(ns.name).match(refs).num_chunks == 6
            theirs = other.namespace(identity_for("a"), CONTRACT_LAYOUT)
            assert theirs.match(refs).num_chunks == 4


def test_a_damaged_copy_is_read_from_the_server(
    behind: tuple[Store, Running], tmp_path: Path
) -> None:
    _, server = behind
    with fronted(server, tmp_path) as both:
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(ns)
        ns.put(refs, data)
        front = both.front
        for ref in refs:
            with front.live.read() as txn:
                data_of = txn.get("chunk", ref.key)
            row = readable(data_of) if data_of is not None else None
            assert row is not None
            file = front.file_of(MEMORY, row.slot_bytes)
            at = row.slot * row.slot_bytes
            os.pwrite(file._fd, bytes([data[refs.index(ref)][0] ^ 1]), at)
        assert read(ns, refs, data) == [REMOTE] * 6
        wait_for(lambda: read(ns, refs, data) == [MEMORY] * 6, "new copies")


def test_two_clients_of_a_server_and_a_folder_agree(
    behind: tuple[Store, Running], tmp_path: Path
) -> None:
    """Engines in the server's folder and engines behind it share one set of keys."""
    store, server = behind
    with fronted(server, tmp_path) as both:
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(ns)
        ns.put(refs, data)
        direct = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert direct.name == ns.name == both.namespace_of(ns.name).name
        assert read(direct, refs, data) == [MEMORY] * 6
        assert isinstance(both.remote, RemoteStore)


class Held:
    """A call that is told when it may go on, once it has come so far."""

    def __init__(self) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.there.set()
        assert self.go_on.wait(WAIT_S)


def bring(ns: FrontedNamespace, how: str, refs: Sequence[ChunkRef]) -> None:
    """Have chunks copied to the front."""
    if how == "get":
        ns.get(refs, outputs(CONTRACT_LAYOUT, len(refs)))
    else:
        ns.prefetch(refs, lambda: True)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("how", ["get", "prefetch"])
def test_what_is_deleted_while_it_comes_is_not_copied(
    behind: tuple[Store, Running],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    other: bool,
) -> None:
    """The bytes have come from the server, and it is deleted before they are put in front: by the
    same store, or by another of the process in front of the same server."""
    _, server = behind
    with fronted(server, tmp_path) as both, fronted(server, tmp_path) as second:
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(ns, 3)
        ns.remote.put(refs, data)
        came, get = Held(), ns.remote.get

        def slow_get(*asked: Any) -> list[int]:
            tiers = get(*asked)
            came()
            return tiers

        monkeypatch.setattr(ns.remote, "get", slow_get)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(bring, ns, how, refs)
            assert came.there.wait(WAIT_S)
            deleting = second.namespace_of(ns.name) if other else ns
            assert deleting.delete(refs[:2]) == 2
            came.go_on.set()
            coming.result(WAIT_S)
        monkeypatch.undo()
        assert read(ns, refs, data) == [MISS, MISS, MEMORY]
        ns.remote.put(refs, data)
        assert read(ns, refs, data) == [REMOTE, REMOTE, MEMORY], "it may be stored again"
        assert read(ns, refs, data) == [MEMORY] * 3


@pytest.mark.parametrize("how", ["get", "prefetch"])
def test_a_delete_waits_for_a_copy_that_has_begun(
    behind: tuple[Store, Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """But for no copy of others' chunks; and it gives up in time."""
    _, server = behind
    with fronted(server, tmp_path) as both:
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(ns, 3)
        ns.remote.put(refs, data)
        begun, put = Held(), ns.front.put

        def slow_put(*what: Any, **options: Any) -> list[PutState]:
            begun()
            return put(*what, **options)

        monkeypatch.setattr(ns.front, "put", slow_put)
        with ThreadPoolExecutor(2) as pool:
            coming = pool.submit(bring, ns, how, refs[:2])
            assert begun.there.wait(WAIT_S)
            assert ns.delete(refs[2:]) == 1
            with pytest.raises(StoreTimeoutError, match="delete them again"):
                copies_to(both.front).leave_out({refs[0].key}, deadline_s=0.05)
            deleting = pool.submit(ns.delete, refs[:2])
            with pytest.raises(FutureTimeout):
                deleting.result(0.3)
            begun.go_on.set()
            assert deleting.result(WAIT_S) == 2
            coming.result(WAIT_S)
        assert read(ns, refs, data) == [MISS] * 3


def test_a_copy_that_takes_too_long_does_not_keep_others_in_front(
    behind: tuple[Store, Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has deleted them by then."""
    _, server = behind
    with fronted(server, tmp_path) as both:
        ns = both.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs, data = refs_and_data(ns, 3)
        ns.put(refs, data)

        def late(keys: set[bytes]) -> None:
            raise StoreTimeoutError("a copy of chunks takes longer than 10 s", "delete them again")

        monkeypatch.setattr(ns._copies, "leave_out", late)
        with pytest.raises(StoreTimeoutError, match="delete them again"):
            ns.delete(refs)
        assert ns.front.match(refs).num_chunks == ns.remote.match(refs).num_chunks == 0
