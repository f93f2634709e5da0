"""One frame of `prefixstore top`: the overview as lines of text. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefixstore.config import format_bytes

_BAR_CHARS = 24
_ROWS = 6  # of each table
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
_WHY = {
    "absent": "not stored",
    "being_stored": "being stored",
    "other_content": "other content",
    "stored_since": "stored since",
}


def frame(told: dict[str, Any], target: str, width: int, *, color: bool = False) -> list[str]:
    """Lines of at most ``width`` characters."""
    models = {one["namespace"]: one["model"] for one in told["namespaces"]}
    lines = [
        _bold(_cut(_title(told, target), width), color),
        "",
        *(_cut(line, width) for line in (*_tiers(told), *_found(told), *_traffic(told))),
    ]
    for heads, right, rows in (
        _latencies(told),
        _misses(told, models),
        _texts(told, models),
        _spaces(told),
        _clients(told),
    ):
        if rows:
            lines += ["", *_table(heads, right, rows, width, color)]
    return lines


def clean(text: object) -> str:
    """A text somebody else has chosen, without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(0, width - 1)] + "~"


def _bold(line: str, color: bool) -> str:
    return f"{_BOLD}{line}{_PLAIN}" if color else line


def _title(told: dict[str, Any], target: str) -> str:
    states = [name for name in ("draining", "read_only") if told.get(name)]
    up = _span(told["time_s"] - told["started_s"])
    clock = time.strftime("%H:%M:%S", time.localtime(told["time_s"]))
    return f"prefixstore {clean(target)}  {clock}  watched for {up}  {' '.join(states)}".rstrip()


def _bar(part: float, whole: float) -> str:
    filled = round(_BAR_CHARS * min(1.0, part / whole)) if whole else 0
    return "[" + "#" * filled + "." * (_BAR_CHARS - filled) + "]"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _is_server(told: dict[str, Any]) -> bool:
    return "listeners" in told  # a folder has none, and no requests either


def _rate(per_s: float) -> str:
    return f"{per_s:.0f}/s" if per_s >= 10 or not per_s else f"{per_s:.1f}/s"


def _tiers(told: dict[str, Any]) -> list[str]:
    rates, lines = told["rates"], []
    flows = {
        "memory": {"stored": "stored_s", "promoted": "promoted_s", "left": "removed_memory_s"},
        "disk": {"written": "written_s", "left": "removed_disk_s"},
    }
    for name, tier in told["tiers"].items():
        if not tier["cap_bytes"]:
            lines.append(f"{name:<7} off")
            continue
        used, cap = tier["used_bytes"], tier["cap_bytes"]
        moving = "  ".join(f"{what} {_rate(rates[rate])}" for what, rate in flows[name].items())
        unwritten = tier["unwritten_chunks"]
        late = f"  {unwritten} not on disk yet" if unwritten else ""
        lines.append(
            f"{name:<7} {_bar(used, cap)} {_percent(used, cap):>4}  "
            f"{format_bytes(used)} of {format_bytes(cap)}  {moving}{late}"
        )
    return lines


def _found(told: dict[str, Any]) -> list[str]:
    found = told["found_lately"]
    whole = sum(found.values())
    if not whole:
        why = "" if _is_server(told) else "; of engines: at vLLM's /metrics"
        return [f"found   nothing was looked up in the last minute{why}"]
    there = found["memory"] + found["disk"]
    parts = "  ".join(f"{name} {_percent(count, whole)}" for name, count in found.items())
    return [f"found   {_bar(there, whole)} {_percent(there, whole):>4}  {parts}"]


def _traffic(told: dict[str, Any]) -> list[str]:
    rates = told["rates"]
    if not _is_server(told):
        return []
    sent, received = (format_bytes(int(rates[f"{way}_bytes_s"])) for way in ("sent", "received"))
    return [f"traffic out {sent}/s  in {received}/s  {_rate(rates['requests_s'])} requests"]


Table = tuple[Sequence[str], str, list[list[str]]]


def _latencies(told: dict[str, Any]) -> Table:
    rows = [
        [
            clean(one["route"]),
            *("-" if one[p] is None else f"{one[p]:.1f}" for p in ("p50_ms", "p90_ms", "p99_ms")),
            str(one["requests_lately"]),
            str(one["failed"]),
        ]
        for one in told["routes"]
        if one["requests_lately"]
        and one["route"].startswith("/v1/")
        and one["route"] != "/v1/overview"
    ]
    return ("route", "p50 ms", "p90", "p99", "requests", "failed"), "lrrrrr", rows[:_ROWS]


def _misses(told: dict[str, Any], models: dict[str, str]) -> Table:
    rows = [
        [
            _WHY.get(one["why"], clean(one["why"])),
            f"{one['found_chunks']} of {one['asked_chunks']}",
            clean(models.get(one["namespace"], one["namespace"][:12])),
            clean(one["request_id"]),
            _span(told["time_s"] - one["time_s"]),
        ]
        for one in told["misses"][:_ROWS]
    ]
    return ("missed", "found", "model", "request", "ago"), "lrllr", rows


def _texts(told: dict[str, Any], models: dict[str, str]) -> Table:
    rows = [
        [
            clean(one["tag"] or one["key"][:16]),
            str(one["prompts"]),
            str(one["longest_tokens"]),
            clean(models.get(one["namespace"], one["namespace"][:12])),
        ]
        for one in told["texts"][:_ROWS]
    ]
    return ("hottest text", "prompts", "tokens", "model"), "lrrl", rows


def _spaces(told: dict[str, Any]) -> Table:
    rows = [
        [
            clean(one["model"]),
            one["namespace"][:12],
            clean(one["tenant"] or "-"),
            format_bytes(one["bytes"].get("memory", 0)),
            format_bytes(one["bytes"].get("disk", 0)),
        ]
        for one in told["namespaces"][:_ROWS]
    ]
    return ("model", "namespace", "tenant", "memory", "disk"), "lllrr", rows


def _clients(told: dict[str, Any]) -> Table:
    rows = [
        [
            clean(one["tenant"]),
            clean(one["way"]),
            str(one["requests"]),
            format_bytes(one["received_bytes"]),
            format_bytes(one["sent_bytes"]),
            str(one["refused"]),
        ]
        for one in told["clients"][:_ROWS]
    ]
    return ("client", "by", "requests", "in", "out", "refused"), "llrrrr", rows


def _table(
    heads: Sequence[str], right: str, rows: list[list[str]], width: int, color: bool
) -> list[str]:
    widths = [max(len(row[i]) for row in [list(heads), *rows]) for i in range(len(heads))]
    lines = []
    for row in [list(heads), *rows]:
        cells = (
            cell.rjust(size) if side == "r" else cell.ljust(size)
            for cell, size, side in zip(row, widths, right, strict=True)
        )
        lines.append(_cut("  ".join(cells).rstrip(), width))
    return [f"{_DIM}{lines[0]}{_PLAIN}" if color else lines[0], *lines[1:]]


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
