"""What a pool holds, found out in the background by a process that looks things up in it.

Two threads. One lists the names, again and again: of these come `known`, so that most misses cost
no round trip, and a `mirror` for each model whose segments are asked for. The other hears of what
was put since, where the engine can tell. What must hold:

- A chunk that another process put is overlooked until it was heard of, which takes milliseconds, or
  listed: PERIOD_S and the time of a listing; AGE_MAX_S at most, whatever happens.
- Listing takes a tenth of the time at most, however many names there are.
- Segments are found once the trailers of their chunks have been read: after the first listing, or
  when they were heard of.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prefixstore.errors import StoreError
from prefixstore.keys import KEY_BYTES
from prefixstore.pool.known import KEYS_MAX, Known, hashes_of
from prefixstore.pool.mirror import Mirror

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace
    from prefixstore.pool.store import PooledStore

logger = logging.getLogger("prefixstore")
PERIOD_S, NEWS_PERIOD_S = 5.0, 30.0  # between listings; of an engine that tells news
AGE_MAX_S = 60.0
SHARE = 10  # a listing is followed by a pause of so many times its time
HEARD_MAX_S = 2.0  # news that were last asked for so long ago are none
HEAR_S = 0.5  # how long is listened for at a time
AFTER_TROUBLE_S = 1.0
NEWS_MAX = 16384  # messages heard that wait for a mirror; the rest is listed later
JOIN_S = 5.0
_HEX = 2 * KEY_BYTES


class Scout:
    """See the module docstring. The threads are started with it. Thread-safe."""

    def __init__(self, store: PooledStore) -> None:
        self._store, self._backend = store, store.backend
        self._known = Known(AGE_MAX_S)
        self._is_filter = self._backend.tells_news or self._backend.lists_late
        self._mirrors: dict[bytes, Mirror | None] = {}  # None: wanted
        self._namespaces: dict[bytes, PooledNamespace] = {}
        self._heard: list[tuple[bytes, Sequence[bytes], bool]] = []  # whether they are there
        self._heard_at = 0.0
        self._hears_since = float("inf") if self._backend.tells_news else 0.0
        self._wake = threading.Condition()
        self._closed = self._hurry = False
        work = [self._run] + [self._hear] * self._backend.tells_news
        self._threads = [
            threading.Thread(target=one, name=f"prefixstore{one.__name__}", daemon=True)
            for one in work
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------ asked by callers
    def may_have(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool] | None:
        """See `Known.may_have`."""
        if not self._is_filter:
            return None
        if self._backend.tells_news and time.monotonic() > self._heard_at + HEARD_MAX_S:
            return None
        return self._known.may_have(namespace, keys)

    def put(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """This process put chunks itself."""
        self._news(namespace, list(keys))

    def removed(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """This process removed chunks itself."""
        self._have_mirrored(namespace, list(keys), there=False)

    def mirror(self, ns: PooledNamespace) -> Mirror | None:
        """That of a model; None until there is one, which is soon."""
        with self._wake:
            if ns.name not in self._mirrors:
                self._mirrors[ns.name], self._namespaces[ns.name] = None, ns
                self._hurry = True
                self._wake.notify_all()
            return self._mirrors[ns.name]

    def close(self) -> None:
        """End the threads."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._threads[0].join(JOIN_S)  # the other one has nothing to lose
        for mirror in self._mirrors.values():
            if mirror is not None and not self._threads[0].is_alive():
                mirror.close()

    # ------------------------------------------------------------------ the thread that lists
    def _run(self) -> None:
        pause_s = 0.0
        while self._pause(pause_s):
            began_s = time.monotonic()
            try:
                if self._is_filter or self._namespaces:
                    self._list()
                period_s = NEWS_PERIOD_S if self._backend.tells_news else PERIOD_S
                pause_s = max(period_s, SHARE * (time.monotonic() - began_s))
            except Exception as error:  # thread loop: the engine is asked as long as it fails
                logger.info("prefixstore: %s was not listed: %s", self._backend.url, error)
                pause_s = max(AFTER_TROUBLE_S, SHARE * (time.monotonic() - began_s))

    def _pause(self, pause_s: float) -> bool:
        """Wait, and enter what was heard of meanwhile; whether to go on."""
        end = time.monotonic() + pause_s
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closed or self._hurry or self._heard, end - time.monotonic()
                )
                heard, self._heard = self._heard, []
                hurry, self._hurry = self._hurry, False
                if self._closed:
                    return False
            try:
                for name, keys, there in heard:
                    if (mirror := self._mirrors.get(name)) is None:
                        continue
                    if there:
                        mirror.add(keys, self._store.deadline_s)
                    else:
                        mirror.take_out(keys)
            except StoreError as error:
                logger.info("prefixstore: %s: not mirrored: %s", self._backend.url, error)
            if hurry or time.monotonic() >= end:
                return True

    def _list(self) -> None:
        began_s = time.monotonic()
        self._known.listing_begins()
        found: dict[bytes, bytearray] = {}
        total = 0
        prefix = f"{self._store.prefix}/"
        for names in self._store.names(prefix):
            if self._closed:
                return
            for name in names:
                namespace, _, key = name[len(prefix) :].partition("/")
                if len(namespace) == _HEX and len(key) == _HEX:
                    found.setdefault(_unhex(namespace), bytearray()).extend(_unhex(key))
                    total += 1
            if total > KEYS_MAX:
                raise StoreError(f"more than {KEYS_MAX} chunks")
        hashes = {name: np.sort(hashes_of([keys])) for name, keys in found.items()}
        if self._hears_since <= began_s:  # else something may be neither listed nor heard of
            self._known.listed(hashes, began_s)
        for ns in list(self._namespaces.values()):
            listed = bytes(found.get(ns.name, b""))
            there = [listed[at : at + KEY_BYTES] for at in range(0, len(listed), KEY_BYTES)]
            mirror = self._mirrors[ns.name] or Mirror(ns)
            self._mirrors[ns.name] = mirror
            mirror.update(there, self._store.deadline_s)

    # ------------------------------------------------------------------ the thread that hears
    def _hear(self) -> None:
        position = ""
        while not self._closed:
            try:
                position, messages = self._backend.hear(
                    self._store.news_topic, position, wait_s=HEAR_S
                )
                for message in messages:
                    name, keys = message[:KEY_BYTES], message[KEY_BYTES:]
                    places = range(0, len(keys) - KEY_BYTES + 1, KEY_BYTES)
                    self._news(name, [keys[at : at + KEY_BYTES] for at in places])
                self._heard_at = time.monotonic()
                if self._heard_at < self._hears_since:
                    with self._wake:
                        self._hears_since, self._hurry = self._heard_at, True
                        self._wake.notify_all()
            except Exception as error:  # thread loop: without news the engine is asked
                logger.info("prefixstore: no news of %s: %s", self._backend.url, error)
                self._hears_since, position = float("inf"), ""
                self._known.forget()
                with self._wake:
                    self._wake.wait_for(lambda: self._closed, AFTER_TROUBLE_S)

    def _news(self, namespace: bytes, keys: Sequence[bytes]) -> None:
        self._known.add(namespace, keys)
        self._have_mirrored(namespace, keys, there=True)

    def _have_mirrored(self, namespace: bytes, keys: Sequence[bytes], *, there: bool) -> None:
        with self._wake:
            if self._mirrors.get(namespace) is not None and len(self._heard) < NEWS_MAX:
                self._heard.append((namespace, keys, there))
                self._wake.notify_all()


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return bytes(KEY_BYTES)  # nobody's
