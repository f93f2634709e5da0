"""``vllm serve`` in a process of its own, which may be killed.

Owns the process and its children: they are a session, and one signal to its group ends all of it.
What must hold: every wait has a deadline, and leaving the context leaves no process behind.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.engine_nursery import nursery_for
from benchmarks.engine_process import (
    KILL_WAIT_S,
    child_environment,
    has_exited,
    wait_for_session_end,
)

START_S = 300.0
POLL_S = 0.2
FREE_PORTS = range(20000, 32768)  # below those of ip_local_port_range (Linux's own default)
# On a CPU vLLM gives each worker a process, which spins for a second after each message; a few of
# those on few cores keep everybody else waiting for seconds. Named in full, this one is let be.
_IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


class VllmServer:
    """An OpenAI-compatible vLLM server on a free port of this host; ``url`` is its address.

    ``options`` are words of the command line behind ``vllm serve MODEL``. It is started at once;
    `wait` waits until it answers, so that several may start together.
    """

    def __init__(
        self,
        model: Path,
        *options: str,
        kv_transfer_config: Mapping[str, Any] | None,
        log: Path,
        threads: int = 1,
    ) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        words = ["--model", str(model), "--port", str(port), "--host", "127.0.0.1",
                 f"--distributed-executor-backend={_IN_PROCESS}", *options]  # fmt: skip
        if kv_transfer_config is not None:
            words += ["--kv-transfer-config", json.dumps(kv_transfer_config)]
        env = child_environment() | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
        with log.open("ab") as sink:
            self._process = nursery_for(env).fork_server(sink.fileno(), words)

    def wait(self, deadline_s: float = START_S) -> None:
        """Wait until it answers. Raises RuntimeError with the end of its log."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end and self.alive:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_S)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"vLLM did not come up within {deadline_s:.0f} s:\n{tail}")

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None and not has_exited(self._process.pid)

    def kill(self) -> None:
        """End all of it with SIGKILL; nothing if it has ended."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(KILL_WAIT_S)
            wait_for_session_end(self._process.pid)

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def free_port() -> int:
    """A TCP port nobody listens on now, nor will by chance: none that the system itself gives to
    sockets which ask for any. An engine's own had taken a server's before that was started."""
    for port in random.SystemRandom().sample(FREE_PORTS, k=len(FREE_PORTS)):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port of {FREE_PORTS.start} to {FREE_PORTS.stop - 1} is free")
