"""What a look-up asks for, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prefixstore.interface import NamespaceLike
from prefixstore.keys import KeyChain
from prefixstore.namespace import Lease, Match
from prefixstore.segments import Segment


@dataclass(frozen=True, slots=True)
class Found:
    """The answer: what is stored, and the leases on it."""

    namespace: NamespaceLike
    match: Match
    leases: tuple[tuple[NamespaceLike, Lease], ...]
    segments: tuple[Segment, ...] = ()
    staleness: Mapping[bytes, bytes] = field(default_factory=dict)  # of their chunks: float16
    # Of a model that has states: the numbers of chunks behind which they are stored.
    states: tuple[int, ...] | None = None

    @property
    def loadable(self) -> tuple[int, ...]:
        """The tiers of chunks that a load may take."""
        if self.states is None:
            return self.match.tiers
        return self.match.tiers[: max(self.states, default=0)]

    def miss(self, start: int, beyond: int) -> str:
        """The count a request goes to that loads nothing, though it could load ``beyond`` chunks
        from chunk ``start`` on."""
        if self.match.num_chunks == 0:
            return "miss_absent"
        if beyond == 0:
            return "miss_not_needed"
        ends = self.states is None or any(start < place <= start + beyond for place in self.states)
        return "miss_slower_to_load" if ends else "miss_absent"


@dataclass(frozen=True, slots=True)
class Search:
    """Segments are wanted too: of these prompt tokens, at least so many each."""

    tokens: list[int]
    min_tokens: int
    want_staleness: bool


@dataclass(frozen=True, slots=True)
class StatesAsked:
    """The states are wanted too: by their chain, behind so many chunks at most. ``beside`` names
    the namespace of the KV."""

    chain: KeyChain
    beside: bytes
    most: int
