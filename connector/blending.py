"""Blends under way on one rank: what `blend` does, in slices, on the engine's own thread.

A blended request goes through two phases. Each rank loads its part of the exact chunks and of the
segments (`Loader`) and says so, also how far it is. When all ranks have what the first slices read,
the scheduler half has all of them run these, and the others later, in the same steps: with tensor
parallelism each layer is a collective operation. So loading and computing overlap.

A split (`SplitJob`) is the same with nothing to choose: all rows of an exact prefix are computed,
from the first on, until they meet those that are loaded, from the last on.

What must hold: whatever goes wrong, the request's blocks from the first that is not exact on are
reported as failed, and the engine computes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from blend.plan import Plan, Segment
from blend.recompute import Blend, compute
from blend.select import selector_named
from connector.blend_engine import Engine
from connector.blend_host import State, VllmHost
from connector.messages import (
    WHOLE,
    BlendCommand,
    BlendJob,
    BlendPiece,
    LoadJob,
    RowsJob,
    SplitJob,
)
from connector.rank import mark
from connector.tally import Tally

logger = logging.getLogger("vllm.prefixstore")

_NOT_MEASURED = np.float16(np.nan).tobytes()


class Loads(Protocol):
    """What is told to what loads for blends and splits (`Loader`)."""

    def awaits(self, req_id: str, position: int) -> None:
        """A blend can go on when all before that position is in the pages: tell no sooner. 0: it
        can go on now, or that is not known."""

    def reached(self, req_id: str, position: int) -> None:
        """Of a split: what is before that position is computed, or is being so."""

    def stop(self, req_id: str) -> bool:
        """Write nothing more to its pages; False: not yet, ask again."""


@dataclass
class _Running:
    job: RowsJob
    blend: Blend[State] | None = None
    steps: Iterator[int] | None = None
    without: frozenset[int] = frozenset()  # pieces its plan was made without
    broken: bool = False  # it ends when its load has
    host: VllmHost | None = None  # of a split
    computed: int = 0
    slice_done: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        self.computed = self.job.computed


class Blender:
    """See the module docstring. All methods run on the worker's main thread.

    ``engine`` None: this rank cannot blend, so it answers that it could not load either, and the
    scheduler has all ranks give the request up.
    """

    def __init__(
        self, engine: Engine | None, block_tokens: int, counts: Tally, leads: int, loads: Loads
    ) -> None:
        self._engine, self._block_tokens = engine, block_tokens
        self._counts, self._leads, self._loads = counts, leads, loads
        self._prepared: dict[str, _Running] = {}
        self._running: dict[str, _Running] = {}
        self._ending: set[str] = set()
        self._invalid: set[int] = set()

    @torch.inference_mode()
    def prepare(self, loads: Sequence[LoadJob]) -> None:
        """Plan the first blend that these loads are for, and choose if that needs no KV: it takes
        some ms, which are free while the engine has nothing to compute but what is loaded."""
        blends = [(load.req_id, load.blend) for load in loads if isinstance(load.blend, BlendJob)]
        if self._engine is None or not blends:
            return
        req_id, job = blends[0]
        running = _Running(job)
        try:
            blend, steps = self._begin(running, job, frozenset())
            if not blend.needed:
                next(steps)
        except Exception as error:  # request loop: it is begun again, and fails, when it runs
            logger.debug("prefixstore: blend of %s is not prepared: %s", req_id, error)
            return
        self._prepared[req_id] = running
        self._loads.awaits(req_id, blend.needed)

    def loaded(self, req_id: str, job: RowsJob) -> None:
        """This rank has its part of the KV in place, or the beginning of it."""
        running = self._prepared.pop(req_id, None)
        if running is None or running.job is not job:
            running = _Running(job)
        if req_id not in self._ending:
            self._running.setdefault(req_id, running)

    def run(self, commands: Sequence[BlendCommand]) -> None:
        """Go on with blends, as told."""
        for command in commands:
            running = self._running.get(command.req_id)
            if running is None:
                continue
            job = running.job
            # Its load goes on, and writes to its blocks; a split's is stopped.
            early = isinstance(job, BlendJob) and command.until < WHOLE
            nothing = isinstance(job, BlendJob) and len(command.failed) == len(job.pieces)
            if command.abort or nothing or (running.broken and not early):
                self._end(command.req_id, failed=True)
                continue
            if running.broken:
                continue
            try:
                if self._advance(running, command):
                    self._end(command.req_id, failed=False)
            except Exception as error:  # request loop: a failed blend is computed by the engine
                if self._engine is None or self._engine.num_ranks > 1:
                    raise  # the other ranks wait for this one in a collective operation
                logger.warning("prefixstore: blend of %s failed: %s", command.req_id, error)
                self._counts.add("blends_failed", self._leads)
                running.broken, running.blend, running.steps = True, None, None
                if not early:
                    self._end(command.req_id, failed=True)

    @torch.inference_mode()
    def _advance(self, running: _Running, command: BlendCommand) -> bool:
        """Run some slices; whether that was all."""
        job = running.job
        assert self._engine is not None, "a rank that cannot blend was told to"
        if isinstance(job, SplitJob):
            self._loads.reached(command.req_id, command.until)
            running.host = running.host or VllmHost(self._engine, job.token_ids, job.blocks)
            if running.slice_done is not None:  # else the front would run away from the GPU
                running.slice_done.synchronize()
            compute(running.host, running.computed, command.until)
            running.slice_done = mark(self._engine.device)
            tokens = max(0, command.until - running.computed)
            running.computed += tokens
            self._counts.add("split_computed_tokens", tokens * self._leads)
            return command.ends
        blend, steps = running.blend, running.steps
        if blend is None or steps is None or running.without != command.failed:
            blend, steps = self._begin(running, job, command.failed)
        slices = command.slices
        while slices and blend.needed <= command.until:
            rows = next(steps, None)
            if rows is None:
                report = blend.report
                assert report is not None
                self._counts.add("blend_recomputed_tokens", report.num_recomputed * self._leads)
                self._counts.add("blend_between_tokens", report.num_fresh * self._leads)
                return True
            slices -= rows > 0
        # Else it has slices there that it was not given: with any news it is given more.
        self._loads.awaits(command.req_id, blend.needed if blend.needed > command.until else 0)
        return False

    def _begin(
        self, running: _Running, job: BlendJob, without: frozenset[int]
    ) -> tuple[Blend[State], Iterator[int]]:
        assert self._engine is not None
        host = VllmHost(self._engine, job.token_ids, job.blocks)
        blend = Blend(
            host, plan_of(job, without), selector_named(job.selector), job.budget,
            span=job.span, slice_rows=job.step_rows,
        )  # fmt: skip
        running.blend, running.steps, running.without = blend, blend.steps(), without
        return blend, running.steps

    def _end(self, req_id: str, *, failed: bool) -> None:
        running = self._running.pop(req_id)
        self._ending.add(req_id)
        if failed:
            first = running.computed // self._block_tokens
            self._invalid.update(running.job.blocks[first:])

    def take_finished(self) -> set[str]:
        """Requests whose blend has ended, well or not, since the last call."""
        finished = {req_id for req_id in self._ending if self._loads.stop(req_id)}
        self._ending -= finished
        return finished

    def take_failed_blocks(self) -> set[int]:
        """Blocks that the engine must compute, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid


def plan_of(job: BlendJob, failed: frozenset[int]) -> Plan:
    """What is reused where: neighbouring pieces of one text are one segment.

    Pieces that some rank could not load are left out: their tokens are computed like any other.
    """
    runs: list[list[BlendPiece]] = []
    for number, piece in enumerate(job.pieces):
        if number in failed:
            continue
        if runs and _goes_on(runs[-1][-1], piece):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    segments = tuple(
        Segment(
            run[0].start,
            sum(piece.num_tokens for piece in run),
            run[0].source_start,
            staleness=_staleness(run),
        )
        for run in runs
    )
    return Plan(len(job.token_ids), segments, job.computed)


def _goes_on(one: BlendPiece, other: BlendPiece) -> bool:
    """Whether a piece stands right behind another, here and where it comes from."""
    return (
        one.start + one.num_tokens == other.start
        and one.source_start + one.num_tokens == other.source_start
    )


def _staleness(run: Sequence[BlendPiece]) -> torch.Tensor | None:
    if not any(piece.staleness for piece in run):
        return None
    known = b"".join(piece.staleness or piece.num_tokens * _NOT_MEASURED for piece in run)
    return torch.frombuffer(bytearray(known), dtype=torch.float16).float()
