"""What operators want to see of a server, kept in rings and sketches of fixed size.

Fed by the handlers of requests (found, missed, bytes, latency) and, every SAMPLE_S, by what the
follower has read of the store. What must hold: nothing here grows with time or with
what clients send; feeding it costs microseconds. Lost when the process ends. Used on one thread:
the event loop's.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefixstore.glance import Glance
from prefixstore.journal import Change
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY, TIER_NAMES
from prefixstore.namespace import Namespace
from prefixstore.serve.sketches import Latencies, Top

SAMPLE_S = 2.0
SAMPLES_MAX = 300  # ten minutes
SLOT_S, SLOTS = 5.0, 60  # latencies: five minutes
WINDOW_S = 60.0  # "lately"
TEXTS_MAX = 128  # counted; a text asked for less than once in 128 prompts may be missing
FADE_S, FADE = 600.0, 0.5  # so that the hottest texts are those of the last half hour
MISSES_MAX = 64
ACTIVITY_MAX = 64
CLIENTS_MAX = 256  # tenant and way; the rest is counted as one
OTHERS = ("others", "")
FLOWS = ("stored", "promoted", "written", "removed_memory", "removed_disk")


@dataclass
class Client:
    """Who asked, and how."""

    requests: int = 0
    refused: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    last_s: float = 0.0


@dataclass
class Text:
    """A text by the key of its first chunk."""

    namespace: bytes
    found_tokens: int = 0
    longest_tokens: int = 0


@dataclass
class Miss:
    """A prompt of which not all was found."""

    time_s: float
    tenant: str
    ns: Namespace
    ref: ChunkRef
    found: int  # leading chunks that were there
    asked: int
    request_id: str
    why: str = ""

    @property
    def namespace(self) -> bytes:
        """Its name."""
        return self.ns.name


@dataclass
class Activity:
    """Chunks that did the same thing one after the other."""

    time_s: float
    kind: str
    tier: str
    namespace: bytes
    chunks: int
    num_bytes: int

    def is_like(self, other: Activity) -> bool:
        """Whether it is the same thing happening."""
        return (self.kind, self.tier, self.namespace) == (other.kind, other.tier, other.namespace)


def grouped(changes: Sequence[Change]) -> list[Activity]:
    """Changes as activities. For any thread: thousands at once are not the event loop's work."""
    now = time.time()
    found: list[Activity] = []
    for change in changes:
        one = Activity(
            now, change.kind, TIER_NAMES[change.tier], change.namespace, 1, change.slot_bytes
        )
        if found and found[-1].is_like(one):
            found[-1].chunks += 1
            found[-1].num_bytes += one.num_bytes
        else:
            found.append(one)
    return found


@dataclass
class Sample:
    """The store and the traffic at one moment; counts are totals since the start."""

    time_s: float
    used: dict[str, int]
    found: Counter[str]
    flows: Counter[str]
    received_bytes: int
    sent_bytes: int
    requests: int


@dataclass
class Route:
    """Requests to one route."""

    requests: int = 0
    failed: int = 0
    latencies: Latencies = field(default_factory=lambda: Latencies(SLOT_S, SLOTS))


class Recorder:
    """See the module docstring."""

    def __init__(self) -> None:
        self.started_s = time.time()
        self.requests = 0
        self.routes: dict[str, Route] = {}
        self.clients: dict[tuple[str, str], Client] = {}
        self.found: Counter[str] = Counter()  # chunks of matched prompts: memory, disk, missing
        self.flows: Counter[str] = Counter()
        self.texts: dict[bytes, Text] = {}
        self.top: Top[bytes] = Top(TEXTS_MAX)
        self.misses: deque[Miss] = deque(maxlen=MISSES_MAX)
        self.activity: deque[Activity] = deque(maxlen=ACTIVITY_MAX)
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self.glance: Glance | None = None
        self.tags: dict[bytes, str] = {}  # of the hottest texts
        self._faded_s = time.monotonic()

    # ------------------------------------------------------------------ requests
    def answered(self, route: str, status: int, seconds: float | None) -> None:
        """A request has ended; ``seconds`` is None for a stream, whose length says nothing."""
        one = self.routes.get(route)
        if one is None:
            one = self.routes[route] = Route()
        one.requests += 1
        one.failed += status >= 400
        if seconds is not None:
            one.latencies.add(time.monotonic(), seconds)

    def asked_by(self, tenant: str, way: str, status: int, received: int, sent: int) -> None:
        """Who it was."""
        name = (tenant, way)
        one = self.clients.get(name)
        if one is None:
            if len(self.clients) >= CLIENTS_MAX:
                name = OTHERS
            one = self.clients.setdefault(name, Client())
        self.requests += 1
        one.requests += 1
        one.refused += status >= 400
        one.received_bytes += received
        one.sent_bytes += sent
        one.last_s = time.time()

    def matched(
        self, namespace: bytes, first: ChunkRef, asked: int, tiers: Sequence[int], tokens: int
    ) -> None:
        """A prompt of ``asked`` chunks of ``tokens`` tokens was looked up, and so much found."""
        in_memory, count = tiers.count(MEMORY), len(tiers)
        self.found["memory"] += in_memory
        self.found["disk"] += count - in_memory
        self.found["missing"] += asked - count
        if count:  # a text that is not there is not hot: it is a miss
            gone = self.top.add(first.key)
            if gone is not None:
                self.texts.pop(gone, None)
            text = self.texts.get(first.key)
            if text is None:
                text = self.texts[first.key] = Text(namespace)
            text.found_tokens += count * tokens
            text.longest_tokens = max(text.longest_tokens, count * tokens)

    # ------------------------------------------------------------------ the store
    def changed(self, activities: Sequence[Activity]) -> None:
        """Chunks have come and gone."""
        for one in activities:
            self.flows[f"removed_{one.tier}" if one.kind == "removed" else one.kind] += one.chunks
            last = self.activity[-1] if self.activity else None
            if last is not None and one.time_s - last.time_s < SAMPLE_S and last.is_like(one):
                last.chunks += one.chunks
                last.num_bytes += one.num_bytes
            else:
                self.activity.append(one)

    def sample(self, glance: Glance, received_bytes: int, sent_bytes: int) -> None:
        """Take a sample; ``glance`` is what the store was a moment ago."""
        self.glance = glance
        used = {tier: numbers["used_bytes"] for tier, numbers in glance.tiers.items()}
        self.samples.append(
            Sample(
                round(time.time(), 3),  # as it is told, for who asks for what is newer
                used,
                self.found.copy(),
                self.flows.copy(),
                received_bytes,
                sent_bytes,
                self.requests,
            )
        )
        if time.monotonic() - self._faded_s > FADE_S:
            self._faded_s = time.monotonic()
            for key in self.top.fade(FADE):
                self.texts.pop(key, None)

    def hottest(self, count: int) -> list[tuple[bytes, Text, int]]:
        """Texts asked for most, lately: key, text, about how many prompts."""
        return [(key, self.texts[key], round(n)) for key, n in self.top.most(count)]
