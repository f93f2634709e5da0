"""A RAG-like trace, and the search for the highest rate that keeps a latency.

A prompt is a system prompt that all share, some documents, the popular ones more often, in the
order they were drawn, and a question nobody asked before. What must hold: the same numbers give the
same prompts and arrivals, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

SYSTEM_TOKENS, QUESTION_TOKENS = 64, 32
VOCAB = 1000  # of random tokens


@dataclass(frozen=True)
class Arrival:
    """One request, so many seconds after the first could have come."""

    prompt: list[int]
    seconds: float


class Trace:
    """``documents`` of ``tokens`` random tokens; number i (from 0) is drawn with a probability
    proportional to 1 / (i + 1) ** zipf; a prompt has from ``fewest`` to ``most`` of them."""

    def __init__(self, documents: int, tokens: int, zipf: float, fewest: int, most: int) -> None:
        """Raises ValueError for numbers that no prompt can be made of."""
        if not 1 <= fewest <= most <= documents:
            raise ValueError(
                f"{fewest} to {most} of {documents} documents in a prompt: give at least 1, and as "
                "many documents as the longest prompt has"
            )
        made = np.random.default_rng(0)
        weights = (1.0 + np.arange(documents)) ** -zipf
        self._popularity = weights / weights.sum()
        self._fewest, self._most = fewest, most
        self.system = _text(made, SYSTEM_TOKENS)
        self.documents = [_text(made, tokens) for _ in range(documents)]
        self.longest = SYSTEM_TOKENS + most * tokens + QUESTION_TOKENS

    def alone(self, document: int) -> list[int]:
        """One document behind the system prompt, as when it is stored."""
        question = _text(np.random.default_rng(1), QUESTION_TOKENS)
        return self.system + self.documents[document] + question

    def arrivals(self, seed: int, count: int, rate: float) -> list[Arrival]:
        """Poisson arrivals, ``rate`` a second; the prompts do not depend on the rate."""
        drawn = np.random.default_rng([2, seed])
        prompts = [self._prompt(drawn) for _ in range(count)]
        seconds = np.cumsum(drawn.exponential(1.0, count)) / rate
        return [Arrival(one, float(at)) for one, at in zip(prompts, seconds, strict=True)]

    def _prompt(self, drawn: np.random.Generator) -> list[int]:
        count = int(drawn.integers(self._fewest, self._most + 1))
        chosen = drawn.choice(len(self.documents), count, replace=False, p=self._popularity)
        texts = chain.from_iterable(self.documents[number] for number in chosen)
        return [*self.system, *texts, *_text(drawn, QUESTION_TOKENS)]


def _text(drawn: np.random.Generator, count: int) -> list[int]:
    tokens: list[int] = drawn.integers(1, VOCAB, count).tolist()
    return tokens


def percentile(values: Sequence[float], share: float) -> float:
    """The ``share`` (0 to 100) of the values is at most this, one of them."""
    return float(np.percentile(values, share, method="inverted_cdf"))


def highest_rate(
    grid: Sequence[float], bisections: int, keeps: Callable[[int, float], bool]
) -> float | None:
    """The highest rate tried that keeps the latency: up the ``grid`` to the first that does not,
    then so many bisections between the two. None if none did.

    ``keeps(number, rate)`` tries one; ``number`` counts the tries, and is the same for rates of the
    grid whatever comes of them.
    """
    best, missed = 0.0, None
    for number, rate in enumerate(grid):
        if not keeps(number, rate):
            missed = rate
            break
        best = rate
    for number in range(bisections if missed is not None else 0):
        assert missed is not None
        rate = (best + missed) / 2
        if keeps(len(grid) + number, rate):
            best = rate
        else:
            missed = rate
    return best or None
