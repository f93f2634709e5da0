"""What may be asked of a model's part of a server's store, as coroutines: match, put, get, lease.

Written once for both kinds of clients: `client.namespace` runs these with connections that block,
`client.loop` has an event loop run them. Keys are computed here, from the namespace the server
gives this tenant; see docs/http.md. A get that fails is a miss of the chunks that had not come;
everything else raises a StoreError.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence, Sized
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from prefixstore import config, wire
from prefixstore.client import answers
from prefixstore.client.caller import Calls, RefusedError, whole
from prefixstore.errors import LayoutError, StoreClosedError, StoreError
from prefixstore.identity import ModelIdentity
from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem, Tokens, token_bytes
from prefixstore.layout import Buffer, Layout, Roi, checksum
from prefixstore.namespace import MISS, Lease, Match
from prefixstore.putting import PutState, labels_for
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment

GET_BYTES = 256 << 20  # in one request
PUT_BYTES = 256 << 20
RATE_MIN_BYTES_S = 64 << 20  # a transfer may take so much longer than a call
T = TypeVar("T")
Register = Callable[[ModelIdentity, Layout], Awaitable[ModelIdentity]]


class NamespaceCalls:
    """See the module docstring; the methods are those of `namespace.Namespace`, as coroutines."""

    def __init__(
        self, calls: Calls, register: Register, given: ModelIdentity, known: ModelIdentity,
        layout: Layout, deadline_s: float,
    ) -> None:  # fmt: skip
        self._calls, self._register, self._deadline_s = calls, register, deadline_s
        self._given, self.layout = given, layout
        self.identity = known  # with the tenant's mark, if there is one
        self.name = known.namespace

    @classmethod
    async def open(
        cls, calls: Calls, register: Register, identity: ModelIdentity, layout: Layout,
        deadline_s: float,
    ) -> NamespaceCalls:  # fmt: skip
        """Enter a model on the server, or find it. Raises StoreError."""
        known = await register(identity, layout)
        return cls(calls, register, identity, known, layout, deadline_s)

    def chain(
        self, tokens: Tokens = (), salt: bytes = b"", items: Sequence[MultimodalItem] = ()
    ) -> KeyChain:
        """The keys of a prompt in this namespace."""
        return KeyChain(self.name, self.layout.chunk_tokens, tokens, salt, items)

    # ------------------------------------------------------------------ asking
    async def _ask(self, path: str, fields: dict[str, Any], *rest: Buffer) -> dict[str, Any]:
        named = {"namespace": self.name.hex(), **fields}
        return await self._known(lambda: self._json("POST", path, named, *rest))

    async def _json(
        self, method: str, path: str, fields: dict[str, Any], *rest: Buffer
    ) -> dict[str, Any]:
        return await self._calls.json(method, path, fields, *rest, deadline_s=self._deadline_s)

    async def _known(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something; if the server has forgotten the namespace (its store is new), enter it."""
        try:
            return await work()
        except RefusedError as error:
            if error.code != "namespace":
                raise
        if await self._register(self._given, self.layout) != self.identity:
            raise StoreClosedError(
                f"the store behind {self._calls.url} was replaced, or the model retired",
                "open it again",
            )
        return await work()

    async def _count(
        self, path: str, refs: Sequence[ChunkRef], fields: dict[str, Any] | None = None
    ) -> int:
        """How many chunks something was done to."""
        total = 0
        for part in self._parts(refs):
            answer = await self._ask(path, fields or {}, wire.pack_refs(refs[part]))
            total += answers.count_of(answer)
        return total

    def _parts(self, refs: Sized, most: int = wire.REFS_MAX) -> list[slice]:
        """Which chunks go into one request each."""
        return [slice(at, at + most) for at in range(0, len(refs), most)]

    async def match(self, refs: Sequence[ChunkRef] | KeyChain) -> Match:
        """Find how many leading chunks are stored, and where. Raises StoreError."""
        tiers: list[int] = []
        for part in self._parts(refs):
            if isinstance(refs, KeyChain):  # its keys are hashes of its preimages: they will do
                answer = await self._ask("/v1/match", {"keys": True}, b"".join(refs.keys[part]))
            else:
                answer = await self._ask("/v1/match", {}, wire.pack_refs(refs[part]))
            asked = min(part.stop, len(refs)) - part.start
            found = answers.tiers_of(answer, asked)
            tiers += found
            if len(found) < asked:
                break
        return Match(tuple(tiers), self.layout.chunk_tokens)

    async def match_each(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Find which chunks are stored, whatever is before them: the tier of each, or MISS. Raises
        StoreError."""
        tiers: list[int] = []
        for part in self._parts(refs):
            answer = await self._ask("/v1/match", {"each": True}, wire.pack_refs(refs[part]))
            tiers += answers.each_of(answer, len(refs[part]))
        return tiers

    async def find_segments(
        self,
        tokens: Tokens,
        salt: bytes = b"",
        start: int = 0,
        min_tokens: int = MIN_SEGMENT_TOKENS,
        items: Sequence[MultimodalItem] = (),
    ) -> list[Segment]:
        """Find runs of the prompt's tokens that stand somewhere in a stored text."""
        fields = {
            "namespace": self.name.hex(), "tokens": True, "salt": salt.hex(), "start": start,
            "min_tokens": min_tokens, "items": wire.items_to_json(items),
        }  # fmt: skip
        body = wire.pack_request(fields, token_bytes(tokens))
        call, deadline_s = self._calls.call, self._deadline_s
        answer = await self._known(lambda: call("POST", "/v1/segments", [body], deadline_s, whole))
        return answers.segments_of(answer, self.layout.chunk_tokens)

    # ------------------------------------------------------------------ leases
    async def lease(
        self, refs: Sequence[ChunkRef], tiers: Sequence[int], duration_s: float = config.LEASE_S
    ) -> tuple[Lease, int]:
        """Hold chunks that `match` found, at most those of one request. Returns the lease and how
        many leading ones it holds."""
        if not refs:
            return Lease(b"", time.time()), 0
        refs, tiers = refs[: wire.REFS_MAX], list(tiers[: wire.REFS_MAX])
        duration_s = min(duration_s, config.LEASE_S)
        fields = {"tiers": tiers, "duration_s": duration_s}
        return answers.lease_of(await self._ask("/v1/leases", fields, wire.pack_refs(refs)))

    async def release(self, lease: Lease) -> None:
        """End a lease; one that has ended already is no error."""
        if not lease.lease_id:
            return
        try:
            await self._json("DELETE", f"/v1/leases/{lease.lease_id.decode()}", {})
        except RefusedError as error:
            if error.code != "lease":
                raise

    # ------------------------------------------------------------------ put
    async def put(
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
        labels_for(ttl_s, tag, pin, alone)
        size = answers.buffer_bytes(self.layout, refs, [memoryview(one) for one in buffers], roi)
        fields = {
            "namespace": self.name.hex(), "group": group, "ttl_s": ttl_s, "tag": tag, "pin": pin,
            "alone": alone, "wait": wait, "deadline_s": deadline_s,
        }  # fmt: skip
        states: list[PutState] = []
        for part in self._parts(refs, min(wire.REFS_MAX, max(1, PUT_BYTES // size))):
            head = wire.pack_request(fields, wire.pack_refs(refs[part]))
            parts: list[Buffer] = [head]
            for buffer in buffers[part]:
                payload = memoryview(buffer).cast("B")
                parts += [checksum(payload), payload]
            count = len(refs[part])
            path = f"/v1/put{answers.query_of(roi)}"
            wait_s = self._transfer_s(deadline_s, count * size)
            call = partial(self._calls.call, "POST", path, parts, wait_s, whole)
            states += answers.states_of(await self._known(call), count)
        return states

    def _transfer_s(self, deadline_s: float, num_bytes: int) -> float:
        return deadline_s + num_bytes / RATE_MIN_BYTES_S

    # ------------------------------------------------------------------ get
    async def get(
        self,
        refs: Sequence[ChunkRef],
        outs: Sequence[memoryview],
        roi: Roi | None = None,
        progress: Callable[[], None] | None = None,
    ) -> list[int]:
        """Read chunks, or a region of each, into the caller's buffers.

        Returns the tier each came from, or MISS, also for what a server that failed did not give;
        the buffer of a miss holds garbage. What fails its checksum is asked for once more, to be
        read and checked there. Raises LayoutError only.
        """
        size = answers.buffer_bytes(self.layout, refs, outs, roi, writable=True)
        result = [MISS] * len(refs)
        end = time.monotonic() + self._transfer_s(self._deadline_s, len(refs) * size)
        wanted = list(range(len(refs)))
        for checked in (False, True):
            bad: list[int] = []
            most = min(wire.REFS_MAX, max(1, GET_BYTES // size))
            for at in range(0, len(wanted), most):
                reading = answers.Reading(refs, outs, wanted[at : at + most], result, bad, progress)
                try:
                    await self._get(reading, roi, checked, end - time.monotonic())
                except StoreError:
                    return result  # what has come is good; the rest is a miss
            wanted = bad
            if not wanted:
                break
        return result

    async def _get(
        self, reading: answers.Reading, roi: Roi | None, checked: bool, deadline_s: float
    ) -> None:
        fields = {"namespace": self.name.hex()}
        chosen = [reading.refs[i] for i in reading.which]
        body = wire.pack_request(fields, wire.pack_refs(chosen))
        path = f"/v1/get{answers.query_of(roi, checked)}"
        call = self._calls.call
        await self._known(lambda: call("POST", path, [body], max(0.0, deadline_s), reading.take))

    # ------------------------------------------------------------------ staleness and the rest
    async def note_staleness(
        self, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
    ) -> int:
        """Keep how far the KV of each token moves behind other texts: [chunks, tokens]."""
        if values.shape != (len(refs), self.layout.chunk_tokens):
            raise LayoutError(
                f"staleness of shape {values.shape} for {len(refs)} chunks",
                f"give [{len(refs)}, {self.layout.chunk_tokens}]: one number a token",
            )
        named, done = {"namespace": self.name.hex()}, 0
        for part in self._parts(refs):
            rest = wire.pack_refs(refs[part]), values[part].astype("<f4").tobytes()
            ask = partial(self._json, "PUT", "/v1/staleness", named, *rest)
            done += answers.count_of(await self._known(ask))
        return done

    async def staleness_of(self, refs: Sequence[ChunkRef]) -> list[npt.NDArray[np.float16] | None]:
        """What was noted of each chunk: float16 [tokens], or None. Raises StoreError."""
        found: list[npt.NDArray[np.float16] | None] = []
        call, deadline_s = self._calls.call, self._deadline_s
        for part in self._parts(refs):
            named = {"namespace": self.name.hex()}
            body = wire.pack_request(named, wire.pack_refs(refs[part]))
            ask = partial(call, "POST", "/v1/staleness", [body], deadline_s, whole)
            answer = await self._known(ask)
            found += answers.staleness_of(answer, len(refs[part]), self.layout.chunk_tokens)
        return found

    async def delete(self, refs: Sequence[ChunkRef]) -> int:
        """Remove chunks from every tier; how many were there."""
        return await self._count("/v1/delete", refs)

    async def pin(self, refs: Sequence[ChunkRef], pinned: bool = True) -> int:
        """Exempt chunks from eviction, or not; how many are now as asked."""
        return await self._count("/v1/pin", refs, {"pinned": pinned})

    async def prefetch(self, refs: Sequence[ChunkRef]) -> int:
        """Have the server copy chunks from disk to memory soon; how many."""
        return await self._count("/v1/prefetch", refs)

    async def explain(self, refs: Sequence[ChunkRef]) -> dict[str, Any]:
        """The first chunk that is missing, and why."""
        return await self._ask("/v1/explain", {}, wire.pack_refs(refs))

    # ------------------------------------------------------------------ how long it is kept
    async def set_ttl(self, refs: Sequence[ChunkRef], ttl_s: float | None) -> int:
        """Have chunks expire so many seconds from now, or never; how many there are."""
        labels_for(ttl_s)
        return await self._count("/v1/ttl", refs, {"ttl_s": ttl_s})

    async def retire(self) -> int:
        """Drop the model: its chunks and its name; how many chunks. This object is of no use
        afterwards. Raises StoreError."""
        path = f"/v1/namespaces/{self.name.hex()}/retire"
        return answers.count_of(await self._json("POST", path, {}))

    async def bump(self) -> NamespaceCalls:
        """The model's weights are others now: retire it, and enter it under another name. This
        object is of no use afterwards. Raises StoreError."""
        await self._json("POST", f"/v1/namespaces/{self.name.hex()}/bump", {})
        return await self.open(
            self._calls, self._register, self._given, self.layout, self._deadline_s
        )
