"""The contract of a store, as far as an engine can hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import pytest

from prefixstore.found import REMOTE
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.namespace import MISS
from prefixstore.pool.backend import BEYOND_BYTES, LOST, Backend, Get
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.redis import RedisBackend
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState
from prefixstore.registry import NamespaceRecord
from prefixstore.segment_testing import SegmentContract
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

WAIT_S = 30.0
_PLACES = count()  # so that tests of one server have names of their own


@contextmanager
def pooled(backend: Backend) -> Iterator[NamespaceFactory]:
    """A store over a backend, apart from what other tests have put there."""
    with PooledStore(backend, prefix=f"prefixstore/test/{next(_PLACES)}") as store:
        yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)


class Strict(RedisBackend):
    """As Mooncake: nothing comes of an object of which more is asked for than is there, but for
    some bytes."""

    reads_short = False

    def __init__(self, url: str, beyond_bytes: int = BEYOND_BYTES) -> None:
        super().__init__(url)
        self.beyond_bytes = beyond_bytes

    def get(self, gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        came = super().get(gets, deadline_s=deadline_s)
        asked = [sum(out.nbytes for _, out in one.cuts) for one in gets]
        ends = [one.cuts[-1][0] + one.cuts[-1][1].nbytes for one in gets]
        sizes = [
            super(Strict, self).get(
                [Get(one.name, [(0, memoryview(bytearray(end)))])], deadline_s=deadline_s
            )[0]
            for one, end in zip(gets, ends, strict=True)
        ]
        return [
            LOST if 0 <= count < wanted and end - size > self.beyond_bytes else count
            for count, wanted, end, size in zip(came, asked, ends, sizes, strict=True)
        ]


def chunks(ns: NamespaceLike, count: int = 4, seed: int = 1) -> list[ChunkRef]:
    """Of a text."""
    return ns.chain(tokens_of(seed, count, ns.layout)).refs()


def part_names(ns: PooledNamespace, ref: ChunkRef) -> list[str]:
    """The objects that there are of a chunk beside the one with its trailer."""
    found = ns.backend.names(f"{ns.shape.prefix}/", deadline_s=WAIT_S)
    begin = f"{ns.shape.object_of(ref.key)}."
    return sorted(name for names in found for name in names if name.startswith(begin))


def put(ns: NamespaceLike, refs: Sequence[ChunkRef]) -> list[PutState]:
    """Store what their keys say."""
    return ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs])


def read(ns: NamespaceLike, refs: Sequence[ChunkRef], roi: Roi | None = None) -> list[int]:
    """The tiers; what is no miss must be right."""
    layout = ns.layout
    outs = outputs(layout, len(refs), roi)
    tiers = ns.get(refs, outs, roi)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        whole = content_of(ref.key, layout.payload_bytes)
        assert tier == MISS or out == region_of(whole, layout, roi or layout.whole)
    return tiers


class PoolContract(StoreContract):
    """An engine evicts as it was told to, not as we say: pins and leases hold nothing in it."""

    tier = REMOTE

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        assert namespace.delete(refs) == len(refs)

    def test_a_pinned_chunk_stays(self, namespace: NamespaceFactory) -> None:
        """No longer than others, but it is stored."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(13, 2)).refs()
        self.put(ns, refs, pin=True)
        self.check_hits(ns, refs)

    def test_a_lease_protects(self, namespace: NamespaceFactory) -> None:
        """Nothing, but says what is there, and can be released."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(15, 2)).refs()
        self.put(ns, refs)
        lease, held = ns.lease(refs, ns.match(refs).tiers)
        assert held == 2
        ns.release(lease)
        self.check_hits(ns, refs)

    @pytest.mark.parametrize("size", [1, 8000, BEYOND_BYTES, BEYOND_BYTES + 1, 40_000])
    def test_a_model_is_known_by_its_name(self, namespace: NamespaceFactory, size: int) -> None:
        """However long its record is, which nobody knows who asks for it."""
        short = NamespaceRecord(identity_for("x"), CONTRACT_LAYOUT).pack()
        ns = namespace("x" * max(1, 1 + size - len(short) - 16))  # 16: its sum
        assert isinstance(ns, PooledNamespace)
        found = ns.store.namespace_of(ns.name)
        assert (found.identity, found.layout) == (ns.identity, ns.layout)
        assert [one.identity for one in ns.store.models()] == [ns.identity]


class PoolSegments(SegmentContract):
    """Segments are found in what this process has read of the engine."""

    def settle(self, namespace: NamespaceLike) -> None:
        assert isinstance(namespace, PooledNamespace)
        settle(namespace)

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        assert namespace.delete(refs) == len(refs)
        self.settle(namespace)


def settle(ns: PooledNamespace) -> None:
    """Until a process has read what is there now, by the names alone."""
    prefix = f"{ns.shape.prefix}/"

    def is_read() -> bool:
        parts = ns.backend.names(prefix, deadline_s=WAIT_S)
        there = {name for part in parts for name in part if len(name) == len(prefix) + 32}
        mirror = ns.store.scout.mirror(ns)
        return mirror is not None and {f"{prefix}{key.hex()}" for key in mirror.keys} == there

    wait_for(is_read, "the trailers to be read")
