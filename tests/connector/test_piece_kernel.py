"""Pieces by a kernel, under Triton's interpreter, beside rows that are moved one by one."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from blend.rope import Rope
from connector.messages import BlendPiece
from connector.pieces import Placing
from prefixstore.keys import ChunkRef
from tests.connector.conftest import interpreted
from tests.connector.test_page_kernel import BLOCKS, LAYERS, content, layers_of, side_by_side
from tests.connector.test_pages import plain

HEADS, TOKENS, CHUNK = 2, 4, 8
REF = ChunkRef(b"", b"", 0, b"")
PIECES = [
    BlendPiece(REF, 0, CHUNK, 3, 300),
    BlendPiece(REF, 5, 2, 11, 5),
    BlendPiece(REF, 1, CHUNK - 1, 19, 19),  # does not move
    BlendPiece(REF, 0, 3, 13, 900),
]
PLACE = [20, 9, 8, 22, 11, 23, 17]


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    return interpreted("piece_kernel")


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (24, 24), (20, 12)])
def test_pieces_are_where_torch_puts_them(
    kernel: ModuleType, style: Any, dtype: torch.dtype, dim: int, rotary: int
) -> None:
    torch.manual_seed(dim)
    rope = Rope(10000.0 ** -(torch.arange(rotary // 2) / (rotary // 2)).double(), style, 1.0)
    chunks = torch.randn(len(PIECES), LAYERS, 2, HEADS, CHUNK, dim).to(dtype)
    every = [[block] for block in range(BLOCKS)]
    found = []
    for by_kernel, rows in ((False, None), (True, None), (True, [4, 0, 5, 2])):
        torch.manual_seed(1)
        pages = layers_of(plain, dim, dtype, heads=HEADS, tokens=TOKENS)
        before = content(pages, every)
        if by_kernel:
            made = kernel.PieceKernel(pages, style)
            made.compile(CHUNK, rotary // 2)
            assert torch.equal(content(pages, every), before), "compiling moves nothing"
            engine: Any = SimpleNamespace(
                block_tokens=TOKENS, piece_kernel=made, rope=rope, device=torch.device("cpu")
            )
            placing = Placing(engine, PIECES, PLACE, CHUNK)
            if rows is None:
                placing.write(0, chunks[:1])  # they arrive in parts
                placing.write(1, chunks[1:])
            else:  # they lie among others
                kept = torch.randn(6, *chunks.shape[1:]).to(dtype)
                kept[rows] = chunks
                placing.write(0, kept, rows[:1])
                placing.write(1, kept, rows[1:])
        else:
            _by_hand(pages, rope, chunks)
        after = content(pages, every)
        touched = (after != before).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(touched) <= set(PLACE)
        found.append(content(pages, [PLACE]).view(dtype)[0])
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[0][:, 1], found[1][:, 1]), "V keeps its bits"
    stays = slice(19, 19 + CHUNK - 1)
    assert torch.equal(found[0][:, 0, :, stays], found[1][:, 0, :, stays])
    close = 2 * torch.finfo(dtype).eps  # the interpreter rounds to bfloat16 in another way
    torch.testing.assert_close(found[0].float(), found[1].float(), rtol=close, atol=close)


def _by_hand(pages: Any, rope: Rope, chunks: torch.Tensor) -> None:
    """One token of one layer after the other."""
    dtype = chunks.dtype
    flat = content(pages, [PLACE]).view(dtype)
    for chunk, (_, offset, count, start, source_start, _) in zip(chunks, PIECES, strict=True):
        for i in range(count):
            row = chunk[:, :, :, offset + i]  # [layer, plane, head, dim]
            moved = rope.rotate(row[:, 0].unsqueeze(1), start - source_start)[:, 0]
            flat[0, :, 0, :, start + i] = moved
            flat[0, :, 1, :, start + i] = row[:, 1]
    for number, layer in enumerate(pages):
        layer.write_chunks([PLACE], flat[:, number].contiguous())


def test_other_pages_are_refused(kernel: ModuleType) -> None:
    with pytest.raises(ValueError, match="several parts"):
        kernel.PieceKernel(layers_of(plain, 16, torch.float16, ratio=4), "neox")
    pages = layers_of(side_by_side, 16, torch.float32, heads=HEADS, tokens=TOKENS)
    made = kernel.PieceKernel(pages, "neox")
    place, turns = torch.zeros(1, dtype=torch.int64), (torch.ones(1, 8), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="chunks are"):
        made.write(torch.zeros(1, LAYERS, 2, HEADS, CHUNK, 8), 0, place, place, place, turns)
    engine: Any = SimpleNamespace(block_tokens=TOKENS, piece_kernel=made)
    for blocks in ([*PLACE[:-1], BLOCKS], [*PLACE[:-1], -1]):
        with pytest.raises(ValueError, match=f"of {BLOCKS}"):
            Placing(engine, PIECES, blocks, CHUNK)
