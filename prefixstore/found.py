"""What finding chunks gives: how many there are, and a promise that they stay."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

REMOTE = 3  # the tier of what only a server or a pool has


@dataclass(frozen=True, slots=True)
class Match:
    """The longest run of chunks, from the first, that the store holds: the tier of each."""

    tiers: tuple[int, ...]
    chunk_tokens: int

    @property
    def num_chunks(self) -> int:
        """Chunks found."""
        return len(self.tiers)

    @property
    def num_tokens(self) -> int:
        """Tokens they stand for."""
        return len(self.tiers) * self.chunk_tokens


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise that the slots of some chunks stay theirs; release it, or it ends by itself.

    ``granting``: of one that was not waited for."""

    lease_id: bytes
    end_s: float
    granting: Future[Any] | None = field(default=None, compare=False, repr=False)
