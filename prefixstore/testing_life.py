"""The contract of what ends chunks: times to live that change, models that are retired or bumped.

For stores that have it, as `testing.StoreContract` is for all. Needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from prefixstore.errors import StoreError
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, outputs, tokens_of, wait_for


class Lasting(NamespaceLike, Protocol):
    """A namespace that can be ended."""

    def set_ttl(self, refs: Sequence[ChunkRef], ttl_s: float | None) -> int:
        """Have chunks expire so many seconds from now, or never."""

    def retire(self) -> int:
        """Drop the model."""

    def bump(self) -> Lasting:
        """The model has other weights now."""


LastingFactory = Callable[[str], Lasting]


def _put(ns: NamespaceLike, refs: Sequence[ChunkRef], **options: object) -> list[PutState]:
    data = [content_of(ref.key, CONTRACT_LAYOUT.payload_bytes) for ref in refs]
    return ns.put(refs, data, **options)  # type: ignore[arg-type]


def _held(ns: NamespaceLike, refs: Sequence[ChunkRef]) -> int:
    """How many chunks are there, each right."""
    outs = outputs(CONTRACT_LAYOUT, len(refs))
    tiers = ns.get(refs, outs)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        assert tier == MISS or out == content_of(ref.key, CONTRACT_LAYOUT.payload_bytes)
    return sum(tier != MISS for tier in tiers)


class LifeContract:
    """See the module docstring. A subclass must override `namespace`; `settle` may be."""

    @pytest.fixture
    def namespace(self) -> LastingFactory:
        """A function that gives the namespace of a label in one store, with CONTRACT_LAYOUT."""
        raise NotImplementedError("a subclass of LifeContract must define the fixture 'namespace'")

    def settle(self, namespace: NamespaceLike) -> None:
        """Bring what was put to the tier under test."""

    def chunks(self) -> int:
        """How many chunks the store holds, whosever they are."""
        raise NotImplementedError("a subclass of LifeContract must define 'chunks'")

    # ------------------------------------------------------------------ time to live
    def test_a_time_to_live_is_shortened(self, namespace: LastingFactory) -> None:
        """Of some chunks; the others stay for ever."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(1, 4)).refs()
        _put(ns, refs)
        self.settle(ns)
        assert ns.set_ttl(refs[2:], 0.5) == 2
        wait_for(lambda: ns.match(refs).num_chunks == 2, "their end")
        assert _held(ns, refs) == 2
        wait_for(lambda: self.chunks() == 2, "the expired chunks to go")

    def test_a_time_to_live_is_lengthened(self, namespace: LastingFactory) -> None:
        """Or taken away: what would have gone is there when the others have."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(2, 6)).refs()
        _put(ns, refs, ttl_s=3)
        self.settle(ns)
        assert ns.set_ttl(refs[:2], None) == 2
        assert ns.set_ttl(refs[2:4], 3600) == 2
        wait_for(lambda: self.chunks() == 4, "the end of the rest")
        assert (ns.match(refs).num_chunks, _held(ns, refs)) == (4, 4)
        absent = ns.chain(tokens_of(3, 2)).refs()
        assert ns.set_ttl(absent, 5) == 0

    @pytest.mark.parametrize("ttl_s", [0.0, -1.0, 1e12, float("nan")])
    def test_what_is_no_time_is_refused(self, namespace: LastingFactory, ttl_s: float) -> None:
        """And changes nothing."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(4, 1)).refs()
        _put(ns, refs)
        with pytest.raises(StoreError):
            ns.set_ttl(refs, ttl_s)
        assert _held(ns, refs) == 1

    # ------------------------------------------------------------------ models that end
    def test_a_retired_model_is_gone(self, namespace: LastingFactory) -> None:
        """Its chunks take no room, leased or pinned; who has it open is refused; others stay."""
        ns, other = namespace("a"), namespace("b")
        refs, theirs = ns.chain(tokens_of(5, 5)).refs(), other.chain(tokens_of(5, 3)).refs()
        _put(ns, refs, pin=True)
        _put(other, theirs)
        self.settle(ns)
        ns.lease(refs, ns.match(refs).tiers)
        assert ns.retire() == 5
        assert self.chunks() == 3
        with pytest.raises(StoreError):
            ns.match(refs)
        with pytest.raises(StoreError):
            _put(ns, refs)
        with pytest.raises(StoreError):
            ns.retire()
        assert _held(other, theirs) == 3
        again = namespace("a")
        assert again.name != ns.name
        assert again.match(again.chain(tokens_of(5, 5))).num_chunks == 0
        assert again.match(refs).num_chunks == 0
        mine = again.chain(tokens_of(5, 5)).refs()
        assert set(_put(again, mine)) == {PutState.STORED}
        assert _held(again, mine) == 5

    def test_a_bumped_model_starts_empty_under_another_name(
        self, namespace: LastingFactory
    ) -> None:
        """Each time, and everybody who opens it finds the same one."""
        names = set()
        ns = namespace("a")
        for round_ in range(3):
            refs = ns.chain(tokens_of(6, 3)).refs()
            assert ns.match(refs).num_chunks == 0
            _put(ns, refs)
            self.settle(ns)
            assert _held(ns, refs) == 3
            names.add(ns.name)
            assert namespace("a").name == ns.name
            old, ns = ns, ns.bump()
            assert len(names) == round_ + 1
            assert ns.name == namespace("a").name == ns.identity.namespace
            assert ns.match(refs).num_chunks == 0
            with pytest.raises(StoreError):
                old.match(refs)
            assert self.chunks() == 0
        assert ns.name not in names
