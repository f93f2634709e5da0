"""Look-ups: what of a prompt the store holds, found and leased on a thread of its own.

A look-up reads two indexes and asks for a lease. All of that is memory in the usual case, but an
index page may have to come from disk, and a server's answer from afar, so the scheduler's thread
only asks, and waits no longer than a few milliseconds a step and ``stall_ms`` a request. A folder's
lease is not waited for: it takes as long as the look-up, and a load checks what it reads anyway.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from connector.found import Found, Search, StatesAsked
from connector.handle import StoreHandle
from connector.namespaces import Namespaces
from connector.prefetch import Prefetcher
from connector.states import StateForm
from connector.tally import Tally
from prefixstore.client.about import about
from prefixstore.errors import StoreClosedError, StoreError
from prefixstore.identity import ModelIdentity
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.keys import KeyChain
from prefixstore.layout import Layout
from prefixstore.namespace import MISS, Lease, Match

logger = logging.getLogger("vllm.prefixstore")

WAIT_S = 0.005  # a step; a look-up takes 0.1 to 2 ms, and waiting beats another scheduler round
QUEUE_S = 2.0  # longest time behind other look-ups
FRESH_S = 20.0  # an older answer is asked for again: its lease may be near its end
PAUSE_S = 0.002


@dataclass
class Lookup:
    """One request's look-up: not begun, under way, or answered.

    ``failed``: the name of the count of a look-up that came to nothing. ``declined``: the answer is
    known, its lease is given up, nothing will be loaded on its account. ``taken``: it is loaded.
    """

    request_id: str = ""
    traceparent: str = ""
    future: Future[Found] | None = None
    serial: int = 0  # of the question; the object serves for one after the other
    num_tokens: int = -1
    began_at: float = 0.0
    started_at: float | None = None  # by the thread; others may be before it
    waited_s: float = 0.0
    found: Found | None = None
    declined: bool = False
    taken: bool = False
    failed: str = ""

    def is_for(self, num_tokens: int) -> bool:
        """Whether it was begun for a prompt of that length, and not too long ago."""
        return self.num_tokens == num_tokens and time.monotonic() - self.began_at <= FRESH_S


class Lookups:
    """Begins, awaits and ends look-ups. All methods run on the scheduler's thread."""

    def __init__(
        self,
        handle: StoreHandle,
        layout: Layout,
        stall_s: float,
        counts: Tally | None = None,
        states: StateForm | None = None,
    ) -> None:
        self._handle = handle
        self._stall_s = stall_s
        self._wait_left_s = WAIT_S
        counts = counts or Tally()
        self._prefetcher = Prefetcher(lambda chunks: counts.add("chunks_prefetched", chunks))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefixstore-lookup")
        self._namespaces = Namespaces(handle, layout, self._pool, stall_s)
        self._states = states
        if states is not None:
            self._of_states = Namespaces(handle, states.layout, self._pool, stall_s, beside=True)
        # Apart, because releasing a server's lease is a call, which must hold up no look-up.
        self._releasing = ThreadPoolExecutor(1, thread_name_prefix="prefixstore-release")

    def new_step(self) -> None:
        """A scheduler step begins: it may wait anew."""
        self._wait_left_s = WAIT_S

    def names_of(self, identity: ModelIdentity) -> list[bytes]:
        """What the keys of this model's KV begin with, then those of its states if it has any;
        nothing as long as that is not known (see `Namespaces.name_of`)."""
        name = self._namespaces.name_of(identity)
        if name is None or self._states is None:
            return [] if name is None else [name]
        of_states = self._of_states.name_of(self._states.identity(identity, name))
        return [] if of_states is None else [name, of_states]

    def pause(self) -> None:
        """A request waits for what is not stored yet: do not ask in a tight circle."""
        pause_s = min(PAUSE_S, self._wait_left_s)
        self._wait_left_s -= pause_s
        time.sleep(pause_s)

    def begin(
        self,
        lookup: Lookup,
        identity: ModelIdentity,
        chain: KeyChain,
        tokens: int,
        search: Search | None = None,
        states: KeyChain | None = None,
    ) -> None:
        """Ask for all chunks of a chain, and for segments behind them, or for the states (by their
        own chain) where each ends. What was asked before is let go."""
        self.end(lookup)
        lookup.serial += 1
        lookup.num_tokens, lookup.began_at, lookup.started_at = tokens, time.monotonic(), None
        store = self._handle.get()
        if store is not None and len(chain):
            asked = None
            if states is not None:  # the last token is computed
                asked = StatesAsked(states, chain.namespace, (tokens - 1) // chain.chunk_tokens)
            arguments = store, identity, chain, len(chain), search, asked
            lookup.future = self._pool.submit(self._started, lookup, *arguments)

    def _started(self, lookup: Lookup, *arguments: Any) -> Found:
        lookup.started_at, serial = time.monotonic(), lookup.serial
        with about(lookup.request_id, lookup.traceparent):
            found = self._run(*arguments)

        def wanted() -> bool:
            return lookup.serial == serial and lookup.future is not None and not lookup.taken

        self._prefetcher.offer(found.namespace, arguments[2], found.loadable, wanted)
        return found

    def _run(
        self,
        store: StoreLike,
        identity: ModelIdentity,
        chain: KeyChain,
        keys: int,
        search: Search | None,
        states: StatesAsked | None,
    ) -> Found:
        leases: list[tuple[NamespaceLike, Lease]] = []
        with ExitStack() as unless_found:
            unless_found.callback(_release_all, leases)
            try:
                namespace = self._namespaces.get(store, identity, chain.namespace)
                refs = chain.refs(0, keys)
                match = namespace.match(refs)
                if match.num_chunks:
                    found = refs[: match.num_chunks]
                    lease, held = namespace.lease(found, match.tiers, wait=False)
                    leases.append((namespace, lease))
                    match = Match(match.tiers[:held], match.chunk_tokens)
                places = None
                if states is not None:
                    places = self._places(store, identity, states, match.num_chunks, leases)
            except StoreClosedError:  # perhaps a server has another namespace for this model now
                self._namespaces.forget(identity)
                if self._states is not None:
                    self._of_states.forget(self._states.identity(identity, chain.namespace))
                raise
            except StoreError:
                raise
            except Exception as error:  # thread loop: whatever is wrong with a store is a miss
                raise StoreError(f"{type(error).__name__}: {error}") from error
            unless_found.pop_all()
        if places is not None:
            return Found(namespace, match, tuple(leases), states=places)
        if search is None or len(search.tokens) - match.num_tokens < search.min_tokens:
            return Found(namespace, match, tuple(leases))
        try:
            return self._with_segments(namespace, chain, match, leases, search)
        except StoreError as error:  # the exact prefix is there all the same
            logger.warning("prefixstore: segments were not looked up: %s", error)
            return Found(namespace, match, tuple(leases))

    def _places(
        self,
        store: StoreLike,
        identity: ModelIdentity,
        states: StatesAsked,
        num_chunks: int,
        leases: list[tuple[NamespaceLike, Lease]],
    ) -> tuple[int, ...]:
        """Behind how many chunks a state is stored; the last of them is leased."""
        assert self._states is not None
        whose = self._states.identity(identity, states.beside)
        namespace = self._of_states.get(store, whose, states.chain.namespace)
        refs = states.chain.refs(0, min(num_chunks, states.most))
        tiers = namespace.match_each(refs)
        places = [i + 1 for i, tier in enumerate(tiers) if tier != MISS]
        if places:
            last = places[-1] - 1
            chosen = refs[last : last + 1], tiers[last : last + 1]
            lease, held = namespace.lease(*chosen, wait=False)
            leases.append((namespace, lease))
            if not held:
                places.pop()
        return tuple(places)

    def _with_segments(
        self,
        namespace: NamespaceLike,
        chain: KeyChain,
        match: Match,
        leases: list[tuple[NamespaceLike, Lease]],
        search: Search,
    ) -> Found:
        segments = namespace.find_segments(
            search.tokens, chain.salt, match.num_tokens, search.min_tokens, chain.items
        )
        refs = [ref for segment in segments for ref in segment.refs]
        known = namespace.staleness_of(refs) if search.want_staleness else []
        staleness = {
            ref.key: value.tobytes()
            for ref, value in zip(refs, known, strict=False)
            if value is not None
        }
        if refs:
            tiers = [tier for segment in segments for tier in segment.tiers]
            lease, _ = namespace.lease(refs, tiers, wait=False)
            leases.append((namespace, lease))  # what it does not hold may be gone when it is read
        return Found(namespace, match, tuple(leases), tuple(segments), staleness)

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
            lookup.future.add_done_callback(self._release)
            lookup.future = None

    def end(self, lookup: Lookup) -> None:
        """Let go of an answer, or of the question; the lease ends."""
        future = lookup.future
        lookup.future, lookup.found, lookup.num_tokens = None, None, -1
        lookup.declined, lookup.taken, lookup.waited_s = False, False, 0.0
        if future is not None and not future.cancel():
            future.add_done_callback(self._release)

    def _release(self, future: Future[Found]) -> None:
        """On whichever thread ends with it. A folder's leases are let go at once; a server's are
        where nobody waits, or end by themselves."""
        if future.cancelled() or future.exception() is not None:
            return
        leases = future.result().leases
        if not self._handle.is_remote:
            _release_all(leases)
        elif leases and self._handle.get() is not None:
            with suppress(RuntimeError):  # the engine ends
                self._releasing.submit(_release_all, leases)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._releasing.shutdown(wait=False, cancel_futures=True)
        self._prefetcher.close()


def _release_all(leases: Sequence[tuple[NamespaceLike, Lease]]) -> None:
    for namespace, lease in leases:
        with suppress(StoreError):  # the store is closed or stalled: the lease ends by itself
            namespace.release(lease)
