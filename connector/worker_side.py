"""The half of the connector that lives in each worker: moves KV between its pages and the store.

Saving: the step that completes a chunk copies it from the pages to the staging ring, before the
step ends, so pages may be freed, reused or preempted at any time after; a thread stores it.
Loading: a thread reads chunks from the store into a buffer of its own, checks them, and only then
writes them to pages that vLLM has set aside for the request. A request that is given up (stall)
has its pages barred first, under a lock, so a late thread cannot write into somebody else's.

What must hold: no method called by the engine waits for the store, except IDLE_WAIT_S in a step
that computes nothing. Any failure is a failed load, reported by block, which vLLM recomputes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from connector.handle import StoreHandle
from connector.messages import LoadJob, SaveJob, StepMetadata, WorkerReport
from connector.options import EngineOptions
from connector.pages import LayerPages
from connector.plan import Speeds
from connector.staging import StagingRing
from prefixstore.config import MIB
from prefixstore.errors import StoreError
from prefixstore.layout import Layout, Roi
from prefixstore.namespace import MISS, Namespace
from prefixstore.putting import PutState
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

IDLE_WAIT_S = 0.005
LOAD_BUFFER_BYTES = 32 * MIB
QUEUE_MAX = 4096


@dataclass
class _Load:
    """A load under way. ``barred`` and ``failed_from`` change only under the loader's lock."""

    job: LoadJob
    failed_from: int | None = None
    barred: bool = False
    tiers: Counter[int] = field(default_factory=Counter)


class WorkerSide:
    """See the module docstring. ``pages`` are this rank's layers in order; ``roi`` its region."""

    def __init__(
        self,
        options: EngineOptions,
        handle: StoreHandle,
        pages: list[LayerPages],
        layout: Layout,
        roi: Roi,
        group: int,
        saves: bool,
    ) -> None:
        self._options, self._handle, self._pages = options, handle, pages
        self._layout, self._roi, self._group, self._saves = layout, roi, group, saves
        self._device = pages[0].device
        self._unit_bytes = layout.roi_bytes(roi)
        self._dims = (
            roi.layer_stop - roi.layer_start, layout.num_planes,
            roi.head_stop - roi.head_start, layout.chunk_tokens, layout.head_bytes,
        )  # fmt: skip
        self._ring: StagingRing | None = None
        self._namespaces: dict[bytes, Namespace] = {}
        self._lock = threading.Condition()
        self._loads: dict[str, _Load] = {}
        self._ended: dict[str, _Load] = {}
        self._invalid: set[int] = set()
        self._progress_at = time.monotonic()
        self._stalled = False
        self._speeds = Speeds()
        self.counts: Counter[str] = Counter()
        self.load_seconds: list[float] = []
        self.save_seconds: list[float] = []
        self._load_queue: queue.Queue[_Load | None] = queue.Queue(QUEUE_MAX)
        self._save_queue: queue.Queue[_Saving | None] = queue.Queue(QUEUE_MAX)
        self._threads = [
            threading.Thread(target=self._run_loads, name="prefixstore-load", daemon=True)
            for _ in range(options.load_threads)
        ]
        self._threads.append(
            threading.Thread(target=self._run_saves, name="prefixstore-save", daemon=True)
        )
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ loading
    def start_loads(self, meta: StepMetadata) -> None:
        """Queue this step's loads."""
        for job in meta.loads:
            load = _Load(job)
            with self._lock:
                if not self._loads:
                    self._progress_at = time.monotonic()
                self._loads[job.req_id] = load
            try:
                self._load_queue.put_nowait(load)
            except queue.Full:
                self._end(load, failed_from=0)

    def _run_loads(self) -> None:
        chunks = max(1, min(LOAD_BUFFER_BYTES // self._unit_bytes, 64))
        buffer = torch.empty(
            (chunks, self._unit_bytes), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )
        while (load := self._load_queue.get()) is not None:
            began = time.monotonic()
            try:
                failed = self._load(load, buffer)
            except Exception as error:  # thread loop: a failed load is recomputed, never fatal
                logger.warning("prefixstore: load of %s failed: %s", load.job.req_id, error)
                failed = 0
            seconds = time.monotonic() - began
            self.load_seconds.append(seconds)
            for tier, num_bytes in load.tiers.items():
                if len(load.tiers) == 1:
                    self._speeds.saw_load(tier, num_bytes, seconds)
                self.counts[f"bytes_loaded_{tier}"] += num_bytes
            self._end(load, failed)

    def _load(self, load: _Load, buffer: torch.Tensor) -> int | None:
        """Read, check, write to pages; returns the first chunk that failed, None for none."""
        job, store = load.job, self._handle.get()
        if store is None:
            return 0
        namespace = self._namespace(store, job.namespace)
        step = len(buffer)
        for at in range(0, len(job.refs), step):
            refs = job.refs[at : at + step]
            rows = buffer[: len(refs)]
            good = 0
            for ref, row in zip(refs, rows, strict=True):
                if load.barred:
                    return at + good
                [tier] = namespace.get([ref], [memoryview(row.numpy())], self._roi)
                self._progress_at = time.monotonic()
                if tier == MISS:
                    break
                load.tiers[tier] += self._unit_bytes
                good += 1
            with self._lock:
                if load.barred:
                    return at
                self._write_pages(job, at, rows[:good])
            if good < len(refs):
                return at + good
        return None

    def _write_pages(self, job: LoadJob, at: int, rows: torch.Tensor) -> None:
        """Copy whole chunks from a host buffer to their blocks; not to those vLLM had filled."""
        blocks = job.blocks[at : at + len(rows)]
        if not blocks:
            return
        data = rows.to(self._device, non_blocking=True).view(len(rows), *self._dims)
        if at == 0 and job.skip_blocks:
            tokens = job.skip_blocks * (self._layout.chunk_tokens // len(blocks[0]))
            head = data[:1, :, :, :, tokens:]
            table = self._pages[0].page_map.block_table(
                [blocks[0][job.skip_blocks :]], self._device
            )
            for layer, pages in enumerate(self._pages):
                pages.write_chunks(table, head[:, layer])
            data, blocks = data[1:], blocks[1:]
        if blocks:
            table = self._pages[0].page_map.block_table(blocks, self._device)
            for layer, pages in enumerate(self._pages):
                pages.write_chunks(table, data[:, layer])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _end(self, load: _Load, failed_from: int | None) -> None:
        with self._lock:
            if self._loads.get(load.job.req_id) is not load or load.barred:
                return
            load.failed_from = failed_from
            load.barred = True
            del self._loads[load.job.req_id]
            self._ended[load.job.req_id] = load
            self._lock.notify_all()

    def finished_loads(self, idle: bool) -> set[str]:
        """Requests whose load has ended, well or not, since the last call."""
        stall_s = self._options.stall_ms / 1000
        if idle and self._loads:
            with self._lock:
                self._lock.wait_for(lambda: self._ended, IDLE_WAIT_S)
        if self._loads and time.monotonic() - self._progress_at > stall_s:
            self._give_up()
        with self._lock:
            ended, self._ended = self._ended, {}
        for load in ended.values():
            if load.failed_from is not None:
                job = load.job
                for index in range(load.failed_from, len(job.refs)):
                    skip = job.skip_blocks if index == 0 else 0
                    self._invalid.update(job.blocks[index][skip:])
                self.counts["loads_failed"] += 1
        return set(ended)

    def _give_up(self) -> None:
        """No chunk arrived for too long: end all loads as failed and leave the store alone."""
        with self._lock:
            for req_id, load in list(self._loads.items()):
                load.barred, load.failed_from = True, 0
                self._ended[req_id] = load
            self._loads.clear()
        self._stalled = True
        self.counts["loads_stalled"] += 1
        self._handle.stalled("a load")

    def failed_blocks(self) -> set[int]:
        """Blocks whose load failed, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    # ------------------------------------------------------------------ saving
    def save(self, meta: StepMetadata) -> None:
        """Copy the chunks this step has completed to the staging ring."""
        if not self._saves:
            return
        for job in meta.saves:
            parts = self._staging().take(len(job.refs))
            if parts is None:
                self.counts["save_dropped_chunks"] += len(job.refs)
                continue
            saving = _Saving(job, parts)
            at = 0
            for part in parts:
                self._read_pages(job.blocks[at : at + len(part)], part)
                at += len(part)
            if self._device.type == "cuda":
                saving.copied = torch.cuda.Event()
                saving.copied.record(torch.cuda.current_stream(self._device))
            self._save_queue.put(saving)  # cannot block: the ring is smaller than the queue

    def _staging(self) -> StagingRing:
        if self._ring is None:
            units = max(1, min(self._options.staging_bytes // self._unit_bytes, QUEUE_MAX - 1))
            self._ring = StagingRing(self._unit_bytes, units, pinned=self._device.type == "cuda")
        return self._ring

    def _read_pages(self, blocks: list[list[int]], out: torch.Tensor) -> None:
        if not blocks:
            return
        table = self._pages[0].page_map.block_table(blocks, self._device)
        on_host = self._device.type == "cpu"
        near = out if on_host else torch.empty_like(out, device=self._device)
        shaped = near.view(len(blocks), *self._dims)
        for layer, pages in enumerate(self._pages):
            pages.read_chunks(table, shaped[:, layer])
        if not on_host:
            out.copy_(near, non_blocking=True)

    def _run_saves(self) -> None:
        while (saving := self._save_queue.get()) is not None:
            began = time.monotonic()
            try:
                self._store(saving)
            except Exception as error:  # thread loop: a chunk not saved is a later miss
                self.counts["save_errors"] += 1
                logger.warning("prefixstore: chunks not saved: %s", error)
            finally:
                assert self._ring is not None
                self._ring.give_back(saving.parts)
            self.save_seconds.append(time.monotonic() - began)

    def _store(self, saving: _Saving) -> None:
        store = self._handle.get()
        job = saving.job
        if store is None:
            self.counts["save_dropped_chunks"] += len(job.refs)
            return
        if saving.copied is not None:
            saving.copied.synchronize()
        rows = [memoryview(row.numpy()) for part in saving.parts for row in part]
        states = self._namespace(store, job.namespace).put(
            job.refs, rows, roi=self._roi, group=self._group,
            ttl_s=job.ttl_s, tag=job.tag, pin=job.pin, wait=False,
        )  # fmt: skip
        stored = sum(state in (PutState.STORED, PutState.PARTIAL) for state in states)
        self.counts["bytes_saved"] += stored * self._unit_bytes
        self.counts["chunks_saved"] += stored
        refused = sum(state in (PutState.FULL, PutState.QUOTA, PutState.LOST) for state in states)
        self.counts["save_refused_chunks"] += refused

    # ------------------------------------------------------------------ both
    def _namespace(self, store: Store, name: bytes) -> Namespace:
        known = self._namespaces.get(name)
        if known is None or known.store is not store:
            known = store.namespace_of(name)
            if known.layout != self._layout:
                raise StoreError(f"namespace {name.hex()} has another layout than this engine")
            self._namespaces[name] = known
        return known

    def report(self) -> WorkerReport | None:
        """News for the scheduler; None when there are none."""
        stalled, self._stalled = self._stalled, False
        bandwidth = dict(self._speeds.tier_bytes_per_s)
        return WorkerReport(stalled=stalled, bandwidth=bandwidth) if bandwidth or stalled else None

    def close(self, deadline_s: float = 5.0) -> None:
        """Store what is staged, as far as the deadline allows, and end the threads."""
        end = time.monotonic() + deadline_s
        self._save_queue.put(None)
        for _ in range(self._options.load_threads):
            self._load_queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


@dataclass
class _Saving:
    """A save job whose bytes are in the ring (on CUDA: once ``copied`` has happened)."""

    job: SaveJob
    parts: list[torch.Tensor]
    copied: torch.cuda.Event | None = None
