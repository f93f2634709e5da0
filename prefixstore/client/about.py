"""What a call to a server is about: the engine's request and its trace, for the log there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_HEADERS: ContextVar[dict[str, str] | None] = ContextVar("prefixstore_about", default=None)
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # as the server takes it
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@contextmanager
def about(request_id: str, traceparent: str = "") -> Iterator[None]:
    """Calls made in the block carry ``X-Request-Id`` and ``traceparent``; what is not valid there
    is left out."""
    headers = {}
    if _ID.fullmatch(request_id):
        headers["X-Request-Id"] = request_id
    if _TRACEPARENT.fullmatch(traceparent):
        headers["traceparent"] = traceparent
    token = _HEADERS.set(headers)
    try:
        yield
    finally:
        _HEADERS.reset(token)


def headers_about() -> dict[str, str]:
    """The headers of a call made now."""
    return _HEADERS.get() or {}
