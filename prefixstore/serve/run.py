"""Running the server of a store: who may ask, and an orderly end.

What must hold: it listens on this host only, or asks for tokens; a first SIGTERM or SIGINT lets
requests under way end and writes the store to disk, within DRAIN_S.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixstore.serve import limits
from prefixstore.serve.app import GUARDS, make_app
from prefixstore.serve.auth import Tenants, read_tokens
from prefixstore.serve.eyes import EYES, EyesOptions
from prefixstore.serve.listening import HttpServer, ListenOptions, until_told
from prefixstore.serve.mending import Mender
from prefixstore.serve.state import State
from prefixstore.store import Store

logger = logging.getLogger("prefixstore")


@dataclass(frozen=True, slots=True)
class ServeOptions(ListenOptions):
    """How to serve."""

    tokens: str | None = None
    read_only: bool = False
    json_log: bool = False
    eyes: EyesOptions = field(default_factory=EyesOptions)

    def check(self) -> None:
        """Raise ConfigError for what must not be."""
        self.check_listening(
            self.tokens is not None,
            "without --tokens: everybody who can reach it could read and write KV",
            "give --tokens FILE, or --insecure if the network is yours alone",
        )
        self.eyes.check(self.insecure)


class Server(HttpServer):
    """A server in this thread's event loop."""

    def __init__(
        self, store: Store, options: ServeOptions, open_it: Callable[[], Store] | None = None
    ) -> None:
        """``open_it`` opens the store again should it be lost; then `state` has another one, which
        is the caller's to close."""
        options.check()
        self.options, self._open_it = options, open_it
        tenants = Tenants([], {})
        if options.tokens is not None:
            tenants = read_tokens(Path(options.tokens), store)
            if not options.read_only:
                tenants.limit_known(store)
        self.state = State(store, tenants, options.read_only)
        app = make_app(self.state, json_log=options.json_log, options=options.eyes)
        super().__init__(app, app[GUARDS], options)
        self._mending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `HttpServer`."""
        await super().start()
        if self._open_it is not None:
            mender = Mender(self.state, self.app[EYES], self._open_it)
            self._mending = asyncio.get_running_loop().create_task(mender.run())

    async def stop(self, deadline_s: float = limits.DRAIN_S) -> None:
        """Take no more requests, let those under way end, and the threads; then the store may be
        closed, which writes it to disk."""
        self.state.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        if self._mending is not None:  # before what it would have follow another store
            self._mending.cancel()
            await asyncio.wait((self._mending,), timeout=limits.ABORT_S)
        await self.stop_listening(end)
        if not await self.state.close(max(limits.ABORT_S, end - loop.time())):
            logger.warning("threads of requests have not ended within %.0f s", deadline_s)


async def serve(
    open_it: Callable[[], Store], options: ServeOptions, ready: Callable[[Server], Any]
) -> None:
    """Open a store, again should it be lost, and serve it until SIGTERM or SIGINT. ``ready`` is
    called once it listens. Raises ConfigError, and what opening does."""
    options.check()
    store = open_it()
    made: list[Server] = []

    def make() -> Server:
        made.append(Server(store, options, open_it))
        return made[0]

    try:
        await until_told(make, ready)
    finally:
        (made[0].state.store if made else store).close()
