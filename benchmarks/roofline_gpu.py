"""Stages of `benchmarks.roofline` on a GPU: copies, the kernels for KV, and what is recomputed.

What must hold: nothing is timed on zeros, and whatever is timed fills the GPU and does not fit its
caches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import rows
from benchmarks.gpu_timing import Timed, timed
from benchmarks.roofline_load import Loaded
from benchmarks.roofline_rows import BYTES, FLOP, Limit, Stage
from blend.rope import Rope
from connector.messages import BlendPiece
from connector.page_kernel import PageKernel
from connector.pages import LayerPages, PageMap
from connector.piece_kernel import PieceKernel
from connector.pieces import Placing
from connector.rank import Rank
from connector.sum_kernel import SumKernel
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout

HASHED, SCATTERED = "xxh3_64 of pieces on the device", "chunks to pages (scatter)"
OF_A_LOAD = (HASHED, SCATTERED)  # besides the copies and the look-up
MATMUL, COPY_BYTES, RECOMPUTED = 8192, 1 << 30, 0.15
HIDDEN, INNER = 4096, 14336
Timer = Callable[[Callable[[], object]], Timed]


@dataclass(frozen=True)
class Shape:
    """Of a model's KV; Llama-3.1-8B's."""

    layers: int = 32
    kv_heads: int = rows.KV_HEADS
    size: int = rows.SIZE
    block: int = rows.BLOCK
    chunk: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> Layout:
        """Of a chunk."""
        return Layout(self.layers, 2, self.kv_heads, self.chunk, self.size * self.dtype.itemsize)


class SideBySide:
    """A backend that keeps of each token and head K, then V, as FlashAttention does."""

    kv_cache_dtype = "auto"

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv: Tensor, slots: Tensor
    ) -> None:
        """As vLLM calls it; ``kv``: ``[blocks, heads, tokens, 2 * size]``."""
        both = torch.cat((key, value), dim=-1).to(kv.dtype)
        kv[slots // kv.shape[2], :, slots % kv.shape[2]] = both


@dataclass
class Kv:
    """Pages of all layers full of random KV, blocks of chunks at random places, and room for the
    same chunks one behind the other."""

    shape: Shape
    tokens: int
    device: torch.device
    pages: list[LayerPages] = field(init=False)
    blocks: list[list[int]] = field(init=False)
    near: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape, per_chunk = self.shape, self.shape.chunk // self.shape.block
        count = self.tokens // shape.block
        layer = SimpleNamespace(impl=SideBySide())
        cache: dict[Hashable, PageMap] = {}
        self.pages = []
        for _ in range(shape.layers):
            sizes = (count + 1, shape.block, shape.kv_heads, 2 * shape.size)
            kv = torch.randn(sizes, dtype=shape.dtype, device=self.device).transpose(1, 2)
            told = (layer, kv, shape.kv_heads, shape.size, shape.dtype, 1, cache)
            self.pages.append(PageMap.probe(*told).bind(kv))
        self.blocks = (torch.randperm(count) + 1).view(-1, per_chunk).tolist()
        row = shape.size * shape.dtype.itemsize
        dims = (shape.layers, 2, shape.kv_heads, shape.chunk, row)
        self.near = torch.empty((len(self.blocks), *dims), dtype=torch.uint8, device=self.device)

    @property
    def num_bytes(self) -> int:
        """Of all chunks."""
        return self.near.numel()


def gpu_stages(folder: Path, tokens: int, recomputed: int) -> list[Stage]:
    """Everything, for prompts of ``tokens`` and slices of ``recomputed`` rows."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    to_device, to_host, on_device = copy_limits(device, timed)
    matrices = matrix_limit(device, timed)
    kv = Kv(Shape(), tokens // Shape.chunk * Shape.chunk, device)
    moved = kv_stages(kv, on_device, timed)
    saved = save_stage(kv, to_host)
    ms = {stage.name: statistics.median(stage.ms) for stage in moved if stage.name in OF_A_LOAD}
    with Loaded(folder / "load-store", kv.shape.layout, kv.near) as loaded:
        loads = loaded.stages(kv.pages, kv.blocks, to_device, ms)
    again = torch.empty_like(kv.near)
    PageKernel(kv.pages, range(kv.shape.layers)).read(kv.blocks, again)
    if not torch.equal(again, kv.near):  # pieces have changed them before
        raise RuntimeError("after a load the pages have other bytes than were stored")
    del kv, again
    return [
        *moved,
        saved,
        *loads,
        *attention_stages(tokens, matrices),
        matrix_stage(recomputed, matrices),
    ]


def copy_limits(device: torch.device, timer: Timer, size: int = COPY_BYTES) -> list[Limit]:
    """Host to device, device to host, and within the device (bytes read and written)."""
    host = torch.randint(0, 256, (size,), dtype=torch.uint8)
    host = host.pin_memory() if device.type == "cuda" else host
    one, other = host.to(device), torch.empty(size, dtype=torch.uint8, device=device)
    found = []
    for name, work, moved in (
        ("cudaMemcpyAsync, pinned to device", partial(one.copy_, host, True), size),
        ("cudaMemcpyAsync, device to pinned", partial(host.copy_, one, True), size),
        ("copy within the device", partial(other.copy_, one, True), 2 * size),
    ):
        found.append(Limit(name, BYTES, moved / statistics.median(timer(work).ms) / 1e6))
    return found


def matrix_limit(device: torch.device, timer: Timer, size: int = MATMUL) -> Limit:
    """A large product of random bfloat16 matrices."""
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    ms = statistics.median(timer(lambda: one @ other).ms)
    return Limit(f"bfloat16 product of {size} x {size}", FLOP, 2 * size**3 / ms / 1e9)


def kv_stages(kv: Kv, limit: Limit, timer: Timer) -> list[Stage]:
    """What moves, hashes and places chunks on the device."""
    shape, layout = kv.shape, kv.shape.layout
    pages = PageKernel(kv.pages, range(shape.layers))
    table = pages.table(kv.blocks)
    sums = SumKernel(layout.piece_bytes, kv.device)
    out = torch.empty(len(kv.blocks) * layout.num_pieces, dtype=torch.int64, device=kv.device)
    chunks = kv.near.view(shape.dtype)
    found = []
    for name, work, moved in (
        ("pages to chunks (gather)", partial(pages.read, kv.blocks, kv.near), 2 * kv.num_bytes),
        (HASHED, partial(sums, kv.near, out), kv.num_bytes),
        (SCATTERED, partial(pages.write, table, kv.near), 2 * kv.num_bytes),
        ("pieces to pages, K rotated", partial(placing_of(kv).write, 0, chunks), 2 * kv.num_bytes),
    ):
        took = timer(work)
        found.append(Stage(name, moved, 0.0, took.ms, limit, took.host_ms))
    return found


def placing_of(kv: Kv) -> Placing:
    """Each chunk is a piece that was computed elsewhere: all of its K is rotated."""
    half = kv.shape.size // 2
    rope = Rope(500000.0 ** -(torch.arange(half) / half).double())
    kernel = PieceKernel(kv.pages, rope.style)
    kernel.compile(kv.shape.chunk, half)
    engine: Any = SimpleNamespace(
        block_tokens=kv.shape.block, piece_kernel=kernel, rope=rope, device=kv.device
    )
    pieces = [
        BlendPiece(ChunkRef(b"", b"", 0, b""), 0, kv.shape.chunk, at, at + 1000 + at % 7)
        for at in range(0, kv.tokens, kv.shape.chunk)
    ]
    return Placing(engine, pieces, [one for row in kv.blocks for one in row], kv.shape.chunk)


def save_stage(kv: Kv, limit: Limit) -> Stage:
    """As a save does it: gathered, hashed, and sent to memory that is registered."""
    layout = kv.shape.layout
    rank = Rank(kv.pages, layout, layout.whole, group=1, saves=True)
    sums = SumKernel(layout.piece_bytes, kv.device)
    hashed = torch.empty(len(kv.blocks) * layout.num_pieces, dtype=torch.int64, device=kv.device)
    out = torch.empty((len(kv.blocks), layout.payload_bytes), dtype=torch.uint8, pin_memory=True)

    def work() -> None:
        rank.read_pages(kv.blocks, kv.near)
        sums(kv.near, hashed)
        out.copy_(kv.near.view_as(out), non_blocking=True)

    took = timed(work)
    name = "pages to pinned memory, hashed (save)"
    return Stage(name, kv.num_bytes, 0.0, took.ms, limit, took.host_ms)


def attention_stages(tokens: int, limit: Limit) -> list[Stage]:
    """Rows of one layer that stand alone, beside matrices, and beside a whole prefill by vLLM's
    FlashAttention where it is installed."""
    prompt = rows.Prompt(tokens)
    kv_bytes = prompt.cache.nbytes

    def flop_of(places: Tensor) -> float:
        return 4 * rows.HEADS * rows.SIZE * float((places + 1).sum())

    places = rows.chosen(tokens, int(RECOMPUTED * tokens), 1)
    query = prompt.query(len(places))
    out = torch.empty_like(query)
    took = timed(partial(prompt.attend, query, places.to(prompt.device), out))
    moved = 3 * kv_bytes + query.nbytes + out.nbytes  # copied out of the pages, then read
    name = f"attention of {len(places)} rows alone, one layer"
    limits = [limit]
    stages = []
    try:
        every = torch.arange(tokens)
        whole = timed(prompt.sequences(prompt.query(tokens), every))
    except ImportError:
        pass
    else:
        flop = flop_of(every)
        stages.append(
            Stage("FlashAttention, whole causal prefill", 0.0, flop, whole.ms, limit, whole.host_ms)
        )
        value = flop / statistics.median(whole.ms) / 1e9
        limits.append(Limit("FlashAttention, whole causal prefill", FLOP, value))
    ours = [Stage(name, moved, flop_of(places), took.ms, one, took.host_ms) for one in limits]
    return [*ours, *stages]


def matrix_stage(recomputed: int, limit: Limit) -> Stage:
    """The matrices of one decoder layer for a slice of rows."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    heads = rows.HEADS * rows.SIZE
    shapes = [
        (heads + 2 * rows.KV_HEADS * rows.SIZE, HIDDEN), (HIDDEN, heads), (2 * INNER, HIDDEN),
        (HIDDEN, INNER),
    ]  # fmt: skip
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    inputs = [torch.randn(recomputed, n, dtype=dtype, device=device) for _, n in shapes]

    def work() -> None:
        for one, weight in zip(inputs, weights, strict=True):
            linear(one, weight)

    took = timed(work)
    flop = 2.0 * recomputed * sum(out * n for out, n in shapes)
    moved = sum(one.nbytes for one in (*weights, *inputs)) + recomputed * 2 * sum(
        out for out, _ in shapes
    )
    name = f"matrices of {recomputed} rows, one layer"
    return Stage(name, moved, flop, took.ms, limit, took.host_ms)
