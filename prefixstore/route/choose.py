"""Which worker a request goes to: the one where it costs least, ties at random.

The cost is in tokens of prefill: what the worker would have to compute of the prompt (tokens loaded
from a store or blended count as a share of one), and what it has to do before (`Worker.cost`). So a
prefix decides between workers that have equally much to do, and gives way to load when waiting for
its worker costs more than computing it elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefixstore.route import limits
from prefixstore.route.prompt import Prompt
from prefixstore.route.workers import Role, Worker

WHOLE, LEG_1 = (Role.BOTH, Role.DECODE), (Role.PREFILL,)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store has of a prompt: leading tokens, and others that stand anywhere in it."""

    prefix: int = 0
    segments: int = 0


NOTHING = Stored()
Found = Mapping[Worker, Stored]


def own_tokens(worker: Worker, prompt: Prompt) -> int:
    """Leading tokens that the worker's own cache holds."""
    size = worker.known.block_tokens
    return worker.known.matches(prompt.keys(size)) * size


def work(worker: Worker, prompt: Prompt, found: Found, loads: bool = False) -> tuple[float, int]:
    """What the prompt costs there without waiting, and how many tokens must be computed.

    ``loads``: another worker has computed the prompt before; this one loads it.
    """
    own, stored = own_tokens(worker, prompt), found.get(worker, NOTHING)
    loaded = max(0, (len(prompt) if loads else stored.prefix) - own)
    left = len(prompt) - own - loaded
    blended = min(left, stored.segments)
    cost = left - blended + limits.SEGMENT_SHARE * blended + limits.LOAD_SHARE * loaded
    return cost, left


def cheapest(
    workers: Sequence[Worker], prompt: Prompt, found: Found, rng: random.Random,
    helped: Sequence[Worker] = (),
) -> Worker | None:  # fmt: skip
    """See the module docstring; ``helped`` are those for whom others compute prompts. None if there
    is no worker."""
    if not workers:
        return None
    costs = [work(one, prompt, found, one in helped)[0] + one.cost for one in workers]
    least = min(costs)
    return rng.choice([one for one, cost in zip(workers, costs, strict=True) if cost == least])


def able(workers: Iterable[Worker], model: str | None, tried: Iterable[Worker]) -> list[Worker]:
    """Those that may have a request for the model now."""
    out = set(tried)
    return [
        one
        for one in workers
        if one not in out
        and one.state == "ready"
        and (model is None or model in one.models)
        and one.requests < limits.WORKER_REQUESTS_MAX
    ]


def for_whole(workers: Sequence[Worker]) -> list[Worker]:
    """Those that answer. Prefill workers do if there is nobody else: they can."""
    return [one for one in workers if one.spec.role in WHOLE] or list(workers)


def partners(worker: Worker, workers: Sequence[Worker]) -> list[Worker]:
    """Those that may prefill for a decode worker: of the same identity, which must be known."""
    if worker.spec.role is not Role.DECODE or not worker.identity:
        return []
    return [one for one in workers if one.spec.role in LEG_1 and one.identity == worker.identity]
