"""LMCache's L2 adapters ``fs`` and ``fs_native`` as two of `corruption_peers`.

Driven as its own ``lmcache bench l2`` drives them, with the objects that tool makes. Run by the
Python of ``.venv-lmcache`` (`lmcache_peer.installed`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.corruption_peer_host import CHUNK_BYTES, Peer

_WAIT_S = 20.0
os.environ.update(LMCACHE_TRACK_USAGE="false", DO_NOT_TRACK="1", LMCACHE_DISABLE_BANNER="1")
_bench: Any = import_module("lmcache.cli.commands.bench.l2_adapter_bench.data")
_adapters: Any = import_module("lmcache.v1.distributed.l2_adapters")
_config: Any = import_module("lmcache.v1.distributed.l2_adapters.config")
_torch: Any = import_module("torch")
# Loaded now rather than in each use, which would take seconds.
for _name in ("fs", "fs_native"):
    _config.get_l2_adapter_config_class(_name)
import_module("lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter")
import_module("lmcache.lmcache_fs")


class LmcacheL2:
    """See `Peer`."""

    def __init__(self, adapter: str, folder: Path, count: int) -> None:
        self._folder = folder / "l2"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._buffer = _bench.make_aligned_tensor(count * CHUNK_BYTES, 4096)
        self._keys = _bench.make_object_keys(count, "m")
        self._objects = _bench.make_memory_objects(self._buffer, count, CHUNK_BYTES, 0)
        spec = {"type": adapter, "base_path": str(self._folder)}
        config = _config.get_l2_adapter_config_class(adapter).from_dict(spec)
        self._adapter = _adapters.create_l2_adapter(
            config, l1_memory_desc=_bench.create_l1_memory_desc(self._buffer, 4096)
        )

    def _wait(self, event_fd: int, query: Callable[[], Any]) -> Any:
        while (result := query()) is None:
            if not _bench.wait_eventfd(event_fd, timeout=_WAIT_S):
                raise TimeoutError("a task was not answered")
        return result

    def put(self, number: int, data: bytes) -> bool:
        """See `Peer`."""
        self._objects[number].raw_data.copy_(_torch.frombuffer(bytearray(data), dtype=_torch.uint8))
        task = self._adapter.submit_store_task([self._keys[number]], [self._objects[number]])
        result = self._wait(
            self._adapter.get_store_event_fd(),
            lambda: self._adapter.pop_completed_store_tasks().get(task),
        )
        return bool(result.is_successful())

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """See `Peer`."""
        keys = [self._keys[number] for number in numbers]
        task = self._adapter.submit_lookup_and_lock_task(keys, {})
        bits = self._wait(
            self._adapter.get_lookup_and_lock_event_fd(),
            lambda: self._adapter.query_lookup_and_lock_result(task),
        )
        there = [number for i, number in enumerate(numbers) if bits.test(i)]
        self._buffer.zero_()
        loaded = {number: self._load(number) for number in there}
        self._adapter.submit_unlock([self._keys[number] for number in there])
        return [
            self._objects[n].raw_data.numpy().tobytes() if loaded.get(n) else None for n in numbers
        ]

    def _load(self, number: int) -> bool:
        task = self._adapter.submit_load_task([self._keys[number]], [self._objects[number]])
        bits = self._wait(
            self._adapter.get_load_event_fd(), lambda: self._adapter.query_load_result(task)
        )
        return bool(bits.test(0))

    def place(self, number: int) -> tuple[str, int, int]:
        """See `Peer`."""
        digest = self._keys[number].chunk_hash.hex()
        [path] = [p for p in self._folder.rglob("*") if p.is_file() and digest in p.name]
        return str(path), 0, CHUNK_BYTES

    def close(self) -> None:
        """See `Peer`."""
        self._adapter.close()


def open_peer(name: str, folder: Path, count: int) -> Peer:
    """Open it."""
    return LmcacheL2(name.partition("-")[2], folder, count)
