"""Statistics through vLLM's own hooks: the log line, and Prometheus counters at ``/metrics``."""

from __future__ import annotations

from collections import Counter as TallyCounter
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from connector.device_tier import DEVICE
from prefixstore import ledger
from prefixstore.fronted import REMOTE

STORE_TIERS = {**ledger.TIER_NAMES, REMOTE: "remote"}
TIER_NAMES = {**STORE_TIERS, DEVICE: "device"}
SAMPLES_MAX = 1000  # of each duration between two reports
SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_MISSES = ("absent", "not_needed", "slower_to_load", "bypassed", "stalled", "error")
_PLAIN = {
    "blend_reused_tokens": "Prompt tokens taken from elsewhere in stored texts.",
    "blend_recomputed_tokens": "Of those, tokens that were recomputed.",
    "blend_between_tokens": "Tokens computed because they stood between or behind reused ones.",
    "blends_failed": "Blends and splits that failed; the engine computed the prompt.",
    "split_computed_tokens": "Prompt tokens computed while others of the same hit were loaded.",
    "chunks_prefetched": "Chunks fetched from a server or a disk for requests that waited.",
    "device_chunks_hit": "Chunks of loads that were in the device tier.",
    "device_chunks_admitted": "Chunks the device tier took in.",
    "device_chunks_evicted": "Chunks the device tier let go of for others.",
    "device_chunks_damaged": "Chunks in the device tier that had changed; the store was asked.",
    "bytes_saved": "Bytes of KV given to the store.",
    "chunks_saved": "Chunks given to the store.",
    "states_saved": "States (of Mamba, linear attention) at ends of chunks given to the store.",
    "save_dropped_chunks": "Chunks not saved because the staging ring was full or no store there.",
    "save_refused_chunks": "Chunks the store refused: tier full or quota used.",
    "save_errors": "Saves that failed.",
    "copies_made": "Chunks copied from the folder to the pool behind it, or there already.",
    "copies_lost": "Chunks not copied: too many waited, or they had gone before their turn.",
    "copies_refused": "Chunks the pool had no room for.",
    "loads_cut": "Loads that were ended early because computing the rest was faster.",
    "loads_failed": "Loads that failed and were recomputed.",
    "loads_stalled": "Times a stalled store was given up.",
    "bad_params": "Requests with invalid kv_transfer_params.prefixstore.",
}


@dataclass
class PrefixStoreStats(KVConnectorStats):
    """``data``: {"counts": {name: n}, "load_seconds": [...], "save_seconds": [...]}."""

    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, counts: dict[str, int], load_seconds: list[float], save_seconds: list[float]
    ) -> PrefixStoreStats:
        """What has happened since the last report."""
        return cls(
            data={
                "counts": dict(counts),
                "load_seconds": load_seconds[:SAMPLES_MAX],
                "save_seconds": save_seconds[:SAMPLES_MAX],
            }
        )

    def reset(self) -> None:
        """Start over."""
        self.data = {"counts": {}, "load_seconds": [], "save_seconds": []}

    def aggregate(self, other: KVConnectorStats) -> PrefixStoreStats:
        """Add another rank's or interval's."""
        mine, theirs = self.data, other.data
        counts = TallyCounter(mine.get("counts", {}))
        counts.update(theirs.get("counts", {}))
        return PrefixStoreStats.of(
            counts,
            mine.get("load_seconds", []) + theirs.get("load_seconds", []),
            mine.get("save_seconds", []) + theirs.get("save_seconds", []),
        )

    def reduce(self) -> dict[str, int | float]:
        """Flat numbers for the log line."""
        flat: dict[str, int | float] = {}
        for name, value in sorted(self.data.get("counts", {}).items()):
            flat[_readable(name)] = value
        for name in ("load_seconds", "save_seconds"):
            samples = sorted(self.data.get(name, []))
            if samples:
                flat[f"{name}_median"] = round(samples[len(samples) // 2], 4)
        return flat

    def is_empty(self) -> bool:
        """Nothing to report."""
        return not any(self.data.values())


def _readable(name: str) -> str:
    head, _, tail = name.rpartition("_")
    return f"{head}_{TIER_NAMES[int(tail)]}" if tail.isdigit() else name


class PrefixStoreProm(KVConnectorPromMetrics):
    """The counters. Names begin with ``prefixstore:``, as vLLM's own do with ``vllm:``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        identity: str = "",
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]

        def family(name: str, text: str, label: str) -> Any:
            return counter(
                name=f"prefixstore:{name}", documentation=text, labelnames=[*labelnames, label]
            )

        self._hits = family("tokens_hit", "Prompt tokens claimed from the store.", "tier")
        self._loaded = family("bytes_loaded", "Bytes of KV read from the store.", "tier")
        self._misses = family("misses", "Requests that loaded nothing, by reason.", "reason")
        self._plain = {
            name: counter(name=f"prefixstore:{name}", documentation=text, labelnames=labelnames)
            for name, text in _PLAIN.items()
        }
        self._seconds = {
            name: histogram(
                name=f"prefixstore:{name}",
                documentation=f"Time of one {name.split('_')[0]}, in seconds.",
                buckets=SECONDS_BUCKETS,
                labelnames=labelnames,
            )
            for name in ("load_seconds", "save_seconds")
        }
        self._waiting = metric_types[Gauge](
            name="prefixstore:copies_waiting",
            documentation="Chunks in the folder that are yet to be copied to the pool behind it.",
            labelnames=labelnames,
        )
        if identity:
            info = metric_types[Gauge](
                name="prefixstore:identity_info",
                documentation="The identity of the engine's KV: engines with the same share it.",
                labelnames=[*labelnames, "identity"],
            )
            for labels in per_engine_labelvalues.values():
                info.labels(*labels, identity).set(1)
        for labels in per_engine_labelvalues.values():  # so that zeros show from the start
            for tier in TIER_NAMES.values():
                self._loaded.labels(*labels, tier)
            for tier in STORE_TIERS.values():
                self._hits.labels(*labels, tier)
            for reason in _MISSES:
                self._misses.labels(*labels, reason)
            for metric in (*self._plain.values(), *self._seconds.values(), self._waiting):
                metric.labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine reported."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.get("counts", {}).items():
            head, _, tail = name.rpartition("_")
            if head in ("tokens_hit", "bytes_loaded"):
                family = self._hits if head == "tokens_hit" else self._loaded
                family.labels(*labels, TIER_NAMES[int(tail)]).inc(value)
            elif name.startswith("miss_"):
                self._misses.labels(*labels, name.removeprefix("miss_")).inc(value)
            elif name == "copies_waiting":  # how many more, or less
                self._waiting.labels(*labels).inc(value)
            elif name in self._plain:
                self._plain[name].labels(*labels).inc(value)
        for name, metric in self._seconds.items():
            for sample in transfer_stats_data.get(name, []):
                metric.labels(*labels).observe(sample)
