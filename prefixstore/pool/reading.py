"""Reading a region of one chunk of a pool: what of which object, and whether what came is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.pool.backend import ABSENT, LOST, Get
from prefixstore.pool.objects import read_trailer

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace


class Reading:
    """See the module docstring. ``good``: the buffer holds what the chunk does. ``damaged``: the
    chunk is there, and is not what it should be."""

    def __init__(self, ns: PooledNamespace, ref: ChunkRef, out: memoryview, roi: Roi) -> None:
        self.ref = ref
        self.good = self.damaged = False
        self._ns, self._out, self._roi = ns, out, roi
        self._trailer = memoryview(bytearray(ns.shape.trailer_bytes(ref)))
        cuts: dict[str, list[tuple[int, memoryview]]] = {}
        for run in ns.layout.runs(roi):
            for name, cut in ns.shape.cut(ref.key, run.slot_offset, run.in_buffer(out)):
                cuts.setdefault(name, []).append(cut)
        last = cuts.pop(ns.shape.object_of(ref.key), [])
        self._wanted = [sum(view.nbytes for _, view in found) for found in cuts.values()]
        self._wanted.append(sum(view.nbytes for _, view in last))
        last.append((ns.shape.last_bytes, self._trailer))
        self.gets = [Get(name, found) for name, found in cuts.items()]
        self.gets.append(Get(ns.shape.object_of(ref.key), last))

    def check(self, came: Sequence[int]) -> None:
        """Judge what has come of each get."""
        if LOST in came or came[-1] == ABSENT:
            return
        ns, trailer = self._ns, self._trailer[: max(0, came[-1] - self._wanted[-1])]
        if all(count >= least for count, least in zip(came, self._wanted, strict=True)):
            found = read_trailer(trailer, ns.shape, ns.name, self.ref)
            self.good = found is not None and found.vouches_for(self._out, ns.layout, self._roi)
        self.damaged = not self.good
