"""What is to be computed: each document cut into pieces that fit, and what to measure it behind.

Pure, and the same again for the same documents: an interrupted run goes on where it was.

A piece is the preamble and some of a document. Its staleness (`blend.staleness`) is measured behind
contexts made of other documents, a whole number of chunks each, so that its tokens stand in the
same places of their chunks there. What must hold: no context has a part of the document itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity
from prefixstore.layout import Layout
from prefixstore.warm_contexts import CONTEXT_TOKENS, Contexts

_MEASURED_SHARE = 4  # of the memory tier one part in so many holds what is measured


@dataclass(frozen=True, slots=True)
class Engine:
    """What is known of an engine before it is started."""

    model: str
    identity: ModelIdentity
    layout: Layout
    max_prompt_tokens: int
    config: dict[str, Any]  # the part of the model's config.json about text
    unmeasurable: str = ""  # why its KV cannot be moved, so that staleness means nothing


@dataclass(frozen=True, slots=True)
class Text:
    """A document as token ids."""

    name: str
    tag: str
    ids: list[int]


@dataclass(frozen=True)
class Piece:
    """A request: ``preamble`` and ``ids``, which are the tokens from ``start`` on of a document."""

    document: int
    start: int
    preamble: list[int]
    ids: list[int]
    chunk_tokens: int
    contexts: tuple[list[int], ...] = ()
    unmeasured: str = ""  # why there are no contexts

    @property
    def prompt(self) -> list[int]:
        """Its token ids, the preamble first."""
        return self.preamble + self.ids

    @property
    def first_chunk(self) -> int:
        """The first chunk that has a token of the document."""
        return len(self.preamble) // self.chunk_tokens

    @property
    def num_chunks(self) -> int:
        """Whole chunks, those of the preamble included."""
        return (len(self.preamble) + len(self.ids)) // self.chunk_tokens

    @property
    def own_chunks(self) -> int:
        """Whole chunks that have a token of the document."""
        return max(0, self.num_chunks - self.first_chunk)

    @property
    def stored_tokens(self) -> int:
        """Tokens of the document that whole chunks have."""
        whole = self.num_chunks * self.chunk_tokens - len(self.preamble)
        return min(len(self.ids), max(0, whole))

    @property
    def measuring_tokens(self) -> int:
        """Tokens of the prompts it is measured with."""
        whole = self.num_chunks * self.chunk_tokens
        return sum(len(context) + whole for context in self.contexts)

    @property
    def measuring_chunks(self) -> int:
        """Chunks stored at a time to measure it: behind one context after the other."""
        longest = max(map(len, self.contexts), default=0)
        return longest // self.chunk_tokens + self.num_chunks if self.contexts else 0

    def behind(self, context: list[int]) -> list[int]:
        """The prompt that measures it: whole chunks, the context between preamble and text."""
        return self.preamble + context + self.ids[: self.stored_tokens]


def make_plan(
    texts: Sequence[Text],
    preamble: list[int],
    engine: Engine,
    memory_bytes: int | None,
    *,
    staleness: bool = True,
) -> list[Piece]:
    """The pieces of all documents, in order; of documents with the same ids only the first.

    ``memory_bytes`` is the cap of the memory tier, None one that is not known. Raises ConfigError
    when the preamble leaves no room for a chunk.
    """
    size = engine.layout.chunk_tokens
    why = "not asked for" if not staleness else engine.unmeasurable
    contexts = Contexts([text.ids for text in texts], size)
    room = engine.max_prompt_tokens - len(preamble)
    if room < size:
        raise ConfigError(
            f"a preamble of {len(preamble)} tokens leaves {room} of {engine.max_prompt_tokens}",
            f"at least a chunk of {size} must fit; shorten it, or raise max_model_len",
        )
    most = None  # chunks
    if memory_bytes is not None:
        most = memory_bytes // _MEASURED_SHARE // engine.layout.slot_bytes
    pieces: list[Piece] = []
    for index, text in enumerate(texts):
        if contexts.first[index] != index:
            continue
        for start, stop in _cuts(len(text.ids), len(preamble), size, room, bool(why)):
            bare = Piece(index, start, preamble, text.ids[start:stop], size, (), why)
            pieces.append(bare if why else _with_contexts(bare, contexts, room, most))
    return pieces


def _cuts(count: int, before: int, size: int, room: int, to_the_end: bool) -> list[tuple[int, int]]:
    """``[start, stop)`` of the pieces of a document with ``count`` tokens.

    All but the last end with a chunk. If it must be cut, then so that contexts have room too.
    """
    if count <= room:
        return [(0, count)]
    most = room if to_the_end else max(room - CONTEXT_TOKENS, room // 2, size)
    step = (before + most) // size * size - before
    if step < 1:
        step = room
    return [(at, min(at + step, count)) for at in range(0, count, step)]


def _with_contexts(piece: Piece, contexts: Contexts, room: int, most: int | None) -> Piece:
    size = piece.chunk_tokens
    found, why = contexts.of(piece.document), ""
    free = (room - piece.stored_tokens) // size * size
    fitting = tuple(context[:free] for context in found if context[:free])
    measured = replace(piece, contexts=fitting)
    if not piece.own_chunks:
        why = "shorter than a chunk"
    elif not found:
        why = contexts.why
    elif not fitting:
        why = "it fills the model's length: nothing fits before it"
    elif most is not None and measured.measuring_chunks > most:
        why = (
            f"the memory tier is too small: measuring it takes {measured.measuring_chunks} "
            f"chunks, and may take {most}"
        )
    return replace(piece, unmeasured=why) if why else measured
