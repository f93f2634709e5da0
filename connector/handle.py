"""The connector's grip on the store: opened in the background, lost and found again, bypassed.

What must hold: nothing here ever blocks an engine step or raises into it. With no usable store the
engine serves; a store that stalls is left alone for a while, and each time it stalls again for
twice as long.
"""

from __future__ import annotations

import logging
import threading
import time

from connector.options import EngineOptions
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

FIRST_OPEN_WAIT_S = 5.0
RETRY_S = 5.0
BYPASS_GROWTH_MAX = 8


class StoreHandle:
    """The store of one engine process, if there is one now. Thread-safe."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._store: Store | None = None
        self._bypass_until = 0.0
        self._bypass_s = options.bypass_s
        self._complained = ""
        self._closed = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixstore-open", daemon=True)
        self._thread.start()
        # Opening takes milliseconds. Waiting for it here spares the first requests a miss; a
        # folder on a dead disk costs the start this once and no request anything.
        self._opened.wait(FIRST_OPEN_WAIT_S)

    def get(self) -> Store | None:
        """The store, unless there is none, it was lost, or it is being bypassed."""
        store = self._store
        if store is None or store.gone or time.monotonic() < self._bypass_until:
            return None
        return store

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
        self._bypass_s = min(2 * self._bypass_s, BYPASS_GROWTH_MAX * self._options.bypass_s)

    def answered(self) -> None:
        """The store answered in time: forget earlier stalls."""
        self._bypass_s = self._options.bypass_s

    def close(self) -> None:
        """Let go of the store; what is queued is written first, within its deadline."""
        self._closed.set()
        if self._store is not None:
            self._store.close()
            self._store = None

    def _run(self) -> None:
        while not self._closed.is_set():
            store = self._store
            if store is None or store.gone:
                self._store = self._try_open()
                self._opened.set()
                if store is not None and self._store is not None:
                    store.close()
            self._closed.wait(RETRY_S)

    def _try_open(self) -> Store | None:
        options = self._options
        try:
            store = Store.open(
                options.dir,
                memory_bytes=options.memory,
                disk_bytes=options.disk,
                memory_dir=options.memory_dir,
            )
        except Exception as error:  # thread loop: whatever is wrong, the engine serves without it
            if str(error) != self._complained:
                logger.warning("prefixstore: serving without the store: %s", error)
                self._complained = str(error)
            return None
        if self._complained:
            logger.warning("prefixstore: the store %s is usable again", options.dir)
            self._complained = ""
        return store
