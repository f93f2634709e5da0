"""The lossless codec against a second implementation, bit by bit; golden bytes; bytes that are none
of its. And rounding to a dtype against torch's."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixstore.codec import lossless
from prefixstore.codec.form import Form, from_float32
from prefixstore.errors import DamagedError
from prefixstore.layout import Layout

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def form_of(dtype: str, tokens: int = 16, head_size: int = 64) -> Form:
    return Form(Layout(2, 2, 3, tokens, head_size * WIDTHS[dtype]), dtype)


def normal(form: Form) -> torch.Tensor:
    """float32 [layers, planes, heads, tokens, head size]; some channels are large, as in K."""
    layout, rng = form.layout, np.random.default_rng(1)
    shape = (layout.num_layers, layout.num_planes, layout.num_heads, layout.chunk_tokens)
    values = rng.standard_normal((*shape, form.head_size), np.float32)
    values[..., ::16] *= 30
    return torch.from_numpy(values)


def bytes_of(values: torch.Tensor, dtype: str) -> memoryview:
    kept = values.to(TORCH[dtype]) if dtype in TORCH else values.to(torch.float8_e4m3fn)
    return memoryview(kept.contiguous().view(torch.uint8).numpy().tobytes())


def encoded(form: Form, payload: memoryview) -> list[memoryview]:
    pieces = lossless.encode(form, payload)
    assert pieces is not None
    assert len(pieces) == form.layout.num_pieces
    assert all(0 < len(piece) <= form.layout.piece_bytes for piece in pieces)
    return [memoryview(piece) for piece in pieces]


def decoded(form: Form, pieces: Sequence[memoryview], which: Sequence[int]) -> memoryview:
    out = memoryview(bytearray(len(which) * form.layout.piece_bytes))
    lossless.decode(form, [pieces[i] for i in which], out)
    return out


@pytest.mark.parametrize("dtype", WIDTHS)
def test_lossless_is_what_the_format_says(dtype: str) -> None:
    """Taken apart here bit by bit: zstd of the exponents, then the rest."""
    form = form_of(dtype)
    payload, width, size = bytes_of(normal(form), dtype), WIDTHS[dtype], form.layout.piece_bytes
    pieces = encoded(form, payload)
    for number, piece in enumerate(pieces):
        elements = payload[number * size : (number + 1) * size]
        tops, rest = bytearray(), bytearray()
        for at in range(0, size, width):
            bits = f"{int.from_bytes(elements[at : at + width], 'little'):0{8 * width}b}"
            turned = bits if width == 1 else bits[1:] + bits[0]
            tops.append(int(turned[:8], 2))
            rest += int(turned[8:] or "0", 2).to_bytes(width, "little")[: width - 1]
        frame = bytes(piece[: len(piece) - len(rest)])
        assert bytes(piece[len(frame) :]) == rest
        assert zstandard.ZstdDecompressor().decompress(frame) == tops
    assert decoded(form, pieces, range(len(pieces))) == payload
    assert sum(map(len, pieces)) < payload.nbytes


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(sorted(WIDTHS)),
    sizes=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 9), st.integers(1, 40)),
    data=st.data(),
)
def test_lossless_gives_back_every_byte(
    dtype: str, sizes: tuple[int, int, int, int, int], data: st.DataObject
) -> None:
    """Of any bytes, any layout (odd ones too), in any selection of pieces."""
    form = Form(Layout(*sizes), dtype)
    layout, size = form.layout, form.layout.piece_bytes
    few = data.draw(st.integers(1, 256))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    payload = memoryview(rng.integers(0, few, layout.payload_bytes).astype(np.uint8).tobytes())
    found = lossless.encode(form, payload)
    if found is None:
        return
    pieces = [memoryview(piece) for piece in found]
    assert sum(map(len, pieces)) < payload.nbytes
    numbers = st.lists(st.integers(0, layout.num_pieces - 1), min_size=1, unique=True)
    for which in (range(layout.num_pieces), sorted(data.draw(numbers))):
        wanted = b"".join(payload[i * size : (i + 1) * size] for i in which)
        assert decoded(form, pieces, which) == wanted


def test_what_does_not_get_smaller_is_left_alone() -> None:
    form = form_of("bfloat16")
    noise = np.random.default_rng(1).integers(0, 256, form.layout.payload_bytes, np.uint8)
    assert lossless.encode(form, memoryview(noise.tobytes())) is None
    # Of a payload of which some pieces do, the others are what they were.
    size = form.layout.piece_bytes
    noise[:size] = 0
    pieces = encoded(form, memoryview(noise.tobytes()))
    assert len(pieces[0]) < size
    assert [bytes(piece) for piece in pieces[1:]] == [
        noise[at : at + size].tobytes() for at in range(size, len(noise), size)
    ]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_pieces_left_alone_may_stand_by_themselves(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """A whole block of them, or a region: nothing is unpacked there."""
    form = form_of("bfloat16")
    size = form.layout.piece_bytes
    monkeypatch.setattr(lossless, "_BLOCK_BYTES", block * size)
    payload = bytearray(bytes_of(normal(form), "bfloat16"))
    noise = np.random.default_rng(2).integers(0, 256, 4 * size, np.uint8).tobytes()
    payload[2 * size : 6 * size] = noise
    pieces = encoded(form, memoryview(payload))
    assert [len(piece) == size for piece in pieces[:7]] == [False] * 2 + [True] * 4 + [False]
    for which in (range(len(pieces)), range(2, 6), [3], [0, 3, 6]):
        found = decoded(form, pieces, which)
        assert found == b"".join(payload[i * size : (i + 1) * size] for i in which)


def test_bytes_that_are_no_frame() -> None:
    """Each length and each flipped bit of a frame: an error of ours, or other bytes; and a frame
    that says it is large takes no memory."""
    form = form_of("bfloat16", tokens=4)
    piece = encoded(form, bytes_of(normal(form), "bfloat16"))[0]
    size = form.layout.piece_bytes
    out = memoryview(bytearray(size))
    for length in set(range(size)) - {len(piece)}:
        other = memoryview(bytes(piece[:length]).ljust(length, b"x"))
        with pytest.raises(DamagedError):
            lossless.decode(form, [other], out)
    wrong = 0
    for at in range(8 * 40):
        bad = bytearray(piece)
        bad[at // 8] ^= 1 << at % 8
        try:
            lossless.decode(form, [memoryview(bad)], out)
        except DamagedError:
            wrong += 1
    assert wrong > 100
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    rest = bytes(size - size // 2)
    assert len(bomb) + len(rest) > size  # nor would a head let it through
    with pytest.raises(DamagedError, match="another size"):
        lossless.decode(form, [memoryview(bomb[:18] + rest)], out)


@pytest.mark.parametrize("dtype", TORCH)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@example([3.3895e38, -1.00390625, 1.01171875, 65519.0, 2.0**-133])
def test_rounding_to_a_dtype_is_torchs(dtype: str, numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    theirs = torch.from_numpy(values).to(TORCH[dtype])
    with np.errstate(over="ignore"):
        ours = from_float32(values, dtype).view(np.uint8)
    assert ours.tobytes() == theirs.view(torch.uint8).numpy().tobytes()


def test_golden() -> None:
    """A frame of zstd as version 1.5.7 made it; other versions may make others, all read it: 16
    tokens of 32 bfloat16, (7 * token * (channel + 1) mod 61 - 30) / 8."""
    form = Form(Layout(1, 1, 1, 16, 64), "bfloat16")
    tokens, channels = torch.arange(16)[:, None], torch.arange(32)[None]
    keys = ((7 * tokens * (channels + 1)) % 61 - 30) / 8
    piece = memoryview(b64decode(GOLDEN))
    assert len(piece) == 694
    assert decoded(form, [piece], [0]) == bytes_of(keys, "bfloat16")


GOLDEN = """
KLUv/WAAAWUFAFKKDgjg6SktAAB6B+vHm4GPgeYYPAo30VIrkNJLTHIL8A1Pgseucfve0fM+8fm21bc3/Hzzx683gfy3+AEy
IHCCOVTEA7LAd2YQiF9WNCylw4CuLROspBQEfWt6R4hBgpK66SG+hqwUyaGCXCXLoBGwlIDQDYoAZOJH9F101TOgB7DCGwi9
YOri4wZ4N8Dxa5x3MU/QljaAeGExA4hhf+kMUbXqoO3GiHfipQ3h4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4XEB
IQFAgDCgwVHBwQDAwFDAoTGBQQAgAHDggRFBgQBgAQGAoFHBwFChgQAA4BGBYJBhAYBAsaEA4NAhAUCAcSEhgMHBwKFBAIGB
IGEBQEEAYCGAgAFAoMHAwIEg4EFg0QGgwVCBABFgYYCxANABgCEwwcAxIIEA0QGwgWBhEAGAQFHAgXCB0YBB4GGAAcHAMQBB
kAGxACEQIaAAoSARIAGAwaEAgWFAACGAQMHAIEHRoIGREAFRUAARkICh0EAhwTDAQRHRQAABAcFQIIHhsWBAAcGhcGABoZGA
gACBgZCgoFAAYIAAASHBMYHRsGAQgMAAgQGhIXHBwHAgoACAAcHBoYFhQSEBwYFBAYEBAQAAAIAAQIDAACBAYICgwODRsVGB
gYDggMExQQEAEKChEQEAQDDAgeGBgIBQ4GGhAUDAwQAgsWFAUIEBAIBRQWCwIQHA4OEAEMGBAECRIcBwYYHBAGEAgMEg0YEQ
UQCQoUDBQSBBgKCBYLEBMDEAsGGAoQDgAdABwIGwAaBBkIGAwXABYCFQQUBhMIEgoRDBAOHgwBFAAcEg4WABoWChgACBoGGg
AGHgIcAAQRDB4IAhMEHAgUGAwEGxEAARsEDBgUCAweCgAVFwgGHBAAEhoCABkQ==
"""
