"""Writing whole chunks to a pool, as they are or coded: first the parts before the last, then what
says that they are there. Parts have their writer in their names, so whoever stores the same chunk
meanwhile, and dies or not, leaves a chunk that is there as it is. A writer that was not the first
removes its parts; those of one that died are left to the engine, but if it comes again with the
same bytes it writes the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from prefixstore.codec import lossless
from prefixstore.errors import LayoutError, RemoteError
from prefixstore.keys import KEY_BYTES, ChunkRef, is_honest
from prefixstore.layout import Buffer
from prefixstore.pool.backend import ABSENT, Put, Written
from prefixstore.pool.coded import make_head
from prefixstore.pool.objects import Shape, make_trailer, trailer_size
from prefixstore.pool.reading import rows_of
from prefixstore.putting import Labels, PutState
from prefixstore.reading import helpers_for, share_out
from prefixstore.serve.limits import ITEMS_BYTES_MAX

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace

_WRITERS = (1 << 32) - 1  # 0 is none
_STATES = {
    Written.YES: PutState.STORED,
    Written.THERE: PutState.EXISTS,
    Written.FULL: PutState.FULL,
    Written.NO: PutState.LOST,
}


def write(
    ns: PooledNamespace,
    refs: Sequence[ChunkRef],
    payloads: Sequence[memoryview],
    labels: Labels,
    deadline_s: float,
) -> list[PutState]:
    """Write chunks that are not there, in one go. Raises LayoutError, RemoteError."""
    end = time.monotonic() + deadline_s
    check(ns, refs)
    states = [PutState.EXISTS] * len(refs)
    # A chunk in several objects is asked about in any case: its parts would be sent in vain.
    asks = ns.backend.ask_first or ns.shape.num_parts > 0
    there = ns.exist([ref.key for ref in refs]) if asks else [False] * len(refs)
    first = {ref.key: i for i, ref in reversed(list(enumerate(refs)))}  # one may be twice in it
    new = [i for i, ref in enumerate(refs) if not there[i] and first[ref.key] == i]
    ttl_s = max(0.001, labels.expires_s - time.time()) if labels.expires_s else None
    with ns.store.seed() as seed:
        made = _make(ns, {i: (refs[i], payloads[i]) for i in new}, labels, seed)
        told = _write_all(ns, made, ttl_s, end)
        # What was not answered for may be stored yet.
        unused = [i for i in told if told[i] in (Written.THERE, Written.FULL)]
        _remove_parts(ns, [refs[i] for i in unused], [made[i] for i in unused], end)
    for i, written in told.items():
        states[i] = _STATES[written]
    stored = [refs[i].key for i in new if states[i] is PutState.STORED]
    if stored:
        ns.store.noted(ns.name, stored)
        if end - time.monotonic() > deadline_s / 2:  # measuring takes a while
            plain = [i for i in new if states[i] is PutState.STORED and not made[i].before]
            ns.choice.learn(ns, [refs[i] for i in plain], [payloads[i] for i in plain])
    return states


def check(ns: PooledNamespace, refs: Sequence[ChunkRef]) -> None:
    """Who forges a key, or keeps a book in a preimage, stores nothing. Raises LayoutError."""
    least = KEY_BYTES + 4 * ns.layout.chunk_tokens
    for ref in refs:
        if not is_honest(ref):
            raise LayoutError("a key that is not the hash of its preimage", "see docs/format.md")
        if not least <= len(ref.preimage) <= least + ITEMS_BYTES_MAX:
            raise LayoutError(
                f"a preimage of {len(ref.preimage)} bytes",
                f"{least} needed, and at most {ITEMS_BYTES_MAX} more for multimodal items",
            )


class _Made(NamedTuple):
    """A chunk as it is stored: ``stream`` is cut into parts, ``before`` and what ``trailer`` makes
    stand beside the last of them."""

    key: bytes
    shape: Shape
    stream: memoryview
    before: bytes = b""
    trailer: Callable[[], bytes] | None = None
    trailer_bytes: int = 0

    @property
    def part_names(self) -> list[str]:
        """Of the parts before the last."""
        return [self.shape.part_of(self.key, number) for number in range(self.shape.num_parts)]


def _make(
    ns: PooledNamespace,
    chunks: Mapping[int, tuple[ChunkRef, memoryview]],
    labels: Labels,
    seed: int,
) -> dict[int, _Made]:
    """Chunks as they are to be stored; those are coded of which something gets smaller."""
    payloads = [payload for _, payload in chunks.values()]
    encodes = ns.choice.encodes
    made: dict[int, _Made] = {}
    numbers = list(chunks)

    def work(at: int) -> None:
        ref, payload = chunks[numbers[at]]
        shape = ns.shape
        if shape.num_parts:
            # Of this put and these bytes: a try that is made again writes the same parts, and
            # nobody else does meanwhile.
            shape = shape.by(xxhash.xxh3_64_intdigest(payload, seed) % _WRITERS + 1)
        pieces = lossless.encode(ns.form, payload) if encodes else None
        if pieces is None:
            trailer = partial(make_trailer, shape, ref, ns.name, payload, labels)
            size = trailer_size(shape, ref, labels)
            made[numbers[at]] = _Made(ref.key, shape, payload, b"", trailer, size)
            return
        head = make_head(make_trailer(shape, ref, ns.name, payload, labels), pieces)
        stream = memoryview(b"".join(pieces))
        shape = shape.coded(stream.nbytes, len(head))
        made[numbers[at]] = _Made(ref.key, shape, stream, before=head)

    helpers = helpers_for(sum(map(len, payloads))) if encodes else 0
    share_out(len(numbers), work, ns.store.helpers, helpers)
    return made


def _write_all(
    ns: PooledNamespace, made: Mapping[int, _Made], ttl_s: float | None, end: float
) -> dict[int, Written]:
    """Write chunks; of which what became."""
    failed = _write_parts(ns, made, ttl_s, end)
    heads = {}
    for i, one in made.items():
        if i in failed:
            continue
        last = one.stream[one.shape.last_start :]
        parts: list[Buffer] = [one.before, last] if one.before else [last]
        heads[i] = Put(one.shape.object_of(one.key), parts, one.trailer, one.trailer_bytes)
    done = ns.backend.put([*heads.values()], ttl_s=ttl_s, deadline_s=end - time.monotonic())
    return {**failed, **dict(zip(heads, done, strict=True))}


def _write_parts(
    ns: PooledNamespace, made: Mapping[int, _Made], ttl_s: float | None, end: float
) -> dict[int, Written]:
    """Write what goes before the last part; the chunks of which that failed."""
    puts, owners = [], []
    for i, one in made.items():
        for number, name in enumerate(one.part_names):
            cut = one.stream[number * one.shape.part_bytes : (number + 1) * one.shape.part_bytes]
            puts.append(Put(name, [cut]))
            owners.append(i)
    done = ns.backend.put(puts, ttl_s=ttl_s, replace=True, deadline_s=end - time.monotonic())
    return {i: one for i, one in zip(owners, done, strict=True) if one is not Written.YES}


def _remove_parts(
    ns: PooledNamespace, refs: Sequence[ChunkRef], made: Sequence[_Made], end: float
) -> None:
    """Remove the parts of chunks that were not stored, if there is time, and if it is certain that
    no object says they are there: one that was sent twice may be, whatever was answered."""
    if not any(one.part_names for one in made) or time.monotonic() >= end:
        return
    with suppress(RemoteError):  # the engine will evict them
        rows = rows_of(ns, refs, end)

        def is_unused(one: _Made) -> bool:
            came, row = rows[one.key]
            return came == ABSENT if row is None else row.slot != one.shape.writer

        names = [name for one in filter(is_unused, made) for name in one.part_names]
        ns.backend.delete(names, deadline_s=end - time.monotonic())
