"""The command line: ``prefixstore VERB DIR``. This module parses and reports errors; the verbs are
in `cli_run`, what they print in `cli_show`, the work in `admin`.

What must hold: nothing but the standard library and `errors` is imported before a command runs, so
that ``--help`` is instant. Every error is one line on standard error. Exit codes: 0 done, 1 the
store is damaged, 2 the command cannot be done as given, 130 interrupted, 141 the reader of our
output went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from prefixstore.errors import FormatError, StoreError

OK, UNSOUND, REFUSED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
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
    level = logger.level
    try:
        code: int = getattr(import_module("prefixstore.cli_run"), f"run_{args.verb}")(args)
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
        logger.setLevel(level)


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

    def verb(name: str, text: str) -> Any:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("folder", nargs="?", metavar="DIR", help="folder of the store")
        sub.add_argument("--dir", help="the same, as an option")
        sub.add_argument("--json", action="store_true", help="print JSON with stable names")
        return sub

    verb("stats", "show what the store holds, how full it is, and its counters")
    ls = verb("ls", "list chunks")
    _add_selection(ls)
    ls.add_argument("--limit", type=int, default=100, help="at most so many (100; 0: all)")
    verify = verb("verify", "read every byte of both tiers and check every checksum")
    verify.add_argument("--fix", action="store_true", help="drop what is damaged")
    rm = verb("rm", "delete chunks from both tiers")
    pin = verb("pin", "exempt chunks from eviction")
    pin.add_argument("--off", action="store_true", help="unpin them")
    for sub in (rm, pin):
        _add_selection(sub)
        sub.add_argument("--all", action="store_true", help="every chunk")
        sub.add_argument("--yes", action="store_true", help="do not ask before --all")
        sub.add_argument("--dry-run", action="store_true", help="only say what would be done")
    gc = verb("gc", "clean up after dead processes, drop what has expired, free unused space")
    gc.add_argument(
        "--older-than",
        metavar="AGE",
        help="also drop all chunks of models that stored nothing for so long (90m, 12h, 30d)",
    )
    gc.add_argument(
        "--memory", action="store_true", help="also write the memory tier to disk and empty it"
    )
    _add_engine_options(verb("config", "print the option for `vllm serve`"))
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
    sub.add_argument(
        "--blend", action="store_true", default=None, help="also reuse text that is no prefix"
    )
    sub.add_argument("--stall-ms", type=int, metavar="MS", help="longest wait for a store (100)")
    sub.add_argument(
        "--bypass-s", type=float, metavar="S", help="how long a stalled store is left alone (10)"
    )
