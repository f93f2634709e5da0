"""The verb ``serve``: open a store, check it, and answer requests until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixstore.serve.run import Server


def add_arguments(sub: Any) -> None:
    """The options of the verb."""
    sub.add_argument("--memory", metavar="SIZE", help="cap of the memory tier, e.g. 8GiB")
    sub.add_argument("--disk", metavar="SIZE", help="cap of the disk tier; 0 turns it off")
    sub.add_argument("--memory-dir", metavar="DIR", help="where the memory tier lies (/dev/shm)")
    add_listening_arguments(sub, 7575)
    sub.add_argument("--tokens", metavar="FILE", help="who may ask: tenant:token[:quota] lines")
    sub.add_argument("--read-only", action="store_true", help="refuse whatever changes the store")
    sub.add_argument(
        "--insecure", action="store_true", help="listen beyond this host without tokens"
    )
    sub.add_argument("--json-log", action="store_true", help="one JSON line a request on stderr")
    sub.add_argument(
        "--kv-events", metavar="ENDPOINT", help="publish KV events as vLLM does: tcp://*:5557"
    )
    sub.add_argument(
        "--kv-events-replay", metavar="ENDPOINT", help="where subscribers ask for those they missed"
    )
    sub.add_argument("--kv-events-topic", metavar="TEXT", default="", help="their topic (none)")
    sub.add_argument("--otlp", metavar="URL", help="send spans there, e.g. http://host:4318")


def add_listening_arguments(sub: Any, port: int) -> None:
    """Where a server listens: the fields of serve.listening.ListenOptions, by name."""
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    sub.add_argument("--port", type=int, default=port, help=f"TCP port ({port}; 0: any)")
    sub.add_argument("--uds", metavar="PATH", help="listen on a unix socket instead")
    sub.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    sub.add_argument("--tls-key", metavar="FILE", help="its key, PEM")


def run(args: argparse.Namespace, folder: str) -> int:
    """Serve. Raises ConfigError and what opening a store raises."""
    from prefixstore.config import format_bytes
    from prefixstore.serve.eyes import EyesOptions
    from prefixstore.serve.run import ServeOptions, serve
    from prefixstore.store import Store

    options = ServeOptions(
        host=args.host, port=args.port, uds=args.uds, tls_cert=args.tls_cert,
        tls_key=args.tls_key, tokens=args.tokens, read_only=args.read_only,
        insecure=args.insecure, json_log=args.json_log,
        eyes=EyesOptions(
            args.kv_events, args.kv_events_replay, args.kv_events_topic, args.otlp
        ),
    )  # fmt: skip

    def open_it() -> Store:
        store = Store.open(
            folder, memory_bytes=args.memory, disk_bytes=args.disk, memory_dir=args.memory_dir
        )
        store.on_keeper(store.reap)  # what a crash left is put right before the first request
        return store

    def ready(server: Server) -> None:
        found = _holds(server)
        if args.json:
            print(json.dumps({"address": server.address, **found}), flush=True)
            return
        print(
            f"prefixstore: {server.address} serves {folder}: {found['chunks']} chunks, "
            f"memory {format_bytes(found['memory_bytes'])}, "
            f"disk {format_bytes(found['disk_bytes'])}",
            flush=True,
        )

    asyncio.run(serve(open_it, options, ready))
    return 0


def _holds(server: Server) -> dict[str, int]:
    from prefixstore import admin

    store = server.state.store
    tiers = admin.stats(store)["tiers"]
    return {
        "chunks": max(tier["chunks"] for tier in tiers.values()),
        "memory_bytes": store.settings.memory_bytes,
        "disk_bytes": store.settings.disk_bytes,
    }
