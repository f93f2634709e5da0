"""The command line: ``prefixstore VERB DIR``. This module parses and reports errors; the verbs are
in `cli_run`, what they print in `cli_show`, the work in `admin`.

What must hold: nothing but the standard library and `errors` is imported before a command runs, so
that ``--help`` is instant. Every error is one line on standard error. Exit codes: 0 done, 1 the
store is damaged, 2 the command cannot be done as given, 3 done and `blend-check` failed the model,
130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from prefixstore import __version__
from prefixstore.cli_connect import add_arguments as add_connect_arguments
from prefixstore.cli_life import add_retire_arguments, add_ttl_arguments
from prefixstore.cli_migrate import add_arguments as add_migrate_arguments
from prefixstore.cli_route import add_arguments as add_route_arguments
from prefixstore.cli_serve import add_arguments as add_serve_arguments
from prefixstore.cli_top import add_arguments as add_top_arguments
from prefixstore.client.token import TOKEN_VARIABLE
from prefixstore.codec import CHOICES, LOSSY_NAMES, NONE
from prefixstore.errors import FormatError, StoreError

OK, UNSOUND, REFUSED, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 130, 141
_EPILOG = """\
DIR is the folder of a store, the "dir" of vLLM's --kv-transfer-config. Engines may have it open.

  prefixstore config DIR --memory 8GiB --disk 200GiB     what to paste behind `vllm serve MODEL`
  prefixstore stats DIR                                  what it holds, how full it is
  prefixstore rm DIR --tag old-docs --dry-run            what would be deleted
"""
_MODULES = {
    "blend-check": "cli_blend_check",
    "connect": "cli_connect",
    "top": "cli_top",
    "warm": "cli_warm",
    "match": "cli_match",
    "migrate": "cli_migrate",
    "route": "cli_route",
    "ttl": "cli_life",
    "retire": "cli_life",
}  # of verbs that are not in cli_run


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
        module = _MODULES.get(args.verb, "cli_run")
        run = getattr(import_module(f"prefixstore.{module}"), f"run_{args.verb.replace('-', '_')}")
        code: int = run(args)
        if sys.stdout is not None:  # it was closed before
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
    parser.add_argument("--version", action="version", version=f"prefixstore {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb_of_a_text(name: str, text: str) -> Any:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument(
            "store", metavar="STORE",
            help="its folder, or a server: http://host:port, https://host:port, unix:/path; or a "
            "pool: redis://host:port, rediss://host:port, s3://bucket",
        )  # fmt: skip
        sub.add_argument(
            "--token-file", metavar="FILE", help="holds the token of the server, or Redis' password"
        )
        sub.add_argument("--ca-file", metavar="FILE", help="what its certificate is signed by")
        sub.add_argument(
            "--manifest", metavar="FILE", help="of names of documents (a folder has its own)"
        )
        sub.add_argument("--json", action="store_true", help="print JSON with stable names")
        sub.add_argument("--model", required=True, help="folder or hub name of the model")
        return sub

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
    ttl = verb("ttl", "change when chunks expire")
    _add_selection(ttl)
    add_ttl_arguments(ttl)
    add_retire_arguments(verb("retire", "drop a model: its chunks and its name"))
    gc = verb("gc", "clean up after dead processes, drop what has expired, free unused space")
    gc.add_argument(
        "--older-than",
        metavar="AGE",
        help="also drop all chunks of models that stored nothing for so long (90m, 12h, 30d)",
    )
    gc.add_argument(
        "--memory", action="store_true", help="also write the memory tier to disk and empty it"
    )
    add_migrate_arguments(verb("migrate", "bring a store of an older version to this one's format"))
    _add_engine_options(verb("config", "print the option for `vllm serve`"))
    _add_blend_check(verb("blend-check", "measure on your texts whether blending suits a model"))
    _add_warm(verb_of_a_text("warm", "compute and store the KV of documents, without a server"))
    _add_match(verb_of_a_text("match", "show what of a prompt is stored, and what the rest costs"))
    add_serve_arguments(verb("serve", "answer requests for a store over the network"))
    add_route_arguments(verbs)
    add_connect_arguments(verbs)
    add_top_arguments(verbs)
    return parser


def _add_warm(sub: Any) -> None:
    sub.add_argument(
        "documents", nargs="+", metavar="DOC",
        help="a text file, a .jsonl file (one object a line), a folder of those, or - for stdin",
    )  # fmt: skip
    sub.add_argument(
        "--codec", choices=CHOICES, default=NONE, help="the engines' own option codec (none)"
    )
    sub.add_argument("--preamble", metavar="FILE", help="what stands before each document")
    sub.add_argument("--field", default="text", help="that has the text in .jsonl files (text)")
    sub.add_argument("--tag", help="of the chunks (the name of the document)")
    sub.add_argument("--ttl", metavar="AGE", help="how long they are kept (90m, 12h, 30d)")
    sub.add_argument("--pin", action="store_true", help="exempt them from eviction")
    sub.add_argument(
        "--engine",
        metavar="JSON",
        help="""vLLM's arguments, those of the server: '{"dtype": ..}'""",
    )
    sub.add_argument("--no-staleness", action="store_true", help="only store")
    sub.add_argument("--dry-run", action="store_true", help="only say what would be stored")
    _add_tiers(sub)
    sub.add_argument(
        "--chunk-tokens", type=int, default=64, metavar="N", help="tokens of a chunk (64)"
    )


def _add_match(sub: Any) -> None:
    sub.epilog = f"Without --token-file the token is that in {TOKEN_VARIABLE}, if it is set."
    sub.add_argument(
        "prompt", metavar="PROMPT",
        help="a file: text; or .json: a list of token ids, or of texts that are tokenised apart",
    )  # fmt: skip
    sub.add_argument("--namespace", metavar="HEX", help="of the model (its first digits will do)")
    sub.add_argument(
        "--codec", choices=(NONE, *LOSSY_NAMES), default=NONE, help="the engines round by (none)"
    )
    sub.add_argument(
        "--budget", type=float, default=0.15, metavar="SHARE",
        help="of the reused tokens that is recomputed (0.15)",
    )  # fmt: skip


def _add_blend_check(sub: Any) -> None:
    sub.epilog = (
        "Without DIR the verdict is only printed. Texts are read as `prefixstore warm` reads "
        "documents. Long texts are cut into pieces."
    )
    sub.add_argument("--model", required=True, help="folder or hub name of the model")
    sub.add_argument(
        "--texts", nargs="+", metavar="PATH",
        help="text files, .jsonl files (one object a line), folders of those, or - for stdin",
    )  # fmt: skip
    sub.add_argument("--field", default="text", help="that has the text in .jsonl files (text)")
    sub.add_argument(
        "--requests", metavar="FILE",
        help='or requests as they are made: {"texts": [..], "question": ".."} a line',
    )  # fmt: skip
    sub.add_argument("--prompts", type=int, default=8, metavar="N", help="prompts to compare (8)")
    sub.add_argument("--texts-per-prompt", type=int, default=4, metavar="K", help="(4)")
    sub.add_argument("--tokens", type=int, default=256, metavar="N", help="of each text (256)")
    sub.add_argument(
        "--compared", type=int, default=32, metavar="N", help="tokens compared behind each (32)"
    )
    sub.add_argument(
        "--budgets", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.3], metavar="SHARE",
        help="(0.1 0.15 0.2 0.3)",
    )  # fmt: skip
    sub.add_argument(
        "--preamble", metavar="FILE",
        help="what stands before every text when it is stored, as for `prefixstore warm`",
    )  # fmt: skip
    sub.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="(auto: the model's; float32 on a CPU)",
    )  # fmt: skip
    sub.add_argument("--device", default="auto", help="(auto: cuda if there is one, else cpu)")
    sub.add_argument(
        "--no-rounding", action="store_true",
        help="do not measure what rounding does, which takes a second copy of the weights",
    )  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="of the draw of texts (0)")


def _add_selection(sub: Any) -> None:
    sub.add_argument("--namespace", metavar="HEX", help="of one model (its first digits will do)")
    sub.add_argument("--tag", help="stored with this tag")
    sub.add_argument("--key", metavar="HEX", help="one chunk (its first digits will do)")


def _add_tiers(sub: Any) -> None:
    sub.add_argument("--memory", metavar="SIZE", help="cap of the memory tier, e.g. 8GiB")
    sub.add_argument("--disk", metavar="SIZE", help="cap of the disk tier; 0 turns it off")
    sub.add_argument("--memory-dir", metavar="DIR", help="where the memory tier lies (/dev/shm)")


def _add_engine_options(sub: Any) -> None:
    """The fields of connector.options.EngineOptions, by name."""
    _add_tiers(sub)
    sub.add_argument("--chunk-tokens", type=int, metavar="N", help="tokens of a chunk (64)")
    sub.add_argument("--load", metavar="POLICY", help="auto, both, always or never (auto)")
    sub.add_argument(
        "--no-save", dest="save", action="store_const", const=False, help="only read the store"
    )
    sub.add_argument(
        "--no-prepare",
        dest="prepare",
        action="store_const",
        const=False,
        help="on a GPU: make the memory tier when it is needed, not at the start",
    )
    sub.add_argument("--staging", metavar="SIZE", help="device memory for saves (two steps)")
    sub.add_argument("--device", metavar="SIZE", help="GPU memory for hot chunks (none)")
    sub.add_argument("--load-threads", type=int, metavar="N", help="threads that load (1)")
    sub.add_argument(
        "--blend", action="store_true", default=None, help="also reuse text that is no prefix"
    )
    sub.add_argument("--url", help="of a server or a pool; DIR is then in front of it")
    sub.add_argument(
        "--token-file", metavar="FILE", help="holds the token of the server, or Redis' password"
    )
    sub.add_argument("--ca-file", metavar="FILE", help="what its certificate is signed by")
    sub.add_argument(
        "--codec", choices=CHOICES, help="fp8, int8: round KV to 8 bits; in a pool: lossless, auto"
    )
    sub.add_argument("--stall-ms", type=int, metavar="MS", help="longest wait for a store (100)")
    sub.add_argument(
        "--bypass-s", type=float, metavar="S", help="how long a stalled store is left alone (10)"
    )
