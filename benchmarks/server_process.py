"""``prefixstore serve`` and ``route`` in processes of their own, to be killed and started again.

Owns the process; the store's folder is the caller's. What must hold: every wait has a deadline, and
leaving the context leaves no process behind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

START_S = 60.0
STOP_S = 20.0
ASK_S = 10.0
_MAIN = "from prefixstore.cli import main; raise SystemExit(main())"


class ServerProcess:
    """A server of the store in ``folder``; ``options`` are words of the command line.

    A TCP server gets a port of its own at its first start and keeps it. Raises RuntimeError if the
    server does not come up.
    """

    stop_s = STOP_S
    environment: Mapping[str, str] = MappingProxyType({})  # what its own has besides ours

    def __init__(self, folder: Path, *options: str, log: Path | None = None, port: int = 0) -> None:
        self._start_of("serve", str(folder), *options, log=log, port=port)

    def _start_of(self, *words: str, log: Path | None, port: int) -> None:
        self._words, self._log, self.port = words, log, port
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.start()

    @property
    def pid(self) -> int:
        """Of the server that runs."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        """Start, or start again at the same address."""
        words = [*self._words, "--json"]
        if not any(word.startswith("--uds") for word in words):
            words.append(f"--port={self.port}")
        log = subprocess.DEVNULL if self._log is None else self._log.open("ab")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, *words],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            )  # fmt: skip
        finally:
            if not isinstance(log, int):
                log.close()
        with ExitStack() as unless_it_runs:
            unless_it_runs.callback(self.kill)
            self.url = json.loads(self._first_line())["address"]
            unless_it_runs.pop_all()
        self.port = int(self.url.rpartition(":")[2]) if self.url.startswith("http") else 0

    def _first_line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise RuntimeError(f"the server did not start within {START_S:.0f} s: see {self._log}")
        return line

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it in order, as an operator would; its exit code, 0 if it did not run."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdout is not None
        process.send_signal(number)
        try:
            return process.wait(self.stop_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(self.stop_s)
        finally:
            process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class RouterProcess(ServerProcess):
    """A router in front of workers, each ``URL`` or ``URL=ROLE``; ``options`` as of the server."""

    def __init__(self, workers: Iterable[str], *options: str, log: Path | None = None) -> None:
        given = [f"--worker={worker}" for worker in workers]
        self._start_of("route", *given, *options, log=log, port=0)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Ask the operators' API. Raises OSError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=ASK_S) as answer:
            return json.loads(answer.read())

    def wait(self, count: int, deadline_s: float = START_S) -> None:
        """Wait until so many workers may have requests. Raises RuntimeError."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            workers = self.ask("GET", "/v1/workers")["workers"]
            if sum(worker["state"] == "ready" for worker in workers) == count:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{count} workers were not ready within {deadline_s:.0f} s: {workers}")
