"""Staleness: how far each token's KV moves when other texts stand before its own.

Measured once, when a text is stored; serving then knows which tokens to recompute without looking
at the question. A token that moves behind some texts may stay behind others: what it refers to must
be in them. So a text is measured behind several contexts (`prefixstore.warm_contexts`), and the
largest change counts (`docs/quality.md` has what that gains).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blend.rope import Rope


class Encoded(NamedTuple):
    """A text's KV as computed from position ``start`` on.

    ``layers`` are pairs of K and V, each [..., tokens, KV heads, head size].
    """

    start: int
    layers: Sequence[tuple[Tensor, Tensor]]


@torch.inference_mode()
def staleness(rope: Rope, alone: Encoded, behind: Sequence[Encoded]) -> Tensor:
    """float32 [..., tokens]: the squared change of K and of V behind other texts.

    Each relative to its mean size in that layer, the largest of all contexts, summed over the
    layers: what the `deviation` selector would see at every layer, in the worst case.
    """
    total: Tensor | None = None
    for index, (keys, values) in enumerate(alone.layers):
        moved = [
            relative_change(rope.rotate(keys, one.start - alone.start), one.layers[index][0])
            for one in behind
        ]
        changed = [relative_change(values, one.layers[index][1]) for one in behind]
        most = torch.stack(moved).amax(0) + torch.stack(changed).amax(0)
        total = most if total is None else total + most
    assert total is not None, "a model has layers, and at least one context was given"
    return total


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """float32 [..., tokens]: squared change of [..., tokens, heads, size], over its mean size."""
    size = (before.float() ** 2).sum((-1, -2)).mean(-1, keepdim=True).clamp_min(1e-20)
    return ((after.float() - before.float()) ** 2).sum((-1, -2)) / size
