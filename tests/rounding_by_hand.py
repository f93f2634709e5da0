"""Rounded KV by its definition in `prefixstore.codec.rounded`: by numpy, tables and arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from blend import rounding
from blend.rounding import Rounding
from prefixstore.codec import FP8
from prefixstore.layout import Layout

Floats = npt.NDArray[np.float32]
F32 = np.float32


def e4m3() -> Floats:
    """The values of codes 0 to 126, from the definition: they rise."""
    return np.array(
        [(code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10)
         for code in range(127)], F32,
    )  # fmt: skip


def nearest(values: Floats) -> npt.NDArray[np.uint8]:
    """The code of the nearest value, of two the even one."""
    known = e4m3().astype(np.float64)
    distance = np.abs(np.abs(values.astype(np.float64))[..., None] - known)
    odd = np.arange(127) % 2
    best = np.lexsort((np.broadcast_to(odd, distance.shape), distance), axis=-1)[..., 0]
    codes: npt.NDArray[np.uint8] = (best | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)
    return codes


def piece_by_hand(codec: str, values: Floats, is_key: bool, size: int) -> tuple[bytes, Floats]:
    """[token, element] as it is stored, and what comes back, in float32."""
    if codec == FP8:
        scale = np.maximum(np.abs(values).max(1) / F32(448), F32(2.0**-126))
        codes = nearest(values / scale[:, None])
        head = [scale]
        signs = np.where(codes & 0x80, F32(-1), F32(1))
        back = signs * e4m3()[codes & 0x7F] * scale[:, None]
    else:
        axis = 0 if is_key else 1
        low = values.min(axis)
        step = np.maximum((values.max(axis) - low) / F32(255), F32(2.0**-126))
        head, wide = [low, step], [np.expand_dims(one, axis) for one in (low, step)]
        codes = np.rint((values - wide[0]) / wide[1]).astype(np.uint8)
        back = codes.astype(F32) * wide[1] + wide[0]
    data = b"".join(part.astype("<f4").tobytes() for part in head) + codes.tobytes()
    assert len(data) <= size
    return data.ljust(size, b"\0"), back.astype(F32)


def by_hand(codec: str, chunk: Floats, layout: Layout) -> tuple[bytes, Floats]:
    """[layer, plane, head, token, element], likewise."""
    data, back = [], np.empty_like(chunk)
    for place in np.ndindex(chunk.shape[:3]):
        is_key = chunk.shape[1] == 2 and place[1] == 0
        piece, back[place] = piece_by_hand(codec, chunk[place], is_key, layout.piece_bytes)
        data.append(piece)
    return b"".join(data), back


def payload_by_hand(
    codec: str, payload: bytes | bytearray, plain: Layout, rounded: Layout
) -> tuple[bytes, bytes]:
    """The bytes of a chunk in float32, with K and V, likewise."""
    shape = plain.num_layers, 2, plain.num_heads, plain.chunk_tokens, plain.head_bytes // 4
    data, back = by_hand(codec, np.frombuffer(payload, F32).reshape(shape), rounded)
    return data, back.tobytes()


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are rounded, and read, each by itself."""
    for name in ("encode", "decode"):
        work = getattr(Rounding, name)

        def alone(
            self: Rounding, chunks: torch.Tensor, *rest: torch.Tensor, work: Any = work
        ) -> Any:
            assert len(chunks) == 1
            return work(self, chunks, *rest)

        monkeypatch.setattr(Rounding, name, alone)
    for name in ("SAVED_BYTES", "LOADED_BYTES"):
        monkeypatch.setattr(rounding, name, 1)
