"""Blending, the scheduler's part: what of a prompt is claimed, and when the ranks run it.

A claim covers the prompt from what the engine has to the end of a segment
(`prefixstore.segment_choice`). Tokens in between that are cached nowhere are computed by the blend.

A split of an exact prefix (Jin et al., Compute Or Load KV Cache? Why Not Both?, 2024) runs as
blends do: from the front all ranks compute rows, from the back each loads its part of the chunks.
It is over when the rows that are computed meet those that all ranks have loaded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from connector.blend_options import BlendOptions
from connector.messages import BlendCommand, BlendJob, BlendLoaded, BlendPiece
from prefixstore.errors import ConfigError
from prefixstore.keys import ChunkRef
from prefixstore.segment_choice import worth_reusing
from prefixstore.segments import Segment

logger = logging.getLogger("vllm.prefixstore")

QUERY_TOKENS_MAX = 256  # behind the last segment, for selectors that score with them
IDLE_ROWS = 8192  # or one slice, in a step that computes nothing else
SPLIT_ROWS_MIN = 1 / 8  # of the most rows of a slice: fewer take as long


@dataclass(frozen=True, slots=True)
class Claim:
    """``[0, end)`` of a prompt, of which ``[0, exact)`` is or will be right."""

    end: int
    exact: int
    pieces: list[BlendPiece]
    options: BlendOptions

    def job(self, token_ids: Sequence[int], blocks: Sequence[int]) -> BlendJob:
        """The message for the workers."""
        return BlendJob(
            token_ids=list(token_ids[: self.end]),
            computed=self.exact,
            blocks=list(blocks),
            pieces=self.pieces,
            selector=self.options.selector,
            budget=self.options.budget,
            span=self.options.span,
            step_rows=self.options.step_rows,
        )

    @property
    def reused_tokens(self) -> int:
        """Tokens taken from elsewhere."""
        return sum(piece.num_tokens for piece in self.pieces)


@dataclass
class _UnderWay:
    """What the ranks have said of one blend."""

    loaded: BlendLoaded | None = None
    placed: dict[int, int] = field(default_factory=dict)
    begun: bool = False  # before all was loaded
    until: int = 0  # what it was told to run before, and how many slices may be left of that
    slices: int = 0
    front: float = 0.0  # of a split: the part of what is missing that is likely to be computed
    over: bool = False


class BlendClaims:
    """All methods run on the scheduler's thread. ``options`` None: this engine does not blend.
    ``split_rows``: the most that a slice of a split computes; 0: this engine does not split."""

    def __init__(
        self, options: BlendOptions | None, num_layers: int, num_ranks: int, split_rows: int = 0
    ) -> None:
        self.options, self.split_rows = options, split_rows
        self.refused = False
        self._num_layers, self._num_ranks = num_layers, num_ranks
        self._under_way: dict[str, _UnderWay] = {}
        self._gone: set[str] = set()

    def refuse(self, why: str) -> None:
        """It was to blend or split, and cannot: exact prefixes are served from now on."""
        if self.split_rows:
            logger.warning('prefixstore: "load": "both" is as "auto" here: %s', why)
            self.split_rows = 0
        self.refuse_blends(why)

    def refuse_blends(self, why: str) -> None:
        """It was to blend, and must not."""
        if self.options is not None:
            logger.warning("prefixstore: no blending, only exact prefixes: %s", why)
            self.options, self.refused = None, True

    def options_of(self, asked: Any) -> BlendOptions | None:
        """A request's. Raises ConfigError."""
        if self.options is None:
            if asked and not self.refused:
                raise ConfigError(
                    "blend is off in this engine", 'start it with "blend": true in its settings'
                )
            return None
        return self.options.of_request(asked, self._num_layers)

    def claim(
        self,
        options: BlendOptions | None,
        segments: Sequence[Segment],
        exact: int,
        num_tokens: int,
        staleness: Mapping[bytes, bytes],
    ) -> Claim | None:
        """What to claim of a prompt whose first ``exact`` tokens are right; None: no more.

        ``staleness``: of chunks, by key, as far as it is known; float16 for each token.
        """
        if options is None:
            return None
        parts = worth_reusing(segments, exact, num_tokens)
        if not parts:
            return None
        pieces = [piece for part in parts for piece in _pieces(*part, staleness)]
        end = parts[-1].stop
        if options.scores_with_query:
            end = min(num_tokens - 1, end + QUERY_TOKENS_MAX)
        return Claim(end, exact, pieces, options)

    def split(self, req_id: str, start: int, front: float) -> None:
        """``[start, end)`` of a request is loaded from the back and computed from the front, as far
        as ``front`` of it by what is known."""
        self._under_way[req_id] = _UnderWay(until=start, front=front)

    def loaded(self, news: Mapping[str, BlendLoaded]) -> None:
        """Some ranks have loaded."""
        for req_id, loaded in news.items():
            known = self._under_way.setdefault(req_id, _UnderWay())
            known.loaded = loaded if known.loaded is None else known.loaded.and_(loaded)

    def placed(self, news: Mapping[str, Mapping[int, int]]) -> None:
        """How far some ranks have loaded."""
        for req_id, by_rank in news.items():
            self._under_way.setdefault(req_id, _UnderWay()).placed.update(by_rank)

    def commands(self, idle: bool) -> list[BlendCommand]:
        """For this step: splits, and blends whose KV all ranks have loaded, go on; else a blend of
        whose KV they have the beginning."""
        found: list[BlendCommand] = []
        slices = self._slices_idle if idle else 1
        for req_id, known in self._under_way.items():
            of = self._of_split if known.front else self._of_loaded
            command = of(req_id, known, slices)
            if command is not None:
                found.append(command)
                computes = command.slices and not command.abort
                slices = 0 if computes else slices  # one at a time: the oldest
        for req_id, known in self._under_way.items():
            if slices and (command := self._of_loading(req_id, known, slices)) is not None:
                found.append(command)
                known.begun, slices = True, 0
        return found

    @property
    def _slices_idle(self) -> int:
        return max(1, IDLE_ROWS // self.options.step_rows) if self.options is not None else 1

    def _of_loaded(self, req_id: str, known: _UnderWay, slices: int) -> BlendCommand | None:
        loaded = known.loaded
        if loaded is None or loaded.ranks < self._num_ranks:
            return None
        # What has begun counted on every piece: the engine computes the request.
        lost = known.begun and bool(loaded.failed)
        abort = loaded.aborted or lost or req_id in self._gone
        if not abort and not slices:
            return None
        return BlendCommand(req_id, slices, loaded.failed, abort)

    def _of_split(self, req_id: str, known: _UnderWay, slices: int) -> BlendCommand | None:
        """In slices that become smaller where front and back are near, for in a slice's time the
        back comes nearer, too."""
        lost = known.loaded is not None and known.loaded.aborted
        if lost or (req_id in self._gone and (known.placed or known.loaded)):
            # Until all have ended: a rank that has not begun yet does not know of it.
            return BlendCommand(req_id, 0, frozenset(), True, known.until)
        if known.over or len(known.placed) < self._num_ranks:
            return None
        gap = max(0, max(known.placed.values()) - known.until)
        if gap and not slices:
            return None
        wanted = max(math.ceil(gap * known.front / 2), int(self.split_rows * SPLIT_ROWS_MIN), 1)
        rows = min(gap, self.split_rows, wanted)
        known.until += rows
        known.over = rows == gap
        return BlendCommand(req_id, min(rows, 1), frozenset(), False, known.until, ends=known.over)

    def _of_loading(self, req_id: str, known: _UnderWay, slices: int) -> BlendCommand | None:
        """None as well if it can run no more slices of what is there."""
        loaded = known.loaded
        if known.front or (loaded is not None and (loaded.failed or loaded.aborted)):
            return None
        if req_id in self._gone or len(known.placed) < self._num_ranks:
            return None
        if loaded is not None and loaded.ranks == self._num_ranks:
            return None
        until = min(known.placed.values())
        if until > known.until:
            known.until, known.slices = until, self._slices_idle
        if known.slices <= 0:
            return None
        known.slices -= slices
        return BlendCommand(req_id, slices, frozenset(), False, until)

    def cancel(self, req_id: str) -> None:
        """The request is gone; the ranks must let go of it, when they have loaded."""
        self._gone.add(req_id)

    def ended(self, req_id: str) -> None:
        """All ranks have ended it."""
        self._under_way.pop(req_id, None)
        self._gone.discard(req_id)


def _pieces(
    segment: Segment, start: int, stop: int, staleness: Mapping[bytes, bytes]
) -> list[BlendPiece]:
    """The part ``[start, stop)`` of the prompt, chunk by chunk."""
    found: list[BlendPiece] = []
    at = segment.start
    for piece in segment.pieces:
        begin, end = max(at, start), min(at + piece.num_tokens, stop)
        if begin < end:
            source = segment.source_start + begin - segment.start
            offset = piece.offset + begin - at
            key, _, depth, salt = piece.ref
            ref = ChunkRef(key, b"", depth, salt)  # it was compared when it was found
            measured = staleness.get(ref.key, b"")[2 * offset : 2 * (offset + end - begin)]
            found.append(BlendPiece(ref, offset, end - begin, begin, source, measured))
        at += piece.num_tokens
    return found
