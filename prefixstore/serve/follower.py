"""Following the store: a thread that looks several times a second at what has come and gone.

It reads the journal that all processes of the host write, so what engines with the folder open
store, promote and evict is seen like what comes over the network; it finds out why prompts were not
found; and it hands all of it to the event loop. What must hold: a store that stalls holds up this
thread only; what waits for it is bounded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from prefixstore import owned
from prefixstore.errors import StoreError
from prefixstore.glance import Glance, Watcher
from prefixstore.journal import Change
from prefixstore.keys import ChunkRef
from prefixstore.namespace import Namespace
from prefixstore.rows import readable
from prefixstore.serve.auth import MARK_FIELD
from prefixstore.serve.recorder import SAMPLE_S, Activity, Miss, grouped
from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
TICK_S = 0.25
UNEXPLAINED_MAX = 64  # misses that wait to be explained; more are counted only
JOIN_S = 5.0


@dataclass
class News:
    """What one look found."""

    changes: list[Change] = field(default_factory=list)
    activities: list[Activity] = field(default_factory=list)  # the same, for the recorder
    lost: int = 0  # changes that were overwritten before they were seen
    misses: list[Miss] = field(default_factory=list)
    glance: Glance | None = None
    tags: dict[bytes, str] = field(default_factory=dict)


class Publisher(Protocol):
    """Who else is to be told of changes."""

    def publish(self, changes: Sequence[Change], lost: int) -> None:
        """Tell of changes."""

    def follow(self, store: Store) -> None:
        """Another store stands for the one that was lost."""

    def close(self) -> None:
        """Tell no more."""


class Follower:
    """See the module docstring."""

    def __init__(
        self,
        store: Store,
        deliver: Callable[[News], None],
        publisher: Publisher | None = None,
    ) -> None:
        self._watcher, self._deliver, self._publisher = Watcher(store), deliver, publisher
        self.hottest: list[bytes] = []  # whose tags are wanted; replaced as a whole by others
        self._unexplained: deque[Miss] = deque()
        self._marks: dict[bytes, str] = {}
        self._next_sample = 0.0
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="prefixstore-follower", daemon=True)
        self._thread.start()

    def follow(self, store: Store) -> None:
        """Another store stands for the one that was lost. The same index, or one begun anew."""
        self._watcher.store = store
        if self._publisher is not None:
            self._publisher.follow(store)

    def explain(self, miss: Miss) -> None:
        """Find out why, soon."""
        if len(self._unexplained) < UNEXPLAINED_MAX:
            self._unexplained.append(miss)

    def known_mark(self, namespace: bytes) -> str:
        """The mark of the tenant whose namespace it is; "" is `local`. For any thread: of what was
        delivered it is known."""
        return self._marks.get(namespace, "unknown")  # which is nobody's mark

    def _learn(self, namespace: bytes) -> str:
        mark = self._marks.get(namespace)
        if mark is None:
            record = self._watcher.record(namespace)
            if record is None:
                return "unknown"
            mark = str(json.loads(record.identity.forward).get(MARK_FIELD, ""))
            self._marks[namespace] = mark
        return mark

    def stop(self) -> bool:
        """End the thread; whether it has ended."""
        self._stop.set()
        self._thread.join(JOIN_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                news = self._look()
            except Exception:  # thread loop: a look that fails must not end the others
                logger.exception("the store could not be followed")
                self._stop.wait(SAMPLE_S)
                continue
            if news is not None:
                with suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._deliver, news)
            self._stop.wait(TICK_S)
        if self._publisher is not None:
            self._publisher.close()

    def _look(self) -> News | None:
        news = News()
        try:
            news.changes, news.lost = self._watcher.changes()
            news.activities = grouped(news.changes)
            for namespace in {change.namespace for change in news.changes}:
                self._learn(namespace)
            while self._unexplained:
                miss = self._unexplained.popleft()
                self._learn(miss.namespace)
                miss.why = self._why(miss)
                news.misses.append(miss)
            if time.monotonic() >= self._next_sample:
                self._next_sample = time.monotonic() + SAMPLE_S
                news.glance = self._watcher.glance()
                for used in news.glance.spaces:
                    self._learn(used.record.identity.namespace)
                news.tags = self._tags(self.hottest)
            if self._publisher is not None:
                self._publisher.publish(news.changes, news.lost)
        except StoreError:  # closed or replaced: /readyz says so
            self._stop.wait(SAMPLE_S)
            return None
        there = news.changes or news.lost or news.misses or news.glance
        return news if there else None

    def _why(self, miss: Miss) -> str:
        ref = miss.ref
        why = owned.why_missing(miss.ns, ref)
        if not ref.preimage and why == "other_content":
            why = "stored"  # asked for by its key alone: there is nothing to compare
        return "stored_since" if why == "stored" else why

    def _tags(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        store, tags = self._watcher.store, {}
        with store.live.lookup("chunk") as in_memory, store.index.lookup("chunk") as on_disk:
            for key in keys:
                data = in_memory(key) or on_disk(key)
                row = None if data is None else readable(data)
                if row is not None and row.tag and self._learn(row.namespace) == "":
                    tags[key] = row.tag.decode(errors="replace")
        return tags


def miss_of(
    tenant: str, ns: Namespace, ref: ChunkRef, found: int, asked: int, request_id: str
) -> Miss:
    """A miss that happens now."""
    return Miss(time.time(), tenant, ns, ref, found, asked, request_id)
