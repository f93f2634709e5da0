"""Counts of the server, and all that ``/metrics`` shows, in Prometheus' text format (0.0.4).

Label values are those of a fixed set (routes, statuses, tiers), so nothing a client sends can make
the page grow. Lost when the process ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_HELP = {
    "requests_total": ("counter", "requests answered"),
    "sent_bytes_total": ("counter", "bytes of KV sent"),
    "received_bytes_total": ("counter", "bytes of KV received"),
    "chunks_total": ("counter", "chunks asked for by gets: the tier that had them, or miss"),
    "matched_chunks_total": ("counter", "chunks of prompts looked up: the tier, or miss"),
    "puts_total": ("counter", "chunks of puts, by what became of them"),
    "refused_total": ("counter", "requests refused"),
    "broken_transfers_total": ("counter", "gets and puts that ended early"),
}


class Metrics:
    """Counters and histograms by label. Used on the event loop's thread only.

    ``counters``: what may be counted, with kind and text; all names begin with ``prefix``.
    """

    def __init__(
        self, counters: Mapping[str, tuple[str, str]] = _HELP, prefix: str = "prefixstore"
    ) -> None:
        self._help, self._prefix = counters, prefix
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, list[int]] = {}
        self._sums: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()

    def add(self, name: str, by: int = 1, **labels: object) -> None:
        """Count something; ``name`` is one of those given."""
        self._counts[name, _labels(labels)] += by
        self._totals[name] += by

    def total(self, name: str) -> int:
        """A counter, whatever its labels."""
        return self._totals[name]

    def observe(self, route: str, seconds: float) -> None:
        """A request took so long."""
        slots = self._seconds.setdefault(route, [0] * (len(BUCKETS_S) + 1))
        slots[bisect_left(BUCKETS_S, seconds)] += 1
        self._sums[route] += seconds  # type: ignore[assignment]

    def text(self, gauges: dict[str, float], stats: dict[str, Any] | None = None) -> str:
        """The page: counters of the server, gauges given, and a store's own statistics."""
        lines: list[str] = []
        prefix = self._prefix
        for name, (kind, text) in self._help.items():
            lines += [f"# HELP {prefix}_{name} {text}", f"# TYPE {prefix}_{name} {kind}"]
            lines += [
                f"{prefix}_{name}{labels} {value}"
                for (which, labels), value in sorted(self._counts.items())
                if which == name
            ]
        lines.append(f"# TYPE {prefix}_request_seconds histogram")
        for route, slots in sorted(self._seconds.items()):
            total = 0
            for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), slots, strict=True):
                total += count
                labels = _labels({"route": route, "le": bound})
                lines.append(f"{prefix}_request_seconds_bucket{labels} {total}")
            labels = _labels({"route": route})
            lines.append(f"{prefix}_request_seconds_sum{labels} {self._sums[route]:.6f}")
            lines.append(f"{prefix}_request_seconds_count{labels} {total}")
        for name, value in gauges.items():
            lines += [f"# TYPE {prefix}_{name} gauge", f"{prefix}_{name} {value:g}"]
        if stats is not None:
            lines += _of_store(stats)
        return "\n".join(lines) + "\n"


def _of_store(stats: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    tiers = stats["tiers"]
    for field in sorted(next(iter(tiers.values()))):
        lines.append(f"# TYPE prefixstore_tier_{field} gauge")
        for tier, numbers in tiers.items():
            lines.append(f"prefixstore_tier_{field}{_labels({'tier': tier})} {numbers[field]}")
    lines.append("# TYPE prefixstore_store_events_total counter")
    for name, value in sorted(stats["counters"].items()):
        lines.append(f"prefixstore_store_events_total{_labels({'event': name})} {value}")
    return lines


def _labels(labels: dict[str, object]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
