"""`GET /v1/events`: what happens to a tenant's chunks, as server-sent events, while it happens.

What must hold: a listener hears of its own tenant's chunks only; it has a queue of fixed size, and
when it takes less than there is it is told how many chunks it has not heard of (``missed``) and
goes on with what is new. Events are news, not a record: who must know what is there asks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from prefixstore.errors import ConfigError
from prefixstore.journal import Change
from prefixstore.ledger import TIER_NAMES
from prefixstore.serve.auth import Tenant
from prefixstore.serve.context import state_of, tenant_of
from prefixstore.serve.recorder import Miss
from prefixstore.serve.refusal import busy

LISTENERS_MAX = 64
LISTENERS_OF_A_TENANT_MAX = 16
QUEUE_MAX = 256  # messages of one listener
KEYS_MAX = 256  # chunks in one message
HEARTBEAT_S = 10.0
WAKE_S = 0.5  # how soon a stream notices that the server stops
STUCK_S = 60.0  # a listener that takes nothing for so long is let go
KINDS = ("stored", "promoted", "written", "removed", "miss", "missed")
CONTENT_TYPE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Message:
    """One event, ready to be sent."""

    kind: str
    namespace: str
    chunks: int
    data: bytes


@dataclass
class Listener:
    """Somebody who listens."""

    tenant: Tenant
    kinds: frozenset[str]
    namespace: str | None
    queue: deque[Message] = field(default_factory=deque)
    missed: int = 0  # chunks it has not heard of
    unknown: bool = False  # and more, nobody knows how many of them its own
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, message: Message) -> None:
        """Put a message into its queue, or count it as missed."""
        if message.kind not in self.kinds:
            return
        if self.namespace is not None and message.namespace != self.namespace:
            return
        if len(self.queue) >= QUEUE_MAX:
            self.missed += message.chunks
        else:
            self.queue.append(message)
        self.wake.set()

    def take(self) -> bytes:
        """What is to be sent now: first what it has, then that it missed some."""
        parts = [message.data for message in self.queue]
        self.queue.clear()
        if self.missed or self.unknown:
            told = {"chunks": None if self.unknown else self.missed}
            parts.append(pack("missed", told))
            self.missed, self.unknown = 0, False
        self.wake.clear()
        return b"".join(parts)


class Hub:
    """Those who listen. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []

    def join(self, tenant: Tenant, kinds: frozenset[str], namespace: str | None) -> Listener:
        """Listen. Raises RefusedError over a bound."""
        if len(self.listeners) >= LISTENERS_MAX:
            raise busy(f"{LISTENERS_MAX} listen already")
        counts = Counter(one.tenant.name for one in self.listeners)
        if counts[tenant.name] >= LISTENERS_OF_A_TENANT_MAX:
            raise busy(f"{counts[tenant.name]} of yours listen already", 429)
        listener = Listener(tenant, kinds, namespace)
        self.listeners.append(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        """Listen no more."""
        self.listeners.remove(listener)

    def changed(self, mark: str, changes: Sequence[Change]) -> None:
        """Changes of one tenant's chunks, in order."""
        listeners = [one for one in self.listeners if one.tenant.mark == mark]
        if listeners:
            for message in _messages(changes):
                for listener in listeners:
                    listener.offer(message)

    def missed(self, mark: str, miss: Miss) -> None:
        """A prompt of a tenant was not found, or not all of it."""
        listeners = [one for one in self.listeners if one.tenant.mark == mark]
        if listeners:
            space = miss.namespace.hex()
            told = {
                "namespace": space, "key": miss.ref.key.hex(), "depth": miss.found,
                "asked_chunks": miss.asked, "why": miss.why, "request_id": miss.request_id,
                "time_s": round(miss.time_s, 3),
            }  # fmt: skip
            message = Message("miss", space, 1, pack("miss", told))
            for listener in listeners:
                listener.offer(message)

    def lost(self) -> None:
        """The server itself has missed changes; it cannot tell whose."""
        for listener in self.listeners:
            listener.unknown = True
            listener.wake.set()


def pack(kind: str, told: dict[str, Any]) -> bytes:
    """One event as it is sent."""
    return f"event: {kind}\ndata: {json.dumps(told, separators=(',', ':'))}\n\n".encode()


def _messages(changes: Iterable[Change]) -> list[Message]:
    """One message for neighbours that did the same."""
    now = round(time.time(), 3)
    groups: list[list[Change]] = []
    for change in changes:
        last = groups[-1] if groups else []
        if last and len(last) < KEYS_MAX and _alike(last[0], change):
            last.append(change)
        else:
            groups.append([change])
    messages = []
    for group in groups:
        first, space = group[0], group[0].namespace.hex()
        told = {
            "namespace": space,
            "tier": TIER_NAMES[first.tier],
            "bytes": first.slot_bytes,
            "keys": [change.key.hex() for change in group],
            "depths": [change.depth for change in group],
            "time_s": now,
        }
        if not first.entered:
            told["elsewhere"] = first.elsewhere
        messages.append(Message(first.kind, space, len(group), pack(first.kind, told)))
    return messages


def _alike(one: Change, other: Change) -> bool:
    return one[:4] == other[:4] and one.namespace == other.namespace


async def stream(request: web.Request, hub: Hub) -> web.StreamResponse:
    """Answer `GET /v1/events` until the listener goes or the server stops."""
    kinds, namespace = _wanted(request)
    state = state_of(request)
    listener = hub.join(tenant_of(request), kinds, namespace)
    response = web.StreamResponse(
        headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"}
    )
    try:
        await response.prepare(request)
        await _send(response, b"retry: 2000\n" + pack("ready", {"kinds": sorted(kinds)}))
        quiet_since = time.monotonic()
        while not state.draining:
            try:
                await asyncio.wait_for(listener.wake.wait(), WAKE_S)
            except asyncio.TimeoutError:
                if time.monotonic() - quiet_since < HEARTBEAT_S:
                    continue
            await _send(response, listener.take() or b": alive\n\n")
            quiet_since = time.monotonic()
        await response.write_eof()
    except (OSError, asyncio.TimeoutError):
        if request.transport is not None:
            request.transport.abort()
    finally:
        hub.leave(listener)
    return response


async def _send(response: web.StreamResponse, data: bytes) -> None:
    await asyncio.wait_for(response.write(data), STUCK_S)


def _wanted(request: web.Request) -> tuple[frozenset[str], str | None]:
    """The kinds and the namespace that the query asks for. Raises ConfigError, RefusedError."""
    text = request.query.get("kinds")
    kinds = frozenset(KINDS if text is None else text.split(","))
    if not kinds <= set(KINDS):
        raise ConfigError(f"kinds={str(text)[:40]!r}", f"some of {','.join(KINDS)}")
    namespace = request.query.get("namespace")
    if namespace is not None:
        state_of(request).namespace(tenant_of(request), namespace)
    return kinds, None if namespace is None else namespace.lower()
