"""What a blend needs of this rank's engine, and the kernels that make it fast."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, set_current_vllm_config

from blend.errors import UnsupportedModelError
from blend.rope import Rope
from connector.pages import BlockTable, LayerPages
from connector.rank import mark

if TYPE_CHECKING:
    from connector.piece_kernel import PieceKernel
    from connector.row_attention import RowAttention

T = TypeVar("T")
logger = logging.getLogger("vllm.prefixstore")

ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
_SENDS_ALL = ("CPU_ATTN", "FLASH_ATTN")  # backends whose plans are not kept in host memory
_NO_KERNEL_FOR = ("alibi_slopes", "logits_soft_cap", "sinks")  # what an attention may have


@dataclass(frozen=True)
class Engine:
    """What a blend needs of this rank's engine. ``names`` are the attention layers in order,
    ``pages`` are theirs. Without kernels it is slower: attention is the backend's, with sequences,
    and pieces are written layer by layer."""

    config: Any
    model: Any
    names: list[str]
    pages: Sequence[LayerPages]
    builder: Any
    block_tokens: int
    rope: Rope
    attend_rows: RowAttention | None = None
    piece_kernel: PieceKernel | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks that share each layer."""
        return int(self.config.parallel_config.tensor_parallel_size)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of an element of the KV cache."""
        dtype: torch.dtype = self.attention(0).kv_cache.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the KV cache is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def layers(self) -> list[Any]:
        """Decoder layers."""
        return list(self.model.model.layers)

    def slots(self, table: BlockTable, positions: Tensor) -> Tensor:
        """int64 [r]: where the KV cache keeps these positions of a request."""
        size = self.block_tokens
        return table.ids[0][positions // size] * size + positions % size

    def write(self, index: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write K and V ([r, heads, size]) of one layer to slots, as the backend itself does."""
        layer = self.attention(index)
        layer.impl.do_kv_cache_update(
            layer, keys.contiguous(), values.contiguous(), layer.kv_cache, slots
        )

    def attention(self, index: int) -> Any:
        """vLLM's attention layer."""
        return self.config.compilation_config.static_forward_context[self.names[index]]

    def table(self, blocks: Sequence[int]) -> BlockTable:
        """For `slots` and `key_values`: made once for a request."""
        return self.pages[0].page_map.block_table([blocks], self.device)

    def key_values(self, index: int, table: BlockTable) -> Tensor:
        """K and V of one layer in these blocks: [2, heads, tokens, head size], a copy."""
        pages = self.pages[index]
        page_map, tokens = pages.page_map, table.ids.shape[1] * self.block_tokens
        shape = (1, 2, page_map.num_kv_heads, tokens, page_map.head_size)
        out = torch.empty(shape, dtype=pages.dtype, device=pages.device)
        pages.read_chunks(table, out)
        return out[0]

    @contextmanager
    def attending(self, index: int, positions: Tensor, table: BlockTable) -> Iterator[None]:
        """Meanwhile a layer's attention is `attend_rows`, of rows at these positions."""
        from connector.row_attention import Attending

        layer = self.attention(index)
        impl, attend = layer.impl, self.attend_rows
        assert attend is not None

        def forward(query: Tensor, out: Tensor) -> None:
            keys, values = self.key_values(index, table)
            attend(query, keys, values, positions, impl.scale, out)

        layer.impl = Attending(impl, forward)
        try:
            yield
        finally:
            layer.impl = impl


class InTurn:
    """A backend's builder of metadata that plans anew when the plan before has been sent.

    FlashInfer's writes each plan to host memory of its own and does not wait for the copy to the
    device; the engine makes one a step, but a blend makes one for each slice of a step.
    """

    def __init__(self, builder: Any, device: torch.device) -> None:
        self._builder, self._device = builder, device
        self._sent: torch.cuda.Event | None = None

    def build(self, common_prefix_len: int, common: Any) -> Any:
        """As vLLM's."""
        if self._sent is not None:
            self._sent.synchronize()
        metadata = self._builder.build(common_prefix_len, common)
        self._sent = mark(self._device)
        return metadata


def make_engine(
    vllm_config: Any,
    kv_cache_config: Any,
    model: Any,
    names: list[str],
    pages: Sequence[LayerPages],
    slice_rows: int,
    per_chunk: int,
) -> Engine:
    """``slice_rows`` is the most rows of a slice, ``per_chunk`` tokens are in a chunk. Raises
    UnsupportedModelError for what cannot be blended."""
    architecture = type(model).__name__
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{architecture} is not supported", f"supported are {', '.join(ARCHITECTURES)}"
        )
    rope = Rope.from_config(vllm_config.model_config.hf_text_config.to_dict())
    group = kv_cache_config.kv_cache_groups[0]
    attention = vllm_config.compilation_config.static_forward_context[names[0]]
    if attention.kv_cache.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedModelError(f"the KV cache is {attention.kv_cache.dtype}")
    device = next(model.parameters()).device
    with set_current_vllm_config(vllm_config):
        builder: Any = attention.attn_backend.get_builder_cls()(
            group.kv_cache_spec,
            list(group.layer_names),
            _for_slices(vllm_config, slice_rows),
            device,
        )
    if attention.attn_backend.get_name() not in _SENDS_ALL:
        builder = InTurn(builder, device)
    block_tokens = int(group.kv_cache_spec.block_size)
    engine = Engine(vllm_config, model, names, pages, builder, block_tokens, rope)
    return _with_kernels(engine, per_chunk) if device.type == "cuda" else engine


def _with_kernels(engine: Engine, per_chunk: int) -> Engine:
    """With the kernels that can be used here: compiled now, not in a request."""
    return replace(
        engine,
        attend_rows=_if_possible(lambda: _row_attention(engine)),
        piece_kernel=_if_possible(lambda: _piece_kernel(engine, per_chunk)),
    )


def _if_possible(make: Callable[[], T]) -> T | None:
    try:
        return make()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        logger.warning("prefixstore: blending is slower: %s", error)
        return None


def _row_attention(engine: Engine) -> RowAttention:
    from connector.row_attention import RowAttention

    attention, page_map = engine.attention(0), engine.pages[0].page_map
    for name in _NO_KERNEL_FOR:
        if getattr(attention.impl, name, None) not in (None, 0):
            raise ValueError(f"its attention has {name}")
    if engine.config.model_config.dtype != engine.kv_dtype:
        raise ValueError(f"its KV cache is {engine.kv_dtype}, unlike its queries")
    sizes = int(attention.num_heads), page_map.num_kv_heads, page_map.head_size
    return RowAttention(*sizes, engine.kv_dtype, engine.device)


def _piece_kernel(engine: Engine, per_chunk: int) -> PieceKernel:
    from connector.piece_kernel import PieceKernel

    kernel = PieceKernel(engine.pages, engine.rope.style)
    kernel.compile(per_chunk, engine.rope.rotary_dim // 2)
    return kernel


def _for_slices(vllm_config: Any, slice_rows: int) -> Any:
    """The engine's settings for a metadata builder of our own.

    Builders have buffers for ``max_num_seqs`` sequences, and each row of a slice may be one
    (FlashInfer's: 4 bytes for each page of the longest request, times that); what ours builds is
    never part of a CUDA graph.
    """
    ours, scheduler = copy(vllm_config), copy(vllm_config.scheduler_config)
    scheduler.max_num_seqs = max(scheduler.max_num_seqs, slice_rows)
    compilation = copy(vllm_config.compilation_config)
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    ours.scheduler_config, ours.compilation_config = scheduler, compilation
    return ours
