"""The contracts of a store and of segments, over TCP and over a unix socket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from prefixstore import admin
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.segment_testing import SegmentContract
from prefixstore.testing import NamespaceFactory, StoreContract
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for
from tests.serve.support import ALICE, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]


def delete(namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
    assert isinstance(namespace, RemoteNamespace)
    assert namespace.delete(refs) == len(refs)


class TestTcp(StoreContract):
    """Without tokens, a memory tier only."""

    capacity_chunks = 512

    @pytest.fixture
    def namespace(self, place: Place) -> Iterator[NamespaceFactory]:
        with place.open("2MiB", 0) as store, running(store) as server, server.open() as client:
            yield lambda label: client.namespace(identity_for(label), CONTRACT_LAYOUT)
            assert admin.verify(store).sound

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        delete(namespace, refs)


class TestUnixSocketAsTenant(StoreContract):
    """With a token, a quota of nearly all there is, and a disk."""

    capacity_chunks = 512

    @pytest.fixture
    def namespace(self, place: Place, tmp_path: Path) -> Iterator[NamespaceFactory]:
        tokens = tokens_file(tmp_path, f"alice:{ALICE}\n")
        options = {"uds": str(tmp_path / "socket"), "tokens": tokens}
        with (
            place.open("2MiB", "2MiB") as store,
            running(store, **options) as server,
            server.open(ALICE) as client,
        ):
            yield lambda label: client.namespace(identity_for(label), CONTRACT_LAYOUT)
            assert admin.verify(store).sound

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        delete(namespace, refs)


class TestSegments(SegmentContract):
    """Segments over TCP, as a tenant."""

    @pytest.fixture
    def namespace(self, place: Place, tmp_path: Path) -> Iterator[NamespaceFactory]:
        with (
            place.open("4MiB", 0) as store,
            running(store, tokens=tokens_file(tmp_path)) as server,
            server.open(ALICE) as client,
        ):
            yield lambda label: client.namespace(identity_for(label), CONTRACT_LAYOUT)

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        delete(namespace, refs)
