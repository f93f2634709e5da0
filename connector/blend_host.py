"""`blend.recompute.Host` over vLLM: its own decoder layers, on chosen tokens of one request.

The layers run as they are (quantised weights, biases, norms, tensor parallelism and all), outside
the engine's own forward pass and uncompiled. K and V of all rows are written before a layer
attends, so a row sees fresh K and V where there are any and reused ones elsewhere. On CUDA
attention is `row_attention`'s; elsewhere it goes through vLLM's backend: each run of consecutive
rows is one "sequence" whose queries are the run and whose context is everything before it, all of
them sharing the request's block table.

Runs on the worker's main thread, where the engine's forward pass runs, never beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from blend.recompute import Observer
from connector.blend_engine import Engine
from connector.sending import sent
from prefixstore.keys import token_bytes

_OBSERVED_ROWS = 64  # rows whose attention is looked at in one go
_RUN_ROWS = 16  # from so many rows a run on, the backend's attention is the faster one

State = tuple[Tensor, Tensor | None]  # hidden states and residual, [r, hidden size]


class VllmHost:
    """One request: ``ids`` are its prompt tokens, ``blocks`` the blocks of ``[0, len(ids))``."""

    def __init__(self, engine: Engine, ids: Sequence[int], blocks: Sequence[int]) -> None:
        self._engine = engine
        self.device = engine.device
        self.num_layers = len(engine.names)
        tokens = np.frombuffer(token_bytes(ids), "<i4").astype(np.int64)
        self._ids = sent(torch.from_numpy(tokens), self.device)
        self._table = engine.table(blocks)
        self._rows = torch.zeros(0, dtype=torch.int64)  # what the next four are for
        self._on_device = self._slots = self._rows
        self._before = self._table  # blocks that they attend to
        self._metadata: Any = None

    def embed(self, positions: Tensor) -> State:
        """See `Host`."""
        self._begin(positions)
        ids = self._ids[self._on_device]
        embedded: Tensor = self._engine.model.model.embed_input_ids(ids)
        return embedded, None

    def _begin(self, positions: Tensor) -> None:
        """Know all that is the same in each layer."""
        if positions is self._rows:
            return
        self._rows, self._on_device = positions, sent(positions, self.device)
        self._slots = self._engine.slots(self._table, self._on_device)
        self._before = self._table.first(int(positions[-1]) // self._engine.block_tokens + 1)
        self._metadata = self._describe(positions)

    def layer(
        self, index: int, positions: Tensor, state: State, observe: Observer | None = None
    ) -> State:
        """See `Host`."""
        engine = self._engine
        self._begin(positions)
        near, slots = self._on_device, self._slots
        attention = engine.attention(index)
        handle = None
        if observe is not None:
            seen = observe

            def look(_: Any, args: tuple[Any, ...]) -> None:
                query, key, value = args[:3]
                # Fresh K is not in the pages yet.
                engine.write(index, slots, *self._heads(attention, key, value))
                seen(self._mass(index, attention, query, near))

            handle = attention.register_forward_pre_hook(look)
        try:
            ours = self._metadata is None
            with (
                set_forward_context(
                    None, engine.config, num_tokens=len(positions), skip_compiled=True
                ),
                engine.attending(index, near, self._before) if ours else nullcontext(),
            ):
                context = get_forward_context()
                context.attn_metadata = dict.fromkeys(engine.names, self._metadata)
                context.slot_mapping = dict.fromkeys(engine.names, slots)
                hidden, residual = engine.layers[index](near, *state)
        finally:
            if handle is not None:
                handle.remove()
        return hidden, residual

    @staticmethod
    def _heads(attention: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(key), attention.num_kv_heads, -1)
        return key.view(shape), value.view(shape)

    def _describe(self, rows: Tensor) -> Any:
        """Attention metadata in which each run of consecutive rows is a sequence; None if
        `attend_rows` is to do it."""
        starts = torch.cat([torch.ones(1, dtype=torch.bool), rows.diff() != 1]).nonzero().flatten()
        if self._engine.attend_rows is not None and len(starts) * _RUN_ROWS > len(rows):
            return None
        bounds = torch.cat([starts, torch.tensor([len(rows)])]).to(torch.int32)
        ends = (rows[bounds[1:].long() - 1] + 1).to(torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=sent(bounds, self.device),
            query_start_loc_cpu=bounds,
            seq_lens=sent(ends, self.device),
            num_reqs=len(ends),
            num_actual_tokens=len(rows),
            max_query_len=int(bounds.diff().max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=self._table.ids.int().expand(len(ends), -1).contiguous(),
            slot_mapping=self._slots,
            causal=True,
            positions=self._on_device,
            seq_lens_cpu_upper_bound=ends,
        )
        return self._engine.builder.build(0, common)

    def _mass(self, index: int, attention: Any, query: Tensor, positions: Tensor) -> Tensor:
        """float32 [end]: attention on each position, summed over rows and this rank's heads."""
        keys, _ = self._cached(index)
        heads = attention.num_heads
        grouped = query.view(len(query), len(keys), heads // len(keys), -1).permute(1, 2, 0, 3)
        place = torch.arange(keys.shape[1], device=self.device)
        total = torch.zeros(keys.shape[1], device=self.device)
        for asked, key in zip(grouped, keys, strict=True):  # one KV head at a time: less memory
            for part in torch.arange(len(positions), device=self.device).split(_OBSERVED_ROWS):
                logits = asked[:, part].float() @ key.float().T * attention.impl.scale
                hidden = place[None] > positions[part][:, None]
                total += logits.masked_fill(hidden, float("-inf")).softmax(-1).sum((0, 1))
        return total

    def _cached(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V in the pages of the whole span, each [heads, tokens, size]."""
        both = self._engine.key_values(index, self._table)[:, :, : len(self._ids)]
        return both[0], both[1]

    def take(self, state: State, rows: Tensor) -> State:
        """See `Host`."""
        hidden, residual = state
        rows = sent(rows, self.device)
        return hidden[rows], None if residual is None else residual[rows]

    def join(self, states: list[State]) -> State:
        """See `Host`."""
        hidden = torch.cat([state[0] for state in states])
        residuals = [state[1] for state in states if state[1] is not None]
        return hidden, torch.cat(residuals) if residuals else None

    def key_values(self, index: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Host`."""
        keys, values = self._cached(index)
        positions = sent(positions, self.device)
        return keys[:, positions].transpose(0, 1), values[:, positions].transpose(0, 1)

    def reduce(self, values: Tensor) -> Tensor:
        """See `Host`."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        if group.world_size == 1:
            return values
        reduced: Tensor = group.all_reduce(values)
        return reduced
