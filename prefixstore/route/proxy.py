"""Passing a request on, and its answer back as it comes.

What must hold: the answer's bytes are the worker's; a request is tried on another worker only while
the client has got none of them, so it never gets two answers; a worker that dies later leaves an
answer that is cut, not one that ends. A client that goes away ends its request at the worker. The
first leg of two can only cost time.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from typing import Any

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    web,
)
from multidict import CIMultiDict

from prefixstore.errors import ConfigError
from prefixstore.route import choose, limits
from prefixstore.route.prompt import TOKENIZED_PATHS, Prompt, ids_in, question_for, tokens_in
from prefixstore.route.stores import Stores
from prefixstore.route.workers import Pool, Worker
from prefixstore.serve.answering import REQUEST_ID
from prefixstore.serve.metrics import Metrics
from prefixstore.serve.refusal import RefusedError, busy
from prefixstore.timing import timeout

WORKER_HEADER, PREFILL_HEADER = "X-Prefixstore-Worker", "X-Prefixstore-Prefill"
GONE = (ClientError, OSError, asyncio.TimeoutError)
_AWAY = (502, 503, 504)
_AGAIN = (500, *_AWAY)  # of a worker: another may do better
_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "expect",
})  # fmt: skip
_ANSWER = ClientTimeout(
    total=None, sock_connect=limits.CONNECT_S, sock_read=limits.FIRST_BYTE_S
)  # between later bytes BETWEEN_S counts
_PREFILL = ClientTimeout(total=limits.PREFILL_S, sock_connect=limits.CONNECT_S)
_TOKENIZE = ClientTimeout(total=limits.TOKENIZE_S, sock_connect=limits.CONNECT_S)


class FailedError(Exception):
    """A worker that gave nothing which could be passed on."""


class Proxy:
    """See the module docstring. ``local_tokens``: a decode worker computes a prompt itself if no
    more of it is missing."""

    def __init__(
        self, session: ClientSession, pool: Pool, stores: Stores, metrics: Metrics,
        rng: random.Random, local_tokens: int,
    ) -> None:  # fmt: skip
        self._session, self._pool, self._stores = session, pool, stores
        self._metrics, self._rng, self._local_tokens = metrics, rng, local_tokens

    async def pass_on(self, request: web.Request, data: bytes) -> web.StreamResponse:
        """Answer a request whose body has come. Raises RefusedError."""
        body, path = _fields(data), request.path
        model = body.get("model")
        model = model if isinstance(model, str) else None
        forced = self._forced(request, WORKER_HEADER)
        candidates = self._able(model, forced)
        prompt = await self._prompt(path, body, len(data), candidates)
        found = await self._stores.find(candidates, prompt)
        helped = self._helped(request, path, model, candidates)
        tried: list[Worker] = []
        while True:
            free = choose.for_whole(choose.able(candidates, model, tried))
            worker = choose.cheapest(free, prompt, found, self._rng, helped)
            if worker is None:
                raise busy("no worker answers" if tried else "no worker is free")
            if worker in helped:
                prefilled = await self._first_leg(request, worker, model, prompt, found, body)
                data, helped = prefilled or data, []
            is_last = len(free) == 1 or len(tried) + 1 >= limits.ATTEMPTS_MAX
            try:
                return await self._try(request, worker, data, prompt, found, is_last)
            except FailedError as error:
                self._metrics.add("retried_total")
                tried.append(worker)
                if is_last:
                    raise RefusedError(502, "worker", f"{worker.name}: {error}") from error

    def _forced(self, request: web.Request, header: str) -> Worker | None:
        name = request.headers.get(header)
        return None if name in (None, "none") else self._pool.get(str(name))

    def _able(self, model: str | None, forced: Worker | None) -> list[Worker]:
        found = choose.able(self._pool if forced is None else [forced], model, ())
        if not found:
            known = {name for worker in self._pool for name in worker.models}
            if model is not None and known and model not in known:
                raise RefusedError(404, "model", f"no worker has the model {model[:255]!r}")
            raise busy("no worker is ready" if forced is None else f"{forced.name} is not ready")
        return found

    # ------------------------------------------------------------------ the prompt
    async def _prompt(
        self, path: str, body: dict[str, Any], size: int, workers: list[Worker]
    ) -> Prompt:
        if path not in TOKENIZED_PATHS:
            return Prompt()
        lora = _lora(body, workers)
        try:
            ids = ids_in(path, body)
            if ids is None:
                ids = await self._tokenize(path, body, size, workers)
            prompt = Prompt.of(ids, body, lora)
        except (*GONE, ConfigError, ValueError) as error:
            self._metrics.add("untokenized_total", why=type(error).__name__)
            return Prompt()
        self._metrics.add("prompt_tokens_total", len(prompt))
        return prompt

    async def _tokenize(
        self, path: str, body: dict[str, Any], size: int, workers: list[Worker]
    ) -> list[int]:
        question = question_for(path, body)
        if question is None or size > limits.TOKENIZE_BYTES_MAX:
            raise ConfigError("a prompt that is not text, or too much of it")
        worker = min(workers, key=lambda one: (one.cost, self._rng.random()))
        url = f"{worker.spec.url}/tokenize"
        json_only = {"Content-Type": "application/json"}
        async with self._session.post(
            url, json=question, headers=json_only, timeout=_TOKENIZE
        ) as answer:
            if answer.status != 200:
                raise ConfigError("a prompt the worker cannot tokenize")
            return tokens_in(json.loads(await answer.read()))

    # ------------------------------------------------------------------ two legs
    def _helped(
        self, request: web.Request, path: str, model: str | None, workers: list[Worker]
    ) -> list[Worker]:
        """Decode workers for whom somebody else would compute the prompt."""
        if path not in TOKENIZED_PATHS or request.headers.get(PREFILL_HEADER) == "none":
            return []
        free = choose.able(self._pool, model, ())
        return [one for one in workers if choose.partners(one, free)]

    async def _first_leg(
        self, request: web.Request, worker: Worker, model: str | None, prompt: Prompt,
        found: choose.Found, body: dict[str, Any],
    ) -> bytes | None:  # fmt: skip
        """Have a prefill worker compute the prompt, if that is worth it; the body of the second
        leg, None where there was no first."""
        if len(prompt) and choose.work(worker, prompt, found)[1] <= self._local_tokens:
            self._metrics.add("first_legs_total", result="not_needed")
            return None
        forced = self._forced(request, PREFILL_HEADER)
        tried: list[Worker] = []
        for _ in range(limits.ATTEMPTS_MAX):
            free = choose.able(self._pool if forced is None else [forced], model, tried)
            partners = choose.partners(worker, free)
            partner = choose.cheapest(partners, prompt, found, self._rng)
            if partner is None:
                break
            if await self._prefill(request, partner, prompt, found, body):
                return _waiting(body)
            tried.append(partner)
        return None

    async def _prefill(
        self, request: web.Request, worker: Worker, prompt: Prompt, found: choose.Found,
        body: dict[str, Any],
    ) -> bool:  # fmt: skip
        headers = self._headers(request)
        headers["Content-Type"] = "application/json"
        tokens = choose.work(worker, prompt, found)[1]
        worker.known.send(prompt.keys(worker.known.block_tokens))
        url, ok = worker.spec.url + request.path, False
        with worker.serving(tokens):
            try:
                async with self._session.post(
                    url, json=_one_token(body), headers=headers, timeout=_PREFILL
                ) as answer:
                    await answer.read()
                    ok = answer.ok
                    self._heard(worker, answer.status)
            except GONE as error:
                self._lost(worker, error)
        self._metrics.add("first_legs_total", result="done" if ok else "failed")
        return ok

    # ------------------------------------------------------------------ the answer
    async def _try(
        self, request: web.Request, worker: Worker, data: bytes, prompt: Prompt,
        found: choose.Found, is_last: bool,
    ) -> web.StreamResponse:  # fmt: skip
        """The answer of one worker. Raises FailedError if another may give one."""
        tokens = choose.work(worker, prompt, found)[1]
        self._metrics.add("known_tokens_total", choose.own_tokens(worker, prompt))
        self._metrics.add("routed_total", role=worker.spec.role.value)
        worker.known.send(prompt.keys(worker.known.block_tokens))
        url, headers = worker.spec.url + request.path_qs, self._headers(request)
        with worker.serving(tokens) as serving:
            try:
                answer = await self._session.post(url, data=data, headers=headers, timeout=_ANSWER)
                try:
                    part = await answer.content.readany()
                except BaseException:
                    answer.close()
                    raise
            except GONE as error:
                self._lost(worker, error)
                raise FailedError(f"{type(error).__name__} before the first byte") from error
            try:
                self._heard(worker, answer.status)
                if answer.status in _AGAIN and not is_last:
                    raise FailedError(f"status {answer.status}")
                serving.began()
                return await self._stream(request, worker, answer, part)
            finally:
                answer.close()  # a connection that was read to its end is kept all the same

    async def _stream(
        self, request: web.Request, worker: Worker, answer: ClientResponse, part: bytes
    ) -> web.StreamResponse:
        """Pass on what comes. A worker that dies, or a client that takes nothing, ends it without
        an end."""
        headers = _passed(answer.headers)
        headers[WORKER_HEADER] = worker.name
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        if answer.content_length is not None:
            response.content_length = answer.content_length
        try:
            await response.prepare(request)
            while part:
                async with timeout(limits.CLIENT_S):
                    await response.write(part)
                part = await self._next_part(worker, answer)
            await response.write_eof()
        except (ConnectionError, asyncio.TimeoutError, FailedError):
            if request.transport is not None:
                request.transport.close()  # behind what was written
        return response

    async def _next_part(self, worker: Worker, answer: ClientResponse) -> bytes:
        try:
            async with timeout(limits.BETWEEN_S):
                return await answer.content.readany()
        except GONE as error:
            self._lost(worker, error)
            self._metrics.add("cut_total")
            raise FailedError("the answer was cut") from error

    def _headers(self, request: web.Request) -> CIMultiDict[str]:
        headers = _passed(request.headers)
        headers["X-Request-Id"] = request[REQUEST_ID]
        for name in (WORKER_HEADER, PREFILL_HEADER):
            headers.popall(name, None)
        return headers

    def _heard(self, worker: Worker, status: int) -> None:
        if status in _AWAY:
            worker.breaker.failed()
        else:
            worker.breaker.succeeded()

    def _lost(self, worker: Worker, error: BaseException) -> None:
        worker.breaker.failed()
        if isinstance(error, ClientConnectorError):
            worker.lost()


def _passed(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """What is passed on: all but what is of one connection."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    out = _HOP | named
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in out)


def _fields(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "config", f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RefusedError(400, "config", "the body is not a JSON object")
    return body


def _lora(body: dict[str, Any], workers: list[Worker]) -> str:
    """The name of the adapter a request asks for: vLLM lists it with the model it belongs to."""
    name = body.get("model")
    for worker in workers:
        if isinstance(name, str) and worker.models.get(name, {}).get("parent"):
            return name
    return ""


def _one_token(body: dict[str, Any]) -> dict[str, Any]:
    """The first leg's request: compute the prompt, say one token."""
    one = {**body, "max_tokens": 1, "n": 1, "stream": False}
    for name in ("max_completion_tokens", "min_tokens", "stream_options", "best_of", "logprobs",
                 "top_logprobs", "prompt_logprobs"):  # fmt: skip
        one.pop(name, None)
    return one


def _waiting(body: dict[str, Any]) -> bytes:
    """The second leg's body: as it was, but the last chunks are waited for."""
    params = body.get("kv_transfer_params") or {}
    ours = params.get("prefixstore") or {} if isinstance(params, dict) else None
    if not isinstance(ours, dict):
        return json.dumps(body).encode()  # the worker says what is wrong
    ours = {"wait_ms": limits.WAIT_MS, **ours}
    return json.dumps({**body, "kv_transfer_params": {**params, "prefixstore": ours}}).encode()
