"""The verbs of the command line. Each takes the parsed arguments and returns the exit code.

Thin: they open the store, call `admin`, and print. What a verb reads or changes is safe while
engines have the store open, because it opens it as they do. With ``--json`` standard output holds
one JSON object with stable names and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from prefixstore import cli_show, config
from prefixstore.cli import OK, UNSOUND
from prefixstore.config import format_bytes, parse_bytes
from prefixstore.errors import ConfigError

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_ENGINE_OPTIONS = (
    "memory", "disk", "memory_dir", "chunk_tokens", "load", "save",
    "prepare", "staging", "device", "load_threads", "stall_ms", "bypass_s", "blend",
    "url", "token_file", "ca_file", "codec",
)  # fmt: skip


def run_stats(args: argparse.Namespace) -> int:
    """Show what the store holds."""
    from prefixstore import admin

    with open_store(args) as store:
        found = admin.stats(store)
    return _print_json(found) if args.json else cli_show.stats(found)


def run_ls(args: argparse.Namespace) -> int:
    """List chunks."""
    from prefixstore import admin

    if args.limit < 0:
        raise ConfigError(f"--limit {args.limit}", "give a whole number, 0 for all")
    chosen = selection(args) if _is_selective(args) else None
    listed: list[dict[str, Any]] = []
    more = 0
    with open_store(args) as store:
        for item in admin.list_chunks(store, chosen):
            if args.limit and len(listed) >= args.limit:
                more += 1
            else:
                listed.append(item.to_json())
    if args.json:
        return _print_json({"chunks": listed, "not_shown": more})
    return cli_show.chunks(listed, more)


def run_verify(args: argparse.Namespace) -> int:
    """Read and check everything."""
    from prefixstore import admin

    logging.getLogger("prefixstore").setLevel(logging.ERROR)  # the report says it all
    with open_store(args) as store:
        report = admin.verify(store, fix=args.fix, progress=cli_show.progress("checked"))
    wrong = report.unread or report.accounting or report.segments
    sound = not wrong and report.fixed >= len(report.damaged)
    found = {
        "chunks": report.chunks,
        "damaged": report.damaged,
        "unread": report.unread,
        "accounting": report.accounting,
        "segments": report.segments,
        "fixed": report.fixed,
        "sound": sound,
    }
    if args.json:
        _print_json(found)
    else:
        cli_show.verified(found, str(store.folder))
    return OK if sound else UNSOUND


def run_rm(args: argparse.Namespace) -> int:
    """Delete chunks."""
    from prefixstore import admin

    chosen = selection(args)
    with open_store(args) as store:
        count, size = _measure(store, chosen)
        if not args.dry_run:
            _confirm(args, f"Delete all {count} chunks ({format_bytes(size)}) of {store.folder}?")
            count = admin.remove(store, chosen, cli_show.progress("deleted"))
    if args.json:
        return _print_json({"chunks": count, "bytes": size, "dry_run": args.dry_run})
    what = "would be deleted" if args.dry_run else "deleted"
    print(f"{_chunks(count)} {what} ({format_bytes(size)})")
    if count and not args.dry_run:
        gc = f"prefixstore gc {shlex.quote(args_folder(args))}"
        print(f"Their slots will be reused; `{gc}` gives the space back.")
    return OK


def run_pin(args: argparse.Namespace) -> int:
    """Exempt chunks from eviction, or not."""
    from prefixstore import admin

    chosen = selection(args)
    refused = 0
    with open_store(args) as store:
        count, size = _measure(store, chosen)
        if not args.dry_run:
            verb = "Unpin" if args.off else "Pin"
            _confirm(args, f"{verb} all {count} chunks ({format_bytes(size)}) of {store.folder}?")
            count, refused = admin.pin(store, chosen, not args.off)
    if args.json:
        _print_json({"chunks": count, "refused": refused, "dry_run": args.dry_run})
    else:
        done = "unpinned" if args.off else "pinned"
        print(f"{_chunks(count)} {'would be ' if args.dry_run else ''}{done}")
    if refused:
        raise ConfigError(
            f"{_chunks(refused)} not pinned: pins may take at most {config.PIN_SHARE_MAX:.0%} of a "
            "tier",
            "unpin others, or give the tier more room",
        )
    return OK


def run_gc(args: argparse.Namespace) -> int:
    """Clean up."""
    from prefixstore import cli_gc

    older_than_s = None if args.older_than is None else parse_age(args.older_than)
    with open_store(args) as store:
        done = cli_gc.collect(store, older_than_s=older_than_s, empty_memory=args.memory)
    return _print_json(done) if args.json else cli_show.collected(done)


def run_config(args: argparse.Namespace) -> int:
    """Print the option for ``vllm serve``."""
    from connector.options import EngineOptions  # pure Python: no torch, no vLLM

    folder = Path(args_folder(args)).expanduser().absolute()
    given = {n: getattr(args, n) for n in _ENGINE_OPTIONS if getattr(args, n) is not None}
    extra = {"dir": str(folder), **given}
    EngineOptions.parse(extra)
    _check_sizes(folder, given)
    value = {
        "kv_connector": "PrefixStoreConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    if args.json:
        return _print_json(value)
    print(f"--kv-transfer-config {shlex.quote(json.dumps(value))}")
    return OK


def run_serve(args: argparse.Namespace) -> int:
    """Answer requests over the network."""
    from prefixstore import cli_serve

    return cli_serve.run(args, args_folder(args))


def _check_sizes(folder: Path, given: dict[str, Any]) -> None:
    """Say now what would stop the engine, or keep its tiers smaller than asked for."""
    there = config.load_settings(folder) if folder.is_dir() else None
    if there is None and folder.is_dir() and set(os.listdir(folder)) - {".lock", "alive"}:
        raise ConfigError(
            f"{folder} is not empty and holds no store", "give an empty or new folder"
        )
    if there is None:
        default = config.default_memory_dir()
        there = config.Settings(
            "0" * 8, config.DEFAULT_MEMORY_BYTES, config.DEFAULT_DISK_BYTES, default
        )
    memory = parse_bytes(given.get("memory", there.memory_bytes))
    disk = parse_bytes(given.get("disk", there.disk_bytes))
    memory_dir = given.get("memory_dir", there.memory_dir)
    config.Settings(there.store_id, memory, disk, memory_dir)  # raises for what no store takes
    try:
        room = os.statvfs(memory_dir)
    except OSError as error:
        raise ConfigError(
            f"the memory tier cannot be in {memory_dir}: {error.strerror}",
            "give --memory-dir a folder in memory",
        ) from error
    enlarge = "lower --memory or enlarge it (containers: --shm-size)"
    _note_room(memory_dir, room, "memory tier", memory, enlarge)
    there_already = next(path for path in (folder, *folder.parents) if path.exists())
    _note_room(there_already, os.statvfs(there_already), "disk tier", disk, "lower --disk")


def _note_room(
    where: Path | str, room: os.statvfs_result, tier: str, wanted: int, what_to_do: str
) -> None:
    total = room.f_blocks * room.f_frsize
    if total < wanted:
        print(
            f"prefixstore: note: {where} has {format_bytes(total)}, less than the {tier} of "
            f"{format_bytes(wanted)}; {what_to_do}",
            file=sys.stderr,
        )


# ------------------------------------------------------------------ arguments
def args_folder(args: argparse.Namespace) -> str:
    """The folder, given as DIR or as --dir. Raises ConfigError for both or none."""
    if args.folder and args.dir:
        raise ConfigError("the folder is given twice", "give DIR or --dir")
    if not (args.folder or args.dir):
        raise ConfigError("no folder given", f"prefixstore {args.verb} DIR")
    return str(args.folder or args.dir)


def parse_age(text: str) -> float:
    """Seconds of an age such as ``90m``, ``12h`` or ``30d``. Raises ConfigError."""
    match = _AGE.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{text!r} is not an age", "write for example 90m, 12h or 30d")
    return float(match[1]) * _SECONDS[match[2]]


def open_store(args: argparse.Namespace) -> Any:
    """The store of a command. Raises StoreError."""
    from prefixstore.store import Store

    return Store.open(args_folder(args), create=False)


def _is_selective(args: argparse.Namespace) -> bool:
    return any(value is not None for value in (args.key, args.namespace, args.tag))


def selection(args: argparse.Namespace) -> Any:
    """The chunks that the options choose. Raises ConfigError."""
    from prefixstore.admin import Selection

    everything = bool(getattr(args, "all", False))
    if everything and _is_selective(args):
        raise ConfigError("--all beside a condition", "give one or the other")
    if not everything and not _is_selective(args):
        raise ConfigError("nothing selected", "give --key, --namespace, --tag or --all")
    return Selection(
        key=_from_hex("--key", args.key),
        namespace=_from_hex("--namespace", args.namespace),
        tag=None if args.tag is None else args.tag.encode(),
        everything=everything,
    )


def _from_hex(name: str, text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if not 1 <= len(value) <= 16:
        raise ConfigError(f"{name} {text!r}", "give 2 to 32 hex digits, an even number of them")
    return value


def _measure(store: Any, chosen: Any) -> tuple[int, int]:
    """Chunks selected and the bytes they take in both tiers."""
    from prefixstore import admin

    count = size = 0
    for item in admin.list_chunks(store, chosen):
        count += 1
        size += item.row.slot_bytes * len(item.tiers)
    return count, size


def _confirm(args: argparse.Namespace, question: str) -> None:
    """Ask before --all. Raises ConfigError when nobody can answer, or the answer is no."""
    if not args.all or args.yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("--all without a terminal to ask on", "add --yes, or try --dry-run")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was changed", "answer y to go on")


def _chunks(count: int) -> str:
    return f"{count} chunk{'s' * (count != 1)}"


def _print_json(value: Any) -> int:
    print(json.dumps(value))
    return OK
