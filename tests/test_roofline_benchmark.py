"""`benchmarks.roofline`: its rows, a quick run, and its kernels' stages, interpreted on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

import torch

from benchmarks import roofline, roofline_gpu, roofline_load
from benchmarks.gpu_timing import Timed
from benchmarks.roofline_gpu import Kv, Shape, kv_stages
from benchmarks.roofline_load import Loaded
from benchmarks.roofline_rows import BYTES, FLOP, Limit, Stage
from benchmarks.store import DEFAULT_DIR
from connector.rank import Rank
from tests.connector.conftest import interpreted

CPU = torch.device("cpu")
SHAPE = Shape(layers=2, kv_heads=2, size=16, block=4, chunk=16, dtype=torch.float32)


def test_rates_and_ratios_are_in_the_limit_s_unit() -> None:
    row = Stage("copy", 8e9, 0.0, [2.0, 3.0, 1.0], Limit("memcpy", BYTES, 5000.0)).row()
    assert (row["ms"], row["min"], row["max"], row["n"]) == (2.0, 1.0, 3.0, 3)
    assert (row["rate"], row["ratio"], row["held_by"]) == (4000.0, 0.8, "itself")
    row = Stage("matrices", 8e9, 3e12, [4.0], Limit("product", FLOP, 800.0)).row()
    assert (row["rate"], row["ratio"], row["held_by"]) == (750.0, 0.9375, "the limit")


def test_what_holds_a_stage_back() -> None:
    limit = Limit("memcpy", BYTES, 5000.0)
    by_host = Stage("copy", 8e9, 0.0, [2.0], limit, host_ms=[1.9]).row()
    assert by_host["held_by"] == "the host: Python and launches"
    assert Stage("copy", 8e9, 0.0, [2.0], limit, host_ms=[0.2]).row()["held_by"] == "itself"
    made = Stage("load", 8e9, 0.0, [2.0], limit, parts={"copy": 1.6, "hash": 0.25})
    assert made.row()["held_by"] == "copy 1.6 ms, hash 0.25 ms"
    unknown = Stage("look-up", 0.0, 0.0, [2.0], Limit("", BYTES, None)).row()
    assert (unknown["rate"], unknown["ratio"], unknown["held_by"]) == (None, None, "")


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder in the checkout: the temporary one may lie in memory, where nothing is cold."""
    DEFAULT_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DEFAULT_DIR) as name:
        yield Path(name)


def test_a_quick_run_prints_one_object(on_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--quick", "--json", "--dir", str(on_disk)])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row["mib"] == 16
        assert row["rate"] == pytest.approx(16 * 2**20 / row["ms"] / 1e6)
        assert row["ratio"] == pytest.approx(row["rate"] / row["limit"])
    assert not list(on_disk.iterdir())


@pytest.fixture
def sum_kernel() -> ModuleType:
    return interpreted("sum_kernel")


@pytest.fixture
def kv(monkeypatch: pytest.MonkeyPatch) -> Kv:
    """Small, with kernels that are interpreted."""
    for module, name in (
        ("page_kernel", "PageKernel"),
        ("sum_kernel", "SumKernel"),
        ("piece_kernel", "PieceKernel"),
    ):
        monkeypatch.setattr(roofline_gpu, name, getattr(interpreted(module), name))
    torch.manual_seed(0)
    return Kv(SHAPE, 64, CPU)


class Registrar:
    """Instead of CUDA."""

    def begin(self) -> None:
        pass

    def register(self, memory: torch.Tensor) -> bool:
        return True

    def unregister(self, memory: torch.Tensor) -> bool:
        return True


def once(work: Callable[[], object]) -> Timed:
    work()
    return Timed([2.0], [1.0])


def test_stages_of_kernels_move_what_they_say(kv: Kv) -> None:
    kv.near.fill_(255)
    before = kv.near.clone()
    stages = kv_stages(kv, Limit("copy", BYTES, 1.0), once)
    assert kv.num_bytes == 64 * 2 * 2 * 2 * 16 * 4
    assert [stage.num_bytes / kv.num_bytes for stage in stages] == [2, 1, 2, 2]
    assert not torch.equal(kv.near, before), "chunks were gathered"
    chunks = kv.near.view(torch.float32)
    for chunk, blocks in zip(chunks, kv.blocks, strict=True):
        for layer, pages in enumerate(kv.pages):
            out = torch.empty(chunk.shape[1:], dtype=torch.float32)
            pages.read_chunk(blocks, out)
            assert torch.equal(out[1], chunk[layer, 1]), "V is as it was"
            assert not torch.allclose(out[0], chunk[layer, 0]), "K was rotated"
            norm = out[0].norm(dim=-1)
            torch.testing.assert_close(norm, chunk[layer, 0].norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_limits_count_bytes_and_operations() -> None:
    limits = roofline_gpu.copy_limits(CPU, once, 1 << 20)
    assert [limit.value for limit in limits] == [2**20 / 2e6, 2**20 / 2e6, 2**21 / 2e6]
    assert roofline_gpu.matrix_limit(CPU, once, 16).value == pytest.approx(2 * 16**3 / 2e9)


def test_a_load_is_by_dma_and_of_every_chunk(
    kv: Kv, on_disk: Path, sum_kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where nothing is registered and kernels are interpreted."""

    class HashingRank(Rank):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.sum_kernel = sum_kernel.SumKernel(self.layout.piece_bytes, CPU)

    monkeypatch.setattr(roofline_load, "Rank", HashingRank)
    monkeypatch.setattr(roofline_load, "Cuda", lambda _: Registrar())
    monkeypatch.setattr(roofline_load, "timed", once)
    monkeypatch.setattr(roofline_load, "REPEATS", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    layout = SHAPE.layout
    kv.near.random_(0, 256)
    limit = Limit("copy", BYTES, 4.0)
    with Loaded(on_disk / "store", layout, kv.near) as loaded:
        copy, look_up, whole = loaded.stages(kv.pages, kv.blocks, limit, {"gather": 3.0})
    assert copy.num_bytes == whole.num_bytes == kv.num_bytes
    assert len(look_up.ms) == len(whole.ms) == 2
    assert whole.parts is not None
    assert whole.parts["copy"] == pytest.approx(kv.num_bytes / 4e6)
    for blocks, stored in zip(kv.blocks, kv.near, strict=True):
        for layer, pages in enumerate(kv.pages):
            out = torch.empty_like(stored[layer])
            pages.read_chunk(blocks, out)
            assert torch.equal(out, stored[layer])
    assert not list(on_disk.iterdir())
