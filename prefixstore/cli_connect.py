"""The verb ``connect``: is this server the right one for this model, and what does an engine need?
Or this pool.

The checks are in `connect_probe`, what an engine of the model would ask for in `connect`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from prefixstore.client.token import TOKEN_VARIABLE, token_of
from prefixstore.codec import CHOICES, NONE
from prefixstore.errors import ConfigError

if TYPE_CHECKING:
    from prefixstore.connect_probe import Found
    from prefixstore.interface import StoreLike

_NO_FILE = "TOKEN_FILE"  # in what is printed, where the token did not come from a file


def add_arguments(verbs: Any) -> None:
    """Add the verb to the command line."""
    text = "check a server, a token and a model, and print the option for `vllm serve`"
    sub = verbs.add_parser("connect", help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument(
        "url",
        metavar="URL",
        help="""http://host:port, https://host:port, unix:/path; of a pool redis://host:port,
        rediss://host:port, s3://bucket""",
    )
    sub.add_argument("--model", required=True, help="folder or hub name of the model")
    sub.add_argument("--token-file", metavar="FILE", help="holds the token, and nothing else")
    sub.add_argument(
        "--token", help=f"itself; other users of this host may see it (better: {TOKEN_VARIABLE})"
    )
    sub.add_argument("--ca-file", metavar="FILE", help="certificates the server's is signed by")
    sub.add_argument(
        "--engine",
        metavar="JSON",
        help="""vLLM's arguments, those of the server: '{"dtype": ..}'""",
    )
    sub.add_argument("--chunk-tokens", type=int, metavar="N", help="tokens of a chunk (64)")
    sub.add_argument("--dir", help="folder of this host that will stand in front of the server")
    sub.add_argument(
        "--codec", choices=CHOICES, default=NONE, help="the engines' own option codec (none)"
    )
    sub.add_argument("--read-only", action="store_true", help="send nothing, change nothing")
    sub.add_argument(
        "--without-vllm", action="store_true", help="go by the model's folder, if vLLM cannot start"
    )
    sub.add_argument("--json", action="store_true", help="print JSON with stable names")


def run_connect(args: argparse.Namespace) -> int:
    """Check, measure, print. Raises StoreError."""
    from prefixstore import connect_probe as probe
    from prefixstore.cli import OK
    from prefixstore.cli_warm import engine_arguments, only_our_output
    from prefixstore.connect import model_facts
    from prefixstore.urls import POOL_SCHEMES

    if not args.url.startswith(("http://", "https://", "unix:", *_begins(POOL_SCHEMES))):
        raise ConfigError(
            f"{args.url!r} is no address of a server",
            "give http://host:port, https://host:port or unix:/path; "
            "for a folder there is `prefixstore config`",
        )
    engine, token = engine_arguments(args.engine), _token(args)
    with ExitStack() as stack:
        if args.url.startswith(_begins(POOL_SCHEMES)):
            store, listed, found = _open_pool(args, token, stack)
        else:
            store, listed, found = _open_server(args, token, stack)
        with only_our_output():
            facts = model_facts(
                args.model, engine, args.chunk_tokens, not args.without_vllm, args.codec
            )
        found.notes += facts.notes
        found.model = facts.to_json()
        layout = probe.check_model(facts, listed, found)
        if layout is None or args.read_only or found.read_only:
            probe.measure_round_trip(store.check_open, found)
        else:
            probe.there_and_back(store, facts, layout, found)
    found.config = _config(args, bool(token), found)
    if args.json:
        print(json.dumps(vars(found)))
    else:
        _show(found)
    return OK


Opened = tuple["StoreLike", list[dict[str, Any]], "Found"]  # and the models it has


def _begins(schemes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{scheme}:" for scheme in schemes)


def _open_server(args: argparse.Namespace, token: str, stack: ExitStack) -> Opened:
    from prefixstore import connect_probe as probe
    from prefixstore.client.remote import RemoteStore

    found = probe.Found(args.url)
    try:
        store = RemoteStore(
            args.url, token=token, deadline_s=probe.DEADLINE_S, ca_file=args.ca_file
        )
    except OSError as error:  # of the file; ssl.SSLError is one
        raise ConfigError(
            f"cannot use {args.ca_file}: {error}", "give certificates, PEM"
        ) from error
    stack.enter_context(store)
    probe.check_server(store, found)
    return store, probe.check_token(store, token, args.ca_file, found), found


def _open_pool(args: argparse.Namespace, token: str, stack: ExitStack) -> Opened:
    from prefixstore import connect_probe as probe
    from prefixstore.pool.backend import open_backend
    from prefixstore.pool.store import PooledStore
    from prefixstore.urls import shown

    found = probe.Found(shown(args.url))
    try:
        backend = open_backend(args.url, token, args.ca_file)
    except OSError as error:
        raise ConfigError(
            f"cannot use {args.ca_file}: {error}", "give certificates, PEM"
        ) from error
    store = stack.enter_context(PooledStore(backend, deadline_s=probe.DEADLINE_S))
    store.check_open()
    found.token = "taken" if token else "none"
    listed = [
        {
            "namespace": one.identity.namespace_hex,
            "identity": json.loads(one.identity.to_json()),
            "layout": one.layout.to_json(),
        }
        for one in store.models()
    ]
    return store, listed, found


def _token(args: argparse.Namespace) -> str:
    if args.token is not None and args.token_file is not None:
        raise ConfigError("--token and --token-file", "give one")
    return args.token or token_of(args.token_file)


# ---------------------------------------------------------------------- result
def _config(args: argparse.Namespace, has_token: bool, found: Found) -> dict[str, Any]:
    """The value of --kv-transfer-config. Raises ConfigError as the engine would."""
    from connector.options import EngineOptions

    scheme, _, path = args.url.partition(":")
    extra: dict[str, Any] = {"url": args.url}
    if scheme == "unix":
        extra["url"] = f"unix:{os.path.abspath(path.removeprefix('//'))}"
    if has_token and found.token == "taken":
        extra["token_file"] = os.path.abspath(args.token_file) if args.token_file else _NO_FILE
        if not args.token_file:
            found.notes.append(
                f"write the token to a file of mode 0600 and put its name for {_NO_FILE}"
            )
    for name in ("ca_file", "dir"):
        if getattr(args, name) is not None:
            extra[name] = os.path.abspath(os.path.expanduser(getattr(args, name)))
    if args.codec != NONE:
        extra["codec"] = args.codec
    if args.chunk_tokens is not None:
        extra["chunk_tokens"] = args.chunk_tokens
    if found.read_only:
        extra["save"] = False
    EngineOptions.parse(extra)
    return {
        "kv_connector": "PrefixStoreConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def _show(found: Found) -> None:
    from prefixstore.config import format_bytes

    model = found.model
    size = model["chunk_bytes"]
    chunk = f"{model['chunk_tokens']} tokens" + (f" ({format_bytes(size)})" if size else "")
    print(f"server      {found.url}: ready{', takes nothing new' * found.read_only}")
    print(f"token       {found.token}")
    kv = ", ".join(filter(None, (model["kv_dtype"], model["codec"])))
    what = f"{model['architecture']}, KV {kv}, chunks of {chunk}"
    print(f"model       {model['name']}: {what}")
    known = "known" if found.was_known else "entered now" if found.namespace else "not there yet"
    print(f"namespace   {f'{found.namespace[:12]}, ' * bool(found.namespace)}{known}")
    speed = f"{found.round_trip_ms:.2f} ms a round trip"
    if found.put_gb_s is not None and found.get_gb_s is not None:
        speed += f", put {found.put_gb_s:.2f} GB/s, get {found.get_gb_s:.2f} GB/s"
        speed += f" (one connection, {format_bytes(found.sent_bytes)}, every byte compared)"
    print(f"network     {speed}")
    if found.codec_why:
        pays = "pays" if found.codec_pays else "does not pay"
        print(f"codec       lossless {pays}: {found.codec_why}; made-up numbers stood for KV")
    print()
    for note in found.notes:
        print(f"prefixstore: note: {note}", file=sys.stderr)
    print(f"--kv-transfer-config {shlex.quote(json.dumps(found.config))}")
