"""Moves K from the position it was computed at to another: relative rotation under RoPE.

RoPE (Su et al., arXiv 2104.09864) gives the key of position p as ``K_p = m R(p w) k``: ``R`` turns
pairs of components by the angles ``p w``, ``w`` are the inverse frequencies and ``m`` is YaRN's
attention factor (mscale), one constant for all positions. Rotations add up, so
``K_q = R((q - p) w) K_p``. The unrotated k is never needed, and m stays as it is: it is in K_p
already, and applying it again would square it.

What must hold: w does not depend on the position, the length or the layer, and nothing but RoPE
touches K after its projection and norm. Models for which that is not known are refused by name.

Precision: w is rounded to float32 exactly as transformers and vLLM do (one unit more in its last
place turns K by 0.06 rad over 10^6 positions), angles are float64, the rotation is float32. The
result is rounded once to the dtype of K, so move K from where it was computed in one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blend.errors import BlendError, UnsupportedModelError
from blend.rope_config import HINT, Style, read_config

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHECKED_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Rope:
    """What the K of one model was rotated with.

    ``inv_freq``: w, float32 or float64 [rotary_dim / 2], kept as float64 on the CPU. ``style``:
    "neox" pairs component i with i + rotary_dim / 2, "gptj" pairs 2i with 2i + 1; components from
    rotary_dim on are not rotated. ``attention_factor``: m above; kept for the record, since a
    relative rotation does not need it.
    """

    inv_freq: Tensor
    style: Style = "neox"
    attention_factor: float = 1.0
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.inv_freq.ndim != 1 or not len(self.inv_freq) or self.style not in ("neox", "gptj"):
            raise BlendError(
                f"got inv_freq of shape {list(self.inv_freq.shape)} and style {self.style!r}; "
                "expected [rotary_dim / 2] and 'neox' or 'gptj'"
            )
        object.__setattr__(self, "inv_freq", self.inv_freq.detach().cpu().double())

    @property
    def rotary_dim(self) -> int:
        """Components of a head that are rotated: the first ones."""
        return 2 * len(self.inv_freq)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """From a Hugging Face config.json; of a multimodal model, the part about the text model.

        Both forms are read: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``. The
        types are default, linear (kaiokendev), llama3 and yarn (arXiv 2309.00071), computed as
        transformers.modeling_rope_utils does.

        Raises:
            UnsupportedModelError: the model or its type of RoPE is not known to be plain RoPE, or
                a value is missing.
        """
        return cls(*read_config(config))

    @classmethod
    def from_table(cls, cos_sin_cache: Tensor, rotary_dim: int, is_neox_style: bool) -> Rope:
        """From vLLM's ``rotary_emb.cos_sin_cache``: [max_position, rotary_dim], row p = cos | sin.

        vLLM computes the table in float32 and, unless FlashInfer applies it, keeps it in the dtype
        of the model (seen in 0.32), mostly bfloat16. One row of that gives w to three digits only,
        so w is fitted to the phases of rows over the whole table. No row may then be off by more
        than 1e-3, or the dtype's epsilon (bfloat16: 8e-3), plus the float32 rounding of p w. For
        moves within a table of 64 rows or more, angles are then within 1e-3 even from bfloat16.

        The table does not tell M-RoPE or layers without RoPE from plain RoPE, and gives w less
        exactly than the config, so prefer :meth:`from_config` where the model type is known.

        Raises:
            UnsupportedModelError: no single w gives this table, as with LongRoPE's two tables.
        """
        rows, half = len(cos_sin_cache), rotary_dim // 2
        fits = cos_sin_cache.shape == (rows, 2 * half) and rows >= 2 and rotary_dim == 2 * half
        if not fits or cos_sin_cache.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"the rotary table has shape {list(cos_sin_cache.shape)} and dtype "
                f"{cos_sin_cache.dtype}; expected [max_position >= 2, rotary_dim = {rotary_dim}], "
                "rotary_dim even, of floats",
                HINT,
            )
        last = rows - 1
        doubling = [2**i for i in range(last.bit_length())]
        spread = torch.linspace(1, last, min(last, _CHECKED_ROWS)).round().long().tolist()
        wanted = sorted({0, last, *doubling, *(r for r in (17, 1000) if r < last), *spread})
        place = torch.tensor(wanted, device=cos_sin_cache.device)
        cos, sin = cos_sin_cache[place].cpu().double().split(half, dim=-1)
        scale = cos[0].mean()
        phase, position = torch.atan2(sin, cos), torch.tensor(wanted).double().unsqueeze(-1)
        # Each doubling of the row halves the error that w has from the rounding of the table; the
        # turns that the phase lost are known from the w before. Then least squares over all rows.
        inv_freq = torch.zeros(half, dtype=torch.float64)
        for row in doubling:
            seen = phase[wanted.index(row)]
            inv_freq = _unwrap(seen, row * inv_freq) / row
        angle = _unwrap(phase, position * inv_freq)
        inv_freq = (position * angle).sum(0) / (position**2).sum()

        angle = position * inv_freq
        error = torch.maximum((cos / scale - angle.cos()).abs(), (sin / scale - angle.sin()).abs())
        allowed = max(1e-3, torch.finfo(cos_sin_cache.dtype).eps) + angle.abs() * 2.0**-23
        if not (error <= allowed).all():  # also where the table has NaN
            worst = int((error - allowed).amax(-1).argmax())
            raise UnsupportedModelError(
                f"the rotary table is not that of plain RoPE: row {wanted[worst]} is off by "
                f"{float(error[worst].max()):.3g}",
                HINT,
            )
        return cls(inv_freq, "neox" if is_neox_style else "gptj", float(scale))

    def cos_sin(
        self, delta: int | Tensor, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine of ``delta * w``, float32 [tokens, rotary_dim / 2], within 1e-6.

        ``delta``: new minus old position, of any sign; an int gives one row. The result is on
        ``device``, else where ``delta`` is. Nothing waits for a CUDA device, and the first call for
        one sends the frequencies on its own stream: before others use them somebody must have
        waited for a result, as an engine's self-test does.
        """
        target = torch.device(device or (delta.device if isinstance(delta, Tensor) else "cpu"))
        inv_freq = self._on_device.get(target)
        if inv_freq is None:
            inv_freq = self._on_device[target] = self.inv_freq.to(target, non_blocking=True)
        if isinstance(delta, Tensor):
            if delta.is_floating_point() or delta.is_complex() or delta.dtype == torch.bool:
                raise BlendError(f"delta has dtype {delta.dtype}; expected integers")
            moved = delta.to(target, non_blocking=True).double()
            angle = moved.reshape(-1, 1) * inv_freq
        else:
            angle = (inv_freq * delta).unsqueeze(0)
        angle = (angle - 2 * math.pi * torch.round(angle / (2 * math.pi))).float()
        return angle.cos(), angle.sin()

    def rotate(self, keys: Tensor, delta: int | Tensor) -> Tensor:
        """K for other positions, as a new tensor of the same dtype; ``keys`` stays as it is.

        ``keys``: [..., tokens, heads, head_size], floating point, rotated for the old positions.
        ``delta``: new minus old position: int, or integers [tokens]. Where it is 0 the result has
        the same bits. Nothing waits for a CUDA device.

        Raises:
            BlendError: the shapes or dtypes do not fit.
        """
        if isinstance(delta, Tensor) and keys.ndim >= 3 and delta.shape != keys.shape[-3:-2]:
            raise BlendError(
                f"delta has shape {list(delta.shape)}; expected [{keys.shape[-3]}], one per token"
            )
        cos, sin = self.cos_sin(delta, keys.device)
        return self.rotate_by(keys, cos, sin)

    def rotate_by(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """:meth:`rotate` with the result of :meth:`cos_sin`, which all layers can share.

        ``cos``, ``sin``: float32 [tokens or 1, rotary_dim / 2] on the device of ``keys``.
        """
        if keys.ndim < 3 or keys.shape[-1] < self.rotary_dim or keys.dtype not in _DTYPES:
            raise BlendError(
                f"keys have shape {list(keys.shape)} and dtype {keys.dtype}; expected [..., "
                f"tokens, heads, head_size >= {self.rotary_dim}] of 16 to 64 bit floats",
                "quantised K must be dequantised first",
            )
        expected = [(rows, self.rotary_dim // 2) for rows in (1, keys.shape[-3])]
        if cos.shape not in expected or sin.shape != cos.shape:
            raise BlendError(
                f"cos and sin have shapes {list(cos.shape)} and {list(sin.shape)}; expected "
                f"{list(expected[1])}, or one row for all tokens"
            )
        rotated = keys.clone()
        turned = rotated[..., : self.rotary_dim]
        if self.style == "neox":
            first, second = turned.chunk(2, dim=-1)
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
        wide = torch.promote_types(keys.dtype, torch.float32)
        x, y = first.to(wide), second.to(wide)
        cos, sin = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
        new_x = (x * cos).addcmul_(y, sin, value=-1)
        new_y = (y * cos).addcmul_(x, sin)
        # x - y * 0 would turn -0.0 into 0.0, so what does not turn is copied.
        still = sin == 0
        first.copy_(torch.where(still, x, new_x, out=new_x))
        second.copy_(torch.where(still, y, new_y, out=new_y))
        return rotated


def _unwrap(phase: Tensor, expected: Tensor) -> Tensor:
    """``phase`` plus the full turns that bring it nearest to the ``expected`` angle."""
    return phase + 2 * math.pi * torch.round((expected - phase) / (2 * math.pi))
