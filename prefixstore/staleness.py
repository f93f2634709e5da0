"""Staleness of stored chunks: how far the KV of each of their tokens moves behind other texts.

Measured when a text is warmed (`blend.staleness`), read when it is reused behind other texts. One
number a token, as float16, in a table beside the row of the chunk: it goes when the row goes, and
is lost when the chunk is evicted, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prefixstore import config
from prefixstore.errors import LayoutError
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef

if TYPE_CHECKING:
    from prefixstore.namespace import Namespace

Staleness = npt.NDArray[np.float16]
_MOST = float(np.finfo(np.float16).max)


def note_staleness(
    namespace: Namespace, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
) -> int:
    """Keep how far the KV of each token moves behind other texts: ``values`` [chunks, tokens],
    NaN where it was not measured.

    Of chunks that segments are found in (on disk, if the store has one: flush first); returns how
    many. Raises LayoutError, StoreTimeoutError, StoreClosedError.
    """
    store = namespace.store
    store.check_open(namespace.name)
    rows = rows_of(refs, values, namespace.layout.chunk_tokens)

    def note(txn: Txn, start: int) -> int:
        part = slice(start, start + config.BATCH_CHUNKS_MAX)
        there = [txn.get("chunk", ref.key) is not None for ref in refs[part]]
        for ref, row, is_there in zip(refs[part], rows[part], there, strict=True):
            if is_there:
                txn.put("staleness", ref.key, row)
        return sum(there)

    env = store.index if store.has_disk else store.live
    starts = range(0, len(refs), config.BATCH_CHUNKS_MAX)
    return sum(env.write(partial(note, start=start)) for start in starts)


def rows_of(
    refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]], chunk_tokens: int
) -> list[bytes]:
    """What is kept of each chunk: float16 [tokens], little-endian. Raises LayoutError."""
    if values.shape != (len(refs), chunk_tokens):
        raise LayoutError(
            f"staleness of shape {values.shape} for {len(refs)} chunks",
            f"give [{len(refs)}, {chunk_tokens}]: one number a token",
        )
    if (values < 0).any():
        raise LayoutError("staleness that is negative", "give numbers from 0 on")
    return [row.tobytes() for row in np.minimum(values, _MOST).astype("<f2")]


def staleness_of(namespace: Namespace, refs: Sequence[ChunkRef]) -> list[Staleness | None]:
    """What was noted of each chunk: float16 [tokens], NaN for what was not measured; or None.
    Lock-free.

    Raises StoreClosedError.
    """
    store, size = namespace.store, namespace.layout.chunk_tokens
    store.check_open(namespace.name)
    env = store.index if store.has_disk else store.live
    with env.lookup("staleness") as lookup:
        found = [lookup(ref.key) for ref in refs]
    return [
        np.frombuffer(data, "<f2") if data is not None and len(data) == 2 * size else None
        for data in found
    ]
