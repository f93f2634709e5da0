"""What the command line prints for people: aligned tables, sizes with units, what to do next.

Pure but for printing. Nothing here is meant to be parsed: ``--json`` is.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from prefixstore.config import format_bytes

_BAR_CHARS = 30
_SHOWN_FAULTS = 20
# What an operator should do about a counter that is not zero.
_HINTS = {
    "corrupt_memory": "memory was damaged: check the machine's RAM; `prefixstore verify DIR`",
    "corrupt_disk": "the disk returned other bytes than were written: `prefixstore verify DIR`",
    "spill_failed": "chunks did not reach the disk tier: is the disk full? raise its cap",
    "put_full": "no slot could be freed: raise the memory cap, or unpin",
    "pinned_evicted_bytes": "pinned chunks had to go: raise the cap, or unpin",
    "jobs_dropped": "the background thread is behind: is the disk slow?",
    "keeper_errors": "background work failed: see the log of the process",
}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
    """Print an aligned table; ``right`` has one letter a column, ``r`` for aligned right."""
    widths = [max(len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(columns)]
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = (
            cell.rjust(width) if right[i : i + 1] == "r" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def stats(found: dict[str, Any]) -> int:
    """The result of `admin.stats`; returns 0."""
    folder, quoted = found["folder"], shlex.quote(found["folder"])
    print(f"store   {folder}\nmemory  {found['memory_dir']}\n")
    table(
        ("tier", "cap", "in use", "free slots", "index", "pinned", "chunks", "not yet on disk"),
        [_tier_row(name, tier) for name, tier in found["tiers"].items()],
        "lrrrrrrr",
    )
    print()
    if found["namespaces"]:
        table(
            ("namespace", "model", "KV dtype", "chunk", "chunk size", "in memory", "on disk"),
            [_namespace_row(entry) for entry in found["namespaces"]],
            "lllrrrr",
        )
    else:
        print("No model has stored anything yet.")
    print(f"\nleases {found['leases']}, chunks being written {found['pending']}")
    counters = {name: value for name, value in sorted(found["counters"].items()) if value}
    if counters:
        print("\nsince the memory tier was created:")
        width = max(map(len, counters))
        for name, value in counters.items():
            hint = _HINTS.get(name, "").replace("DIR", quoted)
            print(f"  {name.ljust(width)}  {value:>10}{'   <- ' + hint if hint else ''}")
    print(f"\nnext: prefixstore ls {quoted}    (or verify, gc, pin, rm)")
    return 0


def _tier_row(name: str, tier: dict[str, int]) -> list[str]:
    used = tier["allocated_bytes"] - tier["free_bytes"]
    share = f" ({used / tier['cap_bytes']:.0%})" if tier["cap_bytes"] else ""
    return [
        name,
        format_bytes(tier["cap_bytes"]) if tier["cap_bytes"] else "off",
        format_bytes(used) + share,
        format_bytes(tier["free_bytes"]),
        format_bytes(tier["index_bytes"]),
        format_bytes(tier["pinned_bytes"]),
        str(tier["chunks"]),
        str(tier["dirty_chunks"]) if name == "memory" else "-",
    ]


def _namespace_row(entry: dict[str, Any]) -> list[str]:
    from prefixstore.serve.auth import MARK_FIELD

    identity = entry["identity"]
    weights = identity["weights"].rpartition(":")[2][:8]
    lora = " +LoRA" if identity["lora"] else ""
    mark = json.loads(identity["forward"]).get(MARK_FIELD, "")[:8]
    return [
        entry["namespace"][:12],
        f"{identity['architecture']} {weights}{lora}{f' of tenant {mark}' if mark else ''}",
        entry["kv"],
        f"{identity['chunk_tokens']} tokens",
        format_bytes(entry["chunk_bytes"]),
        format_bytes(entry["bytes"].get("memory", 0)),
        format_bytes(entry["bytes"].get("disk", 0)),
    ]


def chunks(listed: Sequence[dict[str, Any]], more: int) -> int:
    """Chunks as `admin.Listed.to_json` gives them; returns 0."""
    if not listed:
        print("No such chunks.")
        return 0
    now = time.time()
    table(
        ("key", "namespace", "salt", "depth", "tiers", "size", "age", "expires in", "pin", "tag"),
        [
            [
                item["key"],
                item["namespace"][:12],
                item["salt"] or "-",
                str(item["depth"]),
                "+".join(item["tiers"]),
                format_bytes(item["bytes"]),
                _age(now - item["created_s"]),
                _age(item["expires_s"] - now) if item["expires_s"] else "-",
                "yes" if item["pinned"] else "-",
                item["tag"] or "-",
            ]
            for item in listed
        ],
        "lllrlrrr",
    )
    if more:
        print(f"{more} more: --limit 0 shows all")
    return 0


def verified(found: dict[str, Any], folder: str) -> None:
    """The report of `verify`."""
    for what in ("damaged", "unread"):
        for item in found[what][:_SHOWN_FAULTS]:
            print(f"{what}: {item['key']} in the {item['tier']} tier: {item['why']}")
        if len(found[what]) > _SHOWN_FAULTS:
            print(f"... and {len(found[what]) - _SHOWN_FAULTS} more {what} (--json lists all)")
    for line in found["accounting"]:
        print(f"accounting: {line}")
    for why, count in found["segments"].items():
        print(f"segments: {why}: {count} chunks")
    counted = ", ".join(f"{count} in {tier}" for tier, count in found["chunks"].items())
    print(f"checked {counted}: {len(found['damaged'])} damaged, {found['fixed']} dropped")
    fix = f"prefixstore verify {shlex.quote(folder)} --fix"
    if found["sound"]:
        print("The store is sound.")
    elif found["accounting"]:
        print(f"The accounting of slots is wrong: `{fix}` mends it. If it stays so, stop all "
              "engines and delete the folder and its memory tier (it is a cache); please report it "
              "with the lines above.")  # fmt: skip
    elif len(found["damaged"]) > found["fixed"]:
        print(f"Damaged chunks are never served. `{fix}` drops them.")
    elif found["unread"]:
        print("What could not be read was not checked: have this user read the files named above, "
              "and try again.")  # fmt: skip
    else:
        print(f"The index of segments is wrong, which blending searches: `{fix}` mends it.")


def collected(done: dict[str, Any]) -> int:
    """The result of `cli_gc.collect`; returns 0."""
    print(f"left by dead processes  {done['reaped']} resolved")
    print(f"expired                 {done['expired_chunks']} chunks dropped")
    if done["dropped_namespaces"] is not None:
        names = ", ".join(name[:12] for name in done["dropped_namespaces"]) or "none"
        print(f"models long not stored  {done['dropped_chunks']} chunks dropped ({names})")
    print(f"over the caps           {done['evicted_chunks']} chunks evicted")
    if done["memory_emptied_chunks"] is not None:
        print(f"memory tier emptied     {done['memory_emptied_chunks']} chunks freed")
    for tier, size in done["freed_bytes"].items():
        print(f"given back, {tier:<11} {format_bytes(size)}")
    return 0


def progress(what: str) -> Callable[[int, int], None] | None:
    """A bar on standard error if that is a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    shown = [-1]

    def show(done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if percent == shown[0]:
            return
        shown[0] = percent
        bar = ("#" * (_BAR_CHARS * percent // 100)).ljust(_BAR_CHARS, ".")
        end = "\n" if done >= total else ""
        print(f"\r{what} [{bar}] {percent:3d} % of {total}", end=end, file=sys.stderr, flush=True)

    return show


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
