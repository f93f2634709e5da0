"""Running the router: where it listens, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prefixstore.errors import ConfigError
from prefixstore.route.app import GUARDS, make_app
from prefixstore.route.state import Routing, State
from prefixstore.serve import limits
from prefixstore.serve.listening import HttpServer, ListenOptions, until_told


@dataclass(frozen=True, slots=True)
class RouteOptions(ListenOptions):
    """How to serve as a router. ``drain_s``: what requests under way may take at the end."""

    routing: Routing = field(default_factory=Routing)
    drain_s: float = limits.DRAIN_S

    def check(self) -> None:
        """Raise ConfigError for what must not be."""
        self.check_listening(
            self.routing.admin_token_file is not None,
            "without --admin-token-file: everybody who can reach it could change the workers",
            "give --admin-token-file FILE, or --insecure if the network is yours alone",
        )
        routing = self.routing
        tokens = routing.worker_token_file is not None or routing.store_token_file is not None
        if tokens and routing.admin_token_file is None:
            raise ConfigError(
                "--worker-token-file or --store-token-file without --admin-token-file: "
                "everybody who adds a worker would be sent the token",
                "give --admin-token-file FILE",
            )
        if not self.routing.workers and self.routing.file is None:
            raise ConfigError("no workers", "give --worker URL or --workers FILE")
        if self.routing.local_tokens < 0 or not 0 <= self.drain_s < 1e6:
            raise ConfigError("--local-tokens or --drain below 0", "0 or more")


class Router(HttpServer):
    """A router in this thread's event loop."""

    def __init__(self, options: RouteOptions) -> None:
        options.check()
        self.options, self.state = options, State(options.routing)
        app = make_app(self.state)
        super().__init__(app, app[GUARDS], options)

    async def stop(self) -> None:
        """Take no more requests, and let those under way end."""
        self.state.draining = True
        await self.stop_listening(asyncio.get_running_loop().time() + self.options.drain_s)


async def route(options: RouteOptions, ready: Callable[[Router], Any]) -> None:
    """Route until SIGTERM or SIGINT. ``ready`` is called once it listens."""

    def listens(router: Router) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, router.state.reload_or_say)
        ready(router)

    await until_told(lambda: Router(options), listens)
