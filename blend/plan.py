"""What is known of a prompt before it is blended: which tokens are reused, from where, how stale.

Positions are those of the prompt's tokens, from 0. Of the span ``[0, end)`` each token is *exact*
(its KV is right as it is: the exact prefix), a *candidate* (reused from elsewhere: position moved,
content as computed in another context, so it may be recomputed) or *fresh* (nothing cached: always
computed). What follows ``end`` is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from blend.errors import BlendError


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of reused tokens.

    ``source_start`` is the position its first token had when its KV was computed. ``staleness`` is
    a float tensor of shape [num_tokens], see `blend.staleness`, with NaN for tokens that nobody
    measured; None when nobody measured any.
    """

    start: int
    num_tokens: int
    source_start: int
    exact: bool = False
    staleness: Tensor | None = field(default=None, compare=False)

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Plan:
    """The span ``[0, end)`` of one prompt. Raises BlendError for segments that do not fit it.

    ``computed`` leading tokens are in place and right already (the engine's own prefix cache).
    """

    end: int
    segments: tuple[Segment, ...]
    computed: int = 0

    def __post_init__(self) -> None:
        at = 0
        for segment in self.segments:
            if segment.start < at or segment.num_tokens <= 0 or segment.stop > self.end:
                raise BlendError(
                    f"segment [{segment.start}, {segment.stop}) does not fit behind {at} "
                    f"in a span of {self.end} tokens",
                    "segments must be in order, must not overlap and must end within the span",
                )
            if segment.staleness is not None and segment.staleness.shape != (segment.num_tokens,):
                raise BlendError(
                    f"staleness of shape {tuple(segment.staleness.shape)} for a segment of "
                    f"{segment.num_tokens} tokens",
                    "give one number a token",
                )
            at = segment.stop

    @property
    def candidates(self) -> Tensor:
        """int64 [n]: positions of reused tokens that may be recomputed."""
        return self._of_candidates[0]

    @cached_property
    def fresh(self) -> Tensor:
        """int64 [m]: positions of tokens that are not cached."""
        mask = torch.ones(self.end, dtype=torch.bool)
        mask[_spread(self.segments)[0]] = False
        mask[: self.computed] = False
        return mask.nonzero().flatten()

    @property
    def offsets(self) -> Tensor:
        """int64 [n]: each candidate's place in its segment."""
        return self._of_candidates[1]

    @cached_property
    def _of_candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Position, place in the segment, and staleness of each, by few operations: nothing is
        computed before that is known, and there may be hundreds of segments."""
        segments = [segment for segment in self.segments if not segment.exact]
        positions, offsets = _spread(segments)
        values = torch.full((len(positions),), torch.nan)
        if any(segment.staleness is not None for segment in segments):
            values = torch.cat([_measured(segment) for segment in segments])
        behind = positions >= self.computed
        return positions[behind], offsets[behind], values[behind]

    @cached_property
    def staleness(self) -> Tensor:
        """float32 [n]: how far each candidate's KV moves in another context.

        Where nobody measured it: what is known of transformers in general, that a text's first
        tokens serve as attention sinks when it is encoded alone (EPIC, arXiv 2410.15332), so it
        falls with the offset, from the largest measured value or 1.
        """
        values = self._of_candidates[2]
        measured = ~values.isnan()
        top = float(values[measured].max()) if bool(measured.any()) else 1.0
        return torch.where(measured, values, top / (1.0 + self.offsets))


def _spread(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """int64 each: the positions of the segments' tokens, and their places in their segments."""
    counts = torch.tensor([segment.num_tokens for segment in segments], dtype=torch.int64)
    starts = torch.tensor([segment.start for segment in segments], dtype=torch.int64)
    before = counts.cumsum(0) - counts  # tokens of the segments before each
    offsets = torch.arange(int(counts.sum())) - before.repeat_interleave(counts)
    return starts.repeat_interleave(counts) + offsets, offsets


def _measured(segment: Segment) -> Tensor:
    if segment.staleness is None:
        return torch.full((segment.num_tokens,), torch.nan)
    return segment.staleness.float().cpu()
