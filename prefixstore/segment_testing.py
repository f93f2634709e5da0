"""The contract of finding segments, as tests: what every caller may rely on, whatever holds them.

Like `testing.StoreContract`, to be subclassed with the same fixture ``namespace`` (CONTRACT_LAYOUT:
4 tokens a chunk) and ``settle`` and ``delete`` where they are needed. The truth is computed from
the tokens alone. Needs pytest.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from prefixstore.errors import ConfigError
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.namespace import MISS
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment
from prefixstore.testing import NamespaceFactory
from prefixstore.testing_data import content_of, outputs, tokens_of

_OTHER = -7  # a token that no text of these tests has


class SegmentContract:
    """See the module docstring. A subclass must override `namespace` and `delete`."""

    @pytest.fixture
    def namespace(self) -> NamespaceFactory:
        """A function that gives the namespace of a label in one store, with CONTRACT_LAYOUT."""
        raise NotImplementedError("a subclass must define the fixture 'namespace'")

    def settle(self, namespace: NamespaceLike) -> None:
        """Bring what was put to the tier under test. Nothing to do where puts go there."""

    def delete(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> None:
        """Delete chunks."""
        raise NotImplementedError("a subclass must define 'delete'")

    def keep(
        self, ns: NamespaceLike, tokens: list[int], salt: bytes = b"", alone: bool = False
    ) -> None:
        """Store a text."""
        refs = ns.chain(tokens, salt=salt).refs()
        ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs], alone=alone)
        self.settle(ns)

    def places(self, found: list[Segment]) -> list[tuple[int, int, int]]:
        """(start, number of tokens, start in the source) of each."""
        return [(one.start, one.num_tokens, one.source_start) for one in found]

    # ------------------------------------------------------------------ tests
    def test_runs_are_found_at_any_offset(self, namespace: NamespaceFactory) -> None:
        """From any token to any token of a stored text, to any place of the prompt; exactly."""
        ns = namespace("a")
        text = tokens_of(1, 60)
        self.keep(ns, text)
        for at, count, place in ((0, 64, 1), (1, 64, 0), (3, 65, 7), (99, 141, 64), (6, 200, 33)):
            prompt = [_OTHER] * place + text[at : at + count] + [_OTHER] * 9
            assert self.places(ns.find_segments(prompt)) == [(place, count, at)]
        prompt = [*text[:100], _OTHER, *text[40:140], *text[:100], *text[77:140]]
        assert self.places(ns.find_segments(prompt)) == [
            (0, 100, 0), (101, 100, 40), (201, 100, 0),
        ]  # fmt: skip
        assert self.places(ns.find_segments(text, start=37)) == [(37, 203, 37)]

    def test_shorter_runs_are_not(self, namespace: NamespaceFactory) -> None:
        """A run of fewer than ``min_tokens`` is none, however many there are; fewer than the
        shortest that is sure to be found cannot be asked for."""
        ns = namespace("a")
        text = tokens_of(2, 60)
        self.keep(ns, text)
        short = MIN_SEGMENT_TOKENS - 1
        prompt = [token for at in range(0, 170, 9) for token in [*text[at : at + short], _OTHER]]
        assert ns.find_segments(prompt) == []
        assert ns.find_segments(text[:150], min_tokens=151) == []
        with pytest.raises(ConfigError):
            ns.find_segments(text, min_tokens=short)

    def test_the_chunks_of_a_segment_hold_its_bytes(self, namespace: NamespaceFactory) -> None:
        """Its chunks are read as any others; its pieces name each token of it once."""
        ns = namespace("a")
        text, size = tokens_of(3, 60), ns.layout.chunk_tokens
        self.keep(ns, text)
        [found] = ns.find_segments([_OTHER, *text[10:150]])
        assert found.refs == tuple(ns.chain(text).refs(10 // size, -(-150 // size)))
        outs = outputs(ns.layout, len(found.refs))
        assert ns.get(found.refs, outs) == list(found.tiers)
        assert outs == [content_of(ref.key, ns.layout.payload_bytes) for ref in found.refs]
        named = [(piece.ref.depth * size + piece.offset + i)
                 for piece in found.pieces for i in range(piece.num_tokens)]  # fmt: skip
        assert named == list(range(10, 150))

    def test_another_salt_or_namespace_finds_nothing(self, namespace: NamespaceFactory) -> None:
        """Whatever the tokens."""
        ns, other = namespace("a"), namespace("b")
        text = tokens_of(4, 40)
        self.keep(ns, text, salt=b"alice")
        assert self.places(ns.find_segments(text[1:], salt=b"alice")) == [(0, 159, 1)]
        for stranger, salt in ((ns, b""), (ns, b"bob"), (other, b""), (other, b"alice")):
            assert stranger.find_segments(text[1:], salt=salt) == []

    def test_a_segment_goes_with_its_chunks(self, namespace: NamespaceFactory) -> None:
        """And what is left of the text on either side stays."""
        ns = namespace("a")
        text = tokens_of(5, 60)
        self.keep(ns, text)
        self.delete(ns, ns.chain(text).refs(30, 31))
        assert self.places(ns.find_segments(text[1:])) == [(0, 119, 1), (123, 116, 124)]
        self.keep(ns, text)
        assert self.places(ns.find_segments(text[1:])) == [(0, 239, 1)]

    def test_what_was_encoded_alone_is_preferred(self, namespace: NamespaceFactory) -> None:
        """Also if it came later, and stands deeper in its prompt."""
        ns = namespace("a")
        document = tokens_of(6, 100)
        self.keep(ns, [*tokens_of(7, 1), *document])
        self.keep(ns, [*tokens_of(8, 16), *document], alone=True)
        [found] = ns.find_segments([_OTHER, *document])
        assert MISS not in found.tiers
        assert (found.start, found.num_tokens, found.source_start) == (1, 400, 64)
        assert found.alone
