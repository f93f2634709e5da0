"""KV rounded to 8 bits and back, on the device that has it: `prefixstore.codec.rounded` says how a
piece looks. Operations of torch, or kernels that do the same at once.

What must hold: what comes back depends on nothing but the stored bytes, on every device: each step
is one operation of IEEE 754 in float32, and one rounding to the KV's dtype (nearest, ties to even).
A token (of K by int8: a channel) with a value that is not finite comes back as NaN, never as a
number that was not there.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from prefixstore.codec import FP8, INT8
from prefixstore.codec.rounded import SCALE_MIN, scales_bytes
from prefixstore.config import MIB

# Of KV as the engine has it, at once: more would be more memory beside its own. One stream rounds
# what is saved, several make KV of what is loaded; what was made before is there until the next is.
SAVED_BYTES, LOADED_BYTES, LOADED_BY_KERNEL_BYTES = 64 * MIB, 16 * MIB, 32 * MIB
_LARGEST = 448.0  # in e4m3
_STEPS = 255.0  # of a byte


class RoundingError(Exception):
    """A device rounds in a way of its own."""


class Kernels(Protocol):
    """`connector.rounding_kernel.RoundingKernel`: the same as `Rounding`, of contiguous tensors."""

    def encode(self, kv: Tensor, out: Tensor) -> None:
        """Round chunks."""

    def decode(self, rounded: Tensor, kv: Tensor) -> None:
        """What is left of them, to ``kv``."""


class Rounding:
    """For chunks of one rank. All work is enqueued on the current stream.

    ``shape``: layers, planes, heads, tokens, head size; ``dtype``: of the KV; ``piece_bytes``: of a
    rounded piece. `encode` should get ``save_chunks`` at once, `decode` ``load_chunks``, at most:
    each takes ``scratch_bytes`` of device memory for a moment, for every stream it is called on.
    ``kernels``: what does it on a device that can; without them torch does, with more memory.
    """

    def __init__(
        self,
        codec: str,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        piece_bytes: int,
        kernels: Kernels | None = None,
    ) -> None:
        layers, planes, heads, self._tokens, self._size = shape
        self._kernels = kernels
        self._codec, self._shape, self._dtype = codec, shape, dtype
        self._pieces = layers, planes, heads, piece_bytes
        unit_bytes = layers * planes * heads * self._tokens * self._size * dtype.itemsize
        # By torch there are steps between. While the host launches kernels some MiB arrive, so they
        # should get more at once.
        loaded, saving, loading = LOADED_BYTES, 2, 3
        if kernels is not None:
            loaded, saving, loading = LOADED_BY_KERNEL_BYTES, 0, 2
        self.save_chunks = max(1, SAVED_BYTES // unit_bytes)
        self.load_chunks = max(1, loaded // unit_bytes)
        self.scratch_bytes = (
            saving * self.save_chunks * unit_bytes, loading * self.load_chunks * unit_bytes
        )  # fmt: skip
        # In fp8 a piece of K is like one of V; latents, one plane, are no K.
        by_plane = codec == INT8 and planes == 2
        self._parts = [(slice(0, 1), True), (slice(1, 2), False)] if by_plane else [
            (slice(None), False)
        ]  # fmt: skip

    def encode(self, kv: Tensor, out: Tensor) -> None:
        """Round chunks: ``kv`` of the KV's dtype, ``[n, layer, plane, head, token, element]``;
        ``out`` uint8 ``[n, bytes of a rounded chunk]``."""
        if self._kernels is not None:
            self._kernels.encode(kv, out)
            return
        with torch.inference_mode():
            pieces = out.view(-1, *self._pieces)
            for planes, is_key in self._parts:
                scales, codes, rest = self._split(pieces[:, :, planes], is_key)
                rest.zero_()  # equal KV is equal bytes
                if self._codec == FP8:
                    _to_fp8(kv[:, :, planes], scales, codes)
                else:
                    _to_int8(kv[:, :, planes], -2 if is_key else -1, scales, codes)

    def decode(self, rounded: Tensor) -> Tensor:
        """What is left of chunks: of the KV's dtype, ``[n, layer, plane, head, token, element]``,
        for uint8 ``[n, bytes of a rounded chunk]`` on the same device."""
        with torch.inference_mode():
            pieces = rounded.view(-1, *self._pieces)
            kv = torch.empty((len(pieces), *self._shape), dtype=self._dtype, device=rounded.device)
            if self._kernels is not None:
                self._kernels.decode(rounded, kv)
                return kv
            for planes, is_key in self._parts:
                scales, codes, _ = self._split(pieces[:, :, planes], is_key)
                if self._codec == FP8:
                    _from_fp8(scales, codes, kv[:, :, planes])
                else:
                    _from_int8(scales, codes, -2 if is_key else -1, kv[:, :, planes])
            return kv

    def check(self, device: torch.device) -> None:
        """Raise RoundingError unless that device rounds as a host does."""
        _, planes, _, tokens, size = self._shape
        shape, piece_bytes = (1, planes, 1, tokens, size), self._pieces[-1]
        host = Rounding(self._codec, shape, self._dtype, piece_bytes)
        own = Rounding(self._codec, shape, self._dtype, piece_bytes, self._kernels)
        kv = torch.randn((1, *shape), generator=torch.Generator().manual_seed(1))
        kv[..., :2, :] = 0.0
        made = []
        try:
            for one, place in ((host, torch.device("cpu")), (own, device)):
                out = torch.empty((1, planes * piece_bytes), dtype=torch.uint8, device=place)
                one.encode(kv.to(place, self._dtype), out)
                made.append((out.cpu(), one.decode(out).cpu()))
        except RuntimeError as error:  # NotImplementedError is one
            raise RoundingError(f"{device} cannot round KV: {error}") from error
        if not all(torch.equal(mine, other) for mine, other in zip(*made, strict=True)):
            raise RoundingError(f"{device} does not round KV to {self._codec} as a host does")

    def _split(self, pieces: Tensor, is_key: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Views of pieces: float32 ``[.., scales]``, uint8 ``[.., token, element]``, the rest."""
        begin = scales_bytes(self._codec, is_key, self._tokens, self._size)
        end = begin + self._tokens * self._size
        codes = pieces[..., begin:end].unflatten(-1, (self._tokens, self._size))
        return pieces[..., :begin].view(torch.float32), codes, pieces[..., end:]


def _scales(span: Tensor, parts: float) -> Tensor:
    """``span / parts``; NaN where that is not finite, so that all that has the scale comes back as
    NaN. Never so small that bits of it are lost: what is divided by it would be too large."""
    # By a tensor: a GPU multiplies by the reciprocal of a number, which is off by a bit.
    scale = span.float() / torch.full_like(span, parts, dtype=torch.float32)
    return torch.where(scale.isfinite(), scale.clamp(min=SCALE_MIN), torch.nan)


def _to_fp8(kv: Tensor, scales: Tensor, codes: Tensor) -> None:
    low, high = torch.aminmax(kv, dim=-1)
    scales.copy_(_scales(torch.maximum(high, -low), _LARGEST))
    torch.div(kv, scales.unsqueeze(-1), out=codes.view(torch.float8_e4m3fn))


def _from_fp8(scales: Tensor, codes: Tensor, kv: Tensor) -> None:
    exact = codes.view(torch.float8_e4m3fn).to(kv.dtype)  # each of its values is one of that dtype
    torch.mul(exact, scales.unsqueeze(-1), out=kv)


def _to_int8(kv: Tensor, dim: int, scales: Tensor, codes: Tensor) -> None:
    low, high = torch.aminmax(kv, dim=dim)
    smallest, steps = scales.chunk(2, -1)
    smallest.copy_(low)
    steps.copy_(_scales(high.float() - smallest, _STEPS))
    scaled = (kv - smallest.unsqueeze(dim)).div_(steps.unsqueeze(dim))
    codes.copy_(scaled.round_().nan_to_num_(0))


def _from_int8(scales: Tensor, codes: Tensor, dim: int, kv: Tensor) -> None:
    smallest, steps = (half.unsqueeze(dim) for half in scales.chunk(2, -1))
    torch.add(codes.float().mul_(steps), smallest, out=kv)
