"""Reading a region of chunks of a pool: what of which object, and whether what came is right.

A chunk is stored as it is, or coded, and nobody knows which before it was read. As it is: its bytes
are at places that are known, so one round trip brings them, but for parts in other objects, whose
names stand in the trailer: those take another one. Coded: its head comes first, then the pieces.
A namespace begins with the one way until it has met a coded chunk, then with the other, and tries
what is left with what turns out to be no such chunk: so hosts with and without a codec read each
other's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from prefixstore.errors import RemoteError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.pool import coded
from prefixstore.pool.backend import ABSENT, LOST, Get
from prefixstore.pool.coded import Head
from prefixstore.pool.objects import Shape, Trailer, read_head, read_trailer
from prefixstore.reading import helpers_for, share_out
from prefixstore.rows import Row

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace

Gets = list[tuple[int, memoryview]]


class State(Enum):
    """What became of one chunk of a get."""

    GOOD = "good"  # the buffer holds what the chunk does
    MISSING = "missing"
    LOST = "lost"  # nobody knows
    DAMAGED = "damaged"  # it is there, and is not what it should be
    OTHER = "other"  # what is there is no chunk of the kind that was looked for


def read(
    ns: PooledNamespace,
    refs: Sequence[ChunkRef],
    outs: Sequence[memoryview],
    roi: Roi,
    deadline_s: float,
) -> list[State]:
    """Read a region of chunks. Raises RemoteError."""
    end = time.monotonic() + deadline_s
    first, second = read_plain, _read_coded
    if ns.meets_coded:
        first, second = second, first
    states = first(ns, refs, outs, roi, end)
    # A coded chunk is shorter: of what is asked for as if it were not nothing comes, or as of some
    # engines not even that.
    unsure = {State.OTHER, State.MISSING if ns.backend.reads_short else State.LOST}
    if second is read_plain:
        unsure.discard(State.MISSING)  # its head is not there
    again = [i for i, state in enumerate(states) if state in unsure]
    if again:
        try:
            found = second(ns, [refs[i] for i in again], [outs[i] for i in again], roi, end)
        except RemoteError:
            found = [State.LOST] * len(again)
        for i, state in zip(again, found, strict=True):
            # What one does not know and the other does not recognise nobody knows.
            if not (states[i] is State.LOST and state in (State.OTHER, State.MISSING)):
                states[i] = state
    return [State.DAMAGED if state is State.OTHER else state for state in states]


class _Fetch:
    """Bytes of one chunk's objects: ``wanted`` are (start in the stream, where to), rising.
    ``behind``: what stands behind the last part, read as far as it goes."""

    def __init__(
        self, shape: Shape, ref: ChunkRef, wanted: Gets, behind: memoryview | None = None
    ) -> None:
        cuts: dict[str, Gets] = {}
        for start, out in wanted:
            for name, cut in shape.cut(ref.key, start, out):
                cuts.setdefault(name, []).append(cut)
        self._least = [sum(view.nbytes for _, view in cut) for cut in cuts.values()]
        self._has_behind = behind is not None
        if behind is not None:
            name = shape.object_of(ref.key)
            if name not in cuts:
                self._least.append(0)
            cuts.setdefault(name, []).append((shape.last_bytes, behind))
        self.gets = [Get(name, cut) for name, cut in cuts.items()]

    def judge(self, came: Sequence[int]) -> tuple[State, int]:
        """What the counts say of it, and how many bytes came beyond those that had to."""
        if LOST in came:
            return State.LOST, 0
        if self._has_behind and came[-1] == ABSENT:
            return State.MISSING, 0
        if any(count < least for count, least in zip(came, self._least, strict=True)):
            return State.OTHER, 0
        return State.GOOD, came[-1] - self._least[-1]


def _fetch(ns: PooledNamespace, fetches: Sequence[_Fetch], end: float) -> list[tuple[State, int]]:
    gets = [get for fetch in fetches for get in fetch.gets]
    counts = iter(ns.backend.get(gets, deadline_s=end - time.monotonic()))
    return [fetch.judge([next(counts) for _ in fetch.gets]) for fetch in fetches]


def _fetch_told(
    ns: PooledNamespace,
    refs: Sequence[ChunkRef],
    told: Mapping[int, tuple[Shape, Gets]],
    states: list[State],
    end: float,
) -> None:
    """Fetch what a head or a trailer says is there: where it is not, the chunk is damaged, or was
    removed and stored anew by another writer meanwhile."""
    if not told:
        return
    fetches = [_Fetch(shape, refs[i], wanted) for i, (shape, wanted) in told.items()]
    for i, (state, _) in zip(told, _fetch(ns, fetches, end), strict=True):
        states[i] = state
    lacking = [i for i in told if states[i] is State.OTHER]
    now = writers_of(ns, [refs[i] for i in lacking], end)
    for i in lacking:
        writer = told[i][0].writer
        same = now.get(refs[i].key, writer) == writer
        states[i] = State.DAMAGED if same else State.LOST


def _cut_at(start: int, wanted: Gets) -> tuple[Gets, Gets]:
    """What is wanted before a place in the stream, and from there on."""
    before, behind = Gets(), Gets()
    for at, out in wanted:
        size = min(max(0, start - at), out.nbytes)
        before += [(at, out[:size])] * (size > 0)
        behind += [(at + size, out[size:])] * (size < out.nbytes)
    return before, behind


def read_plain(
    ns: PooledNamespace,
    refs: Sequence[ChunkRef],
    outs: Sequence[memoryview],
    roi: Roi,
    end: float,
) -> list[State]:
    """Read chunks that are stored as they are. Raises RemoteError."""
    trailers = [memoryview(bytearray(ns.shape.trailer_bytes(ref))) for ref in refs]
    runs = ns.layout.runs(roi)
    wanted = [
        _cut_at(ns.shape.last_start, [(run.slot_offset, run.in_buffer(out)) for run in runs])
        for out in outs
    ]
    fetches = [
        _Fetch(ns.shape, ref, behind, trailer)
        for ref, (_, behind), trailer in zip(refs, wanted, trailers, strict=True)
    ]
    states, found, others = list[State](), dict[int, Trailer](), dict[int, tuple[Shape, Gets]]()
    for i, (state, beyond) in enumerate(_fetch(ns, fetches, end)):
        states.append(state)
        if state is not State.GOOD:
            continue
        trailer = read_trailer(trailers[i][:beyond], ns.shape, ns.name, refs[i])
        if trailer is None:
            states[i] = State.OTHER
            continue
        found[i] = trailer
        if wanted[i][0]:
            others[i] = ns.shape.by(trailer.row.slot), wanted[i][0]
    _fetch_told(ns, refs, others, states, end)
    for i, trailer in found.items():
        if states[i] is State.GOOD and not trailer.vouches_for(outs[i], ns.layout, roi):
            states[i] = State.DAMAGED
    return states


def _read_coded(
    ns: PooledNamespace,
    refs: Sequence[ChunkRef],
    outs: Sequence[memoryview],
    roi: Roi,
    end: float,
) -> list[State]:
    heads = read_heads(ns, refs, end)
    states = [head if isinstance(head, State) else State.GOOD for head in heads]
    which = ns.layout.piece_indices(roi)
    asked = {i: head for i, head in enumerate(heads) if isinstance(head, Head)}
    if not asked:
        return states
    ns.meets_coded = True
    data: dict[int, memoryview] = {}
    told: dict[int, tuple[Shape, Gets]] = {}
    for i, head in asked.items():
        runs = head.runs(which)
        data[i] = rest = memoryview(bytearray(sum(size for _, size in runs)))
        wanted: Gets = []
        for start, size in runs:
            wanted.append((start, rest[:size]))
            rest = rest[size:]
        told[i] = head.shape, wanted
    _fetch_told(ns, refs, told, states, end)
    good = [i for i in asked if states[i] is State.GOOD]

    def finish(number: int) -> None:
        i = good[number]
        head = asked[i]
        if not (
            coded.decode(head, ns.form, which, data[i], outs[i])
            and head.trailer.vouches_for(outs[i], ns.layout, roi)
        ):
            states[i] = State.DAMAGED

    helpers = helpers_for(len(good) * ns.layout.roi_bytes(roi))
    share_out(len(good), finish, ns.store.helpers, helpers)
    return states


def read_heads(ns: PooledNamespace, refs: Sequence[ChunkRef], end: float) -> list[Head | State]:
    """Heads of coded chunks; in place of one that is none, what became of it. Raises
    RemoteError."""
    buffers = [memoryview(bytearray(coded.head_bytes(ns.shape, ref))) for ref in refs]
    gets = [
        Get(ns.shape.object_of(ref.key), [(0, buffer)])
        for ref, buffer in zip(refs, buffers, strict=True)
    ]
    counts = ns.backend.get(gets, deadline_s=end - time.monotonic())
    found: list[Head | State] = []
    for ref, buffer, came in zip(refs, buffers, counts, strict=True):
        if came in (LOST, ABSENT):
            found.append(State.LOST if came == LOST else State.MISSING)
            continue
        head = coded.read_head(buffer[:came], ns.shape, ns.name, ref)
        found.append(State.OTHER if head is None else head)
    return found


def read_rows(
    ns: PooledNamespace, keys: Sequence[bytes], size: int, end: float
) -> dict[bytes, tuple[int, Row | None]]:
    """What came of each chunk's object, and the row in it, if that is sound and no longer than
    ``size`` with what stands before it. Where it is depends on whether the chunk is coded: those
    that have none in one place are asked for the other. Raises RemoteError."""
    found: dict[bytes, tuple[int, Row | None]] = {}
    left = list(keys)
    for offset in (ns.shape.last_bytes, coded.TRAILER_AT):
        heads = [memoryview(bytearray(size)) for _ in left]
        gets = [
            Get(ns.shape.object_of(key), [(offset, head)])
            for key, head in zip(left, heads, strict=True)
        ]
        counts = ns.backend.get(gets, deadline_s=end - time.monotonic())
        for key, head, count in zip(left, heads, counts, strict=True):
            row = read_head(head[: max(0, count)], ns.shape, ns.name, key)
            # In the wrong place some engines say LOST: only both, or a row, are an answer.
            before, _ = found.get(key, (count, None))
            found[key] = (count if row is not None else min(count, before)), row
        left = [key for key in left if found[key][1] is None]
        if not left:
            break
    return found


def rows_of(
    ns: PooledNamespace, refs: Sequence[ChunkRef], end: float
) -> dict[bytes, tuple[int, Row | None]]:
    """`read_rows` of chunks, however long their rows may be; of one at least."""
    size = max(ns.shape.row_bytes(ref) for ref in refs)
    return read_rows(ns, [ref.key for ref in refs], size, end)


def writers_of(ns: PooledNamespace, refs: Sequence[ChunkRef], end: float) -> dict[bytes, int]:
    """Who has written the parts of chunks, of those whose row can be read. Raises RemoteError."""
    if not refs or not ns.shape.num_parts:
        return {}
    rows = rows_of(ns, refs, end)
    return {key: row.slot for key, (_, row) in rows.items() if row is not None}
