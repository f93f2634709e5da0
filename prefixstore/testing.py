"""The contract of a store, as tests: subclass `StoreContract` for a tier, a backend or a port.

What every caller may rely on, whatever holds the bytes. A subclass gives a fixture ``namespace``:

    class TestMyTier(StoreContract):
        @pytest.fixture
        def namespace(self, tmp_path):
            with Store.open(tmp_path / "store", memory_bytes="4MiB", disk_bytes="4MiB") as store:
                yield lambda label: store.namespace(identity_for(label), CONTRACT_LAYOUT)

The truth is computed from the key alone, never with the code under test. Needs pytest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from prefixstore.errors import LayoutError
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    content_of,
    identity_for,
    outputs,
    region_of,
    regions,
    tokens_of,
    wait_for,
)  # fmt: skip

__all__ = [
    "CONTRACT_LAYOUT", "NamespaceFactory", "StoreContract", "content_of", "identity_for",
    "outputs", "region_of", "regions", "tokens_of", "wait_for",
]  # fmt: skip
NamespaceFactory = Callable[[str], NamespaceLike]


class StoreContract:
    """See the module docstring. A subclass must override `namespace` and `delete`."""

    tier: int | None = None  # the tier every hit must come from after `settle`; None: any
    capacity_chunks: int = 1024  # more of CONTRACT_LAYOUT than the tier has room for

    @pytest.fixture
    def namespace(self) -> NamespaceFactory:
        """A function that gives the namespace of a label in one store, with CONTRACT_LAYOUT."""
        raise NotImplementedError("a subclass of StoreContract must define the fixture 'namespace'")

    def settle(self, namespace: NamespaceLike) -> None:
        """Bring what was put to the tier under test. Nothing to do where puts go there."""

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        """Delete chunks."""
        raise NotImplementedError("a subclass of StoreContract must define 'delete'")

    # ------------------------------------------------------------------ helpers
    def put(self, ns: NamespaceLike, refs: Sequence[ChunkRef], **options: object) -> list[PutState]:
        """Put the content of chunks."""
        data = [content_of(ref.key, ns.layout.payload_bytes) for ref in refs]
        return ns.put(refs, data, **options)  # type: ignore[arg-type]

    def check_hits(self, ns: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        """All chunks must be there, in the tier under test, bit for bit."""
        self.settle(ns)
        outs = outputs(ns.layout, len(refs))
        tiers = ns.get(refs, outs)
        assert MISS not in tiers
        if self.tier is not None:
            assert tiers == [self.tier] * len(refs)
        for ref, out in zip(refs, outs, strict=True):
            assert out == content_of(ref.key, ns.layout.payload_bytes)

    def press(self, ns: NamespaceLike, seed: int = 99) -> None:
        """Store so much else that whatever may be evicted is."""
        for at in range(0, 2 * self.capacity_chunks, 64):
            self.put(ns, ns.chain(tokens_of(seed * 100_003 + at, 64)).refs())
            self.settle(ns)

    # ------------------------------------------------------------------ tests
    def test_round_trip_is_exact(self, namespace: NamespaceFactory) -> None:
        """What is put is what is got, bit for bit, and only under its own key."""
        ns = namespace("a")
        chain = ns.chain(tokens_of(1, 5))
        assert self.put(ns, chain.refs()) == [PutState.STORED] * 5
        self.check_hits(ns, chain.refs())
        self.check_hits(ns, random.Random(1).sample(chain.refs(), 5))

    def test_put_twice_exists(self, namespace: NamespaceFactory) -> None:
        """A second put does nothing, also with other bytes: the first stays."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(2, 3)).refs()
        self.put(ns, refs)
        self.settle(ns)
        assert ns.put(refs, [bytes(ns.layout.payload_bytes)] * 3) == [PutState.EXISTS] * 3
        self.check_hits(ns, refs)

    def test_match_stops_at_the_first_gap(self, namespace: NamespaceFactory) -> None:
        """Chunks behind a missing one do not count."""
        ns = namespace("a")
        chain = ns.chain(tokens_of(3, 6))
        refs = chain.refs()
        self.put(ns, refs[:2] + refs[3:])
        self.settle(ns)
        found = ns.match(chain)
        assert (found.num_chunks, found.num_tokens) == (2, 2 * ns.layout.chunk_tokens)
        if self.tier is not None:
            assert found.tiers == (self.tier,) * 2
        assert [tier != MISS for tier in ns.match_each(refs)] == [i != 2 for i in range(6)]
        self.put(ns, refs[2:3])
        assert ns.match(chain).num_chunks == ns.match(refs).num_chunks == 6

    def test_a_longer_prompt_shares_its_prefix(self, namespace: NamespaceFactory) -> None:
        """Prompts that differ from token n on share the chunks before it and no other."""
        ns = namespace("a")
        tokens = tokens_of(4, 4)
        self.put(ns, ns.chain(tokens).refs())
        size = ns.layout.chunk_tokens
        for at in (0, size - 1, size, 3 * size, 4 * size - 1):
            changed = tokens.copy()
            changed[at] += 1
            assert ns.match(ns.chain(changed)).num_chunks == at // size
        assert ns.match(ns.chain(tokens + tokens)).num_chunks == 4

    def test_other_salt_or_namespace_never_matches(self, namespace: NamespaceFactory) -> None:
        """The same tokens under another salt or model are other chunks."""
        ns, other = namespace("a"), namespace("b")
        tokens = tokens_of(5, 3)
        self.put(ns, ns.chain(tokens, salt=b"alice").refs())
        self.settle(ns)
        assert ns.match(ns.chain(tokens, salt=b"alice")).num_chunks == 3
        strangers = ns.chain(tokens), ns.chain(tokens, salt=b"bob"), other.chain(tokens, b"alice")
        for stranger in strangers:
            assert ns.match(stranger).num_chunks == other.match(stranger).num_chunks == 0
            assert ns.get(stranger.refs(), outputs(ns.layout, 3)) == [MISS] * 3

    def test_a_key_with_another_preimage_is_a_miss(self, namespace: NamespaceFactory) -> None:
        """Who comes with a key whose tokens are not the stored ones gets nothing."""
        ns = namespace("a")
        ref = ns.chain(tokens_of(6, 1)).refs()[0]
        self.put(ns, [ref])
        self.settle(ns)
        forged = ref._replace(preimage=ref.preimage[:-1] + bytes([ref.preimage[-1] ^ 1]))
        assert (ns.match([forged]).num_chunks, ns.match_each([forged, ref])[0]) == (0, MISS)
        assert ns.get([forged], outputs(ns.layout, 1)) == [MISS]
        self.check_hits(ns, [ref])

    def test_every_region_reads_exactly(self, namespace: NamespaceFactory) -> None:
        """Any layers x heads of a chunk that was written whole."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(7, 2)).refs()
        self.put(ns, refs)
        for roi in regions(ns.layout):
            self.settle(ns)
            outs = outputs(ns.layout, 2, roi)
            assert MISS not in ns.get(refs, outs, roi=roi)
            for ref, out in zip(refs, outs, strict=True):
                payload = content_of(ref.key, ns.layout.payload_bytes)
                assert out == region_of(payload, ns.layout, roi), roi

    @pytest.mark.parametrize("by", ["heads", "layers", "both"])
    def test_parts_complete_only_together(self, namespace: NamespaceFactory, by: str) -> None:
        """Ranks that each put their region make one chunk, there when the last one has come."""
        ns = namespace("a")
        layout = ns.layout
        layers = [(0, layout.num_layers)] if by == "heads" else [(0, 1), (1, layout.num_layers)]
        heads = [(0, layout.num_heads)] if by == "layers" else [(0, 1), (1, layout.num_heads)]
        parts = [Roi(*one, *two) for one in layers for two in heads]
        random.Random(8).shuffle(parts)
        refs = ns.chain(tokens_of(8, 3)).refs()
        whole = [content_of(ref.key, layout.payload_bytes) for ref in refs]
        for part in parts:
            assert ns.match(refs).num_chunks == 0
            assert ns.get(refs, outputs(layout, 3)) == [MISS] * 3
            states = ns.put(refs, [region_of(data, layout, part) for data in whole], roi=part)
            last = part is parts[-1]
            assert states == [PutState.STORED if last else PutState.PARTIAL] * 3
        self.check_hits(ns, refs)
        for roi in regions(layout):
            outs = outputs(layout, 3, roi)
            assert MISS not in ns.get(refs, outs, roi=roi)
            assert outs == [region_of(data, layout, roi) for data in whole]

    def test_another_group_finds_the_chunk_busy(self, namespace: NamespaceFactory) -> None:
        """A chunk is never a mix of two engines' bytes."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(9, 1)).refs()
        data = content_of(refs[0].key, ns.layout.payload_bytes)
        low, high = Roi(0, ns.layout.num_layers, 0, 1), Roi(0, ns.layout.num_layers, 1, 2)
        part = region_of(data, ns.layout, low)
        assert ns.put(refs, [part], roi=low, group=1) == [PutState.PARTIAL]
        garbage = bytes(ns.layout.roi_bytes(high))
        assert ns.put(refs, [garbage], roi=high, group=2) == [PutState.BUSY]
        assert ns.match(refs).num_chunks == 0
        part = region_of(data, ns.layout, high)
        assert ns.put(refs, [part], roi=high, group=1) == [PutState.STORED]
        self.check_hits(ns, refs)

    def test_a_time_to_live_ends(self, namespace: NamespaceFactory) -> None:
        """After its time a chunk is gone and can be stored anew; others stay."""
        ns = namespace("a")
        brief, long = ns.chain(tokens_of(10, 2)).refs(), ns.chain(tokens_of(11, 2)).refs()
        self.put(ns, brief, ttl_s=0.5)
        self.put(ns, long, ttl_s=3600)
        self.settle(ns)
        wait_for(lambda: ns.match(brief).num_chunks == 0, "the end of the time to live")
        assert ns.get(brief, outputs(ns.layout, 2)) == [MISS] * 2
        wait_for(
            lambda: (
                set(self.put(ns, brief)) <= {PutState.STORED, PutState.EXISTS}
                and ns.match(brief).num_chunks == 2
            ),
            "room for the expired chunks' successors",
        )
        self.check_hits(ns, brief + long)

    def test_delete(self, namespace: NamespaceFactory) -> None:
        """A deleted chunk is gone from every tier; it can be stored again."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(12, 4)).refs()
        self.put(ns, refs)
        self.settle(ns)
        self.delete(ns, refs[1:3])
        assert ns.match(refs).num_chunks == 1
        outs = outputs(ns.layout, 4)
        assert [tier != MISS for tier in ns.get(refs, outs)] == [True, False, False, True]
        stored, exists = PutState.STORED, PutState.EXISTS
        assert self.put(ns, refs) == [exists, stored, stored, exists]
        self.check_hits(ns, refs)

    def test_a_pinned_chunk_stays(self, namespace: NamespaceFactory) -> None:
        """Under pressure that evicts what is not pinned."""
        ns = namespace("a")
        pinned, other = ns.chain(tokens_of(13, 2)), ns.chain(tokens_of(14, 2))
        self.put(ns, pinned.refs(), pin=True)
        self.put(ns, other.refs())
        self.press(ns)
        assert ns.match(other).num_chunks == 0, "the pressure did not suffice to evict anything"
        assert ns.match(pinned).num_chunks == 2
        outs = outputs(ns.layout, 2)
        assert MISS not in ns.get(pinned.refs(), outs)
        assert outs == [content_of(key, ns.layout.payload_bytes) for key in pinned.keys]

    def test_a_lease_protects(self, namespace: NamespaceFactory) -> None:
        """What was matched and leased is still there when it is read; released, it may go."""
        ns = namespace("a")
        chain, other = ns.chain(tokens_of(15, 2)), ns.chain(tokens_of(16, 2))
        self.put(ns, chain.refs() + other.refs())
        self.settle(ns)
        lease, held = ns.lease(chain.refs(), ns.match(chain).tiers)
        assert held == 2
        self.press(ns)
        assert ns.match(other).num_chunks == 0, "the pressure did not suffice to evict anything"
        assert ns.match(chain).num_chunks == 2
        self.check_hits(ns, chain.refs())
        ns.release(lease)
        self.press(ns, seed=98)
        self.press(ns, seed=97)
        assert ns.match(chain).num_chunks == 0

    def test_a_lease_of_what_is_gone_is_refused(self, namespace: NamespaceFactory) -> None:
        """The count of held chunks ends at the first that has gone since the match."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(17, 3)).refs()
        self.put(ns, refs)
        self.settle(ns)
        tiers = ns.match(refs).tiers
        self.delete(ns, refs[1:2])
        lease, held = ns.lease(refs, tiers)
        assert held == 1
        ns.release(lease)

    def test_buffers_of_a_wrong_size_are_refused(self, namespace: NamespaceFactory) -> None:
        """Nothing is read past a buffer or left half filled without a word."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(18, 2)).refs()
        size = ns.layout.payload_bytes
        for wrong in (0, size - 1, size + 1):
            with pytest.raises(LayoutError):
                ns.put(refs, [bytes(size), bytes(wrong)])
        assert ns.match(refs).num_chunks == 0
        assert self.put(ns, refs) == [PutState.STORED] * 2
        self.settle(ns)
        for wrong in (0, size - 1, size + 1):
            with pytest.raises(LayoutError):
                ns.get(refs, [memoryview(bytearray(wrong))] * 2)
        for roi in (Roi(0, 0, 0, 1), Roi(0, 1, 1, 1), Roi(0, 99, 0, 1), Roi(-1, 1, 0, 1)):
            with pytest.raises(LayoutError):
                ns.get(refs, outputs(ns.layout, 2), roi=roi)
            with pytest.raises(LayoutError):
                ns.put(refs, [b"", b""], roi=roi)
        self.check_hits(ns, refs)

    def test_empty_inputs(self, namespace: NamespaceFactory) -> None:
        """No chunks is no error; a prompt shorter than a chunk has none."""
        ns = namespace("a")
        assert ns.put([], []) == []
        assert ns.get([], []) == []
        assert ns.match([]).num_chunks == ns.match(ns.chain()).num_tokens == 0
        short = ns.chain(range(ns.layout.chunk_tokens - 1))
        assert (len(short), ns.match(short).num_chunks) == (0, 0)
        lease, held = ns.lease([], [])
        assert held == 0
        ns.release(lease)

    def test_a_large_batch(self, namespace: NamespaceFactory) -> None:
        """More chunks than one transaction takes; one stands twice in the first, and once more."""
        ns = namespace("a")
        refs = ns.chain(tokens_of(19, 150)).refs()
        states = self.put(ns, [*refs[:100], refs[0], *refs[100:], refs[0]])
        assert {states.pop(100), states.pop()} <= {PutState.EXISTS, PutState.BUSY}
        assert states == [PutState.STORED] * 150
        self.check_hits(ns, refs)
        assert ns.match(refs).num_chunks == 150
