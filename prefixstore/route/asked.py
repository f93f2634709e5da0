"""One request under way, and what every part of the router does with workers it asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientConnectorError, ClientError, ClientResponse, web
from multidict import CIMultiDict

from prefixstore.route.choose import Stored
from prefixstore.route.prompt import Prompt
from prefixstore.route.workers import Worker
from prefixstore.serve.answering import REQUEST_ID
from prefixstore.serve.refusal import RefusedError

WORKER_HEADER, PREFILL_HEADER = "X-Prefixstore-Worker", "X-Prefixstore-Prefill"
GONE = (ClientError, OSError, asyncio.TimeoutError)
AWAY = (502, 503, 504)  # statuses of a worker that nobody should ask for a moment
_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "expect",
})  # fmt: skip


@dataclass(slots=True)
class Asked:
    """A request: as it came, and what was found out about it. ``prefilled``: another worker has
    computed its prompt."""

    request: web.Request
    data: bytes
    body: dict[str, Any]  # until it is passed on
    model: str | None = None  # the name of the one it is for
    prompt: Prompt = field(default_factory=Prompt)
    found: dict[Worker, Stored] = field(default_factory=dict)
    prefilled: bool = False

    @classmethod
    def of(cls, request: web.Request, data: bytes) -> Asked:
        """Read it. Raises RefusedError."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, "config", f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise RefusedError(400, "config", "the body is not a JSON object")
        name = body.get("model")
        return cls(request, data, body, name if isinstance(name, str) else None)

    @property
    def path(self) -> str:
        """Without the query."""
        return self.request.path

    def headers(self) -> CIMultiDict[str]:
        """What a worker gets of its headers, and its id."""
        headers = passed(self.request.headers)
        headers["X-Request-Id"] = self.request[REQUEST_ID]
        for name in (WORKER_HEADER, PREFILL_HEADER):
            headers.popall(name, None)
        return headers


async def read_most(answer: ClientResponse, most: int) -> bytes:
    """The body of a worker's answer. Raises ValueError if it is longer, and what aiohttp does."""
    data = bytearray()
    async for part in answer.content.iter_any():
        data += part
        if len(data) > most:
            raise ValueError(f"{answer.url} answers more than {most} bytes")
    return bytes(data)


def passed(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """What is passed on: all but what is of one connection."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    out = _HOP | named
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in out)


def heard(worker: Worker, status: int) -> None:
    """A worker answered."""
    if status in AWAY:
        worker.breaker.failed()
    else:
        worker.breaker.succeeded()


def lost(worker: Worker, error: BaseException) -> None:
    """A worker did not. If nobody listens there, it gets nothing until it answers a poll."""
    worker.breaker.failed()
    if isinstance(error, ClientConnectorError):
        worker.answers = False
