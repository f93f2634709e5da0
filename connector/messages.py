"""What the connector's halves tell each other, once a step.

Scheduler to workers: which chunks to load into which blocks, which to save from which. Workers to
scheduler: whether the cache can be used at all, how fast it was, how it went.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from prefixstore.keys import ChunkRef

WHOLE = sys.maxsize  # a position behind every prompt


class BlendPiece(NamedTuple):
    """Part of a stored chunk that is reused at another place.

    ``num_tokens`` of its tokens, from ``offset`` on, go to position ``start``; they were computed
    at position ``source_start``. ``staleness`` is float16 for each of them, or empty.
    """

    ref: ChunkRef
    offset: int
    num_tokens: int
    start: int
    source_start: int
    staleness: bytes = b""


@dataclass(frozen=True, slots=True)
class BlendJob:
    """What is reused from elsewhere in one request, and how the rest of it is chosen.

    ``token_ids`` are those of the span that is claimed, from the prompt's first on; the leading
    ``computed`` ones are right when the load has ended. ``blocks`` are all blocks of the span.
    """

    token_ids: list[int]
    computed: int
    blocks: list[int]
    pieces: list[BlendPiece]
    selector: str
    budget: float
    span: int
    step_rows: int


@dataclass(frozen=True, slots=True)
class SplitJob:
    """An exact prefix whose end is loaded, the last chunk first, while its beginning is computed.

    ``token_ids`` are those of the prefix, of which the leading ``computed`` are in place, and
    ``blocks`` all its blocks.
    """

    token_ids: list[int]
    computed: int
    blocks: list[int]


RowsJob = BlendJob | SplitJob  # rows of it are computed while others are loaded


@dataclass(frozen=True, slots=True)
class BlendCommand:
    """Run so many slices of the blend, without the pieces that failed: of those that need nothing
    but positions before ``until``, which all ranks have in place; WHOLE when they have loaded.

    Of a split: compute what is missing before ``until``, in one slice if there is any. It is over
    then if ``ends``."""

    req_id: str
    slices: int
    failed: frozenset[int]
    abort: bool
    until: int = WHOLE
    ends: bool = False


@dataclass(frozen=True, slots=True)
class BlendLoaded:
    """How many ranks have loaded for a blend, which pieces one of them could not load; whether one
    of them can do nothing for it."""

    ranks: int
    failed: frozenset[int]
    aborted: bool

    def and_(self, other: BlendLoaded) -> BlendLoaded:
        """The news of more ranks."""
        return BlendLoaded(
            self.ranks + other.ranks, self.failed | other.failed, self.aborted or other.aborted
        )


class StateLoad(NamedTuple):
    """The states at the end of what is loaded: their record, and a block of each group."""

    namespace: bytes
    ref: ChunkRef
    blocks: list[int]


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
    blend: RowsJob | None = None
    states: StateLoad | None = None
    compute_s: float = 0.0  # what computing a chunk takes; 0: load it however long that takes

    def blocks_from(self, chunk: int) -> Iterator[int]:
        """The blocks that chunks from that one on are to fill."""
        for index in range(chunk, len(self.blocks)):
            yield from self.blocks[index][self.skip_blocks if index == 0 else 0 :]


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Chunks that are complete after this step's forward pass, or the states where they end."""

    req_id: str
    namespace: bytes
    refs: list[ChunkRef]
    blocks: list[list[int]]
    ttl_s: float | None
    tag: str
    pin: bool
    alone: bool
    of_states: bool = False


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Everything for one step. ``idle``: the step computes nothing, so waiting is free."""

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    blends: list[BlendCommand] = field(default_factory=list)
    idle: bool = True


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """One worker's news. ``bandwidth``: bytes of chunks a second by tier, newly measured.
    ``placed``: of blends whose load goes on, by rank, the position before which all is in place; of
    splits the one from which on it is.
    ``cut``: requests whose load was ended because computing is faster."""

    disabled: str = ""  # why this worker cannot use the store; "" when it can
    stalled: bool = False
    bandwidth: dict[int, float] = field(default_factory=dict)
    blends: dict[str, BlendLoaded] = field(default_factory=dict)
    placed: dict[str, dict[int, int]] = field(default_factory=dict)
    no_blending: str = ""  # why this worker cannot blend
    cut: frozenset[str] = frozenset()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Combine the news of two ranks: the slower of each, any trouble of either."""
        assert isinstance(other, WorkerReport)
        tiers = self.bandwidth.keys() | other.bandwidth.keys()
        slower = {
            tier: min(r.bandwidth[tier] for r in (self, other) if tier in r.bandwidth)
            for tier in tiers
        }
        blends = dict(self.blends)
        for req_id, loaded in other.blends.items():
            blends[req_id] = loaded.and_(blends[req_id]) if req_id in blends else loaded
        placed = {
            req_id: self.placed.get(req_id, {}) | other.placed.get(req_id, {})
            for req_id in self.placed.keys() | other.placed.keys()
        }
        return replace(
            self,
            blends=blends,
            placed=placed,
            no_blending=self.no_blending or other.no_blending,
            disabled=self.disabled or other.disabled,
            stalled=self.stalled or other.stalled,
            bandwidth=slower,
            cut=self.cut | other.cut,
        )
