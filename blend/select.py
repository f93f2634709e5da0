"""Selectors: which reused tokens to recompute, for a budget.

The budget is what is *charged*, as a share of all the reused tokens at all layers: the tokens that
are recomputed, full layers that only serve the choice, and passes that score. A selector names what
it must know (`Needs`), the blend finds that out and charges it, and what is left buys tokens.

The set never grows with depth: a token recomputed at one layer needs its state from the one below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from blend.errors import BlendError

CHECK_LAYER = 1  # where deviation is looked at, as CacheBlend's released code does
DEFAULT = "staleness"


class Needs(Enum):
    """What must be computed before the choice, and is charged."""

    NOTHING = "nothing"
    DEVIATION = "deviation"  # all candidates up to CHECK_LAYER: that many full layers
    QUERY = "query"  # a pass of the fresh tokens through all layers, over stale KV
    TRUTH = "truth"  # a full prefill; benchmarks only, not charged


@dataclass(frozen=True, slots=True)
class Known:
    """What a choice is made from. n is the number of candidates; tensors are in host memory."""

    positions: Tensor  # int64 [n], ascending
    offsets: Tensor  # int64 [n]: place of each in its segment
    staleness: Tensor  # float32 [n]: how far each moves in another context, measured when stored
    count: int  # how many the budget left can pay for
    span: int = 1  # choose whole runs of so many positions
    seed: int = 0
    scores: Tensor | None = None  # float32 [n]: what was needed, see `Needs`

    @property
    def needed(self) -> Tensor:
        """The scores; they are there when the selector said that it needs them."""
        assert self.scores is not None
        return self.scores


@dataclass(frozen=True, slots=True)
class Selector:
    """A rule for choosing tokens: bool [n] of the candidates to recompute."""

    name: str
    choose: Callable[[Known], Tensor]
    needs: Needs = Needs.NOTHING
    uses_staleness: bool = False

    @property
    def full_layers(self) -> int:
        """Layers computed in full for the choice alone."""
        return CHECK_LAYER + 1 if self.needs is Needs.DEVIATION else 0


def best(scores: Tensor, known: Known) -> Tensor:
    """bool [n]: the best candidates, or the best whole spans, that can be paid for.

    A span is judged by its mean; ties go to the earlier token. Spans read their own neighbours
    fresh and make longer runs for the attention kernel.
    """
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    count = min(known.count, len(scores))
    if count <= 0:
        return chosen
    if known.span == 1:
        chosen[scores.sort(descending=True, stable=True).indices[:count]] = True
        return chosen
    _, group = torch.unique(known.positions // known.span, return_inverse=True)
    sizes = torch.bincount(group)
    means = torch.zeros(len(sizes)).index_add_(0, group, scores) / sizes
    order = means.sort(descending=True, stable=True).indices
    taken = order[sizes[order].cumsum(0) <= count]
    return torch.isin(group, taken)


def _none(known: Known) -> Tensor:
    """Position only: recompute no reused token."""
    return torch.zeros_like(known.positions, dtype=torch.bool)


def _all(known: Known) -> Tensor:
    """Recompute all, whatever the budget: equals a prefill. For tests and comparison."""
    return torch.ones_like(known.positions, dtype=torch.bool)


def _random(known: Known) -> Tensor:
    """The control: tokens drawn evenly."""
    generator = torch.Generator().manual_seed(known.seed)
    scores = torch.rand(len(known.positions), generator=generator)
    return best(scores, known)


def _first(known: Known) -> Tensor:
    """The first tokens of each segment, as many of each as the budget allows.

    EPIC / LegoLink (arXiv 2410.15332): encoded alone, they have become attention sinks.
    """
    return best(-known.offsets.float(), known)


def _by_scores(known: Known) -> Tensor:
    """The tokens with the highest scores."""
    return best(known.needed, known)


def _staleness(known: Known) -> Tensor:
    """Tokens whose KV moved most when their text was encoded behind other ones.

    Measured once, when the text was stored: serving pays nothing for the choice, and it does not
    depend on the question.
    """
    return best(known.staleness, known)


def _staleness_query(known: Known) -> Tensor:
    """The product of staleness and attention: what moved, and is read."""
    return best(known.staleness * known.needed, known)


SELECTORS = {
    selector.name: selector
    for selector in (
        Selector("staleness", _staleness, uses_staleness=True),
        Selector("staleness-query", _staleness_query, Needs.QUERY, uses_staleness=True),
        Selector("first", _first),
        # CacheBlend (arXiv 2405.16444): pays for full layers, 2 of 32 are 6 %, 2 of 8 are 25 %.
        Selector("deviation", _by_scores, Needs.DEVIATION),
        # ProphetKV (arXiv 2602.02579), InfoFlow (arXiv 2603.05353): at the target positions.
        Selector("query", _by_scores, Needs.QUERY),
        Selector("random", _random),
        Selector("none", _none),
        Selector("all", _all),
        Selector("oracle", _by_scores, Needs.TRUTH),
    )
}


def selector_named(name: str) -> Selector:
    """A selector by its name. Raises BlendError."""
    if name not in SELECTORS:
        known = [one.name for one in SELECTORS.values() if one.needs is not Needs.TRUTH]
        raise BlendError(f"no selector {name!r}", f"choose one of {', '.join(known)}")
    return SELECTORS[name]


def check_budget(selector: Selector, budget: float, num_layers: int) -> None:
    """Raise BlendError for a budget that is no share, or that the choice alone overspends."""
    if not 0.0 <= budget <= 1.0:
        raise BlendError(f"a budget of {budget}", "give the share of recomputed tokens, 0 to 1")
    least = selector.full_layers / num_layers
    if least > budget:
        raise BlendError(
            f"{selector.name} computes {selector.full_layers} of {num_layers} layers in full "
            f"before it can choose: {100 * least:.0f} % is more than the budget of "
            f"{100 * budget:.0f} %",
            f"give a budget above {least:.2f}, or another selector",
        )
