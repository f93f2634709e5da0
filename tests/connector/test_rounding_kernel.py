"""The kernels that round, under Triton's interpreter, beside `blend.rounding`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from blend.rounding import Rounding
from prefixstore.codec import FP8, INT8, LOSSY_NAMES
from prefixstore.codec.rounded import rounded_layout
from prefixstore.layout import Layout
from tests.connector.conftest import interpreted

DTYPES = {"float16": torch.float16, "float32": torch.float32}  # bfloat16 is cut off there
SHAPES = {"powers of two": (16, 32), "others": (48, 24)}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """`connector.rounding_kernel`, interpreted, with pieces in several parts."""
    module = interpreted("rounding_kernel")
    vars(module)["TILE"] = 512
    return module


def kv_of(dtype: torch.dtype, planes: int, tokens: int, size: int, seed: int = 1) -> torch.Tensor:
    """A chunk of two layers and three heads: some channels are large, some tokens zero."""
    chosen = torch.Generator().manual_seed(seed)
    kv = torch.randn(1, 2, planes, 3, tokens, size, generator=chosen)
    kv[..., ::8] *= 30
    kv[:, 1, :, 1] = 0.0
    kv[0, 0, :, 0, 3] = -1.5
    return kv.to(dtype)


def made(codec: str, dtype: str, planes: int, tokens: int, size: int) -> tuple[Rounding, Layout]:
    kept = getattr(torch, dtype)
    layout = rounded_layout(codec, Layout(2, planes, 3, tokens, size * kept.itemsize), dtype)
    return Rounding(codec, (2, planes, 3, tokens, size), kept, layout.piece_bytes), layout


def off_by(codec: str, out: Any, wanted: Any, piece_bytes: int, shape: tuple[int, int]) -> int:
    """How far bytes are from each other. In fp8, Triton's interpreter loses the carry of a number
    that becomes a power of two, is wrong about the smallest ones, and rounds ties up: these may be
    off by 1, those are left out."""
    pieces, others = out.view(-1, piece_bytes).int(), wanted.view(-1, piece_bytes).int()
    off = (pieces - others).abs()
    if codec == FP8:
        tokens, size = shape
        codes = slice(4 * tokens, (4 + size) * tokens)
        found = others[:, codes] & 0x7F
        alike = (found % 8 != 0) & (found > 8)
        assert alike.float().mean() > 0.7
        assert int(off[:, codes][alike].max()) <= 1
        assert (off[:, codes][alike] == 0).float().mean() > 0.99
        off[:, codes] = 0
    return int(off.max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_as_by_operations(
    kernels: ModuleType, codec: str, planes: int, dtype: str, shape: str
) -> None:
    tokens, size = SHAPES[shape]
    how, layout = made(codec, dtype, planes, tokens, size)
    kernel = kernels.RoundingKernel(codec, tokens, size, layout.piece_bytes)
    kv = kv_of(DTYPES[dtype], planes, tokens, size)
    wanted = torch.empty((1, layout.payload_bytes), dtype=torch.uint8)
    how.encode(kv, wanted)
    out, back = torch.full_like(wanted, 0xAA), torch.full_like(kv, 7.0)
    kernel.encode(kv, out)
    assert off_by(codec, out, wanted, layout.piece_bytes, (tokens, size)) == 0
    kernel.decode(wanted, back)
    assert torch.equal(back, how.decode(wanted))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_what_is_not_finite_comes_back_as_nan(kernels: ModuleType, codec: str) -> None:
    how, layout = made(codec, "float32", 2, 16, 24)
    kernel = kernels.RoundingKernel(codec, 16, 24, layout.piece_bytes)
    kv = kv_of(torch.float32, 2, 16, 24)
    kv[0, 1, :, 2, 5, 7], kv[-1, 1, :, 2, 6, 8] = float("nan"), float("-inf")
    out, back = torch.empty((1, layout.payload_bytes), dtype=torch.uint8), torch.zeros_like(kv)
    kernel.encode(kv, out)
    kernel.decode(out, back)
    how.encode(kv, out)
    assert torch.equal(back.isnan(), how.decode(out).isnan())
    assert 0 < int(back.isnan().sum()) < 100


def test_pieces_that_are_too_large_are_refused(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="8192 each way at most"):
        kernels.RoundingKernel(INT8, 8193, 8, 1 << 18)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", *DTYPES])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_on_a_gpu(codec: str, planes: int, dtype: str) -> None:
    """Every bit as on a host, and the host waits for nothing."""
    from connector.rounding_kernel import RoundingKernel

    for tokens, size in ((64, 128), *SHAPES.values()):
        host, layout = made(codec, dtype, planes, tokens, size)
        kernel = RoundingKernel(codec, tokens, size, layout.piece_bytes)
        own = Rounding(codec, host._shape, getattr(torch, dtype), layout.piece_bytes, kernel)
        own.check(torch.device("cuda"))
        kv = kv_of(getattr(torch, dtype), planes, tokens, size)
        near, wanted = kv.cuda(), torch.empty((1, layout.payload_bytes), dtype=torch.uint8)
        host.encode(kv, wanted)
        out = torch.full_like(wanted, 0xAA, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            own.encode(near, out)
            back = own.decode(out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out.cpu(), wanted)
        assert torch.equal(back.cpu(), host.decode(wanted))
