"""Kernels, compiled for a GPU that is not here: Triton's interpreter takes more than its compiler.

Each is called as it is in use, and compiled for that call's arguments, down to machine code.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("vllm")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.roofline_gpu import Kv, Shape
from connector import page_kernel, piece_kernel, rounding_kernel, row_attention, sum_kernel
from prefixstore.codec import LOSSY_NAMES
from prefixstore.codec.rounded import rounded_layout
from prefixstore.layout import Layout

CPU, HOPPER = torch.device("cpu"), GPUTarget("cuda", 90, 32)
KERNELS = (
    (page_kernel, "_move"), (piece_kernel, "_place"), (sum_kernel, "_hash"),
    (row_attention, "_attend"), (rounding_kernel, "_encode"), (rounding_kernel, "_decode"),
)  # fmt: skip
TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int64: "i64",
}  # fmt: skip
HALF = 1 << 31
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiled:
    """In place of a kernel: what is launched is compiled."""

    def __init__(self, kernel: Any, folder: Path) -> None:
        self._kernel, self._folder = kernel, folder
        self.count = 0
        self.stack_bytes: list[int] = []  # of each: registers that did not suffice

    def __getitem__(self, grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, *args: Any, **named: Any) -> None:
        given = dict(zip(self._kernel.arg_names, args, strict=False))
        for param in self._kernel.params[len(args) :]:
            given[param.name] = named.pop(param.name)
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attrs: dict[tuple[int], list[list[object]]] = {}
        for place, param in enumerate(self._kernel.params):
            value = given[param.name]
            signature[param.name] = "constexpr" if param.is_constexpr else typed(value)
            if param.is_constexpr:
                constants[(place,)] = value
            elif not param.do_not_specialize and in_sixteens(value):
                attrs[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(
            fn=self._kernel, signature=signature, constexprs=constants, attrs=attrs
        )  # fmt: skip
        built = triton.compile(source, target=HOPPER, options=named)
        code = self._folder / f"{self.count}.cubin"
        code.write_bytes(built.asm["cubin"])
        told = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", code], check=True, capture_output=True, text=True
        ).stdout
        self.stack_bytes.append(int(told.partition(" STACK:")[2].split()[0]))
        self.count += 1


def typed(value: Any) -> str:
    """The type of an argument, as Triton calls it."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -HALF <= value < HALF else "i64"


def in_sixteens(value: Any) -> bool:
    """Whether Triton may count on it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Compiled]:
    """By the kernel's name."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.9 does by itself, with a warning
    found = {}
    for module, name in KERNELS:
        found[name] = Compiled(getattr(module, name), tmp_path)
        monkeypatch.setattr(module, name, found[name])
    return found


def test_pages_and_pieces(compiled: dict[str, Compiled]) -> None:
    kv = Kv(Shape(layers=2), 128, CPU)
    page_kernel.PageKernel(kv.pages, range(2)).compile(kv.near[:1], 4)
    piece_kernel.PieceKernel(kv.pages, "neox").compile(64, 64)
    piece_kernel.PieceKernel(kv.pages, "gptj").compile(64, 32)
    assert (compiled["_move"].count, compiled["_place"].count) == (3, 2)


def test_sums(compiled: dict[str, Compiled]) -> None:
    sum_kernel.SumKernel(16384, CPU).compile()
    assert compiled["_hash"].count == 3


def test_attention_of_rows(compiled: dict[str, Compiled]) -> None:
    row_attention.RowAttention(32, 8, 128, torch.bfloat16, CPU)
    assert compiled["_attend"].count == 1


@pytest.mark.parametrize(
    ("planes", "tokens", "size"), [(2, 64, 128), (2, 256, 128), (2, 48, 80), (1, 64, 576)]
)
@pytest.mark.parametrize("codec", LOSSY_NAMES)
def test_rounding(
    compiled: dict[str, Compiled], codec: str, planes: int, tokens: int, size: int
) -> None:
    """In registers, too: what does not fit is kept in the device's memory."""
    exact = Layout(1, planes, 2, tokens, 2 * size)
    layout = rounded_layout(codec, exact, "bfloat16")
    kernel = rounding_kernel.RoundingKernel(codec, tokens, size, layout.piece_bytes)
    kv = torch.zeros((1, 1, planes, 2, tokens, size), dtype=torch.bfloat16)
    rounded = torch.zeros((1, layout.payload_bytes), dtype=torch.uint8)
    kernel.encode(kv, rounded)
    kernel.decode(rounded, kv)
    assert compiled["_encode"].stack_bytes == compiled["_decode"].stack_bytes == [0]
