"""Rows of `benchmarks.roofline`: what a stage moves and computes, beside a limit that was measured.

What must hold: a ratio is of a limit measured in the same run, in the same unit.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.table import spread

Row = dict[str, object]
BYTES, FLOP = "GB/s", "TFLOP/s"
NEAR = 0.9  # of a limit, or of the time, to call it the cause


@dataclass(frozen=True)
class Limit:
    """``value`` is in GB/s (10^9 bytes) or TFLOP/s, as ``unit`` says; None: not measured here."""

    name: str
    unit: str
    value: float | None


@dataclass(frozen=True)
class Stage:
    """Samples of ``ms`` in which so many bytes are read and written, and so many floating-point
    operations done. ``host_ms``: those until the call returned, if it only enqueues work.
    ``parts``: ms of the stages that it is made of, for one that is."""

    name: str
    num_bytes: float
    flop: float
    ms: Sequence[float]
    limit: Limit
    host_ms: Sequence[float] = ()
    parts: Mapping[str, float] | None = None

    def row(self) -> Row:
        """The line of the table."""
        found = spread(self.ms)
        median = found["median"]
        amount = self.num_bytes / 1e6 if self.limit.unit == BYTES else self.flop / 1e9
        rate = amount / median if amount else None
        ratio = rate / self.limit.value if rate and self.limit.value else None
        host = statistics.median(self.host_ms) if self.host_ms else None
        return {
            "stage": self.name, "mib": self.num_bytes / 2**20, "gflop": self.flop / 1e9,
            "ms": median, "min": found["min"], "max": found["max"], "n": int(found["n"]),
            "rate": rate, "unit": self.limit.unit, "limit": self.limit.value,
            "limit_is": self.limit.name, "ratio": ratio, "host_ms": host,
            "held_by": self._held_by(median, ratio, host),
        }  # fmt: skip

    def _held_by(self, median: float, ratio: float | None, host: float | None) -> str:
        if ratio is not None and ratio >= NEAR:
            return "the limit"
        if self.parts:
            return ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.parts.items())
        if host is not None and host >= NEAR * median:
            return "the host: Python and launches"
        return "itself" if ratio is not None else ""
