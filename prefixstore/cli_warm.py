"""``prefixstore warm``: reads documents, shows how far it is, prints what became of each."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefixstore.cli import OK, REFUSED
from prefixstore.cli_show import table
from prefixstore.config import format_bytes
from prefixstore.errors import ConfigError

if TYPE_CHECKING:
    from prefixstore.warm import Progress, WarmReport

_BAR_CHARS = 30
_LINE_EVERY_S = 5.0
_REDRAW_EVERY_S = 0.2
_SHOWN_DOCUMENTS = 40
_NAME_CHARS = 48


def run_warm(args: argparse.Namespace) -> int:
    """Store the KV of documents."""
    from prefixstore.cli_run import parse_age

    engine = engine_arguments(args.engine)
    ttl_s = None if args.ttl is None else parse_age(args.ttl)
    with only_our_output():
        from prefixstore.warm import warm
        from prefixstore.warm_documents import read_documents, read_text

        preamble = "" if args.preamble is None else read_text(args.preamble)
        report = warm(
            args.store, args.model, read_documents(args.documents, args.field),
            preamble=preamble, tag=args.tag, ttl_s=ttl_s, pin=args.pin, engine=engine,
            memory=args.memory, disk=args.disk, memory_dir=args.memory_dir,
            token_file=args.token_file, ca_file=args.ca_file, codec=args.codec,
            manifest=args.manifest,
            chunk_tokens=args.chunk_tokens, staleness=not args.no_staleness,
            dry_run=args.dry_run, progress=Bar().show,
        )  # fmt: skip
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        show(report)
    if report.lost_chunks:
        print(
            f"prefixstore: error: {report.lost_chunks} chunks are not there (is the tier full or "
            "pinned? prefixstore stats; run again to go on)",
            file=sys.stderr,
        )
    return REFUSED if report.lost_chunks else OK


def engine_arguments(text: str | None) -> dict[str, Any]:
    """What ``--engine`` says. Raises ConfigError."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--engine is no JSON: {error}", 'write {"dtype": "bfloat16"}') from error
    if not isinstance(value, dict):
        raise ConfigError(f"--engine is {text}", 'give an object, such as {"dtype": "bfloat16"}')
    return value


@contextmanager
def only_our_output() -> Iterator[None]:
    """What vLLM and its workers print goes to standard error meanwhile, errors only (unless
    VLLM_LOGGING_LEVEL asks for more); standard output is for the result."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    connector, ours = logging.getLogger("vllm.prefixstore"), logging.getLogger("prefixstore")
    before, handlers = connector.level, list(ours.handlers)
    connector.setLevel(logging.WARNING)
    for handler in handlers:
        connector.addHandler(handler)
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of vLLM and what it imports
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        for handler in handlers:
            connector.removeHandler(handler)
        connector.setLevel(before)


class Bar:
    """How far it is, on standard error: a bar on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._next = 0.0

    def show(self, progress: Progress) -> None:
        """Called often."""
        now, end = time.monotonic(), progress.done_tokens >= progress.total_tokens
        if now < self._next and not end:
            return
        self._next = now + (_REDRAW_EVERY_S if self._tty else _LINE_EVERY_S)
        left = "" if progress.left_s is None else f", {_duration(progress.left_s)} left"
        text = (
            f"{progress.done_tokens} of {progress.total_tokens} tokens, "
            f"{progress.tokens_per_s:.0f} tokens/s{left}"
        )
        if not self._tty:
            print(f"prefixstore: {text}", file=sys.stderr, flush=True)
            return
        share = progress.done_tokens / max(1, progress.total_tokens)
        bar = ("#" * int(_BAR_CHARS * share)).ljust(_BAR_CHARS, ".")
        print(f"\r[{bar}] {share:4.0%} {text}\x1b[K", end="\n" if end else "", file=sys.stderr,
              flush=True)  # fmt: skip


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show(report: WarmReport) -> None:
    """The result, for people."""
    found = report.to_json()
    totals = found["totals"]
    rows = [
        [
            _short(document.name),
            str(document.tokens),
            str(document.pieces),
            str(document.chunks),
            format_bytes(document.bytes),
            document.status,
            document.staleness,
        ]
        for document in report.documents[:_SHOWN_DOCUMENTS]
    ]
    table(("document", "tokens", "pieces", "chunks", "KV", "", "staleness"), rows, "lrrrrll")
    if len(report.documents) > len(rows):
        print(f"... and {len(report.documents) - len(rows)} more (--json has all)")
    print(
        f"\n{len(report.documents)} documents, {totals['tokens']} tokens behind a preamble of "
        f"{report.preamble_tokens}: {totals['chunks']} chunks of {report.chunk_tokens} tokens, "
        f"{format_bytes(totals['bytes'])}; {totals['tail_tokens']} tokens behind the last whole "
        "chunks are not stored"
    )
    for note in report.notes:
        print(f"note: {note}")
    if report.dry_run:
        print(
            f"{totals['stored_chunks']} chunks would be stored "
            f"({format_bytes(totals['stored_chunks'] * report.chunk_bytes)}), "
            f"{report.computed_tokens} tokens computed, those that measure staleness included"
        )
    elif report.engine_start_s is None:
        print("All was there already; no engine was started.")
    else:
        print(
            f"{totals['stored_chunks']} chunks stored, {report.computed_tokens} tokens computed in "
            f"{_duration(report.seconds)} ({found['tokens_per_s']:.0f} tokens/s)"
        )


def _short(name: str) -> str:
    return name if len(name) <= _NAME_CHARS else "..." + name[3 - _NAME_CHARS :]
