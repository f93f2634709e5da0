"""A store in a folder in front of a store on a server, or of a pool: near bytes first, everybody's
behind them. Both are called the server below.

What must hold: the server's troubles are misses here and never more than its deadline; what is in
front has the same keys (a namespace's identity is the one the server gave), so it is the same KV.
Chunks that came from the server are copied to the front (`copying`), for COPY_TTL_S at most: by
then what was deleted, or has expired, on the server is gone from all fronts, but for what was put
through them.
What is put goes to both, to a pool by way of `behind`; while the server is away, to the front only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from prefixstore import config, owned
from prefixstore.behind import Behind, Labels
from prefixstore.copying import copies_to
from prefixstore.errors import ConfigError, RemoteError, StoreClosedError, StoreError
from prefixstore.found import REMOTE as REMOTE
from prefixstore.identity import ModelIdentity
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem, Tokens
from prefixstore.layout import Buffer, Layout, Roi
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS, Lease, Match, Namespace
from prefixstore.putting import PutState
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment
from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
FETCH_BYTES = 32 << 20  # a prefetch holds so much memory at most


class FrontedStore:
    """See the module docstring. Owns both stores. A context manager. Thread-safe. ``write_back``:
    what is put is copied to the remote store by a thread; else with the put."""

    def __init__(self, front: Store, remote: StoreLike, *, write_back: bool = False) -> None:
        self.front, self.remote = front, remote
        self.behind = Behind() if write_back else None

    def namespace(self, identity: ModelIdentity, layout: Layout) -> FrontedNamespace:
        """The part that belongs to one model identity. Raises StoreError: the server is asked."""
        return self._fronted(self.remote.namespace(identity, layout))

    def _fronted(self, remote: NamespaceLike) -> FrontedNamespace:
        front = self.front.namespace(remote.identity, remote.layout)
        if front.name != remote.name:
            raise ConfigError(
                f"the folder {self.front.folder} has retired a model that the server has not",
                "give an empty folder as the front",
            )
        return FrontedNamespace(front, remote, self.behind)

    def namespace_of(self, name: bytes) -> FrontedNamespace:
        """The namespace of that name. Raises StoreError if the server does not know it."""
        if self.behind is not None:
            with suppress(StoreError):  # a pool may be away
                known = self.front.namespace_of(name)
                return self._fronted(self.remote.namespace(known.identity, known.layout))
        return self._fronted(self.remote.namespace_of(name))

    def flush(self, deadline_s: float = config.OP_DEADLINE_S) -> bool:
        """Wait until what was put is on disk, on the server too."""
        end = time.monotonic() + deadline_s
        flushed = self.front.flush(deadline_s)
        if flushed and self.behind is not None:
            flushed = self.behind.flush(end - time.monotonic())
        return flushed and self.remote.flush(max(0.0, end - time.monotonic()))

    @property
    def gone(self) -> bool:
        """Whether the folder has been taken away: open it again."""
        return self.front.gone

    @property
    def usable(self) -> bool:
        """Whether the folder is there; without the server it is served alone."""
        return self.front.usable

    def check_open(self) -> None:
        """Ask the server. Raises StoreError; of a pool that is away it warns."""
        try:
            self.remote.check_open()
        except RemoteError as error:
            if self.behind is None:
                raise
            logger.warning("prefixstore: only %s serves: %s", self.front.folder, error)

    def close(self) -> None:
        """Let go of both."""
        if self.behind is not None:
            self.behind.close()
        self.front.close()
        self.remote.close()

    def __enter__(self) -> FrontedStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FrontedNamespace:
    """See the module docstring; the methods are those of `namespace.Namespace`. Thread-safe."""

    def __init__(
        self, front: Namespace, remote: NamespaceLike, behind: Behind | None = None
    ) -> None:
        self.front, self.remote, self.behind = front, remote, behind
        self._copies = copies_to(front.store)
        self.layout, self.identity, self.name = front.layout, front.identity, front.name

    def chain(
        self, tokens: Tokens = (), salt: bytes = b"", items: Sequence[MultimodalItem] = ()
    ) -> KeyChain:
        """The keys of a prompt in this namespace."""
        return self.front.chain(tokens, salt, items)

    def match(self, refs: Sequence[ChunkRef] | KeyChain) -> Match:
        """How many leading chunks are stored; the server is asked for what the front lacks."""
        near = self.front.match(refs)
        if near.num_chunks == len(refs):
            return near
        try:
            far = self.remote.match(refs).num_chunks
        except StoreClosedError:
            raise  # the model was retired there: no reason to go on alone
        except StoreError as error:
            logger.info("prefixstore: only the front was asked: %s", error)
            far = 0
        return Match(near.tiers + (REMOTE,) * (far - near.num_chunks), near.chunk_tokens)

    def match_each(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Which chunks are stored; the server is asked for those the front lacks."""
        tiers = self.front.match_each(refs)
        lacking = [i for i, tier in enumerate(tiers) if tier == MISS]
        if not lacking:
            return tiers
        try:
            far = self.remote.match_each([refs[i] for i in lacking])
        except StoreClosedError:
            raise  # see match
        except StoreError as error:
            logger.info("prefixstore: only the front was asked: %s", error)
            return tiers
        for i, tier in zip(lacking, far, strict=True):
            tiers[i] = REMOTE if tier != MISS else MISS
        return tiers

    def find_segments(
        self,
        tokens: Tokens,
        salt: bytes = b"",
        start: int = 0,
        min_tokens: int = MIN_SEGMENT_TOKENS,
        items: Sequence[MultimodalItem] = (),
    ) -> list[Segment]:
        """Runs of the prompt's tokens that stand in a stored text: the server's, else those in
        front; a pool lags behind, so of both what is more. What they are read from `get` decides.
        """
        asked = (tokens, salt, start, min_tokens, items)
        try:
            found = self.remote.find_segments(*asked)
            if self.behind is not None:
                near = self.front.find_segments(*asked)
                if sum(one.num_tokens for one in near) >= sum(one.num_tokens for one in found):
                    return near
            return [replace(one, tiers=tuple(self._tiers(one.refs))) for one in found]
        except StoreClosedError:
            raise
        except StoreError as error:
            logger.info("prefixstore: only the front was searched: %s", error)
            return self.front.find_segments(*asked)

    def _tiers(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Where chunks that the server has would be read from."""
        front = self.front.store
        with front.live.lookup("chunk") as in_memory, front.index.lookup("chunk") as on_disk:
            return [
                MEMORY if in_memory(ref.key) else DISK if on_disk(ref.key) else REMOTE
                for ref in refs
            ]

    def lease(
        self,
        refs: Sequence[ChunkRef],
        tiers: Sequence[int],
        duration_s: float = config.LEASE_S,
        wait: bool = True,
    ) -> tuple[Lease, int]:
        """Hold those in front; to hold the server's would be a round trip: one may be a miss."""
        near = [i for i, tier in enumerate(tiers) if tier != REMOTE]
        if not near:
            return Lease(b"", 0.0), len(refs)
        there = [refs[i] for i in near], [tiers[i] for i in near]
        lease, held = self.front.lease(*there, duration_s, wait)
        return lease, len(refs) if held == len(near) else near[held]

    def release(self, lease: Lease) -> None:
        """End a lease."""
        self.front.release(lease)

    def put(
        self,
        refs: Sequence[ChunkRef],
        buffers: Sequence[Buffer],
        *,
        roi: Roi | None = None,
        group: int = 0,
        ttl_s: float | None = None,
        tag: str = "",
        pin: bool = False,
        alone: bool = False,
        wait: bool = True,
        deadline_s: float = config.OP_DEADLINE_S,
    ) -> list[PutState]:
        """Store chunks in front and on the server; what became of them there, or else in front."""
        told: dict[str, Any] = {"roi": roi, "group": group, "tag": tag, "alone": alone}
        if self.behind is not None:
            told.update(ttl_s=ttl_s, pin=pin, wait=wait, deadline_s=deadline_s)
            states = self.front.put(refs, buffers, **told)
            expires_s = None if ttl_s is None else time.time() + ttl_s
            pairs = zip(refs, states, strict=True)
            whole = [ref for ref, state in pairs if state in (PutState.STORED, PutState.EXISTS)]
            self.behind.offer(self.front, self.remote, whole, Labels(expires_s, tag, alone))
            return states
        near = self.front.put(refs, buffers, ttl_s=ttl_s, wait=False, deadline_s=deadline_s, **told)
        told.update(ttl_s=ttl_s, pin=pin, wait=wait, deadline_s=deadline_s)
        try:
            return self.remote.put(refs, buffers, **told)
        except StoreClosedError:
            raise
        except StoreError as error:
            logger.info("prefixstore: %d chunks are in front only: %s", len(refs), error)
            return near

    def get(
        self,
        refs: Sequence[ChunkRef],
        outs: Sequence[memoryview],
        roi: Roi | None = None,
        progress: Callable[[], None] | None = None,
    ) -> list[int]:
        """Read chunks into buffers; the tier of each, REMOTE for the server's, or MISS.

        Whole chunks of the server are copied to the front; of a region there is nothing to copy.
        """
        tiers = self.front.get(refs, outs, roi, progress)
        far = [i for i, tier in enumerate(tiers) if tier == MISS]
        if not far:
            return tiers
        with self._copies.fetch(self.front) as fetch:
            found = self.remote.get([refs[i] for i in far], [outs[i] for i in far], roi, progress)
            came = [i for i, tier in zip(far, found, strict=True) if tier != MISS]
            for i in came:
                tiers[i] = REMOTE
            if came and (roi is None or roi == self.layout.whole):
                fetch.copy([refs[i] for i in came], [outs[i] for i in came])
        return tiers

    def prefetch(self, refs: Sequence[ChunkRef], wanted: Callable[[], bool]) -> int:
        """Copy chunks of the server to the front while they are ``wanted``; how many came."""
        size = self.layout.payload_bytes
        step = max(1, FETCH_BYTES // size)
        buffer = bytearray(min(step, len(refs)) * size)
        rows = [memoryview(buffer)[at : at + size] for at in range(0, len(buffer), size)]
        count = 0
        for at in range(0, len(refs), step):
            if not wanted():
                break
            batch = refs[at : at + step]
            there = self._tiers(batch)
            part = [ref for ref, tier in zip(batch, there, strict=True) if tier == REMOTE]
            with self._copies.fetch(self.front) as fetch:
                tiers = self.remote.get(part, rows[: len(part)])
                came = [i for i, tier in enumerate(tiers) if tier != MISS]
                fetch.copy([part[i] for i in came], [rows[i] for i in came])
            count += len(came)
            if len(came) < len(part):
                break
        return count

    def delete(self, refs: Sequence[ChunkRef]) -> int:
        """Remove chunks from the server and this front, not others'; how many the server had.
        Raises StoreError, and nothing is removed, when it does not answer. No get or prefetch of
        this process brings them back; one of another that has the front open may: see `copying`."""
        behind, keys = self.behind, {ref.key for ref in refs}
        with behind.without(keys) if behind else nullcontext():
            count = self.remote.delete(refs)
        try:
            self._copies.leave_out(keys)
        finally:  # but for what is being copied for too long, which it tells
            owned.delete(self.front, refs)
        return count

    def note_staleness(
        self, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
    ) -> int:
        """Keep how far the KV of each token moves behind other texts, on the server."""
        return self.remote.note_staleness(refs, values)

    def staleness_of(self, refs: Sequence[ChunkRef]) -> list[npt.NDArray[np.float16] | None]:
        """What was noted of each chunk on the server, or in front while that does not answer."""
        try:
            return self.remote.staleness_of(refs)
        except StoreError:
            return self.front.staleness_of(refs)
