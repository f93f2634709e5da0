"""This project's store as one of `corruption_peers`: chunks on disk, read with memory emptied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.corruption_peer_host import CHUNK_BYTES, Peer
from prefixstore import Layout, Store
from prefixstore.keys import ChunkRef
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.rows import Row
from prefixstore.testing_data import identity_for, tokens_of

LAYOUT = Layout(num_layers=8, num_planes=2, num_heads=8, chunk_tokens=16, head_bytes=128)
assert LAYOUT.payload_bytes == CHUNK_BYTES


class Ours:
    """See `Peer`."""

    def __init__(self, folder: Path, count: int) -> None:
        memory = folder / "memory"
        memory.mkdir(parents=True, exist_ok=True)
        self._store = Store.open(
            folder / "store", memory_bytes="64MiB", disk_bytes="64MiB", memory_dir=str(memory)
        )
        self._ns = self._store.namespace(identity_for("a", LAYOUT), LAYOUT)
        self._refs: list[ChunkRef] = [
            self._ns.chain(tokens_of(number, 1, LAYOUT)).refs()[0] for number in range(count)
        ]

    def put(self, number: int, data: bytes) -> bool:
        """See `Peer`."""
        [state] = self._ns.put([self._refs[number]], [data])
        return state in (PutState.STORED, PutState.EXISTS)

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """See `Peer`."""
        refs = [self._refs[number] for number in numbers]
        outs = [memoryview(bytearray(CHUNK_BYTES)) for _ in refs]
        tiers = self._ns.get(refs, outs)
        self._store.on_keeper(lambda: None)  # what was found damaged has been looked at
        return [None if tier == MISS else bytes(out) for tier, out in zip(tiers, outs, strict=True)]

    def place(self, number: int) -> tuple[str, int, int]:
        """See `Peer`."""
        with self._store.index.read() as txn:
            row = Row.unpack(txn.get("chunk", self._refs[number].key) or b"")
        path = self._store.file_of(2, row.slot_bytes).path
        return str(path), row.slot * row.slot_bytes, CHUNK_BYTES

    def close(self) -> None:
        """See `Peer`."""
        self._store.flush()
        self._store.close()


def open_peer(name: str, folder: Path, count: int) -> Peer:
    """Open it."""
    return Ours(folder, count)
