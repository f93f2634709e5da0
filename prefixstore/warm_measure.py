"""Measuring staleness from chunks: how far a text's KV moved when other texts stood before it.

As `blend.staleness.staleness`, but behind one context after the other, so that the KV of one at a
time has to be kept, and some layers at a time, so that little of it is in hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.namespace import MISS

if TYPE_CHECKING:
    from torch import Tensor

_READ_BYTES = 64 << 20  # of one prompt's KV at a time


@dataclass(frozen=True, slots=True)
class Place:
    """A text in a stored prompt: its chunks, and the position of the first token in them."""

    refs: Sequence[ChunkRef]
    start: int


@dataclass
class Measured:
    """The staleness of one text, as far as it was compared.

    ``alone`` are its chunks, of which the first ``skip`` tokens are not the text's. ``config`` is
    the part of the model's config.json about text: it says how K is rotated.
    """

    namespace: NamespaceLike
    config: dict[str, Any]
    alone: Place
    skip: int
    _most: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of K and of V, by layer
    failed: str = ""

    def compare(self, behind: Place) -> None:
        """Take in the same tokens, in the same places of as many chunks, behind a context.

        Raises BlendError for a model whose K is not moved by rotation.
        """
        import torch

        from blend.rope import Rope
        from blend.staleness import relative_change

        layout, rope = self.namespace.layout, Rope.from_config(self.config)
        layer_bytes = len(self.alone.refs) * layout.payload_bytes // layout.num_layers
        step = max(1, _READ_BYTES // layer_bytes)
        found: list[tuple[Tensor, Tensor]] = []
        for first in range(0, layout.num_layers, step):
            roi = Roi(first, min(first + step, layout.num_layers), 0, layout.num_heads)
            before, after = self._read(self.alone, roi), self._read(behind, roi)
            if not before or not after:
                self.failed = "its KV was evicted before it was compared"
                return
            for (keys, values), (keys_behind, values_behind) in zip(before, after, strict=True):
                moved = rope.rotate(keys, behind.start - self.alone.start)
                change = relative_change(moved, keys_behind), relative_change(values, values_behind)
                found.append(change)
        pairs = zip(self._most or found, found, strict=True)
        self._most = [(torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in pairs]

    def values(self) -> npt.NDArray[np.float32] | None:
        """float32 [chunks, tokens]; NaN for what is not the text's. None if it could not be
        compared: ``failed`` says why."""
        total = np.zeros(len(self.alone.refs) * self.namespace.layout.chunk_tokens, np.float32)
        total[: self.skip] = np.nan
        for keys, values in self._most:
            total[self.skip :] += (keys + values).numpy()
        if not self.failed and not np.isfinite(total[self.skip :]).all():
            self.failed = "its KV is not finite"
        return None if self.failed else total.reshape(len(self.alone.refs), -1)

    def _read(self, place: Place, roi: Roi) -> list[tuple[Tensor, Tensor]]:
        """K and V of each layer of a region, [tokens, heads, head size]; [] if a chunk is gone."""
        import torch

        from blend.rounding import Rounding

        layout, identity = self.namespace.layout, self.namespace.identity
        dtype: torch.dtype = getattr(torch, identity.kv_dtype)
        buffer = torch.empty((len(place.refs), layout.roi_bytes(roi)), dtype=torch.uint8)
        outs = [memoryview(row.numpy()) for row in buffer]
        if MISS in self.namespace.get(place.refs, outs, roi):
            return []
        layers = roi.layer_stop - roi.layer_start
        shape = layers, 2, layout.num_heads, layout.chunk_tokens, identity.head_size
        if identity.codec:
            chunks = Rounding(identity.codec, shape, dtype, layout.piece_bytes).decode(buffer)
        else:
            chunks = buffer.view(dtype).view(-1, *shape)
        kv = chunks.permute(1, 2, 0, 4, 3, 5).flatten(2, 3)
        return [(layer[0, self.skip :], layer[1, self.skip :]) for layer in kv]
