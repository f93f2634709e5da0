"""A blend under way: choose tokens, recompute them layer by layer, in slices of bounded size.

Written against `Host`, which is a model with the KV of one prompt in it: `blend.hf` for Hugging
Face models, the connector's for vLLM. Reused K and V are in the host, at their new positions, as
far as the next step needs them (`Blend.needed`), and stay as they are. The first slices are
smaller: computing begins sooner, and the rest arrives meanwhile. How fast that does makes no
difference to the slices, whose sizes decide last bits.

What must hold: rows are computed in ascending order of position, and each layer writes the K and V
of its rows before any row attends to them, so what comes out is what one pass over all of them
would give (causal attention). At a layer where a token is not recomputed its cached K and V stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from blend.errors import BlendError
from blend.plan import Plan
from blend.select import CHECK_LAYER, Known, Needs, Selector, check_budget

FIRST_ROWS = 1024  # of the first slice, or less; of the next twice as many, and so on

State = TypeVar("State")
Observer = Callable[[Tensor], object]


class Host(Protocol[State]):
    """A model holding the KV of one prompt. ``State`` is its hidden state for some rows."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def device(self) -> torch.device:
        """Where scores are added up. Positions, and indices of rows, are in host memory: to fetch
        them from a device would be to wait for the slices before. So is all that a choice is made
        from: sums by several threads of a GPU may differ from rank to rank."""

    def embed(self, positions: Tensor) -> State:
        """State of these prompt tokens (int64 [r], ascending) before the first layer."""

    def layer(
        self, index: int, positions: Tensor, state: State, observe: Observer | None = None
    ) -> State:
        """Compute rows at one layer: write their K and V, attend to all positions up to each.

        ``observe`` gets the attention they pay to each position, float32 [end]: softmax weights
        summed over the rows and this rank's heads (in parts, if it likes).
        """

    def take(self, state: State, rows: Tensor) -> State:
        """The state of some of the rows, by index."""

    def join(self, states: list[State]) -> State:
        """States of consecutive slices as one."""

    def key_values(self, index: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V now cached at a layer, each [r, kv heads, head size]."""

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold other heads; the values themselves with one rank."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a blend did. ``charged`` is the share of the reused tokens' layers that were paid."""

    num_candidates: int
    num_fresh: int
    num_recomputed: int
    charged: float


class Blend(Generic[State]):
    """One prompt's blend. ``true_deviation`` [n] serves the oracle, see `blend.select.Needs`."""

    def __init__(
        self,
        host: Host[State],
        plan: Plan,
        selector: Selector,
        budget: float,
        *,
        span: int = 1,
        slice_rows: int = 2048,
        seed: int = 0,
        true_deviation: Tensor | None = None,
    ) -> None:
        check_budget(selector, budget, host.num_layers)
        if selector.needs is Needs.TRUTH and true_deviation is None:
            raise BlendError(f"{selector.name} needs a full prefill", "it is for benchmarks only")
        self._host, self._plan, self._selector = host, plan, selector
        self._span, self._slice_rows, self._seed = span, slice_rows, seed
        self._candidates, self._fresh = plan.candidates, plan.fresh
        self._budget = budget * host.num_layers * len(self._candidates)
        self._spent = 0
        self._scores = true_deviation
        self._first_layer = 0  # the layers below are done for all rows: `_done` says with what
        self._done: tuple[Tensor, State] | None = None
        self.report: Report | None = None
        at_once = selector.needs in (Needs.NOTHING, Needs.TRUTH) or not len(self._candidates)
        self.needed = 0 if at_once else plan.end
        """The next step reads K and V of positions before this one; the last one is over when all
        of them are in the host."""

    def run(self) -> Report:
        """All steps at once: the host has everything."""
        for _ in self.steps():
            pass
        assert self.report is not None
        return self.report

    def steps(self) -> Iterator[int]:
        """Do it, giving way after each slice; yields how many rows it had, 0 for the choice. Then
        `report` is set."""
        if not len(self._candidates):
            pass  # nothing to choose from
        elif self._selector.needs is Needs.DEVIATION:
            yield from self._measure_deviation()
        elif self._selector.needs is Needs.QUERY:
            yield from self._measure_attention()
        chosen = self._choose()
        rows = torch.cat([chosen, self._fresh]).sort().values
        state: State | None = None
        if self._done is not None:
            computed, states = self._done
            state = self._host.take(states, torch.isin(computed, rows).nonzero().flatten())
            self._done = None
        at, count = 0, min(FIRST_ROWS, self._slice_rows)
        self.needed = self._needed(rows[:count])
        yield 0
        while len(part := rows[at : at + count]):
            here = torch.arange(at, at + len(part))
            now = self._host.embed(part) if state is None else self._host.take(state, here)
            _through(self._host, part, now, self._first_layer)
            at, count = at + count, min(2 * count, self._slice_rows)
            self.needed = self._needed(rows[at : at + count])
            yield len(part)
        self._spent += len(chosen) * (self._host.num_layers - self._first_layer)
        total = max(1, self._host.num_layers * len(self._candidates))
        self.report = Report(
            len(self._candidates), len(self._fresh), len(chosen), self._spent / total
        )

    def _needed(self, part: Tensor) -> int:
        """By a slice, or by the end where there is none left."""
        return int(part[-1]) + 1 if len(part) else self._plan.end

    def _choose(self) -> Tensor:
        layers = max(1, self._host.num_layers - self._first_layer)
        known = Known(
            positions=self._candidates,
            offsets=self._plan.offsets,
            staleness=self._plan.staleness,
            count=max(0, int((self._budget - self._spent) / layers + 1e-9)),
            span=self._span,
            seed=self._seed,
            scores=None if self._scores is None else self._scores.cpu(),
        )
        return self._candidates[self._selector.choose(known)]

    def _measure_deviation(self) -> Iterator[int]:
        """Relative squared change of K plus that of V at CHECK_LAYER, over all heads.

        All rows are computed up to there in full, and go on from there when they are chosen.
        """
        rows = torch.cat([self._candidates, self._fresh]).sort().values
        states: list[State] = []
        sums = torch.zeros(0, 4, device=self._host.device)  # change and size of K, then of V
        for part in rows.split(self._slice_rows):
            state = self._host.embed(part)
            for index in range(CHECK_LAYER):
                state = self._host.layer(index, part, state)
            reused = part[torch.isin(part, self._candidates)]
            old = self._host.key_values(CHECK_LAYER, reused)
            states.append(self._host.layer(CHECK_LAYER, part, state))
            new = self._host.key_values(CHECK_LAYER, reused)
            sums = torch.cat([sums, self._host.reduce(_changes(old, new))])
            yield len(part)
        self._spent += len(self._candidates) * (CHECK_LAYER + 1)
        self._first_layer = CHECK_LAYER + 1
        self._done = rows, self._host.join(states)
        self._scores = sums[:, 0] / sums[:, 1].mean() + sums[:, 2] / sums[:, 3].mean()

    def _measure_attention(self) -> Iterator[int]:
        """Attention the fresh tokens pay to each candidate, summed over tokens, heads and layers.

        All fresh tokens take part, so none reads K and V of one that was never computed.
        """
        total = torch.zeros(self._plan.end, device=self._host.device)
        if not len(self._fresh):  # nobody asks: none is preferred
            self._scores = torch.ones(len(self._candidates), device=self._host.device)
            return
        for part in self._fresh.split(self._slice_rows):
            state = self._host.embed(part)
            for index in range(self._host.num_layers):
                state = self._host.layer(index, part, state, total.add_)
            yield len(part)
        self._spent += len(self._fresh) * self._host.num_layers
        self._scores = self._host.reduce(total)[self._candidates.to(total.device)]


def compute(host: Host[State], start: int, stop: int) -> None:
    """Compute ``[start, stop)``, if that is any, behind KV that is right, in one slice."""
    if start < stop:
        rows = torch.arange(start, stop)
        _through(host, rows, host.embed(rows), 0)


def _through(host: Host[State], rows: Tensor, state: State, first_layer: int) -> None:
    """The layers from there on."""
    for index in range(first_layer, host.num_layers):
        state = host.layer(index, rows, state)


def _changes(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """float32 [r, 4]: squared change and squared size of K, then of V, over heads and dims."""
    parts = []
    for before, after in zip(old, new, strict=True):
        parts.append(((after.float() - before.float()) ** 2).sum((1, 2)))
        parts.append((before.float() ** 2).sum((1, 2)))
    return torch.stack(parts, 1)
