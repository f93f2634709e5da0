"""Attention of scattered rows, under Triton's interpreter, beside torch's with an explicit mask."""

from __future__ import annotations

import random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.connector.conftest import interpreted

KV_HEADS, DIM = 2, 32
SCALE = 0.11


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    """With small programs: the interpreter takes 10 us for each product that is added up."""
    module = interpreted("row_attention")
    vars(module).update(SHAPES=(module.Shape(16, 16, 4, 1),))
    return module


def attend(
    kernel: ModuleType,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    made = kernel.RowAttention(query.shape[1], KV_HEADS, DIM, keys.dtype, query.device)
    out = torch.full_like(query, torch.nan)
    made(query, keys, values, positions, SCALE, out)
    return out


def random_keys(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, KV_HEADS, tokens, DIM).to(dtype).unbind(0)


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    group = query.shape[1] // KV_HEADS
    keys, values = keys.float(), values.float()
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    mask = torch.arange(keys.shape[1])[None] <= rows[:, None]
    found = scaled_dot_product_attention(
        query.float().transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, scale=SCALE
    )
    return found[0].transpose(0, 1)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    "rows",
    [[0], [129], list(range(36)), [0, 1, 2, 15, 16, 17, 127, 128, 129], [7, 70, 71, 72, 111]],
    ids=["first", "last", "prefix", "runs", "scattered"],
)
def test_rows_attend_to_all_before_them(kernel: ModuleType, rows: list[int], group: int) -> None:
    torch.manual_seed(len(rows))
    keys, values = random_keys(144)
    positions = torch.tensor(rows)
    query = torch.randn(len(rows), KV_HEADS * group, DIM)
    out = attend(kernel, query, keys, values, positions)
    torch.testing.assert_close(out, expected(query, keys, values, positions))


def test_many_rows_of_a_long_prompt_in_half_precision(kernel: ModuleType) -> None:
    torch.manual_seed(5)
    keys, values = random_keys(320, torch.float16)
    positions = torch.tensor(sorted(random.Random(6).sample(range(320), 21)))
    query = torch.randn(21, 4 * KV_HEADS, DIM).half()
    out = attend(kernel, query, keys, values, positions)
    found = expected(query, keys, values, positions)
    torch.testing.assert_close(out.float(), found, atol=4e-3, rtol=4e-3)


def test_what_stands_behind_the_last_row_does_not_count(kernel: ModuleType) -> None:
    """It may be NaN, as what another request left in a page."""
    torch.manual_seed(9)
    keys, values = random_keys(48)
    keys[:, 32:], values[:, 32:] = torch.nan, torch.nan
    positions = torch.tensor([3, 31])
    query = torch.randn(2, KV_HEADS, DIM)
    out = attend(kernel, query, keys, values, positions)
    found = expected(query, keys[:, :32], values[:, :32], positions)
    torch.testing.assert_close(out, found)


def test_what_it_cannot_do_is_refused(kernel: ModuleType) -> None:
    device = torch.device("cpu")
    for heads, size in ((6, 24), (6, 8), (5, 32)):
        with pytest.raises(ValueError, match="heads of"):
            kernel.RowAttention(heads, KV_HEADS, size, torch.float32, device)
    keys, values = random_keys(16)
    made = kernel.RowAttention(2 * KV_HEADS, KV_HEADS, DIM, torch.float32, device)
    rows = torch.tensor([0])
    fits = torch.zeros(1, 2 * KV_HEADS, DIM)
    for query in (fits.half(), fits[:, :KV_HEADS], fits.repeat(1, 1, 2)):
        with pytest.raises(ValueError, match="it is for"):
            made(query, keys, values, rows, SCALE, query)
    with pytest.raises(ValueError, match="contiguous: False"):
        made(fits, keys.transpose(0, 1).contiguous().transpose(0, 1), values, rows, SCALE, fits)


def test_a_shape_that_does_not_fit_the_gpu_gives_way_to_a_smaller_one(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.errors import TritonError

    launched, first = kernel._attend, kernel.Shape(32, 32, 4, 2)
    monkeypatch.setattr(kernel, "SHAPES", (first, *kernel.SHAPES))

    class Small:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **told: Any) -> None:
                if told["block_keys"] == first.keys:
                    raise TritonError("out of resource: shared memory")
                launched[grid](*args, **told)

            return launch

    monkeypatch.setattr(kernel, "_attend", Small())
    keys, values = random_keys(16)
    query, rows = torch.randn(1, KV_HEADS, DIM), torch.tensor([9])
    out = attend(kernel, query, keys, values, rows)
    torch.testing.assert_close(out, expected(query, keys, values, rows))
    monkeypatch.setattr(kernel, "SHAPES", (first,))
    with pytest.raises(RuntimeError, match="shared memory"):
        attend(kernel, query, keys, values, rows)


def test_a_layers_attention_is_ours_for_a_while(kernel: ModuleType) -> None:
    seen = []

    def attending(query: torch.Tensor, out: torch.Tensor) -> None:
        assert query.is_contiguous()
        seen.append(query)
        out.fill_(2.0)

    impl = SimpleNamespace(scale=0.5, do_kv_cache_update="theirs")
    ours = kernel.Attending(impl, attending)
    assert (ours.scale, ours.do_kv_cache_update) == (0.5, "theirs")
    query, output = torch.randn(3, 4, 5).transpose(1, 2), torch.zeros(3, 5, 4)
    ours.forward(None, query, None, None, None, None, output=output, output_scale=None)
    assert torch.equal(seen[0], query)
    assert output.eq(2.0).all()
