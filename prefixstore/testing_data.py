"""What the contract tests put and expect: identities, contents, regions, prompts.

What must hold: all of it follows from its arguments alone and uses none of the code under test, so
that any process can tell a wrong byte. Nothing is kept, so a crash leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable

import numpy as np

from prefixstore.identity import ModelIdentity
from prefixstore.layout import Layout, Roi

_WAIT_S = 30.0
CONTRACT_LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=128)


def identity_for(label: str, layout: Layout = CONTRACT_LAYOUT) -> ModelIdentity:
    """An identity that differs from every other label's, for a layout."""
    return ModelIdentity(
        architecture="ContractModel",
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_heads,
        head_size=layout.head_bytes,
        rope="{}",
        attention="{}",
        weights=label,
        model_dtype="float16",
        kv_dtype="int8",
        chunk_tokens=layout.chunk_tokens,
    )


def content_of(key: bytes, num_bytes: int) -> bytes:
    """What the chunk of a key holds: SHAKE-128 of the key, so any process can tell a wrong byte."""
    return hashlib.shake_128(key).digest(num_bytes)


def region_of(payload: bytes, layout: Layout, roi: Roi) -> bytes:
    """The bytes of a region, cut from a payload as an array [layer, plane, head, bytes]."""
    shape = (layout.num_layers, layout.num_planes, layout.num_heads, layout.piece_bytes)
    whole = np.frombuffer(payload, dtype=np.uint8).reshape(shape)
    return whole[roi.layer_start : roi.layer_stop, :, roi.head_start : roi.head_stop].tobytes()


def regions(layout: Layout) -> list[Roi]:
    """Every region of a layout that is not empty."""
    layers = range(layout.num_layers + 1)
    heads = range(layout.num_heads + 1)
    return [
        Roi(first, last, low, high)
        for first in layers
        for last in layers[first + 1 :]
        for low in heads
        for high in heads[low + 1 :]
    ]


def tokens_of(seed: int, num_chunks: int, layout: Layout = CONTRACT_LAYOUT) -> list[int]:
    """Token ids of a prompt: the same for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(150_000) for _ in range(num_chunks * layout.chunk_tokens)]


def outputs(layout: Layout, count: int, roi: Roi | None = None) -> list[memoryview]:
    """Buffers to read chunks into, filled with a pattern no test stores."""
    size = layout.roi_bytes(roi or layout.whole)
    return [memoryview(bytearray(b"\xa5" * size)) for _ in range(count)]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll until a condition holds; raises AssertionError after _WAIT_S."""
    end = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {_WAIT_S} s for {what}"
        time.sleep(0.02)
