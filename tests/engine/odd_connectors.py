"""Connectors that say more than ours, or have a part broken on purpose. vLLM loads them by name.

They run in the engine's process, where a test cannot reach; what they find is left in files beside
the store's folder.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from blend.rope import Rope
from connector import blend_compat, buffers
from connector.blend_engine import Engine, make_engine
from connector.blend_host import VllmHost
from connector.messages import WHOLE
from connector.pages import BlockTable
from connector.pieces import Placing
from connector.rank import Rank
from connector.states import StatePages
from connector.vllm import PrefixStoreConnector
from prefixstore.namespace import MISS, Namespace
from tests.engine.support import connector


def named(name: str, store: Path, **extra: Any) -> dict[str, Any]:
    """``--kv-transfer-config`` for one of the classes below."""
    here = {"kv_connector": name, "kv_connector_module_path": "tests.engine.odd_connectors"}
    return {**connector(store, **extra), **here}


class Telling(PrefixStoreConnector):
    """Leaves the KV of each blend, as it is in the pages when the blend ends."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        assert self._worker is not None
        blender, rank = self._worker._blender, self._worker._rank
        advance = blender._advance

        def telling(running: Any, command: Any) -> bool:
            done = advance(running, command)
            if done:
                job = running.job
                engine = rank.engine
                assert engine is not None
                table = engine.table(job.blocks)
                layers = [engine.key_values(i, table).numpy() for i in range(len(rank.pages))]
                pieces = [(p.start, p.num_tokens, p.source_start) for p in job.pieces]
                np.savez(
                    Path(self._options.dir).parent / f"{job.selector}-{job.budget}-{job.span}.npz",
                    kv=np.stack(layers)[..., : len(job.token_ids), :],
                    pieces=np.array(pieces),
                    computed=job.computed,
                    recomputed=running.blend.report.num_recomputed,
                )
            return done

        blender._advance = telling  # type: ignore[method-assign]


class OneByOne(PrefixStoreConnector):
    """Loads a chunk at a time, slowly; leaves how many rows were blended before all were loaded.
    Of a request whose budget is below LOSES, the last chunk cannot be loaded."""

    LOSES = 0.9

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        buffers.BYTES = 1
        get = Namespace.get
        lost: set[bytes] = set()

        def slow(self: Namespace, refs: Any, outs: Any, *args: Any) -> list[int]:
            time.sleep(0.03)
            tiers = get(self, refs, outs, *args)
            return [MISS if ref.key in lost else t for ref, t in zip(refs, tiers, strict=True)]

        Namespace.get = slow  # type: ignore[method-assign, assignment]
        super().register_kv_caches(kv_caches)
        assert self._worker is not None
        start, advance = self._worker.loader.start, self._worker._blender._advance
        found = Path(self._options.dir).parent / "early.json"

        def starting(jobs: Any) -> None:
            for job in jobs:
                lost.clear()
                if job.blend is not None and job.blend.budget < self.LOSES:
                    lost.add(job.blend.pieces[-1].ref.key)
            start(jobs)

        def counting(running: Any, command: Any) -> bool:
            before = 0 if running.blend is None else running.blend.needed
            done = advance(running, command)
            early = command.until < WHOLE and running.blend.needed > before > 0
            told = json.loads(found.read_text()) if found.exists() else []
            found.write_text(json.dumps([*told, [early, command.until]]))
            return done

        self._worker.loader.start = starting  # type: ignore[method-assign]
        self._worker._blender._advance = counting  # type: ignore[method-assign]


class Paced(PrefixStoreConnector):
    """Splits whatever it finds. A file beside the store, `pace`, says how many seconds a chunk and
    a layer of a slice take, which chunks are lost, and whether computing waits for loading."""

    WAIT_S = 20.0

    def _told(self) -> Any:
        return json.loads((Path(self._options.dir).parent / "pace").read_text())

    def _start_scheduler_side(self, geometry: Any) -> None:
        super()._start_scheduler_side(geometry)
        assert self._scheduler is not None
        self._scheduler._planner.front = lambda tiers: 0.5  # type: ignore[method-assign]

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        get, layer = Namespace.get, VllmHost.layer

        def paced(self_: Namespace, refs: Any, outs: Any, *args: Any) -> list[int]:
            told = self._told()
            time.sleep(told["chunk_s"] * len(refs))
            tiers = get(self_, refs, outs, *args)
            return [
                MISS if ref.depth in told["lost"] else t for ref, t in zip(refs, tiers, strict=True)
            ]

        def slowly(host: VllmHost, index: int, *args: Any) -> Any:
            time.sleep(self._told()["layer_s"])
            return layer(host, index, *args)

        Namespace.get = paced  # type: ignore[method-assign, assignment]
        VllmHost.layer = slowly  # type: ignore[method-assign, assignment]
        super().register_kv_caches(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        end = time.monotonic() + self.WAIT_S
        while self._worker is not None and self._worker.loader._loads and self._told()["waits"]:
            assert time.monotonic() < end
            time.sleep(0.001)


class Unrefusing(PrefixStoreConnector):
    """Keeps latents of MLA also where a prompt with more than one token behind them goes wrong."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        vllm_config.cache_config.enable_prefix_caching = True
        super().__init__(vllm_config, role, kv_cache_config)
        vllm_config.cache_config.enable_prefix_caching = False


class ForgetsStates(PrefixStoreConnector):
    """Loads KV, but leaves the states as they are."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        StatePages.write_pages = lambda self, blocks, row: None  # type: ignore[method-assign]
        super().register_kv_caches(kv_caches)


# ---------------------------------------------------------------------- broken on purpose
def swapped(blocks: Sequence[int]) -> list[int]:
    return [blocks[1], blocks[0], *blocks[2:]]


def pages_swapped() -> AbstractContextManager[Any]:
    """What a blend reads of two blocks is the other's."""
    table = Engine.table
    return patch.object(Engine, "table", lambda self, blocks: table(self, swapped(blocks)))


def chunks_swapped() -> AbstractContextManager[Any]:
    """What is saved of two blocks is the other's."""
    read = Rank.read_pages

    def broken(self: Rank, blocks: list[list[int]], out: torch.Tensor) -> None:
        read(self, [swapped(chunk) for chunk in blocks], out)

    return patch.object(Rank, "read_pages", broken)


def other_theta() -> AbstractContextManager[Any]:
    """K is moved with 11,000 for 10,000."""
    read = Rope.from_config

    def broken(config: dict[str, Any]) -> Rope:
        rope = read(config)
        bend = (10000 / 11000) ** (torch.arange(len(rope.inv_freq)) / len(rope.inv_freq))
        return dataclasses.replace(rope, inv_freq=rope.inv_freq * bend)

    return patch.object(Rope, "from_config", broken)


def double_scale() -> AbstractContextManager[Any]:
    """Attention logits are twice as large as they should be."""
    layer = VllmHost.layer

    def broken(self: VllmHost, *args: Any) -> Any:
        attention = self._engine.attention(args[0]).impl
        with patch.object(attention, "scale", 2 * attention.scale):
            return layer(self, *args)

    return patch.object(VllmHost, "layer", broken)


def one_row_early() -> AbstractContextManager[Any]:
    """Rows attend as if each stood one position further to the front."""
    describe = VllmHost._describe

    def broken(self: VllmHost, rows: torch.Tensor) -> Any:
        return describe(self, rows.clamp(min=1) - 1)

    return patch.object(VllmHost, "_describe", broken)


def one_slot_off() -> AbstractContextManager[Any]:
    """The layer's K and V go to the slot of the position before."""
    describe = VllmHost._describe

    def broken(self: VllmHost, rows: torch.Tensor) -> Any:
        self._slots = self._slots.roll(1)
        return describe(self, rows)

    return patch.object(VllmHost, "_describe", broken)


def pieces_shifted() -> AbstractContextManager[Any]:
    """Each token of a piece goes to its neighbour's place."""
    write = Placing.write

    def broken(self: Placing, at: int, chunks: torch.Tensor) -> None:
        sources, slots, pieces = self._tokens
        self._tokens = torch.stack([sources, slots.roll(1), pieces])
        write(self, at, chunks)

    return patch.object(Placing, "write", broken)


def other_vllm() -> AbstractContextManager[Any]:
    """The backend is not the one that is known."""
    return patch.object(Engine, "attention", lambda self, index: object())


def rows_by_torch() -> AbstractContextManager[Any]:
    """Scattered rows attend as on a GPU: to a copy of what is before them."""

    def attend(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor,
        scale: float, out: torch.Tensor,
    ) -> None:  # fmt: skip
        groups = query.shape[1] // len(keys)
        seen = torch.arange(keys.shape[1]) <= positions[:, None]
        out.copy_(
            scaled_dot_product_attention(
                query.transpose(0, 1), keys.repeat_interleave(groups, 0),
                values.repeat_interleave(groups, 0), attn_mask=seen, scale=scale,
            ).transpose(0, 1)
        )  # fmt: skip

    def made(*args: Any) -> Engine:
        by_torch: Any = attend
        return dataclasses.replace(make_engine(*args), attend_rows=by_torch)

    return patch.object(blend_compat, "make_engine", made)


@contextmanager
def block_left_out() -> Iterator[None]:
    """Of what is before them, the last block is not copied."""
    first = BlockTable.first
    fewer = patch.object(BlockTable, "first", lambda self, count: first(self, max(1, count - 1)))
    with rows_by_torch(), fewer:
        yield


BREAKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    **{
        how.__name__: how
        for how in (
            pages_swapped, chunks_swapped, other_theta, double_scale, one_row_early, one_slot_off,
            pieces_shifted, other_vllm, rows_by_torch, block_left_out,
        )
    },
}  # fmt: skip


class Tried(PrefixStoreConnector):
    """Leaves what the self-test says to each break, and whether it changed anything; then starts
    with K moved wrongly."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        found: dict[str, str] = {}
        engine_of = blend_compat.engine_of

        def trying(*args: Any) -> tuple[Engine | None, str]:
            for name, how in BREAKS.items():
                with how(), unchanged(list(kv_caches.values())):
                    found[name] = engine_of(*args)[1]
            with other_theta():
                return engine_of(*args)

        with patch.object(blend_compat, "engine_of", trying):
            super().register_kv_caches(kv_caches)
        (Path(self._options.dir).parent / "tried.json").write_text(json.dumps(found))


@contextmanager
def unchanged(caches: list[torch.Tensor]) -> Iterator[None]:
    """The KV cache, full of noise, and torch's generator must be the same afterwards."""
    with torch.inference_mode():
        before = [cache.normal_(generator=torch.Generator().manual_seed(8)) for cache in caches]
        before = [cache.clone() for cache in before]
    state = torch.get_rng_state()
    yield
    assert all(map(torch.equal, caches, before)), "the KV cache is not what it was"
    assert torch.equal(torch.get_rng_state(), state), "torch's generator was used"
    for cache in caches:
        cache.zero_()


class SharedNames(PrefixStoreConnector):
    """Blended requests keep the names of their blocks."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with patch.object(blend_compat, "isolate", lambda *args: None):
            super().__init__(vllm_config, role, kv_cache_config)
