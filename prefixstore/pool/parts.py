"""Chunks that several ranks of an engine store together, each its region, in a pool.

::

    KEY.w           the claim: the number of the engine (``group``) that is storing the chunk
    KEY.w.G.L.H     a region: checksum 16 | layer_start, layer_stop, head_start, head_stop as u32
                    | its bytes; G the engine, L and H where it begins

They are gone after PENDING_S. A rank writes its region, then looks from region to region, each of
which says where the next begins, whether all are there. Who writes last sees all; it puts them
together and stores the chunk. Ranks that are last together store the same chunk twice, which is
once. What must hold: a chunk is never a mix of two engines' bytes: the regions of one claim only.
The regions of an engine must be ranges of layers, each cut into ranges of heads, as ranks are.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from prefixstore.config import PENDING_S
from prefixstore.errors import RemoteError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Buffer, Layout, Roi, checksum
from prefixstore.pool.backend import Get, Put, Written
from prefixstore.pool.writing import write as write_whole
from prefixstore.putting import Labels, PutState

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace

_SUM_BYTES = 16
_CORNERS = struct.Struct("<4I")
_HEAD_BYTES = _SUM_BYTES + _CORNERS.size
_GROUP = struct.Struct("<Q")
_FAILED = {Written.FULL: PutState.FULL, Written.NO: PutState.LOST}


def write(
    ns: PooledNamespace,
    roi: Roi,
    group: int,
    refs: Sequence[ChunkRef],
    payloads: Sequence[memoryview],
    labels: Labels,
    deadline_s: float,
) -> list[PutState]:
    """Store a region of chunks. Raises RemoteError."""
    end = time.monotonic() + deadline_s
    writing = _Writing(ns, group, end)
    states = [PutState.EXISTS if there else PutState.PARTIAL for there in ns.match_each(refs)]
    which = [i for i, state in enumerate(states) if state is PutState.PARTIAL]
    for i, state in zip(which, writing.claim([refs[i] for i in which]), strict=True):
        states[i] = state
    which = [i for i in which if states[i] is PutState.PARTIAL]
    head = _CORNERS.pack(roi.layer_start, roi.layer_stop, roi.head_start, roi.head_stop)
    puts = []
    for i in which:
        data = b"".join((head, payloads[i]))
        name = writing.region(refs[i].key, roi.layer_start, roi.head_start)
        puts.append(Put(name, [_sum_of(name, data), data]))
    for i, done in zip(which, writing.put(puts, replace=True), strict=True):
        states[i] = _FAILED.get(done, PutState.PARTIAL)
    for i in which:
        if states[i] is PutState.PARTIAL:
            states[i] = writing.complete(refs[i], roi, payloads[i], labels)
    return states


def _sum_of(name: str, data: Buffer) -> bytes:
    """The checksum of a region: its name is in it, so that another's bytes do not fit."""
    return checksum(name.encode() + data)


class _Writing:
    """One put of one rank."""

    def __init__(self, ns: PooledNamespace, group: int, end: float) -> None:
        self._ns, self._group, self._end = ns, group, end

    @property
    def _left(self) -> float:
        return self._end - time.monotonic()

    def region(self, key: bytes, layer: int, head: int) -> str:
        """The name of the region that begins there."""
        return f"{self._claim(key)}.{self._group:x}.{layer}.{head}"

    def _claim(self, key: bytes) -> str:
        return f"{self._ns.shape.object_of(key)}.w"

    def put(self, puts: Sequence[Put], *, replace: bool) -> list[Written]:
        """Write what is gone after a while."""
        return self._ns.backend.put(puts, ttl_s=PENDING_S, replace=replace, deadline_s=self._left)

    def claim(self, refs: Sequence[ChunkRef]) -> list[PutState]:
        """PARTIAL for chunks that our engine may write, BUSY for those that another is writing."""
        mine = _GROUP.pack(self._group)
        names = [self._claim(ref.key) for ref in refs]
        done = self.put([Put(name, [mine]) for name in names], replace=False)
        told = [memoryview(bytearray(_GROUP.size)) for _ in refs]
        self._ns.backend.get(
            [Get(name, [(0, out)]) for name, out in zip(names, told, strict=True)],
            deadline_s=self._left,
        )
        states = []
        for written, out in zip(done, told, strict=True):
            if written is Written.THERE:
                states.append(PutState.PARTIAL if out == mine else PutState.BUSY)
            else:
                states.append(_FAILED.get(written, PutState.PARTIAL))
        return states

    def complete(self, ref: ChunkRef, roi: Roi, payload: memoryview, labels: Labels) -> PutState:
        """Store the chunk if all its regions are there."""
        layout = self._ns.layout
        whole = memoryview(bytearray(layout.payload_bytes))
        _copy(layout, roi, payload, whole)
        regions = self._walk(ref.key, roi)
        if regions is None:
            return PutState.PARTIAL
        for other in regions:
            if other != roi and not self._read(ref.key, other, whole):
                return PutState.PARTIAL
        [state] = write_whole(self._ns, [ref], [whole], labels, self._left)
        if state in (PutState.STORED, PutState.EXISTS):
            names = [self.region(ref.key, one.layer_start, one.head_start) for one in regions]
            with suppress(RemoteError):  # it is stored; what is left of its parts is in no way
                self._ns.backend.delete([*names, self._claim(ref.key)], deadline_s=self._left)
            return PutState.STORED
        return state

    def _walk(self, key: bytes, mine: Roi) -> list[Roi] | None:
        """The regions of a chunk, if they are all there."""
        layout, found = self._ns.layout, list[Roi]()
        layer = head = 0
        while layer < layout.num_layers:
            at = (layer, head)
            one = mine if at == (mine.layer_start, mine.head_start) else self._told(key, *at)
            if one is None or (found and head and one.layer_stop != found[-1].layer_stop):
                return None
            found.append(one)
            head = one.head_stop % layout.num_heads
            layer = layer if head else one.layer_stop
        return found

    def _told(self, key: bytes, layer: int, head: int) -> Roi | None:
        out = memoryview(bytearray(_HEAD_BYTES))
        name = self.region(key, layer, head)
        [came] = self._ns.backend.get([Get(name, [(0, out)])], deadline_s=self._left)
        if came != _HEAD_BYTES:
            return None
        roi = Roi(*_CORNERS.unpack(out[_SUM_BYTES:]))
        layout = self._ns.layout
        inside = roi.layer_stop <= layout.num_layers and roi.head_stop <= layout.num_heads
        grows = roi.layer_stop > layer and roi.head_stop > head
        return (
            roi if inside and grows and (roi.layer_start, roi.head_start) == (layer, head) else None
        )

    def _read(self, key: bytes, roi: Roi, whole: memoryview) -> bool:
        """Read another rank's region to its place; whether it is what it says."""
        size = self._ns.layout.roi_bytes(roi)
        data = memoryview(bytearray(_HEAD_BYTES + size))
        name = self.region(key, roi.layer_start, roi.head_start)
        [came] = self._ns.backend.get([Get(name, [(0, data)])], deadline_s=self._left)
        if came != data.nbytes or _sum_of(name, data[_SUM_BYTES:]) != data[:_SUM_BYTES]:
            return False
        if Roi(*_CORNERS.unpack(data[_SUM_BYTES:_HEAD_BYTES])) != roi:
            return False
        _copy(self._ns.layout, roi, data[_HEAD_BYTES:], whole)
        return True


def _copy(layout: Layout, roi: Roi, region: memoryview, whole: memoryview) -> None:
    for run in layout.runs(roi):
        whole[run.slot_offset : run.slot_offset + run.num_bytes] = run.in_buffer(region)
