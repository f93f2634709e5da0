"""Attention of scattered rows, under Triton's interpreter, beside torch's with an explicit mask."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.connector.conftest import interpreted
from tests.connector.test_page_kernel import BLOCKS, LAYERS, content, layers_of, side_by_side
from tests.connector.test_pages import plain

TOKENS, KV_HEADS, DIM = 16, 2, 64
SCALE = 0.11


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    """With small programs: the interpreter takes 10 us for each product that is added up."""
    module = interpreted("row_attention")
    vars(module).update(QUERIES=16, KEYS=16)
    return module


def pages_of(store: Any = plain, dtype: torch.dtype = torch.float32) -> Any:
    """Layers whose pages hold normal numbers, and NaN where nothing may be read."""
    pages = layers_of(store, DIM, dtype, heads=KV_HEADS, tokens=TOKENS)
    blocks = [[block] for block in range(BLOCKS)]
    for layer in pages:
        shape = (BLOCKS, 2, KV_HEADS, TOKENS, DIM)
        layer.write_chunks(blocks, torch.randn(shape).to(dtype))
    return pages


def expected(
    pages: Any, index: int, query: torch.Tensor, rows: torch.Tensor, blocks: list[int]
) -> torch.Tensor:
    raw = content(pages, [blocks])[0, index]
    keys, values = raw.view(pages[0].dtype).float()
    group = query.shape[1] // KV_HEADS
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    mask = torch.arange(keys.shape[1])[None] <= rows[:, None]
    found = scaled_dot_product_attention(
        query.float().transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, scale=SCALE
    )
    return found[0].transpose(0, 1)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("store", [plain, side_by_side])
@pytest.mark.parametrize(
    "rows",
    [[0], [129], list(range(36)), [0, 1, 2, 15, 16, 17, 127, 128, 129], [7, 70, 71, 72, 111]],
    ids=["first", "last", "prefix", "runs", "scattered"],
)
def test_rows_attend_to_all_before_them(
    kernel: ModuleType, rows: list[int], store: Any, group: int
) -> None:
    torch.manual_seed(len(rows))
    pages = pages_of(store)
    blocks = [11, 2, 23, 4, 9, 1, 0, 15, 3]  # 144 tokens
    positions = torch.tensor(rows)
    query = torch.randn(len(rows), KV_HEADS * group, DIM)
    out = torch.full_like(query, torch.nan)
    attend = kernel.RowAttention(pages)
    attend(2, query, out, positions, torch.tensor(blocks), SCALE)
    torch.testing.assert_close(out, expected(pages, 2, query, positions, blocks))


def test_many_rows_of_a_long_prompt_in_half_precision(kernel: ModuleType) -> None:
    torch.manual_seed(5)
    pages = pages_of(dtype=torch.float16)
    blocks = random.Random(5).sample(range(BLOCKS), 20)  # 320 tokens
    positions = torch.tensor(sorted(random.Random(6).sample(range(20 * TOKENS), 21)))
    query = torch.randn(21, 4 * KV_HEADS, DIM).half()
    out = torch.empty_like(query)
    attend = kernel.RowAttention(pages)
    attend(LAYERS - 1, query, out, positions, torch.tensor(blocks), SCALE)
    found = expected(pages, LAYERS - 1, query, positions, blocks)
    torch.testing.assert_close(out.float(), found, atol=4e-3, rtol=4e-3)


def test_what_stands_behind_a_row_is_not_read(kernel: ModuleType) -> None:
    """Pages behind the last row hold NaN, as those of another request may."""
    torch.manual_seed(9)
    pages = pages_of()
    blocks = [5, 6, 7]
    for layer in pages:
        layer.write_chunks([[7]], torch.full((1, 2, KV_HEADS, TOKENS, DIM), torch.nan))
    positions = torch.tensor([3, 31])
    query = torch.randn(2, KV_HEADS, DIM)
    out = torch.empty_like(query)
    kernel.RowAttention(pages)(0, query, out, positions, torch.tensor(blocks), SCALE)
    torch.testing.assert_close(out, expected(pages, 0, query, positions, blocks[:2]))


def test_pages_it_cannot_read_are_refused(kernel: ModuleType) -> None:
    with pytest.raises(ValueError, match="multiples"):
        kernel.RowAttention(layers_of(plain, 8, torch.float32))
    with pytest.raises(ValueError, match="heads of 24"):
        kernel.RowAttention(layers_of(plain, 24, torch.float32))
    with pytest.raises(ValueError, match="several parts"):
        kernel.RowAttention(layers_of(plain, 16, torch.float16, ratio=4))
    attend = kernel.RowAttention(pages_of())
    query = torch.zeros(1, 3 * KV_HEADS, DIM)
    with pytest.raises(ValueError, match="queries"):
        attend(0, query, query, torch.tensor([0]), torch.tensor([1]), SCALE)
