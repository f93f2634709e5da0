"""What happens to every request of a server of ours: it gets an id, and an error gets one shape.

What must hold: an error of a request never ends the server, and nothing a client sends makes a 500.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable

from aiohttp import ClientPayloadError, web

from prefixstore.errors import StoreError
from prefixstore.serve import limits
from prefixstore.serve.metrics import Metrics
from prefixstore.serve.refusal import RefusedError
from prefixstore.timing import timeout

logger = logging.getLogger("prefixstore")
REQUEST_ID = web.RequestKey("request_id", str)
_VALUE_BYTES = 96  # of one of Python's objects, and its place in a list or dictionary
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def name_request(request: web.Request) -> None:
    """Give a request its id: the one it came with, or a new one."""
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def transfer_s(num_bytes: int) -> float:
    """Longest time a body of so many bytes may take."""
    return limits.BODY_S + num_bytes / limits.RATE_MIN_BYTES_S


async def read_in_time(
    request: web.Request, most: int, is_of: Callable[[int], None] = lambda _: None
) -> bytes:
    """A body of so many bytes at most; ``is_of`` is told how many there are, while they come.
    Raises RefusedError, also when it is late."""
    data = bytearray()
    try:
        async with timeout(transfer_s(most)):
            while part := await request.content.readany():
                data += part
                if len(data) > most:
                    raise too_large(f"a body of more than {most} bytes", most)
                is_of(len(data))
    except asyncio.TimeoutError:
        raise RefusedError(408, "slow", "the body came too slowly") from None
    return bytes(data)


async def read_told(request: web.Request, most: int) -> bytes:
    """A body whose length its headers tell, which may be ``most`` bytes. Raises RefusedError."""
    length = request.content_length
    if length is None and request.can_read_body:
        raise RefusedError(411, "config", "a body without Content-Length")
    if length is not None and length > most:
        raise too_large(f"a body of {length} bytes", most)
    if request.content.is_eof():  # it came with the headers: no task for a wait
        return await request.read()
    return await read_in_time(request, length or 0)


def parsed_bytes(data: bytes) -> int:
    """Bytes that a body of JSON takes once it is parsed, at most: an object of Python's for each of
    its signs, and characters of four bytes if any is wide."""
    values = 1 + sum(data.count(one) for one in b"[{,:")
    wide = not data.isascii() or b"\\u" in data
    return _VALUE_BYTES * values + (4 if wide else 1) * len(data)


def too_large(what: str, most: int) -> RefusedError:
    """More than one request may have."""
    return RefusedError(413, "too_large", what, f"at most {most}")


def no_token() -> RefusedError:
    """Who asks has none, or a wrong one."""
    return RefusedError(401, "token", "no valid token", "Authorization: Bearer TOKEN")


async def answer(
    request: web.Request,
    work: Callable[[], Awaitable[web.StreamResponse]],
    metrics: Metrics,
    refusal_of: Callable[[StoreError], RefusedError] = RefusedError.of,
) -> web.StreamResponse:
    """What ``work`` gives, or its error as an answer."""
    try:
        return await work()
    except RefusedError as error:
        return _refuse(request, error, metrics)
    except StoreError as error:
        return _refuse(request, refusal_of(error), metrics)
    except web.HTTPException as error:
        code = "too_large" if error.status == 413 else "http"
        response = _refuse(request, RefusedError(error.status, code, error.reason), metrics)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except (ConnectionError, ClientPayloadError):  # the client has gone, in the middle of its body
        short = RefusedError(400, "config", "the body is shorter than it must be")
        return _refuse(request, short, metrics)
    except Exception as error:  # request loop: a fault of ours must not end the server
        logger.exception("a request to %s failed", request.path)
        return _refuse(request, RefusedError(500, "internal", type(error).__name__), metrics)


def _refuse(request: web.Request, refusal: RefusedError, metrics: Metrics) -> web.Response:
    metrics.add("refused_total", code=refusal.code)
    response = web.json_response(refusal.to_json(), status=refusal.status, headers=refusal.headers)
    if request.can_read_body:
        response.force_close()  # what is left of a body is not worth reading
    return response
