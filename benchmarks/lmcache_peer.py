"""LMCache as the peer of our benchmarks, in an environment of its own.

Owns ``.venv-lmcache`` in the repository root (made once from requirements/lmcache.lock: minutes,
4 GB) and, while it runs, an LMCache server and an engine that uses it.  What must hold: nothing is
left running or in shared memory, whichever process dies.  So the peer's side, this module run by
that environment's Python, leads a session; the server is of that session; and when the pipe that
brought the plan ends, it kills the session (an engine ends itself in the same way).

LMCache is used as its documentation describes, with what was fastest on CPU: the multi-process
server, transfers driven by the server over shared memory, L2 adapter ``fs``; telemetry off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engine import Engine
from benchmarks.engine_process import session_members

REPO_ROOT = Path(__file__).resolve().parents[1]
PEERS = ("lmcache",)
VENV = REPO_ROOT / ".venv-lmcache"
LOCK = REPO_ROOT / "requirements" / "lmcache.lock"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SHARED_MEMORY = Path("/dev/shm")

INSTALL_DEADLINE_S = 1800.0
BENCH_DEADLINE_S = 600.0
RUN_DEADLINE_S = 900.0
SERVER_DEADLINE_S = 90.0
STORE_WAIT_S = 2.0  # its stores are asynchronous and nothing tells when they have ended
L2_KEYS = 32  # of one submit; as many as a put or get of ours has chunks
L2_OPERATIONS = {"Store": "put", "Load": "get"}
# With LMCache imported, vLLM 0.32 cannot start its CPU worker in the client's process: it looks for
# a kernel among the attributes of every module and stumbles over one of LMCache's. So the engine
# core has a process of its own, as in `vllm serve`; that adds about a millisecond to each answer.
_OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
_QUIET = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "LMCACHE_DISABLE_BANNER": "1"}


# ---------------------------------------------------------------- our side
def installed() -> Path:
    """The Python of the peer's environment; makes the environment if the lock has changed.

    Raises RuntimeError if pip cannot install it.
    """
    python, stamp = VENV / "bin" / "python", VENV / "lock.sha256"
    want = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == want:
        return python
    print(f"making {VENV.name} from {LOCK.name}: minutes, 4 GB", file=sys.stderr, flush=True)
    _pip_step([sys.executable, "-m", "venv", "--clear", str(VENV)])
    (VENV / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-deps"]
    torch = next(line for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
    try:
        _pip_step([*pip, torch])
    except RuntimeError:  # the "+cpu" build is on torch's own index only
        _pip_step([*pip, torch, "--extra-index-url", TORCH_CPU_INDEX])
    _pip_step([*pip, "--requirement", str(LOCK)])
    stamp.write_text(want)
    return python


def _pip_step(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=INSTALL_DEADLINE_S,
        env={**os.environ, "PIP_NO_COMPILE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def l2_bandwidth(
    folder: Path, adapter: str, payload_bytes: int, total_bytes: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Put and get of an L2 adapter by LMCache's own ``bench l2``, in GB/s with their spread.

    It verifies what it reads; files are in the page cache; its puts call no fsync.
    """
    python = installed()
    spec: dict[str, Any] = {"type": adapter, "base_path": str(folder / f"lmcache-{adapter}")}
    if adapter == "fs_native":
        spec["num_workers"] = 4
    in_flight = max(1, total_bytes // (L2_KEYS * payload_bytes))
    result = folder / "lmcache-l2.json"
    command = [
        str(python.parent / "lmcache"), "bench", "l2", "--l2-adapter", json.dumps(spec),
        "--num-keys", str(L2_KEYS), "--in-flight", str(in_flight),
        "--data-size-kb", str(payload_bytes // 1024), "--rounds", str(rounds),
        "--no-skip-verify", "--format", "json", "--output", str(result),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BENCH_DEADLINE_S,
        env={**os.environ, **_QUIET},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"lmcache bench l2 failed:\n{(done.stdout + done.stderr)[-2000:]}")
    found: dict[str, dict[str, float]] = {}
    for entry in json.loads(result.read_text())["metrics"].values():
        name = L2_OPERATIONS.get(entry.get("operation", ""))
        if name is None:
            continue
        if entry["total_success"] != entry["total_keys"]:
            raise RuntimeError(f"lmcache bench l2: {entry}")
        gb_ms = entry["keys_per_round"] * payload_bytes / 1e6
        found[name] = {
            "median": gb_ms / entry["duration_p50_ms"],
            "min": gb_ms / entry["duration_max_ms"],
            "max": gb_ms / entry["duration_min_ms"],
            "n": entry["rounds"],
        }
    return found


def run_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Answer a plan's prompts with vLLM and LMCache; see `_answer` for both. RuntimeError."""
    command = [str(installed()), "-m", "benchmarks.lmcache_peer"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        cwd=REPO_ROOT, env={**os.environ, **_QUIET, "PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Timer(RUN_DEADLINE_S, process.kill)
    late.start()
    try:
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.flush()  # and left open: its end is the signal to end
        lines = process.stdout.read().splitlines()
        process.wait(timeout=60.0)
    finally:
        late.cancel()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
    if process.returncode or not lines:
        raise RuntimeError(f"the LMCache run ended with status {process.returncode}; see above")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


# ---------------------------------------------------------------- the peer's side
def _answer(plan: dict[str, Any]) -> dict[str, Any]:
    """TTFT in ms of each prompt: cold, from L1, and from L2 after both processes were killed.

    ``plan``: model, engine (vLLM's arguments), warm_prompts, prompts, max_tokens, folder.
    """
    folder = Path(plan["folder"])
    result: dict[str, Any] = {"cold": [], "memory": [], "disk": []}
    l2 = json.dumps({"type": "fs", "base_path": str(folder / "lmcache-l2")})
    options = ("--l1-size-gb", "1", "--l2-adapter", l2)

    def ask(engine: Engine, prompt: list[int], into: str) -> None:
        [answer] = engine.generate([prompt], max_tokens=plan["max_tokens"])
        result[into].append(asdict(answer))

    for turn, names in enumerate((["cold", "memory"], ["disk"])):
        log = folder / f"lmcache-server-{turn}.log"
        with server(log, *options) as port, contextlib.ExitStack() as ended:
            before = set(SHARED_MEMORY.iterdir())
            engine = Engine(
                plan["model"], **plan["engine"], enable_prefix_caching=False,
                kv_transfer_config=_connector(port), env={**_OWN_PROCESS, **_QUIET},
                log=folder / f"lmcache-engine-{turn}.log",
            )  # fmt: skip
            ended.callback(_kill, engine, before)
            for prompt in plan["warm_prompts"][turn]:
                engine.generate([prompt], max_tokens=plan["max_tokens"])
                time.sleep(STORE_WAIT_S)
                engine.generate([prompt], max_tokens=plan["max_tokens"])
            for prompt in plan["prompts"]:
                for name in names:
                    ask(engine, prompt, name)
                    time.sleep(STORE_WAIT_S)
    return result


def _kill(engine: Engine, before: set[Path]) -> None:
    """SIGKILL, as abruptly as ours; what it shared with the server is then nobody's."""
    shared = set().union(*(_mapped(pid) for pid in session_members(engine.pid))) - before
    engine.kill()
    for path in shared:
        path.unlink(missing_ok=True)


def _connector(port: int) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
            "lmcache.mp.mp_transfer_mode": "lmcache_driven",
        },
    }


@contextlib.contextmanager
def server(log: Path, *options: str) -> Iterator[int]:
    """An LMCache server; its port. Killed at the end, its shared memory unlinked."""
    port, http, prometheus = _free_ports(3)
    command = [
        str(VENV / "bin" / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port),
        "--http-host", "127.0.0.1", "--http-port", str(http), "--prometheus-port", str(prometheus),
        "--chunk-size", "256", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto",
        *options,
    ]  # fmt: skip
    before = set(SHARED_MEMORY.iterdir())
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            _wait_until_healthy(process, http, log)
            yield port
        finally:
            ours = _mapped(process.pid) - before
            process.kill()
            process.wait()
            for path in ours:
                path.unlink(missing_ok=True)


def _wait_until_healthy(process: subprocess.Popen[bytes], http: int, log: Path) -> None:
    deadline = time.monotonic() + SERVER_DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{http}/healthcheck", timeout=1.0):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the LMCache server did not start:\n{tail}") from None
            time.sleep(0.2)


def _mapped(pid: int) -> set[Path]:
    """The files of /dev/shm that a process has mapped.

    By inode: glibc makes a semaphore under another name and renames it, and maps keep the first.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended
        return set()
    words = (line.split() for line in maps.splitlines() if f"{SHARED_MEMORY}/" in line)
    inodes = {int(word[4]) for word in words}
    return {Path(entry) for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes}


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on now; another process may take one before the server does."""
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(count)]
        for entry in found:
            entry.bind(("127.0.0.1", 0))
        return [int(entry.getsockname()[1]) for entry in found]


def _end_with_parent() -> None:
    """Thread: when the plan's pipe ends, kill this session; the engine ends with our pipe to it."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Read a plan, one JSON line, from standard input; print its answers, one JSON line."""
    plan = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print(json.dumps(_answer(plan)), flush=True)


if __name__ == "__main__":
    main()
