"""The contract, on the memory tier and on the disk tier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from prefixstore import admin
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import Namespace
from prefixstore.testing import NamespaceFactory, StoreContract
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]


def delete(namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
    assert isinstance(namespace, Namespace)
    for ref in refs:
        assert admin.remove(namespace.store, admin.Selection(key=ref.key)) == 1


def is_sound(namespace: Namespace) -> None:
    report = admin.verify(namespace.store)
    assert report.sound, report


class TestMemoryTier(StoreContract):
    """Without a disk, so that nothing can come from there."""

    tier = MEMORY

    @pytest.fixture
    def namespace(self, place: Place) -> Iterator[NamespaceFactory]:
        with place.open("4MiB", 0) as store:
            yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)
            is_sound(store.namespace(identity_for("a"), CONTRACT_LAYOUT))

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        delete(namespace, refs)


class TestDiskTier(StoreContract):
    """The memory tier is emptied before each look, so that every hit comes from disk."""

    tier = DISK

    @pytest.fixture
    def namespace(self, place: Place, no_late_readers: None) -> Iterator[NamespaceFactory]:
        with place.open("2MiB", "4MiB") as store:
            yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)
            is_sound(store.namespace(identity_for("a"), CONTRACT_LAYOUT))

    def settle(self, namespace: NamespaceLike) -> None:
        assert isinstance(namespace, Namespace)
        admin.empty_memory(namespace.store)

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        delete(namespace, refs)
