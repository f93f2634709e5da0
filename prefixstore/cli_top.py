"""The verb ``top``: the numbers of a server's page, or of a folder, in a terminal.

Refreshed in place with plain ANSI sequences, on the terminal's other screen, so that what was there
comes back; into a pipe it prints one block after the other. What must hold: text that others have
chosen (tags, tenants) is shown without its control characters; the terminal is put back however
this ends; a server that does not answer is said so and asked again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefixstore.client.token import TOKEN_VARIABLE, token_of
from prefixstore.errors import ConfigError, RemoteError, StoreError

_ANSWER_S = 3.0
_INTERVAL_S = (0.5, 3600.0)
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
Ask = Callable[[], dict[str, Any]]


def add_arguments(verbs: Any) -> None:
    """Add the verb to the command line."""
    text = "show what a server or a folder does, refreshed in place"
    sub = verbs.add_parser("top", help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("target", metavar="URL|DIR", help="http://host:port, unix:/path, or a folder")
    sub.add_argument("--json", action="store_true", help="print JSON with stable names")
    sub.add_argument("--once", action="store_true", help="print it once and end")
    sub.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (2)"
    )
    sub.add_argument("--token-file", metavar="FILE", help=f"holds the token (or {TOKEN_VARIABLE})")
    sub.add_argument("--ca-file", metavar="FILE", help="certificates the server's is signed by")


def run_top(args: argparse.Namespace) -> int:
    """Show the numbers until interrupted."""
    low, high = _INTERVAL_S
    if not low <= args.interval <= high:
        raise ConfigError(f"--interval {args.interval}", f"give {low:g} to {high:g} seconds")
    with _source(args) as ask:
        if args.once:
            _print(args, ask())
            return 0
        try:
            if sys.stdout.isatty() and not args.json:
                _in_place(args, ask)
            else:
                _one_after_the_other(args, ask)
        except KeyboardInterrupt:
            pass  # that is how one ends it
    return 0


@contextmanager
def _source(args: argparse.Namespace) -> Iterator[Ask]:
    """What is asked for the numbers. Raises ConfigError, StoreError."""
    if "://" in args.target or args.target.startswith("unix:"):
        from prefixstore.client.caller import Caller

        caller = Caller(args.target, token_of(args.token_file), args.ca_file)
        try:
            yield lambda: caller.json("GET", "/v1/overview", {}, deadline_s=_ANSWER_S)
        finally:
            caller.close()
        return
    from prefixstore.glance import Watcher
    from prefixstore.serve.auth import LOCAL, MARK_FIELD
    from prefixstore.serve.overview import overview
    from prefixstore.serve.recorder import Recorder, grouped
    from prefixstore.store import Store

    with Store.open(args.target.removeprefix("dir:"), create=False) as store:
        watcher, recorder = Watcher(store), Recorder()

        def look() -> dict[str, Any]:
            recorder.changed(grouped(watcher.changes()[0]))
            glance = watcher.glance()
            recorder.sample(glance, 0, 0)
            known = (one.record.identity for one in glance.spaces)
            owners = {one.namespace: "a tenant" if MARK_FIELD in one.forward else LOCAL
                      for one in known}  # fmt: skip
            return overview(recorder, owners)

        if args.once:  # rates are what came between two looks
            look()
            time.sleep(1.0)
        yield look


def _print(args: argparse.Namespace, told: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(told), flush=True)
        return
    from prefixstore.cli_top_show import frame

    print("\n".join(frame(told, args.target, 100)), flush=True)


def _one_after_the_other(args: argparse.Namespace, ask: Ask) -> None:
    while True:
        try:
            told = ask()
        except StoreError as error:
            _must_go_on(error)
            print(f"prefixstore: {_gone(error)}", file=sys.stderr, flush=True)
        else:
            _print(args, told)
            if not args.json:
                print()
        time.sleep(args.interval)


def _in_place(args: argparse.Namespace, ask: Ask) -> None:
    from prefixstore.cli_top_show import frame

    lines: list[str] = []
    sys.stdout.write(_ENTER)
    try:
        while True:
            width, height = shutil.get_terminal_size()
            problem = ""
            try:
                told = ask()
            except StoreError as error:
                _must_go_on(error)
                problem = _gone(error)
            else:
                lines = frame(told, args.target, width, color="NO_COLOR" not in os.environ)
            shown = [problem[:width], *lines] if problem else lines
            text = "".join(f"{line}{_CLEAR_LINE}\n" for line in shown[: height - 1])
            sys.stdout.write(_HOME + text + _CLEAR_BELOW)
            sys.stdout.flush()
            time.sleep(args.interval)
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def _must_go_on(error: StoreError) -> None:
    """Raise what will not be better the next time: no valid token, or not this tenant's."""
    if isinstance(error, ConfigError) or getattr(error, "code", "") in ("token", "forbidden"):
        raise error


def _gone(error: StoreError) -> str:
    what = str(error).splitlines()[0]
    kind = "no answer" if isinstance(error, RemoteError) else "no numbers"
    return f"{time.strftime('%H:%M:%S')} {kind}, trying again: {what}"
