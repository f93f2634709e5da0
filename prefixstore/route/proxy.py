"""Passing a request on, and its answer back as it comes.

What must hold: the answer's bytes are the worker's; a request is tried on another worker only while
the client has got none of them, so it never gets two answers; a worker that dies later leaves an
answer that is cut, not one that ends. A client that goes away ends its request at the worker.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable

from aiohttp import ClientResponse, ClientSession, ClientTimeout, SocketTimeoutError, web

from prefixstore.errors import ConfigError
from prefixstore.route import choose, limits
from prefixstore.route.asked import (
    AWAY,
    GONE,
    WORKER_HEADER,
    Asked,
    heard,
    lost,
    passed,
    read_most,
)
from prefixstore.route.legs import Legs
from prefixstore.route.prompt import TOKENIZED_PATHS, Prompt, ids_in, question_for, tokens_in
from prefixstore.route.stores import Stores
from prefixstore.route.workers import Pool, Worker
from prefixstore.serve.metrics import Metrics
from prefixstore.serve.refusal import RefusedError, busy
from prefixstore.timing import timeout

_AGAIN = (500, *AWAY)  # statuses of a worker: another may do better
_ANSWER = ClientTimeout(total=None, connect=limits.CONNECT_S, sock_read=limits.FIRST_BYTE_S)
_TOKENIZE = ClientTimeout(total=limits.TOKENIZE_S)
_JSON = {"Content-Type": "application/json"}


class FailedError(Exception):
    """A worker that gave nothing which could be passed on, or not all of it."""


class Proxy:
    """See the module docstring."""

    def __init__(
        self, session: ClientSession, pool: Pool, stores: Stores, metrics: Metrics,
        rng: random.Random, local_tokens: int,
    ) -> None:  # fmt: skip
        self._session, self._pool, self._stores = session, pool, stores
        self._metrics, self._rng = metrics, rng
        self._legs = Legs(session, pool, metrics, rng, local_tokens)

    async def pass_on(
        self, request: web.Request, data: bytes, is_of: Callable[[int], None]
    ) -> web.StreamResponse:
        """Answer a request whose body has come; ``is_of`` is told when it takes fewer bytes. Raises
        RefusedError."""
        asked = Asked.of(request, data)
        workers = self._workers(asked)
        if asked.path in TOKENIZED_PATHS:
            await self._read_prompt(asked, workers)
            asked.found = await self._stores.find(workers, asked.prompt)
        helped, tried = self._legs.helped(asked, workers), list[Worker]()
        while True:
            free = choose.for_whole(choose.able(workers, asked.model, tried))
            worker = choose.cheapest(free, asked.prompt, asked.found, self._rng, helped)
            if worker is None:
                raise busy("no worker answers" if tried else "no worker is free")
            if worker in helped and not tried:
                await self._legs.first(asked, worker)
            if not tried:  # what it was parsed into has been read
                asked.body = {}
                is_of(len(asked.data))
            is_last = len(free) == 1 or len(tried) + 1 >= limits.ATTEMPTS_MAX
            try:
                return await self._try(asked, worker, is_last)
            except FailedError as error:
                self._metrics.add("retried_total")
                tried.append(worker)
                if is_last:
                    raise RefusedError(502, "worker", f"{worker.name}: {error}") from error

    def _workers(self, asked: Asked) -> list[Worker]:
        """Those that may answer, or the one that is asked for. Raises RefusedError."""
        name = asked.request.headers.get(WORKER_HEADER)
        found = choose.able(self._pool if name is None else [self._pool.get(name)], asked.model, ())
        if found:
            return found
        known = {model for worker in self._pool for model in worker.models}
        if known and asked.model is not None and asked.model not in known:
            raise RefusedError(404, "model", f"no worker has the model {asked.model[:255]!r}")
        raise busy("no worker is ready" if name is None else f"{name[:255]} is not ready")

    # ------------------------------------------------------------------ the prompt
    async def _read_prompt(self, asked: Asked, workers: list[Worker]) -> None:
        try:
            ids = ids_in(asked.path, asked.body)
            if ids is None:
                ids = await self._tokenize(asked, workers)
            asked.prompt = Prompt.of(ids, asked.body, _lora(asked.model, workers))
        except (*GONE, ConfigError, ValueError) as error:
            self._metrics.add("untokenized_total", why=type(error).__name__)
        self._metrics.add("prompt_tokens_total", len(asked.prompt))

    async def _tokenize(self, asked: Asked, workers: list[Worker]) -> list[int]:
        question = question_for(asked.path, asked.body)
        if question is None or len(asked.data) > limits.TOKENIZE_BYTES_MAX:
            raise ConfigError("a prompt that is not text, or too much of it")
        worker = min(workers, key=lambda one: (one.cost, self._rng.random()))
        url = f"{worker.spec.url}/tokenize"
        async with self._session.post(
            url, json=question, headers=_JSON, timeout=_TOKENIZE, allow_redirects=False
        ) as answer:
            if answer.status != 200:
                raise ConfigError("a prompt the worker cannot tokenize")
            return tokens_in(json.loads(await read_most(answer, limits.TOKENS_BYTES_MAX)))

    # ------------------------------------------------------------------ the answer
    async def _try(self, asked: Asked, worker: Worker, is_last: bool) -> web.StreamResponse:
        """The answer of one worker. Raises FailedError if another may give one."""
        tokens = choose.work(worker, asked.prompt, asked.found, asked.prefilled)[1]
        self._metrics.add("known_tokens_total", choose.own_tokens(worker, asked.prompt))
        self._metrics.add("routed_total", role=worker.spec.role.value)
        url = worker.spec.url + asked.request.path_qs
        with worker.serving(asked.prompt, tokens) as serving:
            try:
                answer = await self._session.post(
                    url,
                    data=asked.data,
                    headers=asked.headers(),
                    timeout=_ANSWER,
                    allow_redirects=False,
                )
            except SocketTimeoutError as error:
                raise _late(worker) from error
            except GONE as error:
                lost(worker, error)
                raise FailedError(f"{type(error).__name__}, nothing was answered") from error
            try:
                part = await self._next_part(worker, answer)
                heard(worker, answer.status)
                if answer.status in _AGAIN and not is_last:
                    raise FailedError(f"status {answer.status}")
                serving.began()
                return await self._stream(asked, worker, answer, part)
            finally:
                answer.close()  # a connection that was read to its end is kept all the same

    async def _stream(
        self, asked: Asked, worker: Worker, answer: ClientResponse, part: bytes
    ) -> web.StreamResponse:
        """Pass on what comes. A worker that dies, or a client that takes nothing, ends it without
        an end."""
        headers = passed(answer.headers)
        headers[WORKER_HEADER] = worker.name
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        if answer.content_length is not None:
            response.content_length = answer.content_length
        try:
            await response.prepare(asked.request)
            while part:
                async with timeout(limits.CLIENT_S):
                    await response.write(part)
                async with timeout(limits.BETWEEN_S):
                    part = await self._next_part(worker, answer)
            async with timeout(limits.CLIENT_S):
                await response.write_eof()
        except (ConnectionError, asyncio.TimeoutError, FailedError) as error:
            if not isinstance(error, ConnectionError):
                self._metrics.add("cut_total")
            if asked.request.transport is not None:
                asked.request.transport.close()  # behind what was written
        return response

    async def _next_part(self, worker: Worker, answer: ClientResponse) -> bytes:
        try:
            return await answer.content.readany()
        except SocketTimeoutError as error:
            raise _late(worker) from error
        except GONE as error:
            lost(worker, error)
            raise FailedError(f"{type(error).__name__} in its answer") from error


def _late(worker: Worker) -> RefusedError:
    return RefusedError(504, "late", f"{worker.name} has not answered", "ask for less, or a stream")


def _lora(model: str | None, workers: list[Worker]) -> str:
    """The name of the adapter a request asks for: vLLM lists it with the model it belongs to."""
    found = model is not None and any(
        worker.models.get(model, {}).get("parent") for worker in workers
    )
    return str(model) if found else ""
