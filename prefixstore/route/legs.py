"""The first of two legs: a prefill worker computes a prompt into the store, for one token.

Only workers of the same identity are paired: KV of another would not be found. What must hold: a
first leg costs time, at most; without one the decode worker computes the prompt itself.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import ClientSession, ClientTimeout

from prefixstore.route import choose, limits
from prefixstore.route.asked import GONE, PREFILL_HEADER, Asked, heard, lost, read_most
from prefixstore.route.prompt import TOKENIZED_PATHS
from prefixstore.route.workers import Pool, Worker
from prefixstore.serve.metrics import Metrics
from prefixstore.timing import timeout

_PREFILL = ClientTimeout(total=None, connect=limits.CONNECT_S)
_NOT_OF_ONE_TOKEN = (
    "max_completion_tokens", "min_tokens", "stream_options", "best_of", "logprobs",
    "top_logprobs", "prompt_logprobs",
)  # fmt: skip


class Legs:
    """See the module docstring. ``local_tokens``: a decode worker computes a prompt itself if no
    more of it is missing."""

    def __init__(
        self, session: ClientSession, pool: Pool, metrics: Metrics, rng: random.Random,
        local_tokens: int,
    ) -> None:  # fmt: skip
        self._session, self._pool, self._metrics = session, pool, metrics
        self._rng, self._local_tokens = rng, local_tokens

    def helped(self, asked: Asked, workers: Sequence[Worker]) -> list[Worker]:
        """Decode workers for whom somebody else would compute the prompt."""
        if asked.path not in TOKENIZED_PATHS or asked.request.headers.get(PREFILL_HEADER) == "none":
            return []
        free = choose.able(self._pool, asked.model, ())
        return [one for one in workers if choose.partners(one, free)]

    async def first(self, asked: Asked, worker: Worker) -> None:
        """Have somebody compute the prompt for a worker, if that is worth it. Raises RefusedError
        for a partner that is asked for and is none."""
        missing = choose.work(worker, asked.prompt, asked.found)[1]
        if len(asked.prompt) and missing <= self._local_tokens:
            self._metrics.add("first_legs_total", result="not_needed")
            return
        name = asked.request.headers.get(PREFILL_HEADER)
        pool = self._pool if name is None else [self._pool.get(name)]
        try:
            async with timeout(limits.PREFILL_S):
                asked.prefilled = await self._somewhere(asked, worker, pool)
        except asyncio.TimeoutError:
            self._metrics.add("first_legs_total", result="late")
        if asked.prefilled:
            asked.data = waiting(asked.body)

    async def _somewhere(self, asked: Asked, worker: Worker, pool: Iterable[Worker]) -> bool:
        tried: list[Worker] = []
        while len(tried) < limits.ATTEMPTS_MAX:
            partners = choose.partners(worker, choose.able(pool, asked.model, tried))
            partner = choose.cheapest(partners, asked.prompt, asked.found, self._rng)
            if partner is None:
                return False
            tried.append(partner)
            done = await self._prefill(asked, partner)
            self._metrics.add("first_legs_total", result="done" if done else "failed")
            if done:
                return True
        return False

    async def _prefill(self, asked: Asked, worker: Worker) -> bool:
        headers = asked.headers()
        headers["Content-Type"] = "application/json"
        url, body = worker.spec.url + asked.path, one_token(asked.body)
        with worker.serving(asked.prompt, choose.work(worker, asked.prompt, asked.found)[1]):
            try:
                async with self._session.post(
                    url, json=body, headers=headers, timeout=_PREFILL, allow_redirects=False
                ) as answer:
                    await read_most(answer, limits.PREFILL_BYTES_MAX)
                    heard(worker, answer.status)
                    return answer.ok
            except GONE as error:
                lost(worker, error)
                return False
            except ValueError:  # it says more than a token
                return False


def one_token(body: dict[str, Any]) -> dict[str, Any]:
    """The first leg's request: compute the prompt, say one token."""
    kept = {name: value for name, value in body.items() if name not in _NOT_OF_ONE_TOKEN}
    return {**kept, "max_tokens": 1, "n": 1, "stream": False}


def waiting(body: dict[str, Any]) -> bytes:
    """The second leg's body: as it was, but the last chunks are waited for."""
    params = body.get("kv_transfer_params") or {}
    ours = params.get("prefixstore") or {} if isinstance(params, dict) else None
    if isinstance(ours, dict):  # else the worker says what is wrong
        ours = {"wait_ms": limits.WAIT_MS, **ours}
        body = {**body, "kv_transfer_params": {**params, "prefixstore": ours}}
    return json.dumps(body).encode()
