"""Codecs by name and by number, and which of them a namespace has."""

from __future__ import annotations

from prefixstore.codec import LOSSY_NAMES, fp8, int8
from prefixstore.codec.form import Codec, Form
from prefixstore.codec.lossless import Lossless
from prefixstore.connect import layout_of
from prefixstore.identity import ModelIdentity
from prefixstore.layout import Layout

LOSSLESS_CODEC: Codec = Lossless()
_CODECS: tuple[Codec, ...] = (LOSSLESS_CODEC, fp8.CODEC, int8.CODEC)
BY_NUMBER = {codec.number: codec for codec in _CODECS}
BY_NAME = {codec.name: codec for codec in _CODECS}


def lossy_of(identity: ModelIdentity, layout: Layout) -> Codec | None:
    """The lossy codec that an identity names, if it can be used: for K and V of attention, and
    nothing else that a layer may keep."""
    if identity.codec not in LOSSY_NAMES or layout_of(identity) != layout:
        return None
    return BY_NAME[identity.codec] if Form(layout, identity.kv_dtype).width > 1 else None
