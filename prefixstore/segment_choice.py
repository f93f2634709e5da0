"""Which of the segments found in a prompt are worth reusing. Used by the connector and by `match`.

What lies between the reused parts must be computed before the engine goes on, so reuse ends where
that is no longer worth it: where the tokens reused exceed those between by most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prefixstore.segments import Segment

PART_TOKENS_MIN = 16  # a shorter rest of a segment is not worth its load


class Part(NamedTuple):
    """Tokens ``[start, stop)`` of a prompt, taken from a segment."""

    segment: Segment
    start: int
    stop: int


def worth_reusing(segments: Sequence[Segment], exact: int, num_tokens: int) -> list[Part]:
    """The parts to reuse of a prompt whose first ``exact`` tokens are right, in order.

    The last token is never one of them: the engine computes it in any case.
    """
    best, gain, reused = 0, 0, 0
    parts: list[Part] = []
    for segment in segments:
        start, stop = max(segment.start, exact), min(segment.stop, num_tokens - 1)
        if stop - start < PART_TOKENS_MIN:
            continue
        parts.append(Part(segment, start, stop))
        reused += stop - start
        if 2 * reused - (stop - exact) > gain:
            best, gain = len(parts), 2 * reused - (stop - exact)
    return parts[:best]
