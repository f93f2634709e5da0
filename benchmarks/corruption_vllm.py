"""vLLM's file system tier (``kv_offload/tiering/fs``) as one of `corruption_peers`.

Driven as its scheduler drives it: look-ups answered between steps, loads and stores as jobs from
and to the primary tier, here a plain mapping.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import (
    LookupResult,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from benchmarks.corruption_peer_host import CHUNK_BYTES, Peer

_WAIT_S = 20.0
_STEP_S = 0.001


class VllmFs:
    """See `Peer`."""

    def __init__(self, folder: Path, count: int) -> None:
        self._memory = mmap.mmap(-1, count * CHUNK_BYTES)
        self._view = np.frombuffer(self._memory, np.uint8).reshape(count, CHUNK_BYTES)
        parallel: dict[str, Any] = {
            "rank": 0, "world_size": 1, "tp_size": 1, "pp_size": 1, "pcp_size": 1, "dcp_size": 1,
            "data_parallel_index": 0, "data_parallel_size": 1, "data_parallel_rank_local": None,
            "is_parallelism_agnostic": True,
        }  # fmt: skip
        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(16, ("layer",), 0),),
            worker_kv_bytes_per_block=CHUNK_BYTES,
            enable_kv_cache_events=False,
            extra_config={},
            engine_id="0",
            model=OffloadingModelConfig("m", "float16"),
            cache=OffloadingCacheConfig(16, 1),
            parallel=OffloadingParallelConfig(**parallel),
        )
        self._tier = FileSystemTierManager(
            SimpleNamespace(config=config, blocks_per_chunk=1),
            memoryview(self._view.data),
            "fs",
            root_dir=str(folder / "tier"),
            n_read_threads=4,
            n_write_threads=4,
        )
        self._jobs = 0
        self._requests = 0

    def _key(self, number: int) -> Any:
        return make_offload_key(number.to_bytes(32, "big"), 0)

    def _job(self, number: int, context: Any, *, load: bool) -> TransferJob:
        self._jobs += 1
        return TransferJob(self._jobs, [self._key(number)], np.array([number]), load, context)

    def _finished(self) -> dict[int, bool]:
        self._tier.drain_jobs()
        return {result.job_id: result.success for result in self._tier.get_finished_jobs()}

    def put(self, number: int, data: bytes) -> bool:
        """See `Peer`."""
        self._view[number] = np.frombuffer(data, np.uint8)
        job = self._job(number, ReqContext("store"), load=False)
        self._tier.submit_store(job)
        return self._finished()[job.job_id]

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """See `Peer`."""
        self._requests += 1
        context = ReqContext(str(self._requests))
        self._tier.on_new_request(context)
        left, there, end = set(numbers), set(), time.monotonic() + _WAIT_S
        while left:
            for number in list(left):
                result = self._tier.lookup(self._key(number), context)
                if result is not LookupResult.RETRY:
                    left.discard(number)
                if result is LookupResult.HIT:
                    there.add(number)
            self._tier.on_schedule_end(ScheduleEndContext((), ()))
            if time.monotonic() > end:
                raise TimeoutError("look-ups were not answered")
            time.sleep(_STEP_S)
        self._view[:] = 0
        jobs = {number: self._job(number, context, load=True) for number in sorted(there)}
        for job in jobs.values():
            self._tier.submit_load(job)
        done = self._finished()
        self._tier.on_request_finished(context)
        return [
            self._view[n].tobytes() if n in jobs and done[jobs[n].job_id] else None for n in numbers
        ]

    def place(self, number: int) -> tuple[str, int, int]:
        """See `Peer`."""
        return self._tier.file_mapper.get_file_name(self._key(number)), 0, CHUNK_BYTES

    def close(self) -> None:
        """See `Peer`."""
        self._tier.shutdown()


def open_peer(name: str, folder: Path, count: int) -> Peer:
    """Open it."""
    return VllmFs(folder, count)
