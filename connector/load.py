"""One load under way: its job, and what has become of its pages."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from connector.destination import Destination
from connector.messages import LoadJob, SplitJob
from connector.pieces import Placing
from connector.rank import Rank, is_past


@dataclass
class Load:
    """Unless it is ``barred``, its pages may be written, under ``pages_lock``."""

    job: LoadJob
    failed_from: int | None = None
    failed_pieces: set[int] = field(default_factory=set)  # of its blend
    barred: bool = False
    stopped: bool = False  # and nothing more is told of it
    after: torch.cuda.Event | None = None  # when what the engine did before it is done
    waited_s: float = 0.0  # for ``after``, not for the store
    enqueued: torch.cuda.Event | None = None  # when its pages have what they were sent last
    pages_lock: threading.Lock = field(default_factory=threading.Lock)
    tiers: Counter[int] = field(default_factory=Counter)
    slow: tuple[int, float] | None = None  # it was cut: the tier, its chunks a second
    destination: Destination | None = None  # of its chunks, when the first are written
    placed: int = 0  # of a blend: all before that position is in the pages; of a split, all behind
    told: int = 0  # what the engine was told of that
    told_at: float = -math.inf  # when (monotonic)
    awaited: int = 0  # of a blend: its next slice needs all before that position; 0: not known
    reached: int = 0  # of a split: what is before that position is computed

    def __post_init__(self) -> None:
        if isinstance(self.job.blend, SplitJob):
            self.placed, self.told = len(self.job.blend.token_ids), -1

    def is_news(self, told_before: float) -> bool:
        """Whether the engine can do something with what is in the pages, or may be able to and was
        told nothing since then."""
        if self.stopped:
            return False
        if self.awaited:
            return self.told < self.awaited <= self.placed
        return self.placed != self.told and self.told_at <= told_before

    def is_written(self) -> bool:
        """Whether its pages have all that they were sent."""
        return is_past(self.enqueued)

    def write(
        self,
        rank: Rank,
        numbers: Sequence[int],
        rows: torch.Tensor,
        enqueued: Callable[[], torch.cuda.Event | None],
        chosen: Sequence[int] | None = None,
    ) -> bool:
        """Write chunks of those numbers, ascending, to their pages; False if it was given up.

        ``rows``: the chunks, in host memory or on the device; with ``chosen`` they are in those
        rows of it. On CUDA it is only enqueued; ``enqueued`` makes an event for that."""

        def write() -> None:
            if self.destination is None:
                self.destination = Destination(rank, self.job.blocks, self.job.skip_blocks)
            self.destination.write(numbers, rows, chosen)

        return self.write_by(write, enqueued)

    def write_pieces(
        self,
        rank: Rank,
        placing: Placing,
        at: int,
        rows: torch.Tensor,
        enqueued: Callable[[], torch.cuda.Event | None],
        chosen: Sequence[int] | None = None,
    ) -> bool:
        """The same for pieces of its blend; ``rows`` are whole chunks."""
        return self.write_by(lambda: rank.write_pieces(placing, at, rows, chosen), enqueued)

    def write_by(
        self, work: Callable[[], None], enqueued: Callable[[], torch.cuda.Event | None]
    ) -> bool:
        """The same for whatever writes to its pages, once steps that were begun before are done:
        they may use them. The thread waits for those, not its stream, so that it can tell their
        time, which may be long, from the store's."""
        if self.after is not None:
            began = time.monotonic()
            self.after.synchronize()
            self.after = None
            self.waited_s += time.monotonic() - began
        with self.pages_lock:
            if self.barred:
                return False
            try:
                work()
            finally:  # also what was enqueued before it failed
                self.enqueued = enqueued()
        return True

    def write_received(
        self,
        rank: Rank,
        numbers: Sequence[int],
        chunks: torch.Tensor,
        chosen: Sequence[int] | None = None,
    ) -> bool:
        """`write` for chunks that a stream of several has received: the event is of all."""
        return self.write(rank, numbers, chunks, self._marks(rank), chosen)

    def write_received_pieces(
        self,
        rank: Rank,
        placing: Placing,
        at: int,
        chunks: torch.Tensor,
        chosen: Sequence[int] | None = None,
    ) -> bool:
        """`write_pieces`, likewise."""
        return self.write_pieces(rank, placing, at, chunks, self._marks(rank), chosen)

    def _marks(self, rank: Rank) -> Callable[[], torch.cuda.Event | None]:
        return lambda: rank.mark(behind=self.enqueued)
