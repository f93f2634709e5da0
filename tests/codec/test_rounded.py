"""How large chunks are that an engine has rounded."""

from __future__ import annotations

import pytest

from prefixstore.codec import AUTO, FP8, INT8, LOSSLESS, NONE, POOL_CHOICES, check_choice, of_pool
from prefixstore.codec.rounded import rounded_layout
from prefixstore.errors import ConfigError
from prefixstore.layout import Layout


@pytest.mark.parametrize(
    ("codec", "planes", "tokens", "head_size", "piece_bytes"),
    [
        (FP8, 2, 64, 128, 64 * 128 + 64 * 4),
        (FP8, 1, 64, 576, 64 * 576 + 64 * 4),
        (INT8, 2, 64, 128, 64 * 128 + 128 * 8),  # K has a scale for each channel, which are more
        (INT8, 1, 64, 128, 64 * 128 + 64 * 8),
        (INT8, 2, 256, 64, 256 * 64 + 256 * 8),
        (FP8, 2, 8, 8, 128),  # 96, and up to 64
        (FP8, 2, 48, 80, 48 * 80 + 48 * 4),
        (FP8, 2, 48, 81, 4224),  # 4080; what 48 and 64 both divide
    ],
)
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_sizes(
    codec: str, planes: int, tokens: int, head_size: int, piece_bytes: int, dtype: str, width: int
) -> None:
    plain = Layout(3, planes, 2, tokens, head_size * width)
    if piece_bytes >= plain.piece_bytes:
        with pytest.raises(ConfigError, match="no smaller"):
            rounded_layout(codec, plain, dtype)
        return
    found = rounded_layout(codec, plain, dtype)
    assert found.piece_bytes == piece_bytes
    assert found.piece_bytes % 64 == 0
    assert found == Layout(3, planes, 2, tokens, piece_bytes // tokens)


@pytest.mark.parametrize("codec", POOL_CHOICES)
def test_other_codecs_leave_chunks_as_they_are(codec: str) -> None:
    plain = Layout(3, 2, 2, 16, 256)
    assert rounded_layout(codec, plain, "bfloat16") is plain


@pytest.mark.parametrize("codec", [FP8, INT8])
@pytest.mark.parametrize("dtype", ["fp8_e4m3", "uint8", "int8"])
def test_kv_of_8_bits_is_refused(codec: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"KV cache of {dtype}.*leave out the codec"):
        rounded_layout(codec, Layout(3, 2, 2, 16, 128), dtype)


def test_a_pool_is_left_what_engines_do_not_do() -> None:
    assert [of_pool(one) for one in (NONE, AUTO, LOSSLESS, FP8, INT8)] == [
        NONE, AUTO, LOSSLESS, NONE, NONE,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"engines round.*none, auto, lossless"):
        check_choice(FP8, POOL_CHOICES)
    with pytest.raises(ConfigError, match=r"zip.*none, auto, lossless, fp8, int8"):
        check_choice("zip")
