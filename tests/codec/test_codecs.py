"""Codecs against second implementations: by Python's own arithmetic, by torch's float8, bit by bit;
golden bytes; bytes that are none of a codec's."""

from __future__ import annotations

import struct
from base64 import b64decode
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixstore.codec import FP8, INT8, LOSSLESS, lossless
from prefixstore.codec.form import Codec, Form
from prefixstore.codec.fp8 import decoding
from prefixstore.codec.lossy import from_float32, to_float32
from prefixstore.codec.registry import BY_NAME, BY_NUMBER
from prefixstore.errors import DamagedError
from prefixstore.layout import Layout

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOSSY = (FP8, INT8)


def form_of(dtype: str, planes: int = 2, tokens: int = 16, head_size: int = 64) -> Form:
    return Form(Layout(2, planes, 3, tokens, head_size * WIDTHS[dtype]), dtype)


def normal(form: Form, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    """float32 [layers, planes, heads, tokens, head size]; some channels are large, as in K."""
    layout, rng = form.layout, np.random.default_rng(seed)
    shape = (layout.num_layers, layout.num_planes, layout.num_heads, layout.chunk_tokens)
    values = rng.standard_normal((*shape, form.head_size), np.float32)
    values[..., ::16] *= 30
    return torch.from_numpy(values * np.float32(scale))


def bytes_of(values: torch.Tensor, dtype: str) -> memoryview:
    kept = values.to(TORCH[dtype]) if dtype in TORCH else values.to(torch.float8_e4m3fn)
    return memoryview(kept.contiguous().view(torch.uint8).numpy().tobytes())


def encoded(codec: Codec, form: Form, payload: memoryview) -> list[memoryview]:
    pieces = codec.encode(form, payload)
    assert pieces is not None
    assert len(pieces) == form.layout.num_pieces
    assert all(0 < len(piece) <= form.layout.piece_bytes for piece in pieces)
    return [memoryview(piece) for piece in pieces]


def decoded(
    codec: Codec, form: Form, pieces: Sequence[memoryview], which: Sequence[int]
) -> memoryview:
    out = memoryview(bytearray(len(which) * form.layout.piece_bytes))
    codec.decode(form, which, [pieces[i] for i in which], out)
    return out


def test_registry() -> None:
    assert {name: codec.number for name, codec in BY_NAME.items()} == {
        LOSSLESS: 1, FP8: 2, INT8: 3,
    }  # fmt: skip
    assert {codec.name: codec for codec in BY_NUMBER.values()} == BY_NAME


# ---------------------------------------------------------------------- without loss
@pytest.mark.parametrize("dtype", WIDTHS)
def test_lossless_is_what_the_format_says(dtype: str) -> None:
    """Taken apart here bit by bit: zstd of the exponents, then the rest."""
    form, codec = form_of(dtype), BY_NAME[LOSSLESS]
    payload, width, size = bytes_of(normal(form), dtype), WIDTHS[dtype], form.layout.piece_bytes
    pieces = encoded(codec, form, payload)
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
    assert decoded(codec, form, pieces, range(len(pieces))) == payload
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
    form, codec = Form(Layout(*sizes), dtype), BY_NAME[LOSSLESS]
    layout, size = form.layout, form.layout.piece_bytes
    few = data.draw(st.integers(1, 256))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    payload = memoryview(rng.integers(0, few, layout.payload_bytes).astype(np.uint8).tobytes())
    found = codec.encode(form, payload)
    if found is None:
        return
    pieces = [memoryview(piece) for piece in found]
    assert sum(map(len, pieces)) < payload.nbytes
    numbers = st.lists(st.integers(0, layout.num_pieces - 1), min_size=1, unique=True)
    for which in (range(layout.num_pieces), sorted(data.draw(numbers))):
        wanted = b"".join(payload[i * size : (i + 1) * size] for i in which)
        assert decoded(codec, form, pieces, which) == wanted


def test_what_does_not_get_smaller_is_left_alone() -> None:
    form = form_of("bfloat16")
    noise = np.random.default_rng(1).integers(0, 256, form.layout.payload_bytes, np.uint8)
    assert BY_NAME[LOSSLESS].encode(form, memoryview(noise.tobytes())) is None
    # Of a payload of which some pieces do, the others are what they were.
    size = form.layout.piece_bytes
    noise[:size] = 0
    pieces = encoded(BY_NAME[LOSSLESS], form, memoryview(noise.tobytes()))
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
    pieces = encoded(BY_NAME[LOSSLESS], form, memoryview(payload))
    assert [len(piece) == size for piece in pieces[:7]] == [False] * 2 + [True] * 4 + [False]
    for which in (range(len(pieces)), range(2, 6), [3], [0, 3, 6]):
        found = decoded(BY_NAME[LOSSLESS], form, pieces, which)
        assert found == b"".join(payload[i * size : (i + 1) * size] for i in which)


def test_bytes_that_are_no_frame() -> None:
    """Each length and each flipped bit of a frame: an error of ours, or other bytes; and a frame
    that says it is large takes no memory."""
    form, codec = form_of("bfloat16", tokens=4), BY_NAME[LOSSLESS]
    piece = encoded(codec, form, bytes_of(normal(form), "bfloat16"))[0]
    size = form.layout.piece_bytes
    out = memoryview(bytearray(size))
    for length in set(range(size)) - {len(piece)}:
        other = memoryview(bytes(piece[:length]).ljust(length, b"x"))
        with pytest.raises(DamagedError):
            codec.decode(form, [0], [other], out)
    wrong = 0
    for at in range(8 * 40):
        bad = bytearray(piece)
        bad[at // 8] ^= 1 << at % 8
        try:
            codec.decode(form, [0], [memoryview(bad)], out)
        except DamagedError:
            wrong += 1
    assert wrong > 100
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    rest = bytes(size - size // 2)
    assert len(bomb) + len(rest) > size  # nor would a head let it through
    with pytest.raises(DamagedError, match="another size"):
        codec.decode(form, [0], [memoryview(bomb[:18] + rest)], out)


# ---------------------------------------------------------------------- with loss
def fp8_by_torch(values: torch.Tensor) -> torch.Tensor:
    """What remains of [.., tokens, head size] by torch's own float8, by way of float16 as ours."""
    scales = values.abs().amax(-1, keepdim=True) / 448
    scaled = (values / torch.where(scales > 0, scales, 1.0)).to(torch.float16)
    return scaled.to(torch.float8_e4m3fn).float() * scales


def int8_by_hand(values: torch.Tensor, planes: int) -> torch.Tensor:
    """What remains of [layer, plane, head, token, channel] by float64 and Python's rules."""
    out = torch.empty_like(values)
    for plane in range(planes):
        axis = 2 if planes == 2 and plane == 0 else 3  # K by channel, V by token
        part = values[:, plane]
        low = part.amin(axis, keepdim=True)
        step = (part.amax(axis, keepdim=True) - low) / 255
        codes = torch.round((part - low) / torch.where(step > 0, step, 1.0)).clamp(0, 255)
        out[:, plane] = codes * step + low
    return out


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_against_torch(name: str, planes: int, dtype: str) -> None:
    form, codec = form_of(dtype, planes), BY_NAME[name]
    payload = bytes_of(normal(form, scale=0.3), dtype)
    shape = normal(form).shape
    values = torch.frombuffer(bytearray(payload), dtype=TORCH[dtype]).float().reshape(shape)
    pieces = encoded(codec, form, payload)
    out = decoded(codec, form, pieces, range(len(pieces)))
    wanted = fp8_by_torch(values) if name == FP8 else int8_by_hand(values, planes)
    assert out == bytes_of(wanted, dtype)
    found = torch.frombuffer(bytearray(out), dtype=TORCH[dtype]).float().reshape(shape)
    error = float((found - values).norm() / values.norm())
    assert 0 < error < (0.04 if name == FP8 else 0.02)
    # Each piece alone, in another order.
    which = [5, 0, 3]
    size = form.layout.piece_bytes
    parts = [out[i * size : (i + 1) * size] for i in which]
    assert decoded(codec, form, pieces, which) == b"".join(parts)
    again = encoded(codec, form, out)
    twice = decoded(codec, form, again, range(len(again)))
    more = torch.frombuffer(bytearray(twice), dtype=TORCH[dtype]).float().reshape(shape)
    assert float((more - values).norm() / values.norm()) < 1.1 * error


def test_codes_of_fp8_are_torchs() -> None:
    ours = decoding()
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", TORCH)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@example([3.3895e38, -1.00390625, 1.01171875, 65519.0, 2.0**-133])
def test_rounding_to_a_dtype_is_torchs(dtype: str, numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    theirs = torch.from_numpy(values).to(TORCH[dtype])
    with np.errstate(over="ignore"):
        ours = from_float32(values, dtype).view(np.uint8)
    assert ours.tobytes() == theirs.view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(to_float32(ours, dtype), theirs.float().numpy())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_cannot_be_rounded_is_refused(name: str, bad: float) -> None:
    form, codec = form_of("bfloat16"), BY_NAME[name]
    values = normal(form)
    values[1, 1, 2, 3, 4] = bad
    assert codec.encode(form, bytes_of(values, "bfloat16")) is None
    assert codec.encode(form_of("fp8_e4m3"), bytes_of(normal(form), "fp8_e4m3")) is None
    small = form_of("float16", tokens=2, head_size=4)
    assert codec.encode(small, bytes_of(normal(small), "float16")) is None  # scales take more


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", TORCH)
def test_extremes(name: str, dtype: str) -> None:
    """Zeros, equal values, the largest and the smallest that there are: what comes is finite and as
    near as a scale allows, or nothing is taken."""
    form, codec = form_of(dtype), BY_NAME[name]
    info = torch.finfo(TORCH[dtype])
    for number in (0.0, -0.0, 1.5, -3.0, info.tiny, info.smallest_normal, info.max, -info.max):
        payload = bytes_of(torch.full(normal(form).shape, number), dtype)
        pieces = codec.encode(form, payload)
        if pieces is None:
            assert abs(number) == info.max
            continue
        out = decoded(codec, form, [memoryview(one) for one in pieces], range(len(pieces)))
        found = torch.frombuffer(bytearray(out), dtype=TORCH[dtype]).double()
        assert found.isfinite().all()
        assert float((found - number).abs().max()) <= abs(number) * 2**-7 + 1e-44
    two = torch.zeros(normal(form).shape)
    two[..., 0], two[..., 1] = info.max, -info.max
    pieces = codec.encode(form, bytes_of(two, dtype))
    if pieces is not None:
        out = decoded(codec, form, [memoryview(one) for one in pieces], range(len(pieces)))
        assert torch.frombuffer(bytearray(out), dtype=TORCH[dtype]).isfinite().all()


@pytest.mark.parametrize("name", LOSSY)
def test_pieces_of_another_size(name: str) -> None:
    form, codec = form_of("bfloat16"), BY_NAME[name]
    piece = encoded(codec, form, bytes_of(normal(form), "bfloat16"))[0]
    out = memoryview(bytearray(form.layout.piece_bytes))
    for bad in (piece[:-1], memoryview(bytes(piece) + b"x"), piece[:0]):
        with pytest.raises(DamagedError):
            codec.decode(form, [0], [bad], out)
    hostile = memoryview(b"\xff" * len(piece))  # scales that are not numbers: no warning, no error
    codec.decode(form, [0], [hostile], out)


# ---------------------------------------------------------------------- golden
def golden_payload() -> npt.NDArray[np.uint8]:
    """2 planes of 1 head, 16 tokens of 32 bfloat16: (7 * token * (channel + 1) mod 61 - 30) / 8,
    and a quarter of that for V."""
    tokens, channels = np.arange(16)[:, None], np.arange(32)[None]
    keys = ((7 * tokens * (channels + 1)) % 61 - 30) / 8
    values = np.stack([keys, keys / 4]).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(-1)


@pytest.mark.parametrize(
    ("name", "sizes", "digest"),
    [
        (FP8, [576, 576], "c7bf2cd4e9478c8e8902b5c7ddb1194b"),
        (INT8, [768, 640], "ebc7b9629ad7d18e217e74f8e4e59285"),
    ],
)
def test_golden(name: str, sizes: list[int], digest: str) -> None:
    """The bytes of a codec never change: pools have them."""
    form = Form(Layout(1, 2, 1, 16, 64), "bfloat16")
    payload = golden_payload()
    assert struct.unpack("<4H", payload[:8].tobytes()) == (0xC070,) * 4  # -3.75
    pieces = encoded(BY_NAME[name], form, memoryview(payload.tobytes()))
    assert [len(piece) for piece in pieces] == sizes
    assert xxhash.xxh3_128_hexdigest(b"".join(pieces)) == digest


def test_golden_of_lossless() -> None:
    """A frame of zstd as version 1.5.7 made it; other versions may make others, all read it."""
    form = Form(Layout(1, 2, 1, 16, 64), "bfloat16")
    payload, piece = golden_payload(), memoryview(b64decode(GOLDEN_LOSSLESS))
    assert len(piece) == 694
    assert decoded(BY_NAME[LOSSLESS], form, [piece], [0]) == payload[:1024].data


GOLDEN_LOSSLESS = """
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
