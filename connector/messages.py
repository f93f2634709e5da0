"""What the connector's halves tell each other, once a step.

Scheduler to workers: which chunks to load into which blocks, which to save from which. Workers to
scheduler: whether the cache can be used at all, how fast it was, how it went.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from prefixstore.keys import ChunkRef


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Chunks of one request to read from the store into its blocks.

    ``blocks[i]`` are the blocks of chunk i, all of them; ``skip_blocks`` leading blocks of the
    first chunk are vLLM's own (prefix cache, shared with others) and must not be written.
    """

    req_id: str
    namespace: bytes
    refs: list[ChunkRef]
    blocks: list[list[int]]
    skip_blocks: int
    stall_s: float  # given up when no chunk arrives for so long


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Chunks that are complete after this step's forward pass."""

    req_id: str
    namespace: bytes
    refs: list[ChunkRef]
    blocks: list[list[int]]
    ttl_s: float | None
    tag: str
    pin: bool


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Everything for one step. ``idle``: the step computes nothing, so waiting is free."""

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    idle: bool = True


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """One worker's news. ``bandwidth``: bytes of chunks a second by tier, newly measured."""

    disabled: str = ""  # why this worker cannot use the store; "" when it can
    stalled: bool = False
    bandwidth: dict[int, float] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Combine the news of two ranks: the slower of each, any trouble of either."""
        assert isinstance(other, WorkerReport)
        tiers = self.bandwidth.keys() | other.bandwidth.keys()
        slower = {
            tier: min(r.bandwidth[tier] for r in (self, other) if tier in r.bandwidth)
            for tier in tiers
        }
        return replace(
            self,
            disabled=self.disabled or other.disabled,
            stalled=self.stalled or other.stalled,
            bandwidth=slower,
        )
