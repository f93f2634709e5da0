"""Reading requests: whole ones into fields and references, streamed ones piece by piece.

What must hold: every read has a deadline that a slow sender cannot move (so many seconds, and a
least rate for its bytes), and takes no more than the request may have.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from aiohttp import StreamReader, web

from prefixstore import wire
from prefixstore.errors import ConfigError
from prefixstore.keys import ChunkRef, MultimodalItem
from prefixstore.layout import Roi
from prefixstore.namespace import Namespace
from prefixstore.owned import Region
from prefixstore.serve import limits
from prefixstore.serve.answering import parsed_bytes, read_told, transfer_s
from prefixstore.serve.context import HELD, state_of, tenant_of
from prefixstore.serve.refusal import RefusedError
from prefixstore.timing import timeout

T = TypeVar("T")
_CHUNKS_HINT = (
    f"give tokens, a list of numbers; or as {wire.CONTENT_TYPE}, behind the fields, references, "
    "keys or token ids"
)
_ITEM_HEAD_BYTES = 10  # of an item in a preimage, beside its digest (keys)


class BodyReader:
    """Reads a body of known length in parts. Raises RefusedError when it is late or cut short."""

    def __init__(self, content: StreamReader, num_bytes: int) -> None:
        self._content, self.left = content, num_bytes
        self._end = time.monotonic() + transfer_s(num_bytes)

    async def _some(self, most: int) -> bytes:
        wait_s = min(limits.STALL_S, self._end - time.monotonic())
        try:
            async with timeout(max(0.0, wait_s)):
                data = await self._content.read(most)
        except asyncio.TimeoutError:
            raise RefusedError(408, "slow", "the body came too slowly") from None
        if not data:
            raise RefusedError(400, "config", "the body is shorter than it must be")
        self.left -= len(data)
        return data

    async def into(self, target: memoryview) -> None:
        """Fill a buffer."""
        if len(target) > self.left:
            raise RefusedError(400, "config", "the body is shorter than it must be")
        at = 0
        while at < len(target):
            # What is there is taken with no task made for the wait.
            data = self._content.read_nowait(len(target) - at)
            self.left -= len(data)
            data = data or await self._some(len(target) - at)
            target[at : at + len(data)] = data
            at += len(data)

    async def take(self, count: int) -> bytes:
        """So many bytes."""
        data = bytearray(count)
        await self.into(memoryview(data))
        return bytes(data)

    async def fields(self) -> bytes:
        """The JSON fields, which stand first."""
        return await self.take(wire.fields_length(await self.take(4)))

    async def refs(self, check: Callable[[int], None]) -> bytes:
        """The block of references, which stands before payloads; ``check`` is told its bytes
        before they are taken."""
        head = await self.take(4)
        check(wire.refs_length(head))
        fixed = head + await self.take(wire.refs_length(head) - 4)
        check(wire.preimages_length(fixed))
        return fixed + await self.take(wire.preimages_length(fixed))


async def off_loop(request: web.Request, size: int, work: Callable[[], T]) -> T:
    """Take apart so many bytes: on a thread if they are many."""
    if size <= limits.INLINE_BODY_BYTES:
        return work()
    return await state_of(request).ask(tenant_of(request), work)


async def have_room(request: web.Request, text: bytes) -> None:
    """Room for what JSON is parsed into, until the request is answered. Raises RefusedError."""
    state, tenant = state_of(request), tenant_of(request)
    size = await off_loop(request, len(text), partial(parsed_bytes, text))
    request[HELD].enter_context(state.memory(tenant, "body", size, limits.BODY_BYTES_MAX))


async def whole_body(request: web.Request) -> bytes:
    """A control request's body."""
    binary = request.content_type == wire.CONTENT_TYPE
    return await read_told(
        request, limits.CONTROL_BODY_BYTES_MAX if binary else limits.JSON_BODY_BYTES_MAX
    )


async def asked(request: web.Request) -> tuple[dict[str, Any], memoryview]:
    """Fields and rest of a control request, which may be plain JSON."""
    body = await whole_body(request)
    binary = request.content_type == wire.CONTENT_TYPE
    await have_room(request, body[4 : 4 + wire.fields_length(body)] if binary else body)

    def parse() -> tuple[dict[str, Any], memoryview]:
        if binary:
            return wire.unpack_request(body)
        fields = wire.parse_fields(body or b"{}")
        if fields.get("keys") is True or fields.get("tokens") is True:
            raise ConfigError("nothing stands behind fields that are the body", _CHUNKS_HINT)
        return fields, memoryview(b"")

    return await off_loop(request, len(body), parse)


async def chunks(request: web.Request) -> tuple[Namespace, dict[str, Any], list[ChunkRef]]:
    """The namespace, fields and chunks of a control request."""
    fields, rest = await asked(request)
    ns = state_of(request).namespace(tenant_of(request), fields.get("namespace"))
    work = partial(refs_of, ns, fields, rest)
    if "tokens" in fields:  # whose keys are computed
        return ns, fields, await state_of(request).ask(tenant_of(request), work)
    return ns, fields, await off_loop(request, len(rest), work)


def refs_of(ns: Namespace, fields: dict[str, Any], rest: memoryview) -> list[ChunkRef]:
    """The chunks a request speaks of: references, keys, or ``tokens`` whose keys are computed here.

    ``tokens``: a list in the fields, or true when they are the rest, as int32. With ``salt`` (hex)
    and ``items``. Raises ConfigError.
    """
    if fields.get("keys") is True:
        return wire.refs_of_keys(rest)
    if "tokens" not in fields:
        if not len(rest):
            raise ConfigError("no chunks", _CHUNKS_HINT)
        refs, rest = wire.unpack_refs(rest)
        if len(rest):
            raise ConfigError(f"{len(rest)} bytes behind the references", "see docs/http.md")
        return refs
    tokens = tokens_of(fields, rest)
    count = len(tokens) // ns.layout.chunk_tokens
    if count > wire.REFS_MAX:
        raise ConfigError(f"{count} chunks in one request", f"at most {wire.REFS_MAX}")
    items = items_of(fields)
    _check_items(items, count, ns.layout.chunk_tokens)
    return ns.chain(tokens, salt_of(fields), items).refs()


def _check_items(items: list[MultimodalItem], count: int, chunk_tokens: int) -> None:
    """Each item stands in the preimage of every chunk it touches. Raises ConfigError."""
    if len(items) * count > limits.ITEM_CHUNKS_MAX:
        raise ConfigError(
            f"{len(items)} items in {count} chunks", f"at most {limits.ITEM_CHUNKS_MAX} together"
        )
    total = 0
    for item in items:
        first, stop = item.offset // chunk_tokens, item.offset + item.num_tokens - 1
        touched = min(count, stop // chunk_tokens + 1) - min(count, first)
        total += touched * (len(item.digest) + _ITEM_HEAD_BYTES)
    if total > wire.REFS_BYTES_MAX:
        raise ConfigError(f"{total} bytes of items in preimages", f"at most {wire.REFS_BYTES_MAX}")


def tokens_of(fields: dict[str, Any], rest: memoryview) -> Any:
    """Token ids. Raises ConfigError."""
    import numpy as np

    tokens = fields.get("tokens")
    if tokens is True:
        if len(rest) % 4:
            raise ConfigError(f"{len(rest)} bytes of token ids", "a multiple of 4")
        return np.frombuffer(rest, "<i4")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ConfigError("tokens: a list of whole numbers is expected")
    return tokens


def salt_of(fields: dict[str, Any]) -> bytes:
    """The client's salt. Raises ConfigError."""
    try:
        return bytes.fromhex(fields.get("salt", ""))
    except (TypeError, ValueError):
        raise ConfigError("salt: hex digits are expected") from None


def items_of(fields: dict[str, Any]) -> list[MultimodalItem]:
    """Multimodal items. Raises ConfigError."""
    return wire.items_from_json(fields.get("items", []))


def number(fields: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number of a request, inside its bounds. Raises ConfigError."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name}={wire.shown(value)}", f"give a number, {low:g} to {high:g}")
    return value


def region_of(ns: Namespace, query: Any) -> Region:
    """The region ``layers=a:b&heads=c:d&part=k|v``. Raises ConfigError, LayoutError."""
    layout = ns.layout
    layers = _range(query, "layers", layout.num_layers)
    heads = _range(query, "heads", layout.num_heads)
    roi = Roi(*layers, *heads)
    layout.check(roi)
    part = query.get("part")
    if part is None:
        return Region(layout, roi)
    if part not in ("k", "v") or layout.num_planes != 2:
        raise ConfigError(f"part={part[:8]!r}", "k or v, where there are both")
    return Region(layout, roi, "kv".index(part))


def _range(query: Any, name: str, count: int) -> tuple[int, int]:
    text = query.get(name)
    if text is None:
        return 0, count
    first, found, last = text.partition(":")
    if not (found and first.isascii() and last.isascii() and first.isdigit() and last.isdigit()):
        raise ConfigError(f"{name}={text[:20]!r}", "give a half-open range such as 0:4")
    if len(text) > 20:
        raise ConfigError(f"{name}={text[:20]!r}", "give a half-open range such as 0:4")
    return int(first), int(last)
