"""States: what Mamba, linear attention and short convolutions keep of all tokens before, per layer.

A state is that of one place in a prompt. vLLM's ``align`` mode (prefix caching) keeps those at the
ends of some blocks and says where, in the step that computes them. Of those at a chunk's end a copy
goes to a namespace beside that of the KV, under the key of the chunk that ends there: a record of
all layers, a part for each tensor-parallel rank.

What must hold: a prefix is loaded only as far as a place whose state is stored, and with that
state. Ranks share a state by heads in ways of their own, and backends (a CPU's, a GPU's, the next
version's) arrange it in ways of their own, so each of them has other namespaces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from connector.groups import KvGroup
from connector.known import KnownNamespaces
from prefixstore.identity import ModelIdentity, canonical_json
from prefixstore.layout import Layout, Roi

SPEC = "MambaSpec"
ALIGNMENT_BYTES = 16  # of each tensor in a record, whatever its elements


@dataclass(frozen=True, slots=True)
class StateForm:
    """What states an engine has. ``groups`` are vLLM's, of layers that have one; ``described`` goes
    into the identity: shapes and dtypes of one layer's state, the number of ranks, the backend."""

    groups: tuple[KvGroup, ...]
    layout: Layout
    described: str

    def identity(self, model: ModelIdentity, name: bytes) -> ModelIdentity:
        """Whose states these are, if the KV is that model's, in the namespace of that name. A model
        that is retired or gets new weights has another name, and other states."""
        return _identity(self.described, model, name)

    def blocks_at(self, tables: Sequence[Sequence[int]], num_tokens: int) -> list[int]:
        """Where the states of that place belong: a block of each group. ``tables`` are vLLM's."""
        return [tables[group.index][num_tokens // group.block_tokens - 1] for group in self.groups]


@lru_cache(maxsize=256)
def _identity(described: str, model: ModelIdentity, name: bytes) -> ModelIdentity:
    """Kept, since each request asks for it."""
    states = {**json.loads(described), "beside": name.hex()}
    attention = {**json.loads(model.attention), "states": states}
    return replace(model, attention=canonical_json(attention))


def refusal(vllm_config: Any, specs: Sequence[Any]) -> str:
    """Why these states cannot be kept; "" when they can."""
    mode = {str(getattr(spec, "mamba_cache_mode", "none")) for spec in specs}
    if mode != {"align"}:
        return (
            f"states (Mamba, linear attention) in vLLM's cache mode {', '.join(sorted(mode))}; "
            "turn prefix caching on, with mamba_cache_mode align"
        )
    if any(spec.num_speculative_blocks for spec in specs):
        return "states (Mamba, linear attention) with speculative decoding"
    if int(vllm_config.parallel_config.pipeline_parallel_size) > 1:
        return "states (Mamba, linear attention) with pipeline parallelism"
    if len({_described(spec) for spec in specs}) != 1:
        return "states of several forms"
    return ""


def form_of(
    found: Sequence[tuple[KvGroup, Any]],
    num_layers: int,
    ranks: int,
    chunk_tokens: int,
    backend: str,
) -> StateForm:
    """The form of states in these groups, of so many layers in all.

    ``backend`` names what computes them, its version included: a page is copied as it is, and
    which of a state's dimensions comes first in it is each backend's own affair.
    """
    spec = found[0][1]
    described = _described(spec)
    layer_bytes = sum(
        _aligned(math.prod(shape) * dtype.itemsize)
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )
    head_bytes = _aligned(-(-layer_bytes // chunk_tokens))
    return StateForm(
        tuple(group for group, _ in found),
        Layout(num_layers, 1, ranks, chunk_tokens, head_bytes),
        canonical_json({"backend": backend, "ranks": ranks, "tensors": json.loads(described)}),
    )


def _described(spec: Any) -> str:
    tensors = [
        [list(shape), str(dtype).removeprefix("torch.")]
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    ]
    return canonical_json({"kind": str(getattr(spec.mamba_type, "name", "")), "of": tensors})


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class StatePages:
    """One rank's states in vLLM's pages. ``layers[i]`` are a layer's tensors ``[block, ...]``,
    ``members[i]`` the place of its group's block in a row of blocks. Raises ValueError for tensors
    that are larger than the form says."""

    def __init__(
        self, form: StateForm, layers: list[list[torch.Tensor]], members: list[int], rank: int
    ) -> None:
        self.layout = form.layout
        self.roi = Roi(0, form.layout.num_layers, rank, rank + 1)
        self.unit_bytes = self.staged_bytes = form.layout.roi_bytes(self.roi)
        self.namespaces = KnownNamespaces(form.layout)
        self.device = layers[0][0].device
        self._layers, self._members, self._width = layers, members, len(form.groups)
        self._num_blocks = min(len(state) for layer in layers for state in layer)
        for layer in layers:
            size = sum(_aligned(state[0].numel() * state.element_size()) for state in layer)
            if size > self.layout.piece_bytes:
                raise ValueError(
                    f"a layer's states have {size} bytes, not {self.layout.piece_bytes}"
                )

    def read_pages(self, blocks: list[list[int]], out: torch.Tensor) -> None:
        """Copy states to ``[n, unit_bytes]`` on the same device; on CUDA only enqueued, on the
        current stream.

        What no tensor fills is zero: equal states are equal bytes.
        """
        out.zero_()
        with torch.inference_mode():
            for page, record in self._pairs(blocks, out):
                record.copy_(page)

    def as_stored(self, staged: torch.Tensor) -> torch.Tensor:
        """What `read_pages` gave, as it is stored: itself."""
        return staged

    def write_pages(self, blocks: list[int], row: torch.Tensor) -> None:
        """Copy one record ``[unit_bytes]`` in host memory to its blocks; on CUDA only enqueued."""
        near = row.to(self.device, non_blocking=True)
        with torch.inference_mode():
            for page, record in self._pairs([blocks], near.unsqueeze(0)):
                page.copy_(record)

    def _pairs(
        self, blocks: list[list[int]], rows: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(a state in its page, its part of a record). Raises ValueError."""
        for row in blocks:
            if len(row) != self._width or not all(0 < block < self._num_blocks for block in row):
                raise ValueError(
                    f"blocks {row}: {self._width} between 1 and {self._num_blocks - 1} expected"
                )
        piece = self.layout.piece_bytes
        for row, data in zip(blocks, rows, strict=True):
            for index, (layer, member) in enumerate(zip(self._layers, self._members, strict=True)):
                at = index * piece
                for tensor in layer:
                    page = tensor[row[member]]
                    size = page.numel() * page.element_size()
                    yield page, data[at : at + size].view(tensor.dtype).view(page.shape)
                    at += _aligned(size)
