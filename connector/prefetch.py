"""Prefetching: what a waiting request will load from a server is brought nearer while it waits.

A request that is scheduled at once gains nothing by it, so nothing is fetched before DELAY_S have
passed, and no more once its load has begun. With a folder in front of the server the chunks are
copied there; without one the server is asked to have them in its memory. Failures are nothing: the
load reads from the server what has not come.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from prefixstore.client.namespace import RemoteNamespace
from prefixstore.fronted import REMOTE, FrontedNamespace
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef, KeyChain
from prefixstore.ledger import DISK

logger = logging.getLogger("vllm.prefixstore")

DELAY_S = 0.02
QUEUE_MAX = 256


class _Wish(NamedTuple):
    namespace: FrontedNamespace | RemoteNamespace
    refs: list[ChunkRef]
    wanted: Callable[[], bool]
    not_before: float


class Prefetcher:
    """See the module docstring. One thread, which is started when there is something to do."""

    def __init__(self, counted: Callable[[int], None]) -> None:
        self._counted = counted
        self._queue: queue.Queue[_Wish | None] = queue.Queue(QUEUE_MAX)
        self._thread: threading.Thread | None = None

    def offer(
        self,
        namespace: NamespaceLike,
        chain: KeyChain,
        tiers: Sequence[int],
        wanted: Callable[[], bool],
    ) -> None:
        """The first chunks of a request and where they are; fetched as long as they are
        ``wanted``."""
        if isinstance(namespace, FrontedNamespace):
            far = REMOTE
        elif isinstance(namespace, RemoteNamespace):
            far = DISK
        else:
            return
        if far not in tiers or self._queue.full():
            return
        refs = chain.refs(0, len(tiers))
        chosen = [ref for ref, tier in zip(refs, tiers, strict=True) if tier == far]
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="prefixstore-prefetch", daemon=True
            )
            self._thread.start()
        self._queue.put(_Wish(namespace, chosen, wanted, time.monotonic() + DELAY_S))

    def _run(self) -> None:
        while (wish := self._queue.get()) is not None:
            time.sleep(max(0.0, wish.not_before - time.monotonic()))
            if not wish.wanted():
                continue
            try:
                if isinstance(wish.namespace, FrontedNamespace):
                    self._counted(wish.namespace.prefetch(wish.refs, wish.wanted))
                else:
                    wish.namespace.prefetch(wish.refs)
            except Exception as error:  # thread loop: the load will do without it
                logger.info("prefixstore: nothing prefetched: %s", error)

    def close(self) -> None:
        """End the thread when it is done with what it does."""
        if self._thread is not None and not self._queue.full():
            self._queue.put(None)
