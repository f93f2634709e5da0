"""The connector's grip on the store: opened in the background, lost and found again, bypassed.

What must hold: nothing here ever blocks an engine step or raises into it. With no usable store the
engine serves; a store that stalls is left alone for a while, and each time it stalls again for
twice as long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

from connector.options import EngineOptions
from prefixstore.behind import Behind
from prefixstore.client.token import read_token
from prefixstore.codec import of_pool
from prefixstore.fronted import FrontedStore
from prefixstore.interface import StoreLike, open_store
from prefixstore.reopening import Reopener

logger = logging.getLogger("vllm.prefixstore")

FIRST_OPEN_WAIT_S = 5.0
RETRY_S = 5.0
BYPASS_GROWTH_MAX = 8
SERVER_RETRY_S = 1.0  # one that comes back is found by then; asking it costs next to nothing
SERVER_BYPASS_S_MAX = 2.0
SERVER_DEADLINE_S = 2.0  # of a call: so long a thread may hang on a server that has frozen


class StoreHandle:
    """The store of one engine process, if there is one now. Thread-safe."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._store: StoreLike | None = None
        self._behind: Behind | None = None
        self._copies: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._bypass_until = 0.0
        most = SERVER_BYPASS_S_MAX if options.url else float("inf")
        self._bypass_s = self._first_bypass_s = min(options.bypass_s, most)
        self._bypass_s_max = min(BYPASS_GROWTH_MAX * options.bypass_s, most)
        self._closed = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixstore-open", daemon=True)
        self._thread.start()
        # Opening takes milliseconds. Waiting for it here spares the first requests a miss; a
        # folder on a dead disk costs the start this once and no request anything.
        self._opened.wait(FIRST_OPEN_WAIT_S)

    @property
    def is_remote(self) -> bool:
        """Whether the store is a server's, which names the namespaces itself."""
        return bool(self._options.url)

    @property
    def named(self) -> str:
        """Which it is, for the log."""
        return "no store yet" if self._store is None else f"store {self._options.where}"

    def get(self) -> StoreLike | None:
        """The store, unless there is none, it was lost, or it is being bypassed."""
        store = self._store
        if store is None or not store.usable or time.monotonic() < self._bypass_until:
            return None
        return store

    def take_copies(self) -> dict[str, int]:
        """Chunks copied from the folder to a pool behind it since the last call, by what became of
        them (`Behind.counted`); of those that wait, how many more or less they are."""
        store = self._store
        if not isinstance(store, FrontedStore) or store.behind is None:
            return {}
        now, before = store.behind.counted(), self._copies
        if store.behind is not self._behind:  # of a store opened anew, and it counts anew
            before = Counter(waiting=before["waiting"])
        self._behind, self._copies = store.behind, now
        return {f"copies_{name}": n for name in now | before if (n := now[name] - before[name])}

    def stalled(self, what: str) -> None:
        """The store did not answer in time: leave it alone for a while."""
        now = time.monotonic()
        if now < self._bypass_until:
            return
        self._bypass_until = now + self._bypass_s
        logger.warning(
            "prefixstore: %s stalled for more than %d ms; the store is bypassed for %.0f s",
            what, self._options.stall_ms, self._bypass_s,
        )  # fmt: skip
        self._bypass_s = min(2 * self._bypass_s, self._bypass_s_max)

    def answered(self) -> None:
        """The store answered in time: forget earlier stalls."""
        self._bypass_s = self._first_bypass_s

    def close(self) -> None:
        """Let go of the store; what is queued is written first, within its deadline."""
        self._closed.set()
        self._let_go()

    def _let_go(self) -> None:
        """Once of each store: others of the process may have the same open."""
        store = self._take()
        if store is not None:
            store.close()

    def _take(self) -> StoreLike | None:
        with self._lock:
            store, self._store = self._store, None
        return store

    def _run(self) -> None:
        reopener = Reopener(self._open, self._options.where, _warn)
        while not self._closed.is_set():
            store = self._store
            if store is None or store.gone:
                self._store = reopener.again(self._take())
                self._opened.set()
            self._closed.wait(SERVER_RETRY_S if self._options.url else RETRY_S)
        self._let_go()  # what was being opened when it was closed

    def _open(self) -> StoreLike:
        options = self._options
        tiers: dict[str, Any] = {
            "memory_bytes": options.memory,
            "disk_bytes": options.disk,
            "memory_dir": options.memory_dir,
        }
        if not options.url:
            return open_store(f"dir:{options.dir}", **tiers)
        token = read_token(options.token_file) if options.token_file else ""
        store = open_store(
            options.url, token=token, deadline_s=SERVER_DEADLINE_S,
            ca_file=options.ca_file, front=options.dir, codec=of_pool(options.codec),
            **(tiers if options.dir else {}),
        )  # fmt: skip
        # What is wrong with the address, the token or the certificate is said at the start.
        with ExitStack() as unless_it_answers:
            unless_it_answers.callback(store.close)
            store.check_open()
            unless_it_answers.pop_all()
        return store


def _warn(what: str) -> None:
    logger.warning("prefixstore: %s", what)
