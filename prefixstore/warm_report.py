"""What warming reports: each document's part, and what it adds up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prefixstore.config import format_bytes
from prefixstore.warm_contexts import first_of_each
from prefixstore.warm_held import State
from prefixstore.warm_plan import Engine, Piece, Text

_TIERS = ("memory", "disk")


@dataclass(frozen=True, slots=True)
class Warmed:
    """One document. ``chunks`` are the whole ones that hold tokens of it, ``bytes`` their KV."""

    name: str
    tokens: int
    pieces: int  # more than 1: it was longer than the model takes
    chunks: int
    stored_chunks: int  # by this run; in a dry run those it would store
    bytes: int
    tail_tokens: int  # behind its last whole chunk: not stored
    status: str  # stored, skipped (all was there), incomplete, too short, same as ...
    staleness: str  # measured, known (from before), to measure, or why it is not


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What a run did, or in a dry run would do."""

    store: str
    model: str
    namespace: str  # in hex; "" in a dry run if a server has yet to name it
    chunk_tokens: int
    chunk_bytes: int
    preamble_tokens: int
    dry_run: bool
    documents: list[Warmed]
    computed_tokens: int  # of all prompts, those that measure too; in a dry run to be computed
    seconds: float  # of computing, measuring and storing
    engine_start_s: float | None  # None: it was not needed
    notes: list[str] = field(default_factory=list)

    @property
    def lost_chunks(self) -> int:
        """Chunks that are not there though their documents were to be stored."""
        if self.dry_run:
            return 0
        return sum(d.chunks - d.stored_chunks for d in self.documents if d.status == "incomplete")

    def to_json(self) -> dict[str, Any]:
        """Stable names."""
        documents = [asdict(document) for document in self.documents]
        names = ("tokens", "chunks", "stored_chunks", "bytes", "tail_tokens")
        totals = {name: sum(entry[name] for entry in documents) for name in names}
        speed = self.computed_tokens / self.seconds if self.seconds else 0.0
        return {
            **asdict(self),
            "documents": documents,
            "lost_chunks": self.lost_chunks,
            "totals": totals,
            "tokens_per_s": speed,
        }


def report_documents(
    texts: Sequence[Text],
    pieces: Sequence[Piece],
    before: Sequence[State],
    after: Sequence[State] | None,
    unmeasured: Mapping[int, str],
    chunk_bytes: int,
) -> list[Warmed]:
    """One entry for each document; ``after`` None: a dry run. ``unmeasured``: why, by piece."""
    first = first_of_each([text.ids for text in texts])
    found: list[Warmed] = []
    for index, text in enumerate(texts):
        if first[index] != index:
            same = f"same as {texts[first[index]].name}"
            found.append(Warmed(text.name, len(text.ids), 0, 0, 0, 0, 0, same, "-"))
            continue
        own = [number for number, piece in enumerate(pieces) if piece.document == index]
        chunks = sum(pieces[number].own_chunks for number in own)
        there = sum(before[number].chunks for number in own)
        if after is None:
            stored = chunks - there
        else:
            stored = sum(max(0, after[n].chunks - before[n].chunks) for n in own)
        tail = len(text.ids) - sum(pieces[number].stored_tokens for number in own)
        done = [number for number in own if pieces[number].own_chunks]
        found.append(
            Warmed(
                text.name, len(text.ids), len(own), chunks, stored, chunks * chunk_bytes, tail,
                _status(done, before, after), _staleness(done, pieces, before, after, unmeasured),
            )
        )  # fmt: skip
    return found


def _status(own: Sequence[int], before: Sequence[State], after: Sequence[State] | None) -> str:
    if not own:
        return "too short"
    if after is None:
        return "skipped" if all(before[n].complete for n in own) else "to store"
    if not all(after[n].complete for n in own):
        return "incomplete"
    return "skipped" if all(before[n].complete for n in own) else "stored"


def _staleness(
    own: Sequence[int],
    pieces: Sequence[Piece],
    before: Sequence[State],
    after: Sequence[State] | None,
    unmeasured: Mapping[int, str],
) -> str:
    if own and all(before[n].measured for n in own):
        return "known"
    if own and after is not None and all(after[n].measured for n in own):
        return "measured"
    whys = [unmeasured.get(n) or pieces[n].unmeasured for n in own]
    why = next(filter(None, whys), "")
    return why or ("to measure" if after is None and own else "-")


def notes_on(
    engine: Engine,
    pieces: Sequence[Piece],
    documents: Sequence[Warmed],
    sizes: tuple[int, int] | None,
    staleness: bool,
) -> list[str]:
    """What the user should know. ``sizes``: the caps of the memory and of the disk tier, None if
    they are not known."""
    found = []
    if staleness and engine.unmeasurable:
        found.append(f"staleness is not measured: {engine.unmeasurable}")
    cut = sum(document.pieces > 1 for document in documents)
    if cut:
        which = "1 document is" if cut == 1 else f"{cut} documents are"
        found.append(
            f"{which} longer than the model takes ({engine.max_prompt_tokens} tokens), and cut; "
            "each piece stands behind the preamble"
        )
    if sizes is None:
        return found
    needed = sum(piece.num_chunks for piece in pieces) * engine.layout.slot_bytes
    tier = 1 if sizes[1] else 0
    if needed > sizes[tier]:
        found.append(
            f"the documents take {format_bytes(needed)}, the {_TIERS[tier]} tier has "
            f"{format_bytes(sizes[tier])}: what is stored first will be evicted"
        )
    return found
