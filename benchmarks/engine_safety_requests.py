"""The requests of `benchmarks.engine_safety`: mixed, and the same for the same seed.

Owns no state. A prompt is a trunk that others share, or a part of one, and tokens of its own; or a
prompt that was asked before; or documents that stand elsewhere in other prompts, behind new tokens.
Whatever a request asks of the store, its answer must be the plain engine's: so those that may blend
have every token recomputed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from benchmarks.messages import Request

VOCAB = 1024
CHUNK_TOKENS = 64
WAVE_MAX = 10
ABORT_SHARE = 0.2
REPEAT_SHARE = 0.35
LONG_SHARE = 0.5
ANSWER_TOKENS, LONG_TOKENS = 6, 64
LOGPROBS = 5
PROMPT_MAX = 700
ALL = {"selector": "all", "budget": 1.0}


def tokens(rng: random.Random, count: int) -> list[int]:
    """Tokens that nobody else has."""
    return rng.choices(range(1, VOCAB), k=count)


class Mix:
    """Prompts and options, drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._trunks = [tokens(self.rng, 64 * self.rng.randint(2, 7)) for _ in range(5)]
        self._documents = [tokens(self.rng, self.rng.randint(90, 200)) for _ in range(4)]
        self._asked: list[list[int]] = []

    def waves(self, count: int, most: int = WAVE_MAX) -> Iterator[list[Request]]:
        """Batches that together have so many requests."""
        while count:
            size = min(self.rng.randint(1, most), count)
            count -= size
            yield [self._request(alone=size == 1) for _ in range(size)]

    def _request(self, alone: bool) -> Request:
        rng = self.rng
        long = not alone and rng.random() < LONG_SHARE
        params = self._params()
        return Request(
            prompt=self._prompt(),
            max_tokens=LONG_TOKENS if long else ANSWER_TOKENS,
            logprobs=LOGPROBS,
            kv_transfer_params=params,
            cache_salt=rng.choice(["red", "blue"]) if rng.random() < 0.08 else None,
            arrival_step=0 if alone else rng.randrange(8),
            abort_at_step=rng.randrange(1, 20) if rng.random() < ABORT_SHARE else None,
        )

    def _prompt(self) -> list[int]:
        rng = self.rng
        if self._asked and rng.random() < REPEAT_SHARE:
            return rng.choice(self._asked)
        kind = rng.random()
        if kind < 0.6:
            trunk = rng.choice(self._trunks)
            prompt = trunk[: rng.randint(1, len(trunk))] + tokens(rng, rng.randint(1, 150))
        elif kind < 0.8:
            parts = rng.sample(self._documents, rng.randint(1, 3))
            prompt = tokens(rng, rng.choice([0, 20, 64])) + [t for part in parts for t in part]
            prompt += tokens(rng, rng.randint(1, 30))
        else:
            prompt = tokens(rng, rng.choice([1, 40, 64, 65, 128, 300, 500]))
        self._asked.append(prompt[:PROMPT_MAX])
        return prompt[:PROMPT_MAX]

    def _params(self) -> dict[str, Any] | None:
        rng = self.rng
        if rng.random() < 0.5:
            return None
        options: dict[str, Any] = rng.choice(
            [
                {"read": False}, {"write": False}, {"salt": "tenant"}, {"ttl_s": 1.0},
                {"ttl_s": 600.0, "tag": "short"}, {"pin": True}, {"max_load_tokens": 64},
                {"wait_ms": 20}, {"blend": False}, {"blend": ALL}, {"blend": ALL}, {"blend": ALL},
                {"alone": True}, {"nonsense": 1}, {"salt": 7},
            ]
        )  # fmt: skip
        return {"prefixstore": options}
