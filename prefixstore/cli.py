"""The command line: ``prefixstore VERB DIR``. Parses, asks, prints; the work is in `admin`.

What must hold: nothing but the standard library and `config` is imported before a command runs, so
that ``--help`` is instant and ``config`` works where only this package is installed. Every error is
one line on standard error. Exit codes: 0 done, 1 the store is damaged, 2 the command cannot be
done as given, 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prefixstore import config
from prefixstore.config import format_bytes, parse_bytes
from prefixstore.errors import ConfigError, FormatError, StoreError

if TYPE_CHECKING:
    from prefixstore.admin import Selection
    from prefixstore.store import Store

OK, UNSOUND, REFUSED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_EPILOG = """\
DIR is the folder of a store, the "dir" of vLLM's --kv-transfer-config. Engines may have it open.

  prefixstore config DIR --memory 8GiB --disk 200GiB     what to paste behind `vllm serve MODEL`
  prefixstore stats DIR                                  what it holds, how full it is
  prefixstore rm DIR --tag old-docs --dry-run            what would be deleted
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every mistake on the command line."""
        self.exit(REFUSED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. SystemExit only from the parser."""
    args = _parser().parse_args(argv)
    logger = logging.getLogger("prefixstore")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("prefixstore: %(message)s"))
    logger.addHandler(handler)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still buffered would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("prefixstore: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (StoreError, OSError, TimeoutError) as error:
        print(f"prefixstore: error: {' '.join(str(error).split())}", file=sys.stderr)
        return UNSOUND if isinstance(error, FormatError) else REFUSED
    finally:
        logger.removeHandler(handler)


class _OneLine(logging.Formatter):
    """A log record without its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The message alone."""
        record.exc_info = record.exc_text = None
        return super().format(record)


# ------------------------------------------------------------------ the parser
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prefixstore",
        description="Look after a store of prefix KV.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("folder", nargs="?", metavar="DIR", help="folder of the store")
        sub.add_argument("--dir", help="the same, as an option")
        sub.add_argument("--json", action="store_true", help="print JSON with stable names")
        sub.set_defaults(run=run)
        return sub

    verb("stats", _stats, "show what the store holds, how full it is, and its counters")
    ls = verb("ls", _ls, "list chunks")
    _add_selection(ls)
    ls.add_argument("--limit", type=int, default=100, help="at most so many (100; 0: all)")
    verify = verb("verify", _verify, "read every byte of both tiers and check every checksum")
    verify.add_argument("--fix", action="store_true", help="drop what is damaged")
    rm = verb("rm", _rm, "delete chunks from both tiers")
    pin = verb("pin", _pin, "exempt chunks from eviction")
    pin.add_argument("--off", action="store_true", help="unpin them")
    for sub in (rm, pin):
        _add_selection(sub)
        sub.add_argument("--all", action="store_true", help="every chunk")
        sub.add_argument("--yes", action="store_true", help="do not ask before --all")
        sub.add_argument("--dry-run", action="store_true", help="only say what would be done")
    gc = verb("gc", _gc, "clean up after dead processes, drop what has expired, free unused space")
    gc.add_argument(
        "--older-than",
        metavar="AGE",
        help="also drop all chunks of models that stored nothing for so long (90m, 12h, 30d)",
    )
    gc.add_argument(
        "--memory", action="store_true", help="also write the memory tier to disk and empty it"
    )
    _add_engine_options(verb("config", _config, "print the option for `vllm serve`"))
    return parser


def _add_selection(sub: Any) -> None:
    sub.add_argument("--namespace", metavar="HEX", help="of one model (its first digits will do)")
    sub.add_argument("--tag", help="stored with this tag")
    sub.add_argument("--key", metavar="HEX", help="one chunk (its first digits will do)")


def _add_engine_options(sub: Any) -> None:
    """The fields of connector.options.EngineOptions, by name."""
    sub.add_argument("--memory", metavar="SIZE", help="cap of the memory tier, e.g. 8GiB")
    sub.add_argument("--disk", metavar="SIZE", help="cap of the disk tier; 0 turns it off")
    sub.add_argument("--memory-dir", metavar="DIR", help="where the memory tier lies (/dev/shm)")
    sub.add_argument("--chunk-tokens", type=int, metavar="N", help="tokens of a chunk (64)")
    sub.add_argument("--load", metavar="POLICY", help="auto, always or never (auto)")
    sub.add_argument(
        "--no-save", dest="save", action="store_const", const=False, help="only read the store"
    )
    sub.add_argument("--staging", metavar="SIZE", help="host memory for saves (256MiB)")
    sub.add_argument("--load-threads", type=int, metavar="N", help="threads that load (1)")
    sub.add_argument("--stall-ms", type=int, metavar="MS", help="longest wait for a store (100)")
    sub.add_argument(
        "--bypass-s", type=float, metavar="S", help="how long a stalled store is left alone (10)"
    )


# ------------------------------------------------------------------ commands
def _stats(args: argparse.Namespace) -> int:
    from prefixstore import admin, cli_show

    with _open(args) as store:
        found = admin.stats(store)
    return _print_json(found) if args.json else cli_show.stats(found)


def _ls(args: argparse.Namespace) -> int:
    from prefixstore import admin, cli_show

    if args.limit < 0:
        raise ConfigError(f"--limit {args.limit}", "give a whole number, 0 for all")
    with _open(args) as store:
        chosen = _selection(args, optional=True)
        listed, more = [], 0
        for item in admin.list_chunks(store, chosen):
            if args.limit and len(listed) >= args.limit:
                more += 1
            else:
                listed.append(item.to_json())
    return (
        _print_json({"chunks": listed, "not_shown": more})
        if args.json
        else cli_show.chunks(listed, more)
    )


def _verify(args: argparse.Namespace) -> int:
    from prefixstore import admin, cli_show

    logging.getLogger("prefixstore").setLevel(logging.ERROR)  # the report says it all
    with _open(args) as store:
        report = admin.verify(store, fix=args.fix, progress=cli_show.progress("checked"))
    sound = not report.accounting and report.fixed == len(report.damaged)
    found = {
        "chunks": report.chunks,
        "damaged": report.damaged,
        "accounting": report.accounting,
        "fixed": report.fixed,
        "sound": sound,
    }
    _print_json(found) if args.json else cli_show.verified(found, str(store.folder))
    return OK if sound else UNSOUND


def _rm(args: argparse.Namespace) -> int:
    from prefixstore import admin, cli_show

    with _open(args) as store:
        chosen = _selection(args)
        count, size = _measure(store, chosen)
        if not args.dry_run:
            _confirm(args, f"Delete all {count} chunks ({format_bytes(size)}) of {store.folder}?")
            count = admin.remove(store, chosen, cli_show.progress("deleted"))
    if args.json:
        return _print_json({"chunks": count, "bytes": size, "dry_run": args.dry_run})
    what = "would be deleted" if args.dry_run else "deleted"
    print(f"{count} chunks {what} ({format_bytes(size)})")
    return OK


def _pin(args: argparse.Namespace) -> int:
    from prefixstore import admin

    with _open(args) as store:
        chosen = _selection(args)
        count, size = _measure(store, chosen)
        refused = 0
        if not args.dry_run:
            verb = "Unpin" if args.off else "Pin"
            _confirm(args, f"{verb} all {count} chunks ({format_bytes(size)}) of {store.folder}?")
            count, refused = admin.pin(store, chosen, not args.off)
    if args.json:
        _print_json({"chunks": count, "refused": refused, "dry_run": args.dry_run})
    else:
        print(
            f"{count} chunks {'would be ' if args.dry_run else ''}{'un' * args.off}pinned"
            f"{f' ({format_bytes(size)})' if args.dry_run else ''}"
        )
    if refused:
        share = f"{config.PIN_SHARE_MAX:.0%}"
        raise ConfigError(
            f"{refused} chunks were not pinned: pins may take at most {share} of a tier",
            "unpin others, or give the tier more room",
        )
    return OK


def _gc(args: argparse.Namespace) -> int:
    from prefixstore import cli_gc, cli_show

    older_than_s = None if args.older_than is None else parse_age(args.older_than)
    with _open(args) as store:
        done = cli_gc.collect(store, older_than_s=older_than_s, empty_memory=args.memory)
    return _print_json(done) if args.json else cli_show.collected(done)


def _config(args: argparse.Namespace) -> int:
    from connector.options import EngineOptions  # pure Python: no torch, no vLLM

    folder = Path(_folder(args)).expanduser().absolute()
    names = (
        "memory", "disk", "memory_dir", "chunk_tokens", "load", "save",
        "staging", "load_threads", "stall_ms", "bypass_s",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    extra = {"dir": str(folder), **given}
    EngineOptions.parse(extra)
    _check_store_folder(folder, given)
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


def _check_store_folder(folder: Path, given: dict[str, Any]) -> None:
    """Say now what would stop the engine, or make its memory tier smaller than asked for."""
    there = config.load_settings(folder) if folder.is_dir() else None
    if there is None and folder.is_dir():
        others = [name for name in os.listdir(folder) if name not in (".lock", "alive")]
        if others:
            raise ConfigError(
                f"{folder} is not empty and holds no store", "give an empty or new folder"
            )
    known = there.memory_bytes if there else config.DEFAULT_MEMORY_BYTES
    disk = parse_bytes(given.get("disk", there.disk_bytes if there else 0))
    memory = parse_bytes(given.get("memory", known))
    memory_dir = given.get("memory_dir") or (there.memory_dir if there else "/dev/shm")
    config.Settings("", memory, disk, memory_dir)  # raises ConfigError for what no store takes
    try:
        room = os.statvfs(memory_dir)
    except OSError as error:
        raise ConfigError(
            f"cannot use {memory_dir} for the memory tier: {error.strerror}",
            "give --memory-dir a folder in memory",
        ) from error
    total = room.f_blocks * room.f_frsize
    if total < memory:
        print(
            f"prefixstore: note: {memory_dir} has {format_bytes(total)} in all, the memory tier may "
            f"take {format_bytes(memory)}; lower --memory or enlarge it (containers: --shm-size)",
            file=sys.stderr,
        )


# ------------------------------------------------------------------ helpers
def _folder(args: argparse.Namespace) -> str:
    if args.folder and args.dir:
        raise ConfigError("the folder is given twice", "give DIR or --dir")
    if not (args.folder or args.dir):
        raise ConfigError("no folder given", f"prefixstore {args.verb} DIR")
    return str(args.folder or args.dir)


def _open(args: argparse.Namespace) -> Store:
    from prefixstore.store import Store

    return Store.open(_folder(args), create=False)


def _selection(args: argparse.Namespace, optional: bool = False) -> Selection | None:
    from prefixstore.admin import Selection

    everything = bool(getattr(args, "all", False))
    given = [args.key, args.namespace, args.tag]
    if everything and given != [None, None, None]:
        raise ConfigError("--all together with a condition", "give one or the other")
    if optional and given == [None, None, None]:
        return None
    return Selection(
        key=_from_hex("--key", args.key),
        namespace=_from_hex("--namespace", args.namespace),
        tag=None if args.tag is None else args.tag.encode(),
        everything=everything,
    )
