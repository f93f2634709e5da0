"""LMCache as the peer of our benchmarks.

Where this Python has no LMCache, it runs in an environment of its own: ``.venv-lmcache`` in the
repository root (made once from requirements/lmcache.lock: minutes, 4 GB), for a CPU.  With a GPU,
install beside vLLM the release of LMCache that was built for its torch.  What must hold: nothing is
left running or in shared memory, whichever process dies; server and engine end with the pipes from
this process.

Engines use LMCache's multi-process connector (`lmcache_server`).  The in-process one
(``LMCacheConnectorV1``) has no CPU support and, on a GPU with vLLM 0.26 or later, gives back wrong
KV without an error: github.com/LMCache/LMCache/issues/4463.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine import LOG_TAIL_LINES, Engine
from benchmarks.engine_process import session_members
from benchmarks.lmcache_server import QUIET, SHARED_MEMORY, mapped
from benchmarks.serve_processes import child, line_of

REPO_ROOT = Path(__file__).resolve().parents[1]
PEERS = ("lmcache",)
VENV = REPO_ROOT / ".venv-lmcache"
LOCK = REPO_ROOT / "requirements" / "lmcache.lock"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

INSTALL_DEADLINE_S = 1800.0
BENCH_DEADLINE_S = 600.0
L2_KEYS = 32  # of one submit; as many as a put or get of ours has chunks
L2_OPERATIONS = {"Store": "put", "Load": "get"}
# With LMCache imported, vLLM 0.32 cannot start its CPU worker in the client's process: it looks for
# a kernel among the attributes of every module and stumbles over one of LMCache's. So the engine
# core has a process of its own, as in `vllm serve`; that adds about a millisecond to each answer.
_OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


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
    pinned = next(line for line in LOCK.read_text().splitlines() if line.startswith("torch=="))
    try:
        _pip_step([*pip, pinned])
    except RuntimeError:  # the "+cpu" build is on torch's own index only
        _pip_step([*pip, pinned, "--extra-index-url", TORCH_CPU_INDEX])
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
        env={**os.environ, **QUIET},
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


def interpreter() -> Path:
    """The Python that has LMCache: this one or, for a CPU, that of the peer's environment.

    Raises RuntimeError if it is not installed beside a vLLM for a GPU, or cannot be.
    """
    if importlib.util.find_spec("lmcache") is not None:
        return Path(sys.executable)
    import torch  # an extra

    if torch.cuda.is_available():
        raise RuntimeError(
            f"LMCache is not installed; install the release that was built for torch "
            f"{torch.__version__} beside vLLM"
        )
    return installed()


@contextlib.contextmanager
def lmcache_engine(
    model: str | Path, folder: Path, *options: str, **arguments: Any
) -> Iterator[Engine]:
    """An engine with LMCache and a server of its own, with such options; both end by SIGKILL.

    ``arguments`` are the `Engine`'s; logs go to the folder.  Raises RuntimeError, whose first line
    is the reason, if the server does not start, EngineDied if the engine does not.
    """
    python = interpreter()
    log, engine_log = folder / "lmcache-server.log", folder / "lmcache-engine.log"
    command = (str(python), "-m", "benchmarks.lmcache_server", str(log), *options)
    before = set(SHARED_MEMORY.iterdir())
    with child(*command) as owner, contextlib.ExitStack() as at_end:
        at_end.callback(_end, owner.pid, before)
        try:
            port = int(line_of(owner))
        except RuntimeError:
            lines = _tail(log)
            printed = "\n".join(lines)
            raise RuntimeError(f"LMCache's server did not start: {lines[-1]}\n{printed}") from None
        before = set(SHARED_MEMORY.iterdir())  # the server's, too
        try:
            engine = Engine(
                model, python=python, kv_transfer_config=_connector(port), log=engine_log,
                env=QUIET if python == Path(sys.executable) else {**_OWN_PROCESS, **QUIET},
                **arguments,
            )  # fmt: skip
            try:
                yield engine
            finally:
                _kill(engine, before)
        except RuntimeError:  # the logs go with the folder
            for one in (log, engine_log):
                print(f"the end of {one.name}:", *_tail(one), sep="\n", file=sys.stderr, flush=True)
            raise


def _tail(log: Path) -> list[str]:
    text = log.read_text(errors="replace") if log.is_file() else ""
    return text.splitlines()[-LOG_TAIL_LINES:] or ["its log is empty"]


def _kill(engine: Engine, before: set[Path]) -> None:
    """SIGKILL, as abruptly as ours; what it shared with the server is then nobody's."""
    _end(engine.pid, before)
    engine.kill()


def _end(session: int, before: set[Path]) -> None:
    """Kill all of a session; unlink what memory they shared, but what was there ``before``."""
    members = session_members(session)
    shared = set().union(*map(mapped, members)) - before
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in shared:
        path.unlink(missing_ok=True)


def _connector(port: int) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheMPConnector",
        # LMCache's own: vLLM's copy calls another release of LMCache.
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
            "lmcache.mp.mp_transfer_mode": "lmcache_driven",
        },
    }
