"""Answers that carry KV, or say what became of it: taken apart, and checked, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prefixstore import wire
from prefixstore.client.caller import parse
from prefixstore.client.connection import BrokenError, Connection
from prefixstore.errors import ConfigError, LayoutError, RemoteError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Roi
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS, Lease
from prefixstore.putting import PutState
from prefixstore.segments import Segment

_HEADS_BYTES = 4096  # taken at once where no payloads are between
_PLACES = 1 << 31  # tokens of a prompt


class Reading:
    """Takes the answer of one get apart, into the caller's buffers."""

    def __init__(
        self,
        refs: Sequence[ChunkRef],
        outs: Sequence[memoryview],
        which: list[int],
        result: list[int],
        bad: list[int],
        progress: Callable[[], None] | None,
    ) -> None:
        self.refs, self.which = refs, which
        self._outs, self._result, self._bad = outs, result, bad
        self._progress = progress

    async def take(self, connection: Connection) -> None:
        """Read all records. Raises OSError; what was noted until then is good."""
        ahead = 0
        for i in self.which:
            head = await connection.read(wire.RECORD.size, ahead)
            tier, kind, _, sum_bytes, num_bytes = wire.RECORD.unpack(head)
            out = self._outs[i].cast("B")
            if num_bytes not in (0, out.nbytes):
                raise BrokenError(f"a payload of {num_bytes} bytes, not {out.nbytes}")
            record = wire.Record(tier, kind, await connection.read(sum_bytes), num_bytes)
            ahead = _HEADS_BYTES
            if num_bytes:
                self._result[i] = MISS  # of an answer that broke off, and is given again
                ahead = wire.RECORD.size + sum_bytes  # the next is likely to be of this size
                await connection.read_into(out, ahead)
            if tier == MISS or not num_bytes:
                continue
            if wire.payload_is(record, out):
                self._result[i] = tier
                if self._progress is not None:
                    self._progress()
            elif i not in self._bad:
                self._bad.append(i)


def count_of(answer: dict[str, Any]) -> int:
    """How many chunks something was done to. Raises RemoteError."""
    count = answer.get("chunks", 0)
    if type(count) is not int:
        raise RemoteError(f"the answer counts {count!r:.40} chunks")
    return count


def lease_of(answer: dict[str, Any]) -> tuple[Lease, int]:
    """A lease, and how many leading chunks it holds. Raises RemoteError."""
    try:
        return Lease(answer["id"].encode(), float(answer["end_s"])), int(answer["held"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise RemoteError(f"the answer names no lease: {error}") from error


def tiers_of(answer: dict[str, Any], most: int) -> list[int]:
    """The tiers of one prompt's leading chunks. Raises RemoteError."""
    found = _tiers(answer)
    if len(found) > most or not all(_is_tier(t) for t in found):
        raise RemoteError("the answer of a match has no tiers")
    return found


def each_of(answer: dict[str, Any], count: int) -> list[int]:
    """The tier of each of so many chunks, or MISS. Raises RemoteError."""
    found = _tiers(answer)
    if len(found) != count or not all(_is_tier(t, MISS) for t in found):
        raise RemoteError("the answer of a match has not a tier for each chunk")
    return found


def _tiers(answer: dict[str, Any]) -> list[int]:
    told = answer.get("tiers")
    found = told[0] if isinstance(told, list) and len(told) == 1 else None
    if not isinstance(found, list):
        raise RemoteError("the answer of a match has no tiers")
    return found


def _is_tier(value: Any, *also: int) -> bool:
    return type(value) is int and value in (MEMORY, DISK, *also)


def buffer_bytes(
    layout: Layout,
    refs: Sequence[ChunkRef],
    views: Sequence[memoryview],
    roi: Roi | None,
    *,
    writable: bool = False,
) -> int:
    """Bytes of each buffer for a region of those chunks. Raises LayoutError if one has others."""
    roi = roi or layout.whole
    layout.check(roi)
    size = layout.roi_bytes(roi)
    if len(views) != len(refs):
        raise LayoutError(f"{len(views)} buffers for {len(refs)} chunks", "give one for each")
    for view in views:
        if view.nbytes != size or (writable and view.readonly):
            kind = "read-only " if writable and view.readonly else ""
            raise LayoutError(f"a {kind}buffer of {view.nbytes} bytes", f"{size} needed")
    return size


def segments_of(body: bytes, chunk_tokens: int) -> list[Segment]:
    """Segments that were found. Raises RemoteError."""
    found, at = [], 0
    try:
        told, rest = wire.unpack_request(body)
        refs, _ = wire.unpack_refs(rest)
        for one in told["segments"]:
            found.append(_segment(one, refs[at:], chunk_tokens))
            at += len(found[-1].refs)
    except (ConfigError, KeyError, TypeError) as error:
        raise RemoteError(f"the answer names no segments: {error}") from error
    return found


def _segment(one: dict[str, Any], refs: Sequence[ChunkRef], chunk_tokens: int) -> Segment:
    """A segment in the first of some chunks. KV is placed by its numbers: they must fit together.
    Raises RemoteError, KeyError, TypeError."""
    places = one["start"], one["num_tokens"], one["source_start"]
    tiers, alone = tuple(one["tiers"]), one["alone"]
    if all(type(place) is int and 0 <= place < _PLACES for place in places) and places[1]:
        start, count, source = places
        chunks = -(-(source % chunk_tokens + count) // chunk_tokens)
        fits = len(tiers) == chunks <= len(refs) and all(map(_is_tier, tiers))
        if fits and type(alone) is bool:
            return Segment(start, count, source, alone, tuple(refs[:chunks]), tiers, chunk_tokens)
    raise RemoteError("the answer has a segment that cannot be")


def staleness_of(
    body: bytes, count: int, chunk_tokens: int
) -> list[npt.NDArray[np.float16] | None]:
    """What was noted of so many chunks: float16 [tokens], or None. Raises RemoteError."""
    found: list[npt.NDArray[np.float16] | None] = []
    at, size = count, 2 * chunk_tokens
    if len(body) < at or len(body) != at + size * sum(body[:at]):
        raise RemoteError("the answer about staleness has a wrong length")
    for there in body[:count]:
        found.append(np.frombuffer(body, "<f2", chunk_tokens, at) if there else None)
        at += size * there
    return found


def query_of(roi: Roi | None, checked: bool = False) -> str:
    """The query that asks for a region."""
    query = [] if roi is None else [
        f"layers={roi.layer_start}:{roi.layer_stop}", f"heads={roi.head_start}:{roi.head_stop}"
    ]  # fmt: skip
    query += ["checked=1"] * checked
    return f"?{'&'.join(query)}" if query else ""


def states_of(body: bytes, count: int) -> list[PutState]:
    """What became of the chunks of a put. Raises RemoteError."""
    try:
        states = [PutState(one) for one in parse(body)["states"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteError(f"the answer of a put: {error}") from error
    if len(states) != count:
        raise RemoteError(f"{len(states)} states for {count} chunks")
    return states
