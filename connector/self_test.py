"""Start-up self-test of blending: what it takes for granted of this vLLM, tried before it is used.

On each rank, while its KV caches are registered and before any request or CUDA graph exists:

  - K moved by `blend.rope` is what the model's own rotary embedding gives at the new position;
  - K and V written through the backend to permuted blocks come back through the page map;
  - pieces of chunks arrive at their new places, with K moved;
  - one layer's attention on rows in runs, and on rows that stand alone, over those blocks is
    torch's, with an explicit mask.

`self_test_isolation` is the scheduler's part.

What must hold: no rank waits for another (one may fail where another does not, so the layer is left
before its first collective operation), and the KV cache is left as it was. Block 0 is not touched:
it is vLLM's null block. Raises SelfTestError, which says what failed and by how much.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blend.errors import BlendError
from connector.blend_engine import Engine
from connector.blend_host import VllmHost
from connector.messages import BlendPiece
from connector.pieces import Placing
from connector.rank import Rank
from prefixstore.keys import ChunkRef

logger = logging.getLogger("vllm.prefixstore")

BLOCKS_MIN = 3
_RUNS = 8  # of rows that are computed, with others between them
_MOVES = 48
# Largest error of an attention output, as a share of the largest V. Kernels multiply in TF32 or
# keep weights in the model's dtype; a mask that is one token off is wrong by tenths.
_CLOSE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# What a vLLM whose internals are others raises.
OTHER_INTERNALS = (
    TypeError, AttributeError, ValueError, AssertionError, RuntimeError, LookupError, ImportError,
)  # fmt: skip


class SelfTestError(BlendError):
    """This engine cannot blend: what blending needs does not hold here."""


class _AttentionDoneError(Exception):
    """Leaves a layer once its attention is computed."""


@contextmanager
def checking(what: str) -> Iterator[None]:
    """What fails in this block is a SelfTestError that says what was being tested."""
    try:
        yield
    except SelfTestError:
        raise
    except BlendError as error:
        raise SelfTestError(f"self-test of {what}: {error}") from error
    except OTHER_INTERNALS as error:
        reason = f"{type(error).__name__}: {error}"
        raise SelfTestError(f"self-test of {what} cannot run: {reason}") from error


def _random(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers that leave torch's own generators alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


# ---------------------------------------------------------------------- each rank
@torch.inference_mode()
def check_rank(engine: Engine, rank: Rank) -> None:
    """Raises SelfTestError."""
    began = time.perf_counter()
    with checking("moving K"):
        _check_rope(engine)
    with checking("the KV pages"), _scratch_blocks(engine, rank) as blocks:
        _check_pages(engine, rank, blocks)
        with checking("a layer's attention"):
            _check_attention(engine, rank, blocks)
        with checking("pieces that move"):
            _check_pieces(engine, rank, blocks)
    if rank.leads:
        elapsed = 1e3 * (time.perf_counter() - began)
        logger.info("prefixstore: the self-test of blending passed in %.0f ms", elapsed)


def _check_rope(engine: Engine) -> None:
    """K of one position, moved, and the model's K of the other, at all scales of positions. Behind
    it all streams may use `Rope.cos_sin`."""
    layer, dtype = engine.layers[0].self_attn, engine.config.model_config.dtype
    attention, device = engine.attention(0), engine.device
    longest = int(engine.config.model_config.max_model_len)
    bounds = longest ** ((torch.arange(_MOVES) + 1) / _MOVES)
    places = torch.rand((2, _MOVES), generator=torch.Generator().manual_seed(1)) * bounds
    old, new = places.long().to(device)
    size = int(attention.head_size)
    query = _random(2, (_MOVES, attention.num_heads * size), dtype, device)
    key = _random(3, (_MOVES, attention.num_kv_heads * size), dtype, device)
    before, after = (
        layer.rotary_emb(at, query.clone(), key.clone())[1].view(_MOVES, -1, size)
        for at in (old, new)
    )
    error = (engine.rope.rotate(before, new - old).float() - after.float()).abs().amax((1, 2))
    error /= after.float().abs().max()
    # The model's table is in its dtype, and made from angles rounded to float32.
    allowed = 4 * (torch.finfo(dtype).eps + torch.maximum(old, new) * 2.0**-23)
    worst = int((error / allowed).argmax())
    if not bool((error <= allowed).all()):  # NaN too
        raise BlendError(
            f"K moved from position {int(old[worst])} to {int(new[worst])} is off by "
            f"{float(error[worst]):.2g} of its size, {float(allowed[worst]):.2g} is allowed"
        )


@contextmanager
def _scratch_blocks(engine: Engine, rank: Rank) -> Iterator[list[int]]:
    """Blocks in no order, whole chunks of them, which are afterwards what they were before."""
    caches = [engine.attention(index).kv_cache for index in range(len(engine.names))]
    per_chunk = rank.layout.chunk_tokens // engine.block_tokens
    count = per_chunk * -(-BLOCKS_MIN // per_chunk)
    total = min(len(cache) for cache in caches)
    if total <= count:
        raise BlendError(f"the KV cache has {total} blocks, more than {count} are needed")
    drawn = torch.randperm(total - 1, generator=torch.Generator().manual_seed(4))[:count] + 1
    if total - 1 not in drawn:
        drawn[count // 2] = total - 1  # where an offset that is too large for 32 bits would show
    ids = drawn.to(engine.device)
    kept = [cache[ids] for cache in caches]
    try:
        yield drawn.tolist()
    finally:
        for cache, content in zip(caches, kept, strict=True):
            cache[ids] = content
        rank.wait_for_writes()


def _content(engine: Engine, index: int, tokens: int) -> Tensor:
    """What is written to a layer: K and V, [2, tokens, heads, size]."""
    attention = engine.attention(index)
    shape = (2, tokens, int(attention.num_kv_heads), int(attention.head_size))
    return _random(100 + index, shape, engine.kv_dtype, engine.device)


def _check_pages(engine: Engine, rank: Rank, blocks: list[int]) -> None:
    """Every layer, to the bit: as a blend reads a layer, and as chunks are saved."""
    tokens, layers = len(blocks) * engine.block_tokens, range(len(engine.names))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(5)).to(engine.device)
    table = engine.table(blocks)
    slots = engine.slots(table, order)
    for index in layers:
        keys, values = _content(engine, index, tokens)
        engine.write(index, slots, keys[order], values[order])
    per_chunk = rank.layout.chunk_tokens // engine.block_tokens
    chunks = [blocks[at : at + per_chunk] for at in range(0, len(blocks), per_chunk)]
    staged = torch.empty((len(chunks), rank.staged_bytes), dtype=torch.uint8, device=engine.device)
    rank.read_pages(chunks, staged)
    by_layer = staged.view(engine.kv_dtype).view(
        len(chunks), len(layers), 2, -1, rank.layout.chunk_tokens, rank.pages[0].page_map.head_size
    )
    for index in layers:
        expected = _content(engine, index, tokens).transpose(1, 2)
        _compare(index, engine.key_values(index, table), expected)
        _compare(index, torch.cat(by_layer[:, index].unbind(), 2), expected)


def _compare(index: int, found: Tensor, expected: Tensor) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        raise BlendError(
            f"{wrong} of {expected.numel()} elements of K and V of layer {index} are not where "
            "they were written to"
        )


def _check_pieces(engine: Engine, rank: Rank, blocks: list[int]) -> None:
    """Parts of two chunks, one moved forwards and one backwards, in all layers."""
    layers, size = len(engine.names), rank.pages[0].page_map.head_size
    tokens, most = len(blocks) * engine.block_tokens, rank.layout.chunk_tokens - 1
    shape = (2, layers, 2, rank.pages[0].page_map.num_kv_heads, most + 1, size)
    chunks = _random(8, shape, engine.kv_dtype, engine.device)
    count = min(most, tokens // 2 - 1) - 1 | 1  # odd
    ref = ChunkRef(b"", b"", 0, b"")
    pieces = [
        BlendPiece(ref, 1, count, 0, 1000),
        BlendPiece(ref, 0, count, tokens // 2, tokens // 3),
    ]
    placing = Placing(engine, pieces, blocks, most + 1)
    for number in range(len(pieces)):  # as they arrive, in parts
        placing.write(number, chunks[number : number + 1])
    table = engine.table(blocks)
    for index in range(layers):
        found = engine.key_values(index, table)
        for chunk, piece in zip(chunks, pieces, strict=True):
            there = found[:, :, piece.start : piece.start + count]
            keys, values = chunk[index, :, :, piece.offset : piece.offset + count]
            _compare(index, there[1], values)
            move = piece.start - piece.source_start
            wanted = engine.rope.rotate(keys.transpose(0, 1), move).transpose(0, 1).float()
            error = float((there[0].float() - wanted).abs().max() / wanted.abs().max())
            if not error <= 2 * torch.finfo(engine.kv_dtype).eps:
                raise BlendError(f"K of layer {index} that moves by {move} is off by {error:.2g}")


def _check_attention(engine: Engine, rank: Rank, blocks: list[int]) -> None:
    """Layer 0 on rows in runs and on rows that stand alone, behind K and V of `_content`."""
    tokens = len(blocks) * engine.block_tokens
    longest = min(tokens, int(engine.config.model_config.max_model_len))
    both = _content(engine, 0, tokens)
    ways = [replace(engine, attend_rows=None)]  # long runs go through the backend
    if engine.attend_rows is not None:
        ways.append(engine)
    for way, rows in product(ways, (_runs(longest), torch.arange(1, longest, 3))):
        _check_rows(way, rank, blocks, rows, both)


def _check_rows(engine: Engine, rank: Rank, blocks: list[int], rows: Tensor, both: Tensor) -> None:
    """From random hidden states; what they write is noted in ``both``."""
    attention, device = engine.attention(0), engine.device
    tokens = both.shape[1]
    model = engine.config.model_config
    hidden = _random(6, (len(rows), int(model.get_hidden_size())), model.dtype, device)
    seen: list[Tensor] = []

    def after(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
        seen.extend([*args[:3], output])
        raise _AttentionDoneError

    handle = attention.register_forward_hook(after)
    try:
        with suppress(_AttentionDoneError):
            VllmHost(engine, [0] * tokens, blocks).layer(0, rows, (hidden, None))
    finally:
        handle.remove()
    size = int(attention.head_size)
    query, key, value, output = (part.reshape(len(rows), -1, size) for part in seen)
    both[:, rows] = torch.stack([key, value]).to(both.dtype)
    _compare(0, engine.key_values(0, engine.table(blocks)), both.transpose(1, 2))
    groups = query.shape[1] // key.shape[1]
    keys, values = both.float().transpose(1, 2).repeat_interleave(groups, 1)
    visible = torch.arange(tokens, device=device) <= rows.to(device)[:, None]
    scale = float(engine.layers[0].self_attn.scaling)
    asked = query.float().transpose(0, 1)
    truth = scaled_dot_product_attention(asked, keys, values, attn_mask=visible, scale=scale)
    error = float((output.float().transpose(0, 1) - truth).abs().max() / values.abs().max())
    if not error <= _CLOSE[engine.kv_dtype]:
        raise BlendError(
            f"on {len(rows)} scattered rows it is off by {error:.2g} of the largest V from torch's "
            f"scaled_dot_product_attention, {_CLOSE[engine.kv_dtype]:.2g} is allowed"
        )


def _runs(tokens: int) -> Tensor:
    """int64 [r]: about half of the positions, in runs, the first among them."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(7))[: 2 * _RUNS] + 1
    places = torch.arange(tokens)
    return places[torch.bucketize(places, cuts.sort().values, right=True) % 2 == 0]
