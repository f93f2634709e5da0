"""Eight hours of a server's life in minutes: clients of several tenants, faults, and no trace left.

``python -m benchmarks.soak --minutes M [--json] [--check] [--dir FOLDER]``

Processes of clients of three tenants (`soak_client`) do random operations on a store much smaller
than what they put, so that it evicts all the time and quotas are full, in cycles of some seconds.
Beside them are clients that die in the middle of a body, read slowly, send nonsense or hold
connections, and bytes of the disk tier are changed (`soak_faults`). In the first half the server is
killed (SIGKILL) in each cycle; in the second it lives on, and is looked at after each cycle, when
nobody asks for anything: its memory and descriptors must not grow. At the end it is stopped, and
the store is verified. How long it would have been: requests at ORDINARY_REQUESTS_S, which is what
an engine that answers one prompt a second makes (match, lease, get, put, release).

What must hold at the end: no wrong byte, nothing found that was deleted or never put, no answer of
500, no traceback in the server's log, memory and descriptors flat, an orderly end, a sound store.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks.serve_processes import child, line_of
from benchmarks.soak_faults import Rude, Server, damage
from benchmarks.table import Bar, add_arguments, report
from prefixstore.store import Store

ORDINARY_REQUESTS_S = 5.0
TENANTS = ("alice", "bob", "local")
THREADS = 3  # of each tenant's process
CYCLES = 16
WARM_CYCLES = 0.4  # of the second half: pools fill, allocators grow
QUIET_S = 2.0
LOG_SHOWN = 4000  # characters
GROWTH_KIB_MAX, GROWTH_SHARE_MAX = 16 << 10, 0.10
FILES_MORE_MAX = 8


class Clients:
    """A process of clients for each tenant."""

    def __init__(self, stack: ExitStack, server: Server, tokens: dict[str, str]) -> None:
        self._processes = []
        for seed, (tenant, token) in enumerate(tokens.items()):
            command = [sys.executable, "-m", "benchmarks.soak_client", server.url, token,
                       tenant, str(seed), str(THREADS)]  # fmt: skip
            self._processes.append(stack.enter_context(child(*command)))

    def begin(self, seconds: float) -> None:
        """Have them work."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()

    def end(self) -> Counter[str]:
        """What they did. Raises RuntimeError when one has died."""
        total: Counter[str] = Counter()
        for process in self._processes:
            total += Counter(json.loads(line_of(process))["counts"])
        return total


def soak(minutes: float, folder: Path, cycles: int = CYCLES) -> dict[str, object]:
    """Do it; what came of it, by name."""
    rng = random.Random(1)
    given = {tenant: secrets.token_hex(16) for tenant in TENANTS}
    tokens = folder / "tokens"
    tokens.write_text("".join(f"{name}:{token}\n" for name, token in given.items()))
    tokens.chmod(0o600)
    counts: Counter[str] = Counter()
    samples: list[tuple[int, int]] = []
    began = time.monotonic()
    with ExitStack() as stack:
        server = stack.enter_context(Server(folder, tokens, "8MiB", "24MiB"))
        clients = Clients(stack, server, given)
        rude = Rude(server, given["bob"], 2)
        seconds = max(1.0, 60 * minutes / cycles - QUIET_S)
        for cycle in range(cycles):
            with rude.at_work():
                clients.begin(seconds)
                time.sleep(seconds * rng.uniform(0.3, 0.7))
                counts["bytes changed on disk"] += damage(folder / "store", rng, 3)
                if cycle < cycles // 2:
                    server.restart()
                    counts["kills"] += 1
                counts += clients.end()
            time.sleep(QUIET_S)
            if cycle >= cycles // 2:
                samples.append((server.resident_kib(), server.files()))
        counts["rude clients"] = rude.done.total()
        exit_code = server.stop()
        faults = server.faults_logged()
        if faults:
            print(server.log.read_text()[-LOG_SHOWN:], file=sys.stderr)
    return {
        "minutes": (time.monotonic() - began) / 60,
        "counts": counts,
        "samples": samples,
        "exit_code": exit_code,
        "tracebacks": faults,
        "unsound": _unsound(folder),
    }


def _unsound(folder: Path) -> int:
    """What is wrong with the store beside the damage that was done to it."""
    from prefixstore import admin

    with Store.open(folder / "store", create=False) as store:
        first = admin.verify(store, fix=True)
        second = admin.verify(store)
        return len(first.accounting) + len(second.accounting) + len(second.damaged)


def rows_and_bars(found: dict[str, object]) -> tuple[list[dict[str, object]], list[Bar]]:
    """The result as a table, and what it must be."""
    counts, samples = found["counts"], found["samples"]
    assert isinstance(counts, Counter)
    assert isinstance(samples, list)
    warm = samples[: max(1, round(WARM_CYCLES * len(samples)))]
    rest = samples[len(warm) :] or samples[-1:]
    third = max(1, len(rest) // 3)
    before, after = rest[:third], rest[-third:]
    memory = [statistics.median(one[0] for one in part) for part in (before, after)]
    files = [statistics.median(one[1] for one in part) for part in (before, after)]
    wrong = sum(count for name, count in counts.items() if name.startswith("wrong: "))
    hours = counts["requests"] / ORDINARY_REQUESTS_S / 3600
    values: dict[str, object] = {
        "minutes": found["minutes"],
        **dict(sorted(counts.items())),
        "hours of ordinary load": hours,
        "memory after warm-up, KiB": memory[0],
        "memory at the end, KiB": memory[1],
        "memory of each cycle, KiB": " ".join(str(one[0]) for one in samples),
        "files after warm-up": files[0],
        "files at the end": files[1],
    }
    most = max(GROWTH_KIB_MAX, GROWTH_SHARE_MAX * memory[0])
    bars = [
        Bar("wrong bytes or chunks", float(wrong), 0, "=="),
        Bar("tracebacks of the server", float(str(found["tracebacks"])), 0, "=="),
        Bar("growth of its memory, KiB", memory[1] - memory[0], most, "<="),
        Bar("growth of its descriptors", files[1] - files[0], FILES_MORE_MAX, "<="),
        Bar("exit code of the server", float(str(found["exit_code"])), 0, "=="),
        Bar("faults of the store", float(str(found["unsound"])), 0, "=="),
        Bar("hits", float(counts["hits"]), 0, ">"),
    ]
    return [{"what": name, "value": value} for name, value in values.items()], bars


def main(argv: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--cycles", type=int, default=CYCLES)
    parser.add_argument("--dir", help="where its folder is made (the temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="prefixstore-soak-", dir=args.dir) as folder:
        found = soak(args.minutes, Path(folder), args.cycles)
    report("soak of a server", *rows_and_bars(found), args)


if __name__ == "__main__":
    main()
