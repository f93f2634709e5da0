"""Whether a load is worth going on with: its own speed against that of computing the rest.

The plan (`connector.plan`) goes by what was measured before. A tier that was never measured, or
that has become slow since, is found out by the load itself.
"""

from __future__ import annotations

READ_CHUNKS_MAX = 16  # at once: what is lost to a tier that becomes slow in the middle
LOST_S_MAX = 0.01  # or the time of computing a chunk: a hiccup of the host is no slow tier


class Pace:
    """The pace of one load whose chunks are computed in ``compute_s`` each.

    One-sided CUSUM (E. S. Page, Continuous inspection schemes, 1954): what the load has lost
    against computing since it was last level with it. What it won before does not count, so that
    slow chunks behind fast ones are found as soon.
    """

    def __init__(self, compute_s: float) -> None:
        self._compute_s = compute_s
        self._allowed_s = max(compute_s, LOST_S_MAX)
        self._chunks, self._seconds = 0, 0.0  # since it was level
        self._next = 1

    def to_read(self, most: int) -> int:
        """How many chunks to read next, of at most so many: one, then twice as many each time."""
        count = min(self._next, most)
        self._next = min(2 * self._next, READ_CHUNKS_MAX)
        return count

    def went(self, chunks: int, seconds: float) -> None:
        """So many more chunks took so long."""
        self._chunks += chunks
        self._seconds += seconds
        if self._seconds <= self._chunks * self._compute_s:
            self._chunks, self._seconds = 0, 0.0

    def too_slow(self, to_load: int, to_compute: int) -> bool:
        """Whether to end a load of which ``to_load`` chunks are missing and ``to_compute`` must be
        computed then: more than those where some that are loaded would be of no use."""
        if self._seconds - self._chunks * self._compute_s <= self._allowed_s:
            return False
        return to_load * self._seconds > to_compute * self._compute_s * self._chunks

    @property
    def chunks_per_s(self) -> float:
        """Its speed since it was last level with computing; 0 if it is."""
        return self._chunks / self._seconds if self._chunks else 0.0
