"""Look-ups: what of a prompt the store holds, found and leased on a thread of its own.

A look-up reads two indexes and takes a lease. All of that is memory in the usual case, but an index
page may have to come from disk and the lease needs the writer lock, so the scheduler's thread only
asks, and waits no longer than a few milliseconds a step and ``stall_ms`` a request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from connector import compat
from connector.handle import StoreHandle
from prefixstore.errors import StoreError
from prefixstore.identity import ModelIdentity
from prefixstore.keys import KeyChain
from prefixstore.layout import Layout
from prefixstore.namespace import Lease, Match, Namespace
from prefixstore.segments import Segment
from prefixstore.staleness import staleness_of
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

WAIT_S = 0.005  # a step; a look-up takes 0.1 to 2 ms, and waiting beats another scheduler round
QUEUE_S = 2.0  # longest time behind other look-ups
FRESH_S = 20.0  # an older answer is asked for again: its lease may be near its end
NAMESPACES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """The answer: what is stored, and the leases on it."""

    namespace: Namespace
    match: Match
    leases: tuple[Lease, ...]
    segments: tuple[Segment, ...] = ()
    staleness: Mapping[bytes, bytes] = field(default_factory=dict)  # of their chunks: float16

    def miss(self, beyond: int) -> str:
        """The count a request goes to that loads nothing, ``beyond`` being chunks it could load."""
        if self.match.num_chunks == 0:
            return "miss_absent"
        return "miss_not_needed" if beyond == 0 else "miss_slower_to_load"


@dataclass(frozen=True, slots=True)
class Search:
    """Segments are wanted too: of these prompt tokens, at least so many each."""

    tokens: list[int]
    min_tokens: int
    want_staleness: bool


@dataclass
class Lookup:
    """One request's look-up: not begun, under way, or answered.

    ``failed``: the name of the count of a look-up that came to nothing. ``declined``: the answer is
    known, its lease is given up, nothing will be loaded on its account.
    """

    future: Future[Found] | None = None
    num_tokens: int = -1
    began_at: float = 0.0
    started_at: float | None = None  # by the thread; others may be before it
    waited_s: float = 0.0
    found: Found | None = None
    declined: bool = False
    failed: str = ""

    def is_for(self, num_tokens: int) -> bool:
        """Whether it was begun for a prompt of that length, and not too long ago."""
        return self.num_tokens == num_tokens and time.monotonic() - self.began_at <= FRESH_S


class Lookups:
    """Begins, awaits and ends look-ups. All methods run on the scheduler's thread."""

    def __init__(self, handle: StoreHandle, layout: Layout, stall_s: float) -> None:
        self._handle, self._layout = handle, layout
        self._stall_s = stall_s
        self._wait_left_s = WAIT_S
        self._namespaces: dict[bytes, Namespace] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefixstore-lookup")

    def new_step(self) -> None:
        """A scheduler step begins: it may wait anew."""
        self._wait_left_s = WAIT_S

    def know(self, identity: ModelIdentity) -> None:
        """Have an identity entered in the store, which workers need before they can save."""
        store = self._handle.get()
        known = self._namespaces.get(identity.namespace)
        if store is not None and (known is None or known.store is not store):
            self._pool.submit(self._namespace, store, identity)

    def begin(
        self,
        lookup: Lookup,
        identity: ModelIdentity,
        chain: KeyChain,
        tokens: int,
        search: Search | None = None,
    ) -> None:
        """Ask for all chunks of a chain, and for segments behind them. What was asked before is let
        go."""
        self.end(lookup)
        lookup.num_tokens, lookup.began_at, lookup.started_at = tokens, time.monotonic(), None
        store = self._handle.get()
        if store is not None and len(chain):
            arguments = store, identity, chain, len(chain), search
            lookup.future = self._pool.submit(self._started, lookup, *arguments)

    def _started(self, lookup: Lookup, *arguments: Any) -> Found:
        lookup.started_at = time.monotonic()
        return self._run(*arguments)

    def _run(
        self,
        store: Store,
        identity: ModelIdentity,
        chain: KeyChain,
        keys: int,
        search: Search | None,
    ) -> Found:
        try:
            namespace = self._namespace(store, identity)
            refs = chain.refs(0, keys)
            match = namespace.match(refs)
            leases = []
            if match.num_chunks:
                lease, held = namespace.lease(refs[: match.num_chunks], match.tiers)
                leases.append(lease)
                match = Match(match.tiers[:held], match.chunk_tokens)
            if search is None or len(search.tokens) - match.num_tokens < search.min_tokens:
                return Found(namespace, match, tuple(leases))
            segments = namespace.find_segments(
                search.tokens, chain.salt, match.num_tokens, search.min_tokens, chain.items
            )
            refs = [ref for segment in segments for ref in segment.refs]
            if refs:
                tiers = [tier for segment in segments for tier in segment.tiers]
                lease, _ = namespace.lease(refs, tiers)
                leases.append(lease)  # a chunk it does not hold may be gone when it is read
            known = staleness_of(namespace, refs) if search.want_staleness else []
            staleness = {
                ref.key: value.tobytes()
                for ref, value in zip(refs, known, strict=False)
                if value is not None
            }
            return Found(namespace, match, tuple(leases), tuple(segments), staleness)
        except StoreError:
            raise
        except Exception as error:  # thread loop: whatever is wrong with a store is a miss
            raise StoreError(f"{type(error).__name__}: {error}") from error

    def _namespace(self, store: Store, identity: ModelIdentity) -> Namespace:
        known = self._namespaces.get(identity.namespace)
        if known is None or known.store is not store:
            if len(self._namespaces) >= NAMESPACES_MAX:
                self._namespaces.clear()
            compat.explain_new_namespace(store, identity)
            known = store.namespace(identity, self._layout)
            self._namespaces[identity.namespace] = known
        return known

    def answer(self, lookup: Lookup) -> Found | None:
        """The answer. None while it is under way (``future`` is set) or if there is none."""
        if lookup.found is not None or lookup.future is None:
            return lookup.found
        asked_at = time.monotonic()
        try:
            lookup.found = lookup.future.result(self._wait_left_s)
        except FutureTimeout:
            # One that waits behind others' searches is late too, but that is not the store's fault.
            since = lookup.started_at or lookup.began_at + QUEUE_S
            if asked_at - since > self._stall_s:
                self._handle.stalled("a look-up")
                self.end(lookup)
                lookup.failed = "miss_stalled"
            return None
        except StoreError as error:
            logger.warning("prefixstore: look-up failed: %s", error)
            self.end(lookup)
            lookup.failed = "miss_error"
            return None
        finally:
            self._wait_left_s = max(0.0, self._wait_left_s - (time.monotonic() - asked_at))
        lookup.waited_s = time.monotonic() - lookup.began_at
        self._handle.answered()
        return lookup.found

    def decline(self, lookup: Lookup) -> None:
        """Keep the answer, end its lease: nothing will be loaded on its account."""
        lookup.declined = True
        if lookup.future is not None:
            lookup.future.add_done_callback(_release)
            lookup.future = None

    def end(self, lookup: Lookup) -> None:
        """Let go of an answer, or of the question; the lease ends."""
        future = lookup.future
        lookup.future, lookup.found, lookup.num_tokens = None, None, -1
        lookup.declined, lookup.waited_s = False, 0.0
        if future is not None and not future.cancel():
            future.add_done_callback(_release)

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _release(future: Future[Found]) -> None:
    if future.cancelled() or future.exception() is not None:
        return
    found = future.result()
    for lease in found.leases:
        try:
            found.namespace.release(lease)
        except StoreError:
            return  # the store is closed or stalled: the lease ends by itself
