"""The contract of segments, on the memory tier and on the disk tier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from prefixstore import admin
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.namespace import Namespace
from prefixstore.segment_testing import SegmentContract
from prefixstore.testing import NamespaceFactory
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]


class OneStore(SegmentContract):
    disk_bytes: int

    @pytest.fixture
    def namespace(self, place: Place, no_late_readers: None) -> Iterator[NamespaceFactory]:
        with place.open("4MiB", self.disk_bytes) as store:
            yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)
            assert admin.verify(store).sound

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        assert isinstance(namespace, Namespace)
        for ref in refs:
            assert admin.remove(namespace.store, admin.Selection(key=ref.key)) == 1


class TestMemoryTier(OneStore):
    """Without a disk."""

    disk_bytes = 0


class TestDiskTier(OneStore):
    """The memory tier is emptied before each look."""

    disk_bytes = 4 << 20

    def settle(self, namespace: NamespaceLike) -> None:
        assert isinstance(namespace, Namespace)
        admin.empty_memory(namespace.store)
