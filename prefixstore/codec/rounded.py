"""Chunks whose KV an engine has rounded to 8 bits: about half the bytes, in all tiers and between.

The engine rounds what it saves and makes its own dtype of what it loads, on its device
(`blend.rounding`); a store sees smaller chunks of another identity (`identity.with_codec`), and
knows no more of them. Pieces, so that each can be read alone:

    fp8:   f32 scale of each token | e4m3 of each element
    int8:  f32 smallest of each channel or token | f32 step of each | u8 of each element

e4m3 has 4 bits of exponent and 3 of mantissa, without infinities (OCP 8-bit floating point); the
scale brings the largest element to 448. int8 is by channel for K, by token for V, as KIVI does with
fewer bits (Liu et al., arXiv 2402.02750): K has channels that are large in all tokens. Latents of
MLA, one plane, go like V. Zeros fill a piece up to the bytes that all have.

What comes back is ``scale * e4m3`` or ``step * u8 + smallest``, each operation in float32, then
the KV's dtype, nearest and ties to even. Scales and steps are SCALE_MIN at least; NaN where a value
is not finite: then all that has the scale comes back as NaN.
"""

from __future__ import annotations

from dataclasses import replace

from prefixstore.codec import FP8, INT8, LOSSY_NAMES
from prefixstore.codec.form import FLOATS, Form
from prefixstore.errors import ConfigError
from prefixstore.layout import Layout

PIECE_ALIGNMENT = 64  # bytes: GPUs hash pieces in stripes of so many
SCALE_BYTES = 4
SCALE_MIN = 2.0**-126  # the smallest number of float32 that has all its bits


def scales_bytes(codec: str, is_key: bool, tokens: int, head_size: int) -> int:
    """Bytes of a piece in front of its elements, which take one each."""
    if codec == FP8:
        return SCALE_BYTES * tokens
    assert codec == INT8
    return 2 * SCALE_BYTES * (head_size if is_key else tokens)


def rounded_layout(codec: str, layout: Layout, dtype: str) -> Layout:
    """The layout of chunks that are rounded, of those that are not; the same for a codec that does
    not round. ``dtype`` is the KV's. Raises ConfigError for KV that it makes no smaller."""
    if codec not in LOSSY_NAMES:
        return layout
    form, tokens = Form(layout, dtype), layout.chunk_tokens
    if form.width == 1:
        raise ConfigError(
            f"codec={codec} for a KV cache of {dtype}",
            f"it is for one of {', '.join(FLOATS)}: leave out the codec, or kv_cache_dtype",
        )
    kinds = (True, False) if layout.num_planes == 2 else (False,)
    scales = max(scales_bytes(codec, is_key, tokens, form.head_size) for is_key in kinds)
    size = scales + tokens * form.head_size
    while size % tokens or size % PIECE_ALIGNMENT:
        size += -size % tokens or tokens
    if size >= layout.piece_bytes:
        raise ConfigError(
            f"codec={codec} makes heads of {form.head_size} elements of {dtype} in chunks of "
            f"{tokens} tokens no smaller",
            "raise chunk_tokens, or leave out the codec",
        )
    return replace(layout, head_bytes=size // tokens)
