"""The contract of a store, as far as an engine can hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from prefixstore.found import REMOTE
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.pool.backend import Backend
from prefixstore.pool.store import PooledStore
from prefixstore.testing import NamespaceFactory, StoreContract
from prefixstore.testing_data import CONTRACT_LAYOUT, identity_for, tokens_of

_PLACES = count()  # so that tests of one server have names of their own


@contextmanager
def pooled(backend: Backend) -> Iterator[NamespaceFactory]:
    """A store over a backend, apart from what other tests have put there."""
    with PooledStore(backend, prefix=f"prefixstore/test/{next(_PLACES)}") as store:
        yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)


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
