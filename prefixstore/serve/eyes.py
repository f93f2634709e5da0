"""What lets operators see: recorder, follower, listeners, spans, and their part of the application.

Handlers say what they found through `note_match` and `note_get`, in one line each; the middleware
says who asked and how long it took. Everything else is here: it begins when the application starts
and ends before the store is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from aiohttp import web

from prefixstore.errors import ConfigError
from prefixstore.keys import ChunkRef
from prefixstore.ledger import TIER_NAMES
from prefixstore.namespace import Namespace
from prefixstore.serve import overview as overviews
from prefixstore.serve.answering import REQUEST_ID
from prefixstore.serve.auth import LOCAL
from prefixstore.serve.context import STATE, TENANT, tenant_of
from prefixstore.serve.events import Hub, stream
from prefixstore.serve.follower import Follower, News, Publisher, miss_of
from prefixstore.serve.recorder import Recorder
from prefixstore.serve.refusal import RefusedError
from prefixstore.serve.state import State
from prefixstore.serve.tracing import Tracing, describe
from prefixstore.store import Store
from prefixstore.urls import is_http

_LOOKS = frozenset({"/v1/overview", "/v1/events"})  # who looks is no client


@dataclass(frozen=True, slots=True)
class EyesOptions:
    """What is to be seen from outside."""

    kv_events: str | None = None  # an endpoint of ZeroMQ
    kv_events_replay: str | None = None
    kv_events_topic: str = ""
    otlp: str | None = None  # where spans go

    def check(self, insecure: bool) -> None:
        """Raise ConfigError for what must not be."""
        if self.otlp is not None and not is_http(self.otlp):
            raise ConfigError(f"--otlp {self.otlp!r:.80} is no URL", "give http://host:4318")
        if self.kv_events is None and (self.kv_events_replay or self.kv_events_topic):
            raise ConfigError("an option of KV events without --kv-events", "give it an endpoint")
        if self.kv_events is not None:
            from prefixstore.serve.kv_events import check_endpoint

            check_endpoint(self.kv_events, insecure)
            if self.kv_events_replay is not None:
                check_endpoint(self.kv_events_replay, insecure, listens=True)


class Eyes:
    """See the module docstring. Used on the event loop's thread only."""

    def __init__(self, state: State, options: EyesOptions) -> None:
        self.state, self.options = state, options
        self.recorder, self.hub = Recorder(), Hub()
        self.tracing = Tracing(options.otlp)
        self.follower: Follower | None = None
        self._owners: dict[bytes, str] = {}
        self._names = {tenant.mark: tenant.name for tenant in state.tenants.tenants}
        self._names[""] = LOCAL

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Begin with the application, end with it."""
        publisher: Publisher | None = None
        if self.options.kv_events is not None:
            from prefixstore.serve.kv_events import KvEvents

            publisher = KvEvents(self.state.store, self.options)
        self.follower = Follower(self.state.store, self._news, publisher)
        yield
        self.follower.stop()
        self.tracing.close()

    def follow(self, store: Store) -> None:
        """Another store stands for the one that was lost."""
        if self.follower is not None:
            self.follower.follow(store)

    # ------------------------------------------------------------------ what happens
    def _news(self, news: News) -> None:
        recorder, follower = self.recorder, self.follower
        if follower is None:
            return
        recorder.changed(news.activities)
        for mark, changes in groupby(news.changes, lambda c: follower.known_mark(c.namespace)):
            self.hub.changed(mark, list(changes))
        if news.lost:
            self.hub.lost()
        for miss in news.misses:
            recorder.misses.append(miss)
            self.hub.missed(follower.known_mark(miss.namespace), miss)
        if news.glance is not None:
            total = self.state.metrics.total
            recorder.sample(news.glance, total("received_bytes_total"), total("sent_bytes_total"))
            recorder.tags = news.tags
            follower.hottest = [key for key, _, _ in recorder.hottest(overviews.TEXTS_SHOWN)]
            self._owners = {
                name: self._names.get(follower.known_mark(name), "former")
                for name in (one.record.identity.namespace for one in news.glance.spaces)
            }

    def matched(
        self, request: web.Request, ns: Namespace, refs: Sequence[ChunkRef], tiers: Sequence[int]
    ) -> None:
        """A prompt of those chunks was looked up and its leading ones found in ``tiers``."""
        if not refs:
            return
        asked, found = len(refs), len(tiers)
        self.recorder.matched(ns.name, refs[0], asked, tiers, ns.layout.chunk_tokens)
        if found < asked and self.follower is not None:
            tenant = tenant_of(request).name
            request_id = request.get(REQUEST_ID, "")
            self.follower.explain(
                miss_of(tenant, ns, refs[found], found, asked, request_id)
            )  # fmt: skip

    def answered(
        self, request: web.Request, route: str, status: int, seconds: float, sent: int
    ) -> None:
        """A request has ended."""
        timed = None if route == "/v1/events" else seconds
        self.recorder.answered(route, status, timed)
        tenant = request.get(TENANT)
        if tenant is not None and route.startswith("/v1/") and route not in _LOOKS:
            received = request.content_length or 0
            self.recorder.asked_by(tenant.name, _way(request), status, received, sent)

    # ------------------------------------------------------------------ what is asked
    def overview(self, since_s: float) -> dict[str, Any]:
        """The numbers, as JSON."""
        told = overviews.overview(self.recorder, self._owners, since_s)
        told["draining"], told["read_only"] = self.state.draining, self.state.read_only
        told["transfers"] = sum(self.state.transfers.values())
        told["listeners"] = len(self.hub.listeners)
        return told


EYES = web.AppKey("eyes", Eyes)


def _way(request: web.Request) -> str:
    """How somebody is connected: unix, loopback or network, with TLS or not."""
    transport = request.transport
    peer = None if transport is None else transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return "unix"
    assert transport is not None
    tls = " tls" if transport.get_extra_info("ssl_object") is not None else ""
    return ("loopback" if peer[0].startswith("127.") or peer[0] == "::1" else "network") + tls


def note_match(
    request: web.Request,
    ns: Namespace,
    refs: Sequence[ChunkRef],
    prompts: Sequence[int],
    tiers: Sequence[Sequence[int]],
) -> None:
    """A match was answered: of each prompt, in order, so many chunks, found in those tiers."""
    eyes, at = request.app[EYES], 0
    for count, found in zip(prompts, tiers, strict=True):
        eyes.matched(request, ns, refs[at : at + count], found)
        at += count
    metrics = request.app[STATE].metrics
    in_memory = sum(list(found).count(1) for found in tiers)
    there = sum(map(len, tiers))
    describe(request, asked_chunks=len(refs), found_chunks=there)
    for tier, chunks in ((1, in_memory), (2, there - in_memory), (0, len(refs) - there)):
        if chunks:
            metrics.add("matched_chunks_total", chunks, tier=TIER_NAMES.get(tier, "miss"))


def note_get(
    request: web.Request, ns: Namespace, refs: Sequence[ChunkRef], places: Sequence[object]
) -> None:
    """A get was answered: chunks without a place were not there."""
    if None not in places:
        return
    eyes, first = request.app[EYES], places.index(None)
    if eyes.follower is not None:
        tenant, request_id = tenant_of(request).name, request.get(REQUEST_ID, "")
        eyes.follower.explain(
            miss_of(tenant, ns, refs[first], first, len(refs), request_id)
        )  # fmt: skip


async def events(request: web.Request) -> web.StreamResponse:
    """What happens to the tenant's chunks."""
    return await stream(request, request.app[EYES].hub)


async def show_overview(request: web.Request) -> web.Response:
    """The numbers of the page."""
    if not tenant_of(request).is_local:
        raise RefusedError(403, "forbidden", "this is for the tenant 'local'", "use its token")
    text = request.query.get("since_s", "0")
    try:
        since_s = float(text)
    except ValueError:
        raise ConfigError(f"since_s={text[:20]!r}", "give Unix seconds") from None
    told = request.app[EYES].overview(since_s)
    return web.json_response(told, headers={"Cache-Control": "no-store"})
