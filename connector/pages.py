"""Canonical view of an engine's paged KV cache, learnt from the attention backend itself.

Owns: the map between one layer's paged KV tensor (logical `[B, H, N, C]`, `C = 2 * D`, any
strides, any packing inside the page) and the canonical order `[plane K|V][head][token][dim]`. An
MLA layer has one plane, its latent, and `C = D`.

Must hold: stored elements move bit for bit (never converted, so fp8 codes and NaN payloads
survive), and a write touches the named blocks and nothing else. A page whose bytes are not
a fixed rearrangement of its own K and V elements is refused with `PageLayoutError`, never
guessed at; the caller then goes without this cache.

A crash leaves nothing behind: all state is derived again from the live tensors.

`page_probe` finds the layout; here the whole cache becomes one `as_strided` view in canonical
order, so that every transfer is a single strided copy without index tables.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from connector.page_probe import (
    INT_OF_BYTES,
    AttentionLayer,
    GroupView,
    PageLayoutError,
    PlaneGroup,
    backend_name,
    check_geometry,
    group_views,
    num_planes,
    plane_groups,
    probe_offsets,
    scratch_page,
    with_isa,
    write_page,
)
from connector.sending import sent

BlockIds = Sequence[Sequence[int]]
Window = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BlockTable:
    """Validated block ids of m chunks: build once, use for every layer.

    ids: int64 `[m, k]` kernel block ids on the cache's device, in prompt order.
    """

    ids: Tensor
    end: int  # greatest kernel block id + 1
    distinct: bool

    def first(self, count: int) -> BlockTable:
        """Of the first so many blocks of each chunk."""
        return replace(self, ids=self.ids[:, :count])


@dataclass(frozen=True)
class PageMap:
    """Page layout of one kind of attention layer.

    num_planes P is 2 for K and V, 1 for MLA. num_kv_heads H and head_size D are this rank's.
    block_tokens is the scheduler's block size in tokens, `kernel_blocks_per_block` times that of
    the tensor (N). element_bytes is the size of one stored element.
    """

    num_planes: int
    num_kv_heads: int
    head_size: int
    block_tokens: int
    element_bytes: int
    kernel_blocks_per_block: int
    _groups: tuple[PlaneGroup, ...]
    _page_shape: tuple[int, ...]
    _page_strides: tuple[int, ...]

    @classmethod
    def probe(
        cls,
        layer: AttentionLayer,
        kv: Tensor,
        num_kv_heads: int,
        head_size: int,
        model_dtype: torch.dtype,
        kernel_blocks_per_block: int = 1,
        cache: MutableMapping[Hashable, PageMap] | None = None,
    ) -> PageMap:
        """Learn the page layout of `layer` by writing scratch pages with its own backend.

        kv: the registered cache, `[B, H, N, P * D]`, any strides; only its geometry is
        used, its contents are neither read nor written. model_dtype is the dtype K and V
        have before they are stored. `cache` is shared by layers of one model: layers of
        equal geometry are then probed once, and the others checked with two writes.

        Raises PageLayoutError if the layer's KV cannot be kept as plain K and V elements.
        """
        check_geometry(layer, kv, num_kv_heads, head_size)
        layer = with_isa(layer, model_dtype, kv.shape[2], head_size)
        key = (
            *(type(layer.impl), getattr(layer.impl, "kv_cache_dtype", None)),
            *(getattr(layer, "isa", None), kv.shape[1:], kv.stride()[1:], kv.dtype),
            *(kv.device.type, model_dtype, kernel_blocks_per_block),
        )
        page_map = cache.get(key) if cache is not None else None
        if page_map is None:
            offsets = probe_offsets(layer, kv, head_size, model_dtype)
            page_map = cls(
                num_planes=num_planes(layer),
                num_kv_heads=num_kv_heads,
                head_size=head_size,
                block_tokens=kv.shape[2] * kernel_blocks_per_block,
                element_bytes=kv.element_size(),
                kernel_blocks_per_block=kernel_blocks_per_block,
                _groups=plane_groups(offsets),
                _page_shape=tuple(kv.shape[1:]),
                _page_strides=tuple(kv.stride()[1:]),
            )
        page_map._verify(layer, kv, model_dtype)
        if cache is not None:
            cache[key] = page_map
        return page_map

    def block_table(self, block_ids: BlockIds, device: torch.device) -> BlockTable:
        """Turn scheduler block ids `[m][k]` into a table every `LayerPages` method takes.

        Raises ValueError for ids that are negative or rows that are empty or ragged.
        """
        width = len(block_ids[0]) if len(block_ids) else 1
        if width == 0 or any(len(row) != width for row in block_ids):
            raise ValueError("block_ids: every chunk needs the same number (>= 1) of blocks")
        ids = torch.tensor(block_ids, dtype=torch.int64).view(-1, width)
        if ids.numel() and int(ids.min()) < 0:
            raise ValueError(f"block_ids: negative block id {int(ids.min())}")
        ratio = self.kernel_blocks_per_block
        if ratio > 1:
            ids = (ids.unsqueeze(-1) * ratio + torch.arange(ratio)).flatten(1)
        end = int(ids.max()) + 1 if ids.numel() else 0
        distinct = ids.unique().numel() == ids.numel()
        return BlockTable(sent(ids, device), end, distinct)

    def bind(self, kv: Tensor) -> LayerPages:
        """Attach to one layer's cache tensor; cheap, allocates nothing on the device.

        kv: `[B, H, N, P * D]` with the probed page shape and strides; the block stride is
        free. Raises ValueError if the geometry is another one.
        """
        page = (tuple(kv.shape[1:]), tuple(kv.stride()[1:]), kv.element_size())
        expected = (self._page_shape, self._page_strides, self.element_bytes)
        if page != expected:
            raise ValueError(
                f"KV tensor has page (shape, strides, element bytes) {page}, but {expected} "
                "was probed; probe this layer on its own"
            )
        if kv.shape[0] % self.kernel_blocks_per_block or (kv.shape[0] > 1 and kv.stride(0) == 0):
            raise ValueError(
                f"KV tensor has {kv.shape[0]} blocks with stride {kv.stride(0)}; expected "
                f"distinct blocks in groups of {self.kernel_blocks_per_block}"
            )
        return LayerPages(self, kv, group_views(kv, self._groups))

    def _verify(self, layer: AttentionLayer, kv: Tensor, model_dtype: torch.dtype) -> None:
        """Check the map and that an element's code depends on its own value alone.

        Values 0, 1 and 4 are mixed: had a quantiser scaled by what it sees (int8 per token
        and head), a 1 beside a 4 would be stored otherwise than a 1 among ones, and the
        scale, which the page lacks, would be needed to read it.
        """
        shape = (1, self.num_planes, self.num_kv_heads, kv.shape[2], self.head_size)
        count = torch.Size(shape).numel()
        # Knuth's multiplicative hash: a pattern without the periods that page layouts have.
        hashed = (torch.arange(count) * 2654435761 >> 16) % 3
        mixed = torch.tensor([0, 1, 4])[hashed].view(shape)
        scratch, _ = scratch_page(kv)
        pages = LayerPages(self, scratch, group_views(scratch, self._groups))
        table = BlockTable(torch.zeros(1, 1, dtype=torch.int64, device=kv.device), 1, True)
        stored = []
        for values in (torch.ones_like(mixed), mixed):
            write_page(layer, scratch, values[0], model_dtype)
            out = torch.empty(shape, dtype=INT_OF_BYTES[self.element_bytes], device=kv.device)
            pages._read(table, out)
            stored.append(out.cpu())
        ones, mix = stored
        if not torch.equal(mix != 0, mixed != 0):
            raise PageLayoutError(
                f"{backend_name(layer)}: KV page layout is not stable between writes"
            )
        if not torch.equal(mix[mixed == 1], ones[mixed == 1]):
            raise PageLayoutError(
                f"{backend_name(layer)}: KV is quantised with scales computed from the data (for "
                "example int8 per token and head), which are not part of K and V; use "
                "kv_cache_dtype auto or fp8 with fixed scales"
            )


class LayerPages:
    """Reads and writes canonical chunks in one layer's KV cache. Made by `PageMap.bind`.

    A chunk is k blocks that follow each other in the prompt; in a buffer it is
    `[P][H][k * block_tokens][D]`. Buffers have any dtype of the element's size, or uint8
    with a last dimension of D * element_bytes; that dimension is contiguous, others may be
    strided. They are on the cache's device. On CUDA, copies go to the current stream.
    """

    def __init__(self, page_map: PageMap, kv: Tensor, views: tuple[GroupView, ...]) -> None:
        self.page_map = page_map
        self.device, self.dtype = kv.device, kv.dtype
        self.num_kernel_blocks = kv.shape[0]
        self._views = views

    def base(self) -> int:
        """Address of the first block, from which `row_offsets` count."""
        return self._views[0].cache.data_ptr()

    def block_stride(self) -> int:
        """Bytes from a block to the next."""
        cache = self._views[0].cache
        return cache.stride(0) * cache.element_size()

    def row_offsets(self) -> tuple[torch.dtype, Tensor]:
        """Where the rows of a page begin: int64 ``[plane x head x token]``, in integers of that
        type. Raises ValueError unless each row of head-size elements is in one piece."""
        lane, row_bytes = self._views[0].lane, self.page_map.head_size * self.page_map.element_bytes
        planes = []
        for view in self._views:
            cache = view.cache
            whole = cache.shape[-1] * cache.element_size() == row_bytes and cache.stride(-1) == 1
            if view.pick is not None or view.lane != lane or not whole:
                raise ValueError("the rows of a page are not in one piece")
            offsets = torch.tensor((cache.data_ptr() - self.base()) // lane.itemsize)
            for size, stride in zip(cache.shape[1:-1], cache.stride()[1:-1], strict=True):
                offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
            planes.append(offsets.flatten())
        return lane, torch.cat(planes)

    def read_chunk(self, block_ids: Sequence[int], out: Tensor) -> None:
        """Copy one chunk into `out` `[P, H, k * block_tokens, D]`. Raises ValueError."""
        self.read_chunks([block_ids], out.unsqueeze(0))

    def read_chunks(self, block_ids: BlockIds | BlockTable, out: Tensor) -> None:
        """Copy m chunks into `out` `[m, P, H, k * block_tokens, D]`.

        Raises ValueError if a block id or the buffer does not fit; nothing is copied then.
        """
        self._read(self._table(block_ids), out)

    def write_chunks(self, block_ids: BlockIds | BlockTable, src: Tensor) -> None:
        """Copy `src` `[m, P, H, k * block_tokens, D]` into the named blocks, and only those.

        Raises ValueError if a block id or the buffer does not fit, or a block is named
        twice (which content would stay is not defined); nothing is copied then.
        """
        table = self._table(block_ids)
        if not table.distinct:
            raise ValueError("block_ids: a block is named twice; each can be written once")
        with torch.inference_mode():  # engine tensors may be inference tensors
            for cache, ids, window in self._windows(table, src):
                cache.index_copy_(0, ids, window)

    def _read(self, table: BlockTable, out: Tensor) -> None:
        with torch.inference_mode():
            for cache, ids, window in self._windows(table, out):
                torch.index_select(cache, 0, ids, out=window)

    def _table(self, block_ids: BlockIds | BlockTable) -> BlockTable:
        if not isinstance(block_ids, BlockTable):
            block_ids = self.page_map.block_table(block_ids, self.device)
        if block_ids.end > self.num_kernel_blocks:
            # Checked on the host: on CUDA an index out of range takes the engine down.
            raise ValueError(
                f"block_ids: kernel block {block_ids.end - 1} does not exist, this cache has "
                f"{self.num_kernel_blocks}"
            )
        return block_ids

    def _windows(self, table: BlockTable, buffer: Tensor) -> Iterator[Window]:
        """Split a transfer into (cache view, block ids `[n]`, buffer window `[n, ...]`).

        Windows take block j of every chunk, or every block of chunk i, whichever makes
        fewer of them. One index_select/index_copy_ per window, because both take strided
        pages and buffers as they are: on CPU, a Python loop of copy_ per page reached 0.4 of
        that for pages of 64 KiB, and `cache[ids]`, which fills a temporary, at most 0.3.
        """
        m, k = table.ids.shape
        self._check_buffer(m, k, buffer)
        if m == 0:
            return
        for group in self._views:
            lanes = buffer.view(group.lane)[:, group.planes].unflatten(3, (k, -1))
            by_block = lanes.movedim(3, 1)  # [m, k, planes, H, N, D]
            for i in range(min(m, k)):
                at = (i,) if m < k else (slice(None), i)
                yield group.cache, table.ids[at], group.window(by_block[at])

    def _check_buffer(self, m: int, k: int, buffer: Tensor) -> None:
        page_map = self.page_map
        tokens = k * page_map.block_tokens // page_map.kernel_blocks_per_block
        row_bytes = page_map.head_size * page_map.element_bytes
        item = buffer.element_size()
        shape = [m, page_map.num_planes, page_map.num_kv_heads, tokens]
        if list(buffer.shape[:-1]) != shape or (
            buffer.shape[-1] * item != row_bytes
            or (item != page_map.element_bytes and buffer.dtype != torch.uint8)
        ):
            raise ValueError(
                f"buffer is {list(buffer.shape)} {buffer.dtype}; expected "
                f"{[*shape, page_map.head_size]} of {page_map.element_bytes}-byte elements, or "
                "the same bytes as uint8"
            )
        lane = max(group.lane.itemsize for group in self._views)
        steps = (buffer.storage_offset(), *buffer.stride()[:-1])
        if buffer.stride(-1) != 1 or any(step * item % lane for step in steps):
            raise ValueError(f"buffer rows must be contiguous and aligned to {lane} bytes")
        if buffer.device != self.device:
            raise ValueError(f"buffer is on {buffer.device}, the KV cache on {self.device}")
