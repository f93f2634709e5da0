"""The verb ``route``: a reverse proxy in front of engines, until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

from prefixstore.cli_serve import add_listening_arguments

if TYPE_CHECKING:
    from prefixstore.route.run import Router


def add_arguments(verbs: Any) -> None:
    """The verb, and its options."""
    text = "pass requests on to the engine that has their prefix"
    sub = verbs.add_parser("route", help=text, description=f"{text[0].upper()}{text[1:]}.")
    sub.add_argument(
        "--worker", action="append", default=[], metavar="URL[=ROLE]",
        help="an engine; ROLE is both, prefill or decode (both); may be given again",
    )  # fmt: skip
    sub.add_argument(
        "--workers", metavar="FILE",
        help='a list of {"url", "role", "kv_events", "replay", "store", "identity"}; SIGHUP: again',
    )  # fmt: skip
    add_listening_arguments(sub, 8000)
    sub.add_argument("--admin-token-file", metavar="FILE", help="who has it may change the workers")
    sub.add_argument("--insecure", action="store_true", help="listen beyond this host without that")
    sub.add_argument(
        "--worker-token-file",
        metavar="FILE",
        help="holds the engines' --api-key, to ask for models",
    )
    sub.add_argument("--store-token-file", metavar="FILE", help="holds the token of the stores")
    sub.add_argument(
        "--store-ca-file", metavar="FILE", help="what the stores' certificates are signed by"
    )
    sub.add_argument(
        "--segments", action="store_true", help="engines blend: text stored anywhere counts, too"
    )
    sub.add_argument(
        "--local-tokens", type=int, default=256, metavar="N",
        help="a decode worker computes a prompt itself if no more is missing (256)",
    )  # fmt: skip
    sub.add_argument(
        "--drain", type=float, default=30.0, metavar="S",
        help="what requests under way may take when it is stopped (30)",
    )  # fmt: skip
    sub.add_argument("--seed", type=int, help="of choices between equals")
    sub.add_argument("--json", action="store_true", help="print JSON with stable names")


def run_route(args: argparse.Namespace) -> int:
    """Route. Raises ConfigError."""
    from prefixstore.route.run import RouteOptions, route
    from prefixstore.route.state import Routing
    from prefixstore.route.workers import WorkerSpec

    workers = []
    for given in args.worker:
        url, _, role = given.partition("=")
        workers.append(WorkerSpec.parse({"url": url, "role": role or "both"}))
    options = RouteOptions(
        host=args.host, port=args.port, uds=args.uds, tls_cert=args.tls_cert,
        tls_key=args.tls_key, insecure=args.insecure, drain_s=args.drain,
        routing=Routing(
            tuple(workers), args.workers, args.admin_token_file, args.worker_token_file,
            args.store_token_file, args.store_ca_file, args.segments, args.local_tokens, args.seed,
        ),
    )  # fmt: skip

    def ready(router: Router) -> None:
        names = [worker.name for worker in router.state.pool]
        if args.json:
            print(json.dumps({"address": router.address, "workers": names}), flush=True)
        else:
            print(f"prefixstore: {router.address} routes to {', '.join(names)}", flush=True)

    asyncio.run(route(options, ready))
    return 0
