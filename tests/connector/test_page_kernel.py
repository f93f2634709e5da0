"""The kernel that moves all layers at once, under Triton's interpreter, beside `pages`."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from connector.pages import LayerPages, PageMap
from tests.connector.test_pages import FakeImpl, amx, plain

BLOCKS, LAYERS = 24, 4


def side_by_side(page: Any, offset: Any, key: Any, value: Any) -> None:
    """Tokens outside, then K of all heads, then V: rows of a head are far apart."""
    heads, tokens, width = page.shape
    inner = page.reshape(-1).view(tokens, 2, heads, width // 2)
    inner[offset, 0], inner[offset, 1] = key.to(page.dtype), value.to(page.dtype)


LAYOUTS: dict[str, Any] = {
    "side by side": {"store": plain, "dim": 64, "dtype": torch.bfloat16},
    "heads inside tokens": {"store": side_by_side, "dim": 64, "dtype": torch.bfloat16},
    "rows of no power of two": {"store": plain, "dim": 24, "dtype": torch.float32},
    "bytes": {"store": plain, "dim": 5, "dtype": torch.uint8},
    "blocks of four": {"store": plain, "dim": 16, "dtype": torch.float16, "ratio": 4},
}


def layers_of(
    store: Any, dim: int, dtype: torch.dtype, ratio: int = 1, heads: int = 2, tokens: int = 16
) -> list[LayerPages]:
    """Layers in one tensor, as vLLM lays them out, full of random bytes."""
    model = torch.float32 if dtype == torch.uint8 else dtype
    size = BLOCKS * ratio * LAYERS * heads * tokens * 2 * dim
    raw = torch.randint(0, 100, (size,), dtype=torch.uint8).to(dtype)
    every = raw.view(BLOCKS * ratio, LAYERS, heads, tokens, 2 * dim)
    layer = SimpleNamespace(impl=FakeImpl(store))
    pages = []
    for number in range(LAYERS):
        kv = every[:, number]
        pages.append(PageMap.probe(layer, kv, heads, dim, model, ratio).bind(kv))
    return pages


def content(pages: list[LayerPages], blocks: list[list[int]]) -> torch.Tensor:
    """The chunks in these blocks, layer by layer, as `pages` reads them."""
    page_map = pages[0].page_map
    tokens = page_map.block_tokens * len(blocks[0])
    row = page_map.head_size * page_map.element_bytes
    shape = (len(blocks), len(pages), page_map.num_planes, page_map.num_kv_heads, tokens, row)
    out = torch.empty(shape, dtype=torch.uint8)
    for number, layer in enumerate(pages):
        layer.read_chunks(blocks, out[:, number])
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_read_is_what_pages_read(kernel: ModuleType, name: str) -> None:
    pages = layers_of(**LAYOUTS[name])
    blocks = [[5, 0, 23], [7, 8, 9], [1, 22, 3]]
    expected = content(pages, blocks)
    out = torch.zeros_like(expected)
    kernel.PageKernel(pages, range(LAYERS)).read(blocks, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_written_is_there_and_nothing_else(kernel: ModuleType, name: str) -> None:
    pages = layers_of(**LAYOUTS[name])
    every = [[block] for block in range(BLOCKS)]
    before = content(pages, every)
    blocks = [[-1, 2, 19], [11, -1, -1], [4, 20, 6]]
    named = [[max(block, 0) for block in row] for row in blocks]
    data = torch.randint(0, 100, content(pages, named).shape).to(torch.uint8)
    mover = kernel.PageKernel(pages, range(LAYERS))
    mover.write(mover.table(named, absent=0), data)
    after = content(pages, every)
    tokens = pages[0].page_map.block_tokens
    for number, row in enumerate(blocks):
        for place, block in enumerate(row):
            if block >= 0:
                part = data[number, ..., place * tokens : (place + 1) * tokens, :]
                assert torch.equal(after[block], part)
                before[block] = part
    assert torch.equal(after, before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_chosen_chunks_are_written(kernel: ModuleType, name: str) -> None:
    """As from the slots of the device tier: any of them, in any order."""
    pages = layers_of(**LAYOUTS[name])
    blocks = [[5, 0, 23], [7, 8, 9]]
    data = torch.randint(0, 100, (4, *content(pages, blocks).shape[1:])).to(torch.uint8)
    mover = kernel.PageKernel(pages, range(LAYERS))
    mover.write(mover.table(blocks), data, sources=[3, 1])
    assert torch.equal(content(pages, blocks), data[[3, 1]])
    for sources in ([4, 1], [-1, 1], [0], []):
        with pytest.raises(ValueError, match="of 4"):
            mover.write(mover.table(blocks), data[[0, 0, 0, 0]], sources=sources)
    assert torch.equal(content(pages, blocks), data[[3, 1]])


def test_layers_of_another_group_are_left_out(kernel: ModuleType) -> None:
    pages = layers_of(**LAYOUTS["side by side"])
    blocks = [[3, 4, 5]]
    data = torch.full_like(content(pages, blocks), 7)
    before = content(pages, blocks)
    mover = kernel.PageKernel(pages[1::2], [1, 3])
    mover.write(mover.table(blocks), data)
    after = content(pages, blocks)
    assert torch.equal(after[:, 1::2], data[:, 1::2])
    assert torch.equal(after[:, ::2], before[:, ::2])


def test_blocks_that_do_not_fit_are_refused(kernel: ModuleType) -> None:
    pages = layers_of(**LAYOUTS["side by side"])
    mover = kernel.PageKernel(pages, range(LAYERS))
    data = content(pages, [[1, 2, 3]])
    before = content(pages, [[1, 2, 3]])
    with pytest.raises(ValueError, match="does not exist"):
        mover.table([[1, 2, BLOCKS]])
    with pytest.raises(ValueError, match="twice"):
        mover.table([[1, 2, 1]])
    with pytest.raises(ValueError, match="chunks are"):
        mover.write(mover.table([[1, 2, 3]]), data[:, :, :1])
    assert torch.equal(content(pages, [[1, 2, 3]]), before)


def test_rows_in_pieces_are_refused(kernel: ModuleType) -> None:
    with pytest.raises(ValueError, match="one piece"):
        kernel.PageKernel(layers_of(amx, 32, torch.bfloat16), range(LAYERS))
