"""The half of the connector that lives in each worker: puts loading and saving together.

What must hold: no method called by the engine waits for the store, except a few milliseconds in a
step that computes nothing anyway.
"""

from __future__ import annotations

import time

from connector.ahead import Ahead
from connector.blending import Blender
from connector.buffers import PINNED_BYTES
from connector.device_tier import tier_for
from connector.direct import LANES, lane_bytes
from connector.handle import StoreHandle
from connector.loading import Loader
from connector.messages import StepMetadata, WorkerReport
from connector.options import EngineOptions
from connector.rank import Rank
from connector.registered import Cuda, RegisteredSlots
from connector.saving import SAVE_BYTES, Saver
from connector.tally import Tally

CLOSE_S = 5.0


class WorkerSide:
    """See the module docstring. All methods run on the worker's main thread. ``step_tokens`` is the
    most one step computes; ``share`` is vLLM's of the device's memory, None: not known."""

    def __init__(
        self, options: EngineOptions, handle: StoreHandle, rank: Rank, step_tokens: int,
        share: float | None = None,
    ) -> None:  # fmt: skip
        self._rank, self._handle = rank, handle
        self._counts = Tally()
        threads = options.load_threads if options.load != "never" else 0
        self._slots = RegisteredSlots(Cuda(rank.device))
        step_bytes = step_tokens // rank.layout.chunk_tokens * rank.staged_bytes
        staging_bytes = options.staging_bytes(step_bytes)
        others_bytes = staging_bytes + threads * (LANES * lane_bytes(rank.device) + PINNED_BYTES)
        others_bytes += rank.scratch_bytes(threads * (LANES + 1), SAVE_BYTES)
        wanted = options.device_bytes if threads else 0
        tier = tier_for(rank, wanted, share, self._counts, others_bytes)
        self.loader = Loader(rank, handle, self._counts, threads, self._slots, tier)
        block_tokens = rank.pages[0].page_map.block_tokens
        self._blender = Blender(rank.engine, block_tokens, self._counts, rank.leads, self.loader)
        self._computes = False
        self._told = False  # the last step had news for the scheduler
        self.saver = Saver(rank, handle, self._counts, staging_bytes, self._slots)
        self._ahead: Ahead | None = None
        if options.prepare and rank.sum_kernel is not None:
            self._ahead = Ahead(self._slots, handle, rank.layout.slot_bytes, make=options.save)
            self._ahead.wait()

    def start_loads(self, meta: StepMetadata) -> None:
        """Queue this step's loads, and go on with blends."""
        if self._ahead is not None:
            self._ahead.step()
        self.loader.start(meta.loads)
        self._blender.run(meta.blends)
        if meta.idle:
            self._blender.prepare(meta.loads)
        self._computes = any(one.slices and not one.abort for one in meta.blends)

    def finished(self, idle: bool) -> set[str]:
        """Requests whose load has ended, and their blend if there is one."""
        # A step that has computed rows does not wait besides: there may be more at once. Nor does
        # one that the scheduler made before it heard what the step before had told.
        waits = idle and not (self._computes or self._told)
        finished = self.loader.finished(waits) | self._blender.take_finished()
        self._told = bool(finished)
        return finished

    def failed_blocks(self) -> set[int]:
        """Blocks that the engine must compute."""
        return self.loader.failed_blocks() | self._blender.take_failed_blocks()

    def save(self, meta: StepMetadata) -> None:
        """Copy the chunks this step completed out of the pages."""
        self.saver.save(meta.saves)

    def take_stats(self) -> tuple[dict[str, int], list[float], list[float]]:
        """Counts, seconds of loads, seconds of saves, since the last call."""
        loads, self.loader.seconds = self.loader.seconds, []
        saves, self.saver.seconds = self.saver.seconds, []
        return self._counts.take() | self._handle.take_copies(), loads, saves

    def report(self) -> WorkerReport | None:
        """News for the scheduler; None when there are none."""
        stalled, self.loader.stalled = self.loader.stalled, False
        bandwidth = self.loader.bandwidth.take()
        placed = {}
        for req_id, (job, position) in self.loader.take_placed().items():
            self._blender.loaded(req_id, job)
            placed[req_id] = {self._rank.number: position}
        blends = {}
        for req_id, (job, loaded) in self.loader.take_for_blends().items():
            self._blender.loaded(req_id, job)
            blends[req_id] = loaded
        cut = self.loader.take_cut()
        if not (bandwidth or stalled or blends or placed or cut):
            return None
        self._told = True
        return WorkerReport(
            stalled=stalled, bandwidth=bandwidth, blends=blends, placed=placed, cut=cut
        )

    def close(self) -> None:
        """Store what is staged, as far as the deadline allows, and end the threads."""
        end = time.monotonic() + CLOSE_S
        if self._ahead is not None:
            self._ahead.end()
        self.saver.close(end)
        self.loader.close(end)
        if self._ahead is not None:
            self._ahead.close(end)
        self._slots.close(end)
