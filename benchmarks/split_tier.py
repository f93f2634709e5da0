"""The connector with a disk tier as slow as it is told, and with each way of loading by turns.

vLLM loads it by name, in the engine's process. A file beside the store's folder says which ``load``
setting the next request is served with, and how many bytes a second the tier gives; without it the
tier is as fast as it is. There is a scheduler's half for each setting, and each goes by what it has
measured itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from connector.geometry import Geometry
from connector.scheduler_side import SchedulerSide
from connector.vllm import PrefixStoreConnector
from prefixstore.layout import Roi
from prefixstore.namespace import Namespace

# What of `kv_transfer_config` names it.
NAMED = {"kv_connector": "SlowTierConnector", "kv_connector_module_path": "benchmarks.split_tier"}
POLICIES = ("always", "auto", "both")
NAP_S = 0.02  # between two signs of progress


class Told:
    """What the engine is told, by a file."""

    def __init__(self, folder: Path) -> None:
        self._file = folder.parent / "told.json"

    def tell(self, load: str, bytes_s: float | None) -> None:
        """From the next request on."""
        self._file.write_text(json.dumps([load, bytes_s]))

    def read(self) -> tuple[str, float | None]:
        """What was told last."""
        if not self._file.exists():
            return POLICIES[0], None
        load, bytes_s = json.loads(self._file.read_text())
        return load, bytes_s


class Throttle:
    """When what is read would have come, one read after the other."""

    def __init__(self, told: Told) -> None:
        self._told, self._lock, self._free_at = told, threading.Lock(), 0.0

    def due(self, num_bytes: int) -> float:
        """When (monotonic) so many bytes that are asked for now would be there."""
        bytes_s = self._told.read()[1]
        if bytes_s is None:
            return 0.0
        with self._lock:
            self._free_at = max(time.monotonic(), self._free_at) + num_bytes / bytes_s
            return self._free_at


class SlowTierConnector(PrefixStoreConnector):
    """See the module docstring. Its engine is told ``load: both``."""

    _sides: dict[str, SchedulerSide]

    def _start_scheduler_side(self, geometry: Geometry) -> None:
        self._sides, options = {}, self._options
        for load in POLICIES:
            self._options = replace(options, load=load)
            super()._start_scheduler_side(geometry)
            assert self._scheduler is not None
            self._sides[load] = self._scheduler

    def on_new_request(self, request: Any) -> None:
        """Nobody else is being served then."""
        self._scheduler = self._sides[Told(Path(self._options.dir)).read()[0]]
        super().on_new_request(request)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """From here on all reads of this process are slow."""
        throttle, get = Throttle(Told(Path(self._options.dir))), Namespace.get

        def slow(
            namespace: Namespace,
            refs: Any,
            outs: Sequence[memoryview],
            roi: Roi | None = None,
            progress: Callable[[], None] = lambda: None,
        ) -> list[int]:
            due = throttle.due(sum(len(out) for out in outs))
            tiers = get(namespace, refs, outs, roi, progress)
            while (left := due - time.monotonic()) > 0:
                time.sleep(min(left, NAP_S))
                progress()
            return tiers

        Namespace.get = slow  # type: ignore[method-assign, assignment]
        super().register_kv_caches(kv_caches)
