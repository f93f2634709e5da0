"""Prefetching from a disk: a waiting request's chunks come to memory, in order, while it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from connector.prefetch import Prefetcher
from prefixstore import Namespace, admin
from prefixstore.ledger import DISK, MEMORY
from prefixstore.testing_data import content_of
from tests.store_helpers import Place, namespace_in, wait_for

pytest_plugins = ["tests.store_fixtures"]
CHUNKS = 6


@pytest.fixture
def ns(place: Place) -> Iterator[Namespace]:
    """All of one prompt on disk, the second chunk in memory, too."""
    with place.open() as store:
        ns = namespace_in(store)
        chain = ns.chain(range(CHUNKS * ns.layout.chunk_tokens))
        refs = chain.refs()
        data = [content_of(ref.key, ns.layout.payload_bytes) for ref in refs]
        ns.put(refs, data)
        admin.empty_memory(store)
        ns.put(refs[1:2], data[1:2])
        yield ns


@pytest.fixture
def counted() -> Iterator[tuple[Prefetcher, list[int]]]:
    counts: list[int] = []
    prefetcher = Prefetcher(counts.append)
    yield prefetcher, counts
    prefetcher.close()


def offer(prefetcher: Prefetcher, ns: Namespace, wanted: list[bool]) -> None:
    """``wanted`` are the answers whether it still is; from their end on it is not."""
    chain = ns.chain(range(CHUNKS * ns.layout.chunk_tokens))
    answers, lock = iter(wanted), threading.Lock()

    def still() -> bool:
        with lock:
            return next(answers, False)

    prefetcher.offer(ns, chain, ns.match(chain).tiers, still)


def test_what_is_on_disk_comes_to_memory(
    ns: Namespace, counted: tuple[Prefetcher, list[int]]
) -> None:
    prefetcher, counts = counted
    chain = ns.chain(range(CHUNKS * ns.layout.chunk_tokens))
    on_disk = ns.match(chain).tiers.count(DISK)
    assert on_disk >= CHUNKS - 1
    offer(prefetcher, ns, [True] * 100)
    wait_for(lambda: counts, "the end of it")
    assert counts == [on_disk]
    assert ns.match(chain).tiers == (MEMORY,) * CHUNKS


def test_it_ends_when_the_request_is_loaded(
    ns: Namespace, counted: tuple[Prefetcher, list[int]]
) -> None:
    prefetcher, counts = counted
    offer(prefetcher, ns, [True] * 3)  # the thread asks once before the first
    wait_for(lambda: counts, "the end of it")
    assert counts == [2]
    tiers = ns.match(ns.chain(range(CHUNKS * ns.layout.chunk_tokens))).tiers
    assert tiers[0] == MEMORY, "the first comes first"
    assert tiers[3:] == (DISK,) * 3


def test_a_request_that_does_not_wait_is_left_alone(
    ns: Namespace, counted: tuple[Prefetcher, list[int]]
) -> None:
    prefetcher, counts = counted
    offer(prefetcher, ns, [])
    time.sleep(0.1)
    assert counts == []
