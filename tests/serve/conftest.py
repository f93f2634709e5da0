"""A server in this process over a store of its own, and a namespace as a client sees it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefixstore import Store
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for
from tests.serve.support import Running, running
from tests.store_helpers import Place


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    """Tiers of 4 MiB; modules that need others have a fixture of their own."""
    with place.open("4MiB", "4MiB") as store:
        yield store


@pytest.fixture
def server(store: Store) -> Iterator[Running]:
    with running(store) as server:
        yield server


@pytest.fixture
def ns(server: Running) -> Iterator[RemoteNamespace]:
    with server.open(deadline_s=5.0) as client:
        yield client.namespace(identity_for("a"), CONTRACT_LAYOUT)
