"""Prefetching: what a waiting request will load from disk or a server is brought nearer meanwhile.

A request that is scheduled at once gains nothing by it, so nothing is fetched before DELAY_S have
passed, and no more once its load has begun. From a folder's disk chunks come to its memory tier, in
order. With a folder in front of a server the chunks are copied there; without one the server is
asked to have them in its memory. Failures are nothing: the load reads from far what has not come.
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
from prefixstore.namespace import Namespace
from prefixstore.promote import promote_in_order

logger = logging.getLogger("vllm.prefixstore")

DELAY_S = 0.02
QUEUE_MAX = 256


class _Wish(NamedTuple):
    namespace: Namespace | FrontedNamespace | RemoteNamespace
    on_disk: list[ChunkRef]
    remote: list[ChunkRef]
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
        if not isinstance(namespace, Namespace | FrontedNamespace | RemoteNamespace):
            return
        refs = chain.refs(0, len(tiers))
        on_disk, remote = (
            [ref for ref, tier in zip(refs, tiers, strict=True) if tier == wanted_tier]
            for wanted_tier in (DISK, REMOTE)
        )
        if not (on_disk or remote) or self._queue.full():
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="prefixstore-prefetch", daemon=True
            )
            self._thread.start()
        not_before = time.monotonic() + DELAY_S
        self._queue.put(_Wish(namespace, on_disk, remote, wanted, not_before))

    def _run(self) -> None:
        while (wish := self._queue.get()) is not None:
            time.sleep(max(0.0, wish.not_before - time.monotonic()))
            if not wish.wanted():
                continue
            try:
                self._fetch(wish)
            except Exception as error:  # thread loop: the load will do without it
                logger.info("prefixstore: nothing prefetched: %s", error)

    def _fetch(self, wish: _Wish) -> None:
        namespace = wish.namespace
        if isinstance(namespace, RemoteNamespace):  # the disk is the server's
            namespace.prefetch(wish.on_disk)
            return
        folder = namespace if isinstance(namespace, Namespace) else namespace.front
        keys = [ref.key for ref in wish.on_disk]
        self._counted(promote_in_order(folder.store, keys, wish.wanted))
        if isinstance(namespace, FrontedNamespace) and wish.remote:
            self._counted(namespace.prefetch(wish.remote, wish.wanted))

    def close(self) -> None:
        """End the thread when it is done with what it does."""
        if self._thread is not None and not self._queue.full():
            self._queue.put(None)
