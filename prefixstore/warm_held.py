"""What a store has of the pieces that are to be warmed. Asks only; see `warm_store` for how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.warm_contexts import digest
from prefixstore.warm_manifest import Entry
from prefixstore.warm_plan import Piece, Text
from prefixstore.warm_store import Target


@dataclass(frozen=True, slots=True)
class State:
    """What the store has of a piece. ``chunks`` are those with tokens of the document."""

    complete: bool
    chunks: int
    measured: bool

    def needs(self, piece: Piece) -> tuple[bool, bool]:
        """Whether it must be computed, and whether it must be measured."""
        if not piece.own_chunks:
            return False, False
        return not self.complete, bool(piece.contexts) and not self.measured


@dataclass(frozen=True, slots=True)
class Held:
    """A model's part of a store, and what it has of pieces."""

    target: Target
    namespace: NamespaceLike

    def refs(self, piece: Piece) -> list[ChunkRef]:
        """The chunks of a piece, those of the preamble first."""
        return self.namespace.chain(piece.prompt).refs()

    def missing(self, refs: Sequence[ChunkRef]) -> tuple[int, int]:
        """How many chunks a match does not find, and how many are not where they shall stay. Raises
        StoreError."""
        count, there = self.target.call(lambda: self.target.kept(self.namespace, refs))
        return len(refs) - count, there.count(False)

    def look(self, piece: Piece) -> State:
        """Ask the store. Raises StoreError."""
        refs = self.refs(piece)
        own = refs[piece.first_chunk :]

        def ask() -> State:
            count, there = self.target.kept(self.namespace, refs)
            here = there[piece.first_chunk :]
            measured = False
            if own and all(here):  # what is noted of a chunk goes when it goes
                known = self.namespace.staleness_of(own)
                measured = all(value is not None for value in known)
            return State(all(there) and count == len(refs), sum(here), measured)

        return self.target.call(ask)

    def entry(self, text: Text, piece: Piece, tag: str | None) -> Entry | None:
        """A piece's line of the manifest; None as long as it is not whole in the store."""
        if not piece.own_chunks or not self.look(piece).complete:
            return None
        keys = [ref.key.hex() for ref in self.refs(piece)[piece.first_chunk :]]
        return Entry(
            text.name, text.tag if tag is None else tag, digest(piece.ids), piece.start,
            piece.stored_tokens, digest(piece.preamble), len(piece.preamble), keys,
        )  # fmt: skip
