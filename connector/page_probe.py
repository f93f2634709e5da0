"""Where a page keeps its elements: learnt from the attention backend itself.

Backends document no page format (the CPU backend packs K transposed or as VNNI tiles), but each has
`do_kv_cache_update`, which writes K and V of given slots. Every element of a scratch page gets a
number, and the backend writes the bits of those numbers, one per pass, as values 0 and 1; "stored
element is not zero" then reads the number back under any KV dtype and scale. The page offset found
this way must be a sum of one term per axis, each a mixed-radix counter with constant strides.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Digits = tuple[tuple[int, int], ...]  # (count, stride in elements), outermost first
INT_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What a backend's cache-update op raises when it cannot take the arguments.
_OP_ERRORS = (RuntimeError, TypeError, AttributeError, ValueError, AssertionError, LookupError)


class PageLayoutError(RuntimeError):
    """The KV pages of a layer are not a fixed rearrangement of K and V; do not cache them."""


class AttentionLayer(Protocol):
    """The part of vLLM's attention layer used here: its backend implementation object."""

    impl: Any


class _LayerWithIsa:
    """An attention layer plus `isa`, which vLLM's CPU metadata builder sets only later."""

    def __init__(self, layer: AttentionLayer, isa: str) -> None:
        self._layer = layer
        self.isa = isa

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@dataclass(frozen=True)
class PlaneGroup:
    """K, V or both (if they differ by a constant offset): where their elements are in a page."""

    first: int
    count: int
    offset: int
    plane_stride: int
    heads: Digits
    tokens: Digits
    dims: Digits

    @property
    def digits(self) -> Digits:
        """All counters, outermost first."""
        return ((self.count, self.plane_stride), *self.heads, *self.tokens, *self.dims)


def backend_name(layer: AttentionLayer) -> str:
    """The backend's class, for messages."""
    return type(layer.impl).__name__


def num_planes(layer: AttentionLayer) -> int:
    """2 for K and V; 1 for MLA, which stores one latent vector a token (DeepSeek-V2, section 2.1):
    the compressed KV and, behind it, the part of K that carries RoPE."""
    return 1 if hasattr(layer.impl, "kv_lora_rank") else 2


def check_geometry(layer: AttentionLayer, kv: Tensor, num_kv_heads: int, head_size: int) -> None:
    """Refuse, by geometry, what the probe would misunderstand."""
    shared = getattr(layer.impl, "kv_sharing_target_layer_name", None)
    if shared is not None:
        raise PageLayoutError(f"layer shares the KV cache of {shared!r}; map that layer instead")
    content = num_planes(layer) * head_size
    expected = (num_kv_heads, content)
    if kv.dim() != 4 or (kv.shape[1], kv.shape[3]) != expected:
        raise PageLayoutError(
            f"{backend_name(layer)}: KV tensor is {list(kv.shape)}, expected "
            f"[blocks, {num_kv_heads}, tokens, {content}]; packed 4-bit and inline-scale caches "
            "(those of MLA too) and unequal K/V head sizes are not supported"
        )
    if kv.element_size() not in INT_OF_BYTES or kv.dtype.is_complex:
        raise PageLayoutError(f"{backend_name(layer)}: KV dtype {kv.dtype} is not supported")


def with_isa(
    layer: AttentionLayer, model_dtype: torch.dtype, block_tokens: int, head_size: int
) -> Any:
    """Give the CPU backend its `isa` if its metadata builder has not run yet."""
    if hasattr(layer, "isa") or hasattr(layer.impl, "isa"):
        return layer
    choose = getattr(sys.modules.get(type(layer.impl).__module__), "_get_attn_isa", None)
    if choose is None:
        return layer
    kv_cache_dtype = getattr(layer.impl, "kv_cache_dtype", "auto")
    return _LayerWithIsa(layer, choose(model_dtype, block_tokens, head_size, kv_cache_dtype))


def scratch_page(kv: Tensor) -> tuple[Tensor, Tensor]:
    """One zeroed block with the strides of `kv`: (`[1, H, N, C]`, its flat storage)."""
    span = 1 + sum((n - 1) * s for n, s in zip(kv.shape[1:], kv.stride()[1:], strict=True))
    flat = torch.zeros(span, dtype=kv.dtype, device=kv.device)
    return flat.as_strided((1, *kv.shape[1:]), kv.stride()), flat


def write_page(
    layer: AttentionLayer, page: Tensor, values: Tensor, model_dtype: torch.dtype
) -> None:
    """Let the backend store `values` (`[planes, H, N, D]`) in block 0 of `page`."""
    planes = values.transpose(1, 2).to(page.device, model_dtype).contiguous().unbind(0)
    slots = torch.arange(page.shape[2], dtype=torch.int64, device=page.device)
    try:
        if len(planes) == 2:
            layer.impl.do_kv_cache_update(layer, *planes, page, slots)
        else:
            _write_latent(layer, page, planes[0], slots)
    except _OP_ERRORS as error:
        raise PageLayoutError(
            f"{backend_name(layer)}.do_kv_cache_update refused a scratch page "
            f"{list(page.shape)} {page.dtype}: {error}"
        ) from error


def _write_latent(layer: Any, page: Tensor, values: Tensor, slots: Tensor) -> None:
    """As vLLM's MLA layer does: `[N, 1, D]` is cut into the latent and the part with RoPE."""
    rank = int(layer.impl.kv_lora_rank)
    scale = getattr(layer, "_k_scale", None)
    layer.impl.do_kv_cache_update(
        values[:, 0, :rank], values[..., rank:], page.squeeze(1), slots,
        str(getattr(layer, "kv_cache_dtype", layer.impl.kv_cache_dtype)),
        torch.ones((), device=page.device) if scale is None else scale,
    )  # fmt: skip


def probe_offsets(
    layer: AttentionLayer, kv: Tensor, head_size: int, model_dtype: torch.dtype
) -> Tensor:
    """Offset of every canonical element inside a page, in elements: int64 `[planes, H, N, D]`."""
    shape = (num_planes(layer), kv.shape[1], kv.shape[2], head_size)
    total = torch.Size(shape).numel()
    # From 1: an element that is never written reads as 0.
    codes = torch.arange(1, total + 1, device=kv.device).view(shape)
    page, flat = scratch_page(kv)
    raw = flat.view(INT_OF_BYTES[kv.element_size()])
    seen = torch.zeros(raw.numel(), dtype=torch.int64, device=kv.device)
    for bit in range(total.bit_length()):
        flat.zero_()
        write_page(layer, page, codes >> bit & 1, model_dtype)
        seen |= (raw != 0).long() << bit
    places = seen.nonzero().flatten()
    found = seen[places]
    if not torch.equal(found.sort().values, codes.flatten()):
        raise PageLayoutError(
            f"{backend_name(layer)}: writing {total} KV elements changed "
            f"{places.numel()} stored elements, {int(found.unique().numel())} of them distinct; "
            "the KV page is not a rearrangement of K and V (inline scales or a quantised format?)"
        )
    offsets = torch.empty(total, dtype=torch.int64, device=kv.device)
    offsets[found - 1] = places
    return offsets.view(shape).cpu()


def _digits(offsets: list[int]) -> Digits | None:
    """Write `offsets` as nested counters of constant stride, coarsest first; None if not so.

    If two inner counts fit, so does their least common multiple, so taking the largest
    needs no backtracking.
    """
    n = len(offsets)
    if n == 1:
        return ()
    stride = offsets[1] - offsets[0]
    for count in range(n, 1, -1):
        if n % count == 0 and all(
            offsets[i] - offsets[i - i % count] == i % count * stride for i in range(n)
        ):
            outer = _digits(offsets[::count])
            return None if outer is None else (*outer, (count, stride))
    return None


def plane_groups(offsets: Tensor) -> tuple[PlaneGroup, ...]:
    """Factor page offsets `[planes, H, N, D]` into strides; K and V joined where they agree."""
    groups = []
    for plane, off in enumerate(offsets):
        base = int(off[0, 0, 0])
        axes = (off[:, 0, 0], off[0, :, 0], off[0, 0, :])
        heads, tokens, dims = (_digits(axis.tolist()) for axis in axes)
        h, t, d = (axis - base for axis in axes)
        total = base + h[:, None, None] + t[:, None] + d
        if heads is None or tokens is None or dims is None or not torch.equal(total, off):
            raise PageLayoutError(
                f"KV page offsets of {'KV'[plane]} are not a sum of strides over head, token "
                "and dim; this page format is not supported"
            )
        heads, tokens, dims = (x or ((1, 0),) for x in (heads, tokens, dims))
        groups.append(PlaneGroup(plane, 1, base, 0, heads, tokens, dims))
    if len(groups) == 1:
        return tuple(groups)
    k, v = groups
    if k.digits == v.digits:
        return (PlaneGroup(0, 2, k.offset, v.offset - k.offset, k.heads, k.tokens, k.dims),)
    return (k, v)


@dataclass(frozen=True)
class GroupView:
    """`cache`: `[B, *shape]`, shape = (planes, *heads, *tokens, *dims), canonical order.

    With pick = (axis, index), `cache` has only that index of that axis of `[B, *shape]`.
    """

    planes: slice
    lane: torch.dtype
    shape: tuple[int, ...]
    cache: Tensor
    pick: tuple[int, int] | None

    def window(self, lanes: Tensor) -> Tensor:
        """Shape `[n, planes, H, N, D]` of a buffer like `cache` for n blocks; copies nothing."""
        split = lanes.view(-1, *self.shape)
        return split if self.pick is None else split.select(*self.pick)


def group_views(kv: Tensor, groups: tuple[PlaneGroup, ...]) -> tuple[GroupView, ...]:
    """The cache as canonical views, in the widest integers that keep neighbours in dim whole.

    Wider lanes mean fewer elements per copy; VNNI tiles of bf16 pairs move as int32.
    """
    views = []
    for group in groups:
        digits = ((kv.shape[0], kv.stride(0)), *group.digits)
        offset = kv.storage_offset() + group.offset
        element = lane = kv.element_size()
        inner, inner_stride = digits[-1]
        if inner_stride == 1:
            steps = [element * step for step in (offset, inner, *(s for _, s in digits[:-1]))]
            lane = max(w for w in INT_OF_BYTES if w >= element and not any(s % w for s in steps))
        ratio = lane // element
        sizes = [count for count, _ in digits[:-1]] + [inner // ratio]
        strides = [stride // ratio for _, stride in digits[:-1]] + [inner_stride]
        dtype = INT_OF_BYTES[lane]
        cache = torch.empty(0, dtype=dtype, device=kv.device)
        cache.set_(kv.untyped_storage(), offset // ratio, sizes, strides)
        planes = slice(group.first, group.first + group.count)
        # Interleaved tokens would make the copy's inner loop 2 long: measured for VNNI
        # tiles of V, one copy per such token writes 0.65 instead of 0.23 GB/s per core.
        axis = next((a for a, s in enumerate(strides[:-1]) if s == 1 and 1 < sizes[a] <= 4), None)
        picks = [None] if axis is None else [(axis, i) for i in range(sizes[axis])]
        for pick in picks:
            part = cache if pick is None else cache.select(*pick)
            views.append(GroupView(planes, dtype, tuple(sizes[1:]), part, pick))
    return tuple(views)
