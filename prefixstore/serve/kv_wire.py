"""The structures of vLLM's KV events, as ``vllm.distributed.kv_events`` (0.32) has them.

Written down here because a server has no vLLM; tests decode them with vLLM's own. Fields that this
store has nothing for are left out on the wire (``omit_defaults``). The router decodes vLLM's with
them: there a hash may be a number.
"""

from __future__ import annotations

from typing import Any

import msgspec


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """What is common to events: they are maps, and ``type`` names the class."""


class BlockStored(KVCacheEvent):
    """Blocks that are there now, each behind the one before it."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(KVCacheEvent):
    """Blocks that are there no more."""

    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    """Nothing is there, as far as was told before."""


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one message carries."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None
