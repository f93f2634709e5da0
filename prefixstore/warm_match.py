"""What of a prompt a store has: part by part, from which document, and what the rest would cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefixstore.codec import LOSSY_NAMES, NONE
from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.ledger import TIER_NAMES
from prefixstore.rows import FLAG_ALONE
from prefixstore.segment_choice import worth_reusing
from prefixstore.segments import MIN_SEGMENT_TOKENS
from prefixstore.warm_manifest import Entry, Manifest
from prefixstore.warm_store import Listed, Target

EXACT, SEGMENT, NEW = "exact", "segment", "new"


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens ``[start, start + tokens)`` of a prompt. All but the first three are empty for what
    is ``new``."""

    kind: str  # exact: from the first token on; segment: from elsewhere; new: computed
    start: int
    tokens: int
    source: str = ""  # name of the document, or the tag of its chunks
    source_offset: int | None = None  # in the document if that is known, else in its prompt
    chunks: int = 0
    tiers: dict[str, int] | None = None  # chunks in each
    alone: bool | None = None  # encoded behind a preamble only; None: a server does not tell
    measured_chunks: int | None = None  # whose staleness is known


@dataclass(frozen=True, slots=True)
class MatchReport:
    """A prompt against a store. ``computed_tokens`` is in full passes of one token."""

    store: str
    namespace: str
    model: str
    kv_dtype: str
    tokens: int
    budget: float
    parts: list[Part]
    load_bytes: int
    exact_tokens: int
    segment_tokens: int
    new_tokens: int
    computed_tokens: float  # new ones, and the budget's share of the segments
    computed_share: float
    computed_tokens_exact: int  # without blending: all behind the exact prefix

    def to_json(self) -> dict[str, Any]:
        """Stable names."""
        return asdict(self)


def choose_namespace(
    target: Target,
    model: ModelIdentity,
    tokens: Sequence[int],
    prefix: str = "",
    codec: str = NONE,
) -> Listed:
    """The namespace of a model's weights, for engines with a codec; of several the one with most
    chunks, of a server's the one with most of the prompt. Or by its digits.

    Raises ConfigError that names what is there, StoreError.
    """
    listed = target.listed()
    if prefix:
        found = [one for one in listed if one.name.hex().startswith(prefix.lower())]
    else:
        ours = (model.architecture, model.weights, "")
        found = [
            one for one in listed
            if (one.identity.architecture, one.identity.weights, one.identity.lora) == ours
            and one.identity.codec == (codec if codec in LOSSY_NAMES else "")
        ]  # fmt: skip
    if not found:
        there = ", ".join(
            f"{one.name.hex()[:12]} ({one.identity.architecture}, {one.identity.stored_as})"
            for one in listed
        )
        rounded = codec in LOSSY_NAMES or any(one.identity.codec for one in listed)
        hint = "; give the --codec of your engines" if rounded else ""
        raise ConfigError(
            f"{target.address} has nothing of this model"
            + (f" rounded by {codec}" if codec in LOSSY_NAMES else ""),
            f"it has {there}{hint}" if there else "it is empty: serve with it, or warm it",
        )
    return max(found, key=lambda one: target.weight(one, tokens)) if len(found) > 1 else found[0]


def match_prompt(
    target: Target,
    chosen: Listed,
    tokens: Sequence[int],
    budget: float,
    names: Manifest | None = None,
) -> MatchReport:
    """What an engine with blending would reuse of a prompt, as segments of at least
    MIN_SEGMENT_TOKENS, if all of it is faster to load than to compute (``load: always``).

    ``names`` says which document is in which chunks; None: what the folder has, if it is one.
    Raises ConfigError for a budget outside of 0 to 1, StoreError.
    """
    if not 0 <= budget <= 1:
        raise ConfigError(f"a budget of {budget}", "give a share from 0 to 1")
    if not tokens:
        raise ConfigError("the prompt has no tokens", "give a text")
    namespace = target.store.namespace(chosen.identity, chosen.layout)
    if names is None and target.address.folder is not None:
        names = Manifest.of(target.address.folder, namespace.name)
    sources = _Sources(target, namespace, names)
    refs = namespace.chain(tokens).refs()
    match = namespace.match(refs)
    # The engine computes the last token in any case.
    exact = min(match.num_tokens, len(tokens) - 1)
    parts = []
    if match.num_chunks:
        tiers, held = match.tiers, refs[: match.num_chunks]
        parts.append(sources.part(EXACT, 0, exact, 0, held, tiers))
    loaded = match.num_chunks
    segments = []
    if len(tokens) - match.num_tokens >= MIN_SEGMENT_TOKENS:
        segments = namespace.find_segments(tokens, start=match.num_tokens)
    at = exact
    for segment, start, stop in worth_reusing(segments, exact, len(tokens)):
        if at < start:
            parts.append(Part(NEW, at, start - at))
        parts.append(sources.part(
            SEGMENT, start, stop - start, segment.source_start, segment.refs, segment.tiers,
            segment.alone,
        ))  # fmt: skip
        loaded += len(segment.refs)
        at = stop
    if at < len(tokens):
        parts.append(Part(NEW, at, len(tokens) - at))
    counts = {
        kind: sum(part.tokens for part in parts if part.kind == kind)
        for kind in (EXACT, SEGMENT, NEW)
    }
    computed = counts[NEW] + budget * counts[SEGMENT]
    return MatchReport(
        str(target.address), chosen.name.hex(), chosen.identity.architecture,
        chosen.identity.stored_as, len(tokens), budget, parts,
        loaded * chosen.layout.payload_bytes, counts[EXACT], counts[SEGMENT], counts[NEW],
        computed, computed / len(tokens), len(tokens) - exact,
    )  # fmt: skip


class _Sources:
    """Where chunks come from: the manifest says it by name, their rows by tag."""

    def __init__(self, target: Target, namespace: NamespaceLike, names: Manifest | None) -> None:
        self._target, self._namespace = target, namespace
        self._entries: dict[str, Entry] = {}
        for entry in names.read() if names is not None else ():
            self._entries.update(dict.fromkeys(entry.keys, entry))

    def part(
        self, kind: str, start: int, tokens: int, source_start: int, refs: Sequence[ChunkRef],
        tiers: Sequence[int], alone: bool | None = None,
    ) -> Part:  # fmt: skip
        """A part that is stored; ``source_start``: its place in the prompt it was computed in;
        ``alone``: as far as it is known without its rows."""
        rows = self._target.rows(refs)
        # Of an exact prefix the last chunk names the document: the first are the preamble's.
        entry = next((e for ref in reversed(refs) if (e := self._entries.get(ref.key.hex()))), None)
        tags = [row.tag.decode(errors="replace") for row in reversed(rows) if row.tag]
        offset: int | None = source_start
        if entry is not None:
            offset = entry.start + source_start - entry.preamble_tokens
            if kind == EXACT:
                offset = None  # it begins with the preamble
        known = self._namespace.staleness_of(refs)
        held = Counter(tiers)
        return Part(
            kind, start, tokens, entry.name if entry else next(iter(tags), ""), offset,
            len(refs), {TIER_NAMES[tier]: count for tier, count in sorted(held.items())},
            all(row.flags & FLAG_ALONE for row in rows) if rows else alone,
            sum(value is not None for value in known),
        )  # fmt: skip
