"""The part of a server's store that belongs to a model, for callers that wait: see `operations`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prefixstore import config, wire
from prefixstore.client.caller import TOO_MANY_LEASES, RefusedError
from prefixstore.client.connection import finish
from prefixstore.client.operations import NamespaceCalls
from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem, Tokens
from prefixstore.layout import Buffer, Roi
from prefixstore.namespace import Lease, Match
from prefixstore.putting import PutState
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment


class RemoteNamespace:
    """The methods are those of `namespace.Namespace`, and end by the store's deadline. A get that
    fails is a miss of the chunks that had not come; everything else raises a StoreError.
    Thread-safe.
    """

    def __init__(self, calls: NamespaceCalls) -> None:
        self.calls = calls
        self.identity, self.layout, self.name = calls.identity, calls.layout, calls.name

    def chain(
        self, tokens: Tokens = (), salt: bytes = b"", items: Sequence[MultimodalItem] = ()
    ) -> KeyChain:
        """The keys of a prompt in this namespace."""
        return self.calls.chain(tokens, salt, items)

    def match(self, refs: Sequence[ChunkRef] | KeyChain) -> Match:
        """Find how many leading chunks are stored, and where. Raises StoreError."""
        return finish(self.calls.match(refs))

    def match_each(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Which chunks are stored: the tier of each, or MISS. Raises StoreError."""
        return finish(self.calls.match_each(refs))

    def find_segments(
        self,
        tokens: Tokens,
        salt: bytes = b"",
        start: int = 0,
        min_tokens: int = MIN_SEGMENT_TOKENS,
        items: Sequence[MultimodalItem] = (),
    ) -> list[Segment]:
        """Find runs of the prompt's tokens that stand somewhere in a stored text."""
        return finish(self.calls.find_segments(tokens, salt, start, min_tokens, items))

    def lease(
        self,
        refs: Sequence[ChunkRef],
        tiers: Sequence[int],
        duration_s: float = config.LEASE_S,
        wait: bool = True,
    ) -> tuple[Lease, int]:
        """Hold chunks that `match` found. Returns the lease and how many leading ones it holds: see
        `operations`.

        Without ``wait`` what is beyond a bound of the server's is said to be held as well: a chunk
        that goes is a miss when it is read.
        """
        try:
            lease, held = finish(self.calls.lease(refs, tiers, duration_s))
        except RefusedError as error:
            if wait or error.code not in (TOO_MANY_LEASES, "busy"):
                raise
            return Lease(b"", time.time()), len(refs)
        return lease, held if wait or held < wire.REFS_MAX else len(refs)

    def release(self, lease: Lease) -> None:
        """End a lease; one that has ended already is no error."""
        finish(self.calls.release(lease))

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
        """Store chunks, or a region of each: see `namespace.Namespace.put`. Raises StoreError."""
        return finish(
            self.calls.put(
                refs, buffers, roi=roi, group=group, ttl_s=ttl_s, tag=tag, pin=pin, alone=alone,
                wait=wait, deadline_s=deadline_s,
            )
        )  # fmt: skip

    def get(
        self,
        refs: Sequence[ChunkRef],
        outs: Sequence[memoryview],
        roi: Roi | None = None,
        progress: Callable[[], None] | None = None,
    ) -> list[int]:
        """Read chunks, or a region of each, into the caller's buffers: see `operations`."""
        return finish(self.calls.get(refs, outs, roi, progress))

    def note_staleness(
        self, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
    ) -> int:
        """Keep how far the KV of each token moves behind other texts: [chunks, tokens]."""
        return finish(self.calls.note_staleness(refs, values))

    def staleness_of(self, refs: Sequence[ChunkRef]) -> list[npt.NDArray[np.float16] | None]:
        """What was noted of each chunk: float16 [tokens], or None. Raises StoreError."""
        return finish(self.calls.staleness_of(refs))

    def delete(self, refs: Sequence[ChunkRef]) -> int:
        """Remove chunks from every tier; how many were there."""
        return finish(self.calls.delete(refs))

    def pin(self, refs: Sequence[ChunkRef], pinned: bool = True) -> int:
        """Exempt chunks from eviction, or not; how many are now as asked."""
        return finish(self.calls.pin(refs, pinned))

    def prefetch(self, refs: Sequence[ChunkRef]) -> int:
        """Have the server copy chunks from disk to memory soon; how many."""
        return finish(self.calls.prefetch(refs))

    def explain(self, refs: Sequence[ChunkRef]) -> dict[str, Any]:
        """The first chunk that is missing, and why."""
        return finish(self.calls.explain(refs))

    def set_ttl(self, refs: Sequence[ChunkRef], ttl_s: float | None) -> int:
        """Have chunks expire so many seconds from now, or never; how many there are."""
        return finish(self.calls.set_ttl(refs, ttl_s))

    def retire(self) -> int:
        """Drop the model: its chunks and its name; how many chunks. This object is of no use
        afterwards. Raises StoreError."""
        return finish(self.calls.retire())

    def bump(self) -> RemoteNamespace:
        """The model's weights are others now: retire it, and enter it under another name. This
        object is of no use afterwards. Raises StoreError."""
        return RemoteNamespace(finish(self.calls.bump()))
