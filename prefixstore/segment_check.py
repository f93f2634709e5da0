"""Checking the segment index against the rows of the chunks, and building it anew.

Part of ``verify``. A store that was made before there was a segment index, or that a version
without one has written to, is brought up to date by ``verify --fix``: each chunk is entered, and
texts that were left out because of a source that has gone since are looked at again. The repair is
made in small transactions, each of which leaves the index sound, so it may end anywhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prefixstore.index import Environment, Txn
from prefixstore.keys import KEY_BYTES
from prefixstore.rows import Row
from prefixstore.segment_index import (
    child_name,
    enter,
    fingerprints_of,
    leave,
    refresh,
    unpack_sources,
)

if TYPE_CHECKING:
    from prefixstore.store import Store

_BATCH = 64  # chunks entered in one transaction: about 10 ms

Fault = tuple[str, bytes, tuple[bytes, ...]]  # what is wrong, key, fingerprints that name it


def check_segments(store: Store, *, fix: bool) -> dict[str, int]:
    """What is wrong with the segment index, and with how many chunks; {} if nothing.

    With ``fix`` it is repaired first, and what is still wrong is given.
    """
    searched = store.index if store.has_disk else store.live
    wrong: Counter[str] = Counter()
    for env in (store.index, store.live):
        if fix:
            faults, strays = _faults(store, env, env is searched)
            _clear(env, faults, strays)
            if env is searched:
                _build(store, env)
        faults, strays = _faults(store, env, env is searched)
        wrong.update(why for why, _, _ in faults)
        wrong.update("a chunk is entered as a child that it is not" for _ in strays)
    return dict(wrong)


def _faults(store: Store, env: Environment, complete: bool) -> tuple[list[Fault], list[bytes]]:
    """Chunks that the index is wrong about; names in table ``child`` that belong to none."""
    named: dict[bytes, set[bytes]] = {}
    with env.read() as txn:  # one snapshot: a row and its entries change together
        indexed, children = dict(txn.scan("indexed")), {name for name, _ in txn.scan("child")}
        for fingerprint, data in txn.scan("segment"):
            for source in unpack_sources(data):
                named.setdefault(source.key, set()).add(fingerprint)
        rows = {key: row for key, row in txn.scan("chunk") if complete or key in indexed}
        measured = [key for key, _ in txn.scan("staleness")]
    faults: list[Fault] = []
    for key in indexed.keys() | named.keys():
        names, value = named.get(key, set()), indexed.get(key)
        why = ""
        if key not in rows or value is None:
            why = "a segment of a chunk that is not there"
        elif names != set(fingerprints_of(value)):
            why = "a chunk whose fingerprints do not name it"
        elif child_name(key, value) not in children:
            why = "a chunk that cannot be found from the one before"
        if why:
            faults.append((why, key, tuple(names)))
    left = [key for key in measured if key not in rows]
    faults += [("staleness of a chunk that is not there", key, ()) for key in left]
    if complete:
        size_of = _sizes(store)
        faults += [
            ("a chunk that is not in the segment index", key, ())
            for key, row in rows.items()
            if key not in indexed and size_of(row)
        ]
    return faults, sorted(children - {child_name(*item) for item in indexed.items()})


def _sizes(store: Store) -> Callable[[bytes], int]:
    """A function that gives the tokens of an encoded row's chunk, 0 if it has no place here."""
    sizes = {record.identity.namespace: record.layout.chunk_tokens for record in store.namespaces()}
    now_s = time.time()

    def chunk_tokens(data: bytes) -> int:
        try:
            row = Row.unpack(data)
        except ValueError:  # a damaged page: the check of the rows reports it
            return 0
        size = sizes.get(row.namespace, 0)
        has_items = len(row.preimage) != KEY_BYTES + 4 * size
        return 0 if has_items or 0 < row.expires_s <= now_s else size

    return chunk_tokens


def _clear(env: Environment, faults: list[Fault], strays: list[bytes]) -> None:
    """Take out all that is wrong."""

    def leave_all(txn: Txn, part: Sequence[Fault]) -> None:
        for _, key, names in part:
            leave(txn, key, names)
            if txn.get("chunk", key) is None:
                txn.delete("staleness", key)

    def delete_all(txn: Txn, part: Sequence[bytes]) -> None:
        for name in part:
            txn.delete("child", name)

    for at in range(0, len(faults), _BATCH):
        env.write(partial(leave_all, part=faults[at : at + _BATCH]))
    for at in range(0, len(strays), _BATCH):
        env.write(partial(delete_all, part=strays[at : at + _BATCH]))


def _build(store: Store, env: Environment) -> None:
    """Enter what is not there; look at the rest again."""
    size_of = _sizes(store)
    with env.read() as txn:
        rows = [(int.from_bytes(row[4:8], "little"), key, size)
                for key, row in txn.scan("chunk") if (size := size_of(row))]  # fmt: skip
    rows.sort()  # by depth: parents first

    def enter_all(txn: Txn, part: Sequence[tuple[int, bytes, int]]) -> None:
        for _, key, size in part:
            known = txn.get("indexed", key) is not None
            (refresh if known else enter)(txn, key, size)

    for at in range(0, len(rows), _BATCH):
        env.write(partial(enter_all, part=rows[at : at + _BATCH]))
