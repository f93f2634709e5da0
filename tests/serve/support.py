"""A server in this process, on a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefixstore import Store
from prefixstore.client.remote import RemoteStore
from prefixstore.errors import ConfigError
from prefixstore.serve.run import ServeOptions, Server

WAIT_S = 30.0
ALICE, BOB, ADMIN = "alice-" + "a" * 24, "bob-" + "b" * 24, "admin-" + "c" * 24


class Running:
    """A server that runs."""

    def __init__(self, store: Store, options: ServeOptions) -> None:
        self.loop = asyncio.new_event_loop()
        self.server = self.make(store, options)
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.on_loop(self.server.start())
        except ConfigError:
            self.stop()
            raise

    def make(self, store: Store, options: ServeOptions) -> Server:
        return Server(store, options)

    @property
    def address(self) -> str:
        return self.server.address

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def open(self, token: str = "", **options: Any) -> RemoteStore:
        return RemoteStore(self.address, token=token, **options)

    async def _closed(self) -> None:
        """Wait for the end of connections: the loop watches nothing any more but its own pipe."""
        selector = self.loop._selector  # type: ignore[attr-defined]
        while len(selector.get_map()) > 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)  # their sockets are closed in the next turn

    def stop(self) -> None:
        self.on_loop(self.server.stop(2.0))
        self.on_loop(self._closed())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@contextmanager
def running(store: Store, **options: Any) -> Iterator[Running]:
    """Serve a store."""
    server = Running(store, ServeOptions(**options))
    try:
        yield server
    finally:
        server.stop()


def tokens_file(folder: Path, text: str = "") -> str:
    """A file with the tokens of this module."""
    path = folder / "tokens"
    path.write_text(text or f"# for tests\nalice:{ALICE}\nbob:{BOB}\nlocal:{ADMIN}\n")
    path.chmod(0o600)
    return str(path)


def certificate(folder: Path) -> tuple[str, str]:
    """Files of a certificate for this host, and of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of this test")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(cert), str(key)
