"""Rounding KV against its definition, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blend import rounding
from blend.rounding import Rounding, RoundingError
from prefixstore.codec import FP8, INT8, LOSSY_NAMES
from prefixstore.codec.rounded import rounded_layout
from prefixstore.layout import Layout
from tests.rounding_by_hand import by_hand, one_by_one

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def made(
    codec: str, dtype: str, planes: int = 2, tokens: int = 16, size: int = 24
) -> tuple[Rounding, Layout]:
    kept = DTYPES[dtype]
    layout = rounded_layout(codec, Layout(2, planes, 3, tokens, size * kept.itemsize), dtype)
    return Rounding(codec, (2, planes, 3, tokens, size), kept, layout.piece_bytes), layout


def like_kv(count: int, *shape: int, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    """Some channels are large, as in K; a token of zeros, and one whose elements are alike."""
    values = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) * scale
    values[..., ::8] *= 30
    values[0, 0, :, 0, 3] = 0.0
    values[0, 0, :, 0, 4] = -1.5
    values[:, 1, :, 1] = 0.0
    return values


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_as_the_definition_says(codec: str, planes: int, dtype: str, scale: float) -> None:
    how, layout = made(codec, dtype, planes)
    kv = like_kv(3, 2, planes, 3, 16, 24, scale=scale).to(DTYPES[dtype])
    out = torch.full((3, layout.payload_bytes), 0xAA, dtype=torch.uint8)
    how.encode(kv, out)
    back = how.decode(out)
    assert (back.dtype, back.shape) == (kv.dtype, kv.shape)
    for chunk, row, found in zip(kv, out, back, strict=True):
        data, values = by_hand(codec, chunk.float().numpy(), layout)
        assert row.numpy().tobytes() == data
        assert torch.equal(found, torch.from_numpy(values).to(kv.dtype))
    error = float((back.float() - kv.float()).norm() / kv.float().norm())
    assert 0 < error < (0.04 if codec == FP8 else 0.02)
    assert torch.equal(how.decode(out[1:2]), back[1:2]), "a chunk alone"


@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_what_is_not_finite_comes_back_as_nan(codec: str) -> None:
    """It, and all that has its scale; the rest as if it were not there."""
    how, layout = made(codec, "bfloat16")
    kv = like_kv(3, 2, 2, 3, 16, 24).bfloat16()
    bad = kv.clone()
    for chunk, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        bad[chunk, 1, :, 2, 5, 7] = value
    outs = [torch.empty((3, layout.payload_bytes), dtype=torch.uint8) for _ in range(2)]
    how.encode(kv, outs[0])
    how.encode(bad, outs[1])
    back, lost = how.decode(outs[0]), how.decode(outs[1])
    expected = torch.zeros_like(kv, dtype=torch.bool)
    expected[:, 1, 1, 2, 5] = True
    if codec == INT8:
        expected[:, 1, 0, 2, :, 7] = True
    else:
        expected[:, 1, 0, 2, 5] = True
    assert torch.equal(lost.isnan(), expected)
    assert torch.equal(lost[~expected], back[~expected])


@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_extremes(codec: str) -> None:
    """Scales that are themselves too small to have all their bits, and the largest there are."""
    how, layout = made(codec, "float32", tokens=16, size=24)
    tiny = torch.arange(24.0) * 2.0**-141
    kv = like_kv(1, 2, 2, 3, 16, 24)
    kv[0, 0, 0, 0, 0], kv[0, 0, 1, 0, 0] = tiny, tiny
    kv[0, 0, 1, 0, 2] = tiny * 2.0**20
    kv[0, 0, 1, 0, 1] = torch.linspace(0.0, 3.4e38, 24)
    out = torch.empty((1, layout.payload_bytes), dtype=torch.uint8)
    how.encode(kv, out)
    back = how.decode(out)
    assert back.isfinite().all()
    of_values = 0, 0, 1, 0, slice(3)
    largest, error = kv[of_values].amax(-1), (back - kv)[of_values].abs().amax(-1)
    assert error[0] <= largest[0]  # nothing is left of it
    assert bool((error[1:] <= largest[1:] / 8).all())


@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_a_device_that_rounds_otherwise_is_refused(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, _ = made(codec, "bfloat16")
    how.check(torch.device("cpu"))
    calls = iter(range(2))
    scales = rounding._scales

    def off_by_a_bit(*args: Any) -> torch.Tensor:
        return scales(*args).nextafter(torch.tensor(9.0)) if next(calls) else scales(*args)

    monkeypatch.setattr(rounding, "_scales", off_by_a_bit)
    if codec == INT8:
        calls = iter([0, 0, 1, 1])
    with pytest.raises(RoundingError, match=f"cpu does not round KV to {codec}"):
        how.check(torch.device("cpu"))


def test_memory_for_rounding_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    how, _ = made(FP8, "bfloat16")
    assert how.save_chunks > how.load_chunks > 100
    unit_bytes = 2 * 2 * 3 * 16 * 24 * 2
    assert how.scratch_bytes == (2 * how.save_chunks * unit_bytes, 3 * how.load_chunks * unit_bytes)
    one_by_one(monkeypatch)
    how, _ = made(FP8, "bfloat16")
    assert how.save_chunks == how.load_chunks == 1


class Divisions(TorchDispatchMode):
    """Refuses those by a number: a GPU multiplies by its reciprocal then."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "div" in str(func):
            self.count += 1
            assert all(isinstance(one, torch.Tensor) and one.dim() for one in args[:2]), func
        return func(*args, **(kwargs or {}))


def test_a_device_without_these_dtypes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any) -> None:
        raise NotImplementedError("no kernel for Float8_e4m3fn")

    monkeypatch.setattr(rounding, "_from_fp8", cannot)
    with pytest.raises(RoundingError, match="cpu cannot round KV: no kernel"):
        made(FP8, "bfloat16")[0].check(torch.device("cpu"))


@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_all_devices_divide_alike(codec: str) -> None:
    with Divisions() as seen:
        made(codec, "bfloat16")[0].check(torch.device("cpu"))
    assert seen.count >= 4


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_on_a_gpu(codec: str) -> None:
    """As on a host, and the host waits for nothing."""
    how, layout = made(codec, "bfloat16")
    kv = like_kv(3, 2, 2, 3, 16, 24).bfloat16()
    near = kv.cuda()
    outs = [
        torch.empty((3, layout.payload_bytes), dtype=torch.uint8, device=d) for d in ("cpu", "cuda")
    ]
    how.encode(kv, outs[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        how.encode(near, outs[1])
        back = how.decode(outs[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(outs[1].cpu(), outs[0])
    assert torch.equal(back.cpu(), how.decode(outs[0]))
