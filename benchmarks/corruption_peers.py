"""The same damage and the same kills for this store and for others that keep KV in files.

``python -m benchmarks.corruption_peers [--cases N] [--seed S] [--stores NAME ...] [--json]``

Stores: this one's disk tier; vLLM's file system tier (``kv_offload/tiering/fs``, of the vLLM that
is installed); LMCache's L2 adapters ``fs`` and ``fs_native`` (from requirements/lmcache.lock, see
`lmcache_peer`). Each is driven through its own code (`corruption_peer_host`) with its defaults.

For each case a store of 16 chunks of 256 KiB is copied and one chunk's bytes on disk are damaged;
or 64 chunks are stored one after the other, and the process gets SIGKILL while it stores one. Then
another process looks all chunks up, reads what is found, and compares it with what was stored:

- right, missing (not found, or found and refused), wrong (served, with other bytes)
- lost: missing although it had been said to be stored (kills)
- still missing: after it was stored again through the same code, read by a third process
- failed: uses that ended in a crash, a hang or an exception
- files left: of names that a store which was not killed does not have

A file here holds one chunk, in this store all of them: so cutting it takes the chunks behind, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.corruption_peer_host import MODULES
from benchmarks.lmcache_peer import REPO_ROOT, installed
from benchmarks.table import Bar, add_arguments, report

OURS = "prefixstore"
CHUNKS, CHUNKS_OF_KILLS = 16, 64
PAGE = 4096
Place = tuple[Path, int, int]
Damage = Callable[[list[Place], random.Random], None]


class Host:
    """The process of one store."""

    def __init__(self, name: str, log: Path) -> None:
        python = str(installed()) if name.startswith("lmcache") else sys.executable
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.corruption_peer_host", name],
            cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        if not self._line():
            raise RuntimeError(f"{name} did not start:\n{log.read_text()[-2000:]}")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def use(self, do: str, folder: Path, count: int, **more: Any) -> dict[str, Any]:
        """See `corruption_peer_host.run_use`."""
        assert self._process.stdin is not None
        use = {"do": do, "folder": str(folder), "count": count, **more}
        self._process.stdin.write(json.dumps(use) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        self._process.kill()
        self._process.wait()
        self._log.close()


# ---------------------------------------------------------------- damage
def _overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _read(place: Place) -> bytes:
    path, at, size = place
    with path.open("rb") as file:
        file.seek(at)
        return file.read(size)


def flip(places: list[Place], rng: random.Random) -> None:
    """One bit."""
    place = rng.choice(places)
    at = rng.randrange(place[2])
    _overwrite(place[0], place[1] + at, bytes([_read(place)[at] ^ 1 << rng.randrange(8)]))


def zero(places: list[Place], rng: random.Random) -> None:
    """A page, as by a write that was lost."""
    path, at, size = rng.choice(places)
    _overwrite(path, at + rng.randrange(size // PAGE) * PAGE, bytes(PAGE))


def truncate(places: list[Place], rng: random.Random) -> None:
    """The file ends within the chunk."""
    path, at, size = rng.choice(places)
    os.truncate(path, at + rng.randrange(size))


def swap(places: list[Place], rng: random.Random) -> None:
    """Two chunks' bytes have changed places."""
    one, other = rng.sample(places, 2)
    data = _read(one), _read(other)
    _overwrite(one[0], one[1], data[1])
    _overwrite(other[0], other[1], data[0])


DAMAGE: dict[str, Damage] = {
    "flip a bit": flip, "zero a page": zero, "truncate": truncate, "swap two chunks": swap,
}  # fmt: skip
KILL = "kill -9"


# ---------------------------------------------------------------- cases
def _files(folder: Path) -> set[str]:
    """What there is on disk; this store's memory tier is elsewhere."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)) for p in paths if "memory" not in p.parts}


def judge(host: Host, folder: Path, count: int, said: list[int], tally: Counter[str]) -> None:
    """Let two more processes read, and count what they say. ``said``: stored, as far as we know."""
    found = _check(host, folder, count, tally)
    tally["cases"] += 1
    for name in ("right", "missing", "wrong"):
        tally[name] += len(found[name])
    tally["lost"] += len(set(found["missing"]) & set(said))
    if found["missing"] or found["wrong"]:
        again = _check(host, folder, count, tally, again=True)
        tally["still missing"] += len(again["missing"])


def _check(
    host: Host, folder: Path, count: int, tally: Counter[str], **more: Any
) -> dict[str, list[int]]:
    answer = host.use("check", folder, count, **more)
    if answer["ended"] != "done" or not answer["told"]:
        tally["failed"] += 1
        print(f"{answer['ended']}: {answer['error']}", file=sys.stderr)
        return {"right": [], "missing": [], "wrong": []}
    found: dict[str, list[int]] = answer["told"][-1]
    return found


def fill(host: Host, pristine: Path) -> list[Place]:
    """Make the store that is damaged; where its chunks are."""
    host.use("fill", pristine, CHUNKS)
    [told] = host.use("places", pristine, CHUNKS)["told"]
    shutil.rmtree(pristine / "memory", ignore_errors=True)  # so that the disk is read
    return [(Path(path), at, size) for path, at, size in told]


def damaged(
    host: Host, name: str, base: Path, places: list[Place], args: argparse.Namespace
) -> Counter[str]:
    """All cases of one kind of damage."""
    tally: Counter[str] = Counter()
    pristine = base / "pristine"
    for number in range(args.cases):
        rng = random.Random(f"{args.seed} {name} {number}")
        folder = base / "case"
        shutil.copytree(pristine, folder)
        moved = [(folder / path.relative_to(pristine), at, size) for path, at, size in places]
        DAMAGE[name](moved, rng)
        judge(host, folder, CHUNKS, list(range(CHUNKS)), tally)
        shutil.rmtree(folder)
    return tally


def killed(host: Host, base: Path, args: argparse.Namespace) -> Counter[str]:
    """All kills."""
    tally: Counter[str] = Counter()
    whole = host.use("fill", base / "whole", CHUNKS_OF_KILLS)
    names = _files(base / "whole")
    one_s = whole["telling_s"] / CHUNKS_OF_KILLS
    for number in range(args.cases):
        rng = random.Random(f"{args.seed} kill {number}")
        folder = base / "case"
        after, delay_s = rng.randrange(CHUNKS_OF_KILLS), rng.uniform(0, one_s)
        answer = host.use("fill", folder, CHUNKS_OF_KILLS, kill_after=after, kill_delay_s=delay_s)
        said = [entry for entry in answer["told"] if isinstance(entry, int)]
        tally["said"] += len(said)
        judge(host, folder, CHUNKS_OF_KILLS, said, tally)
        tally["files left"] += len(_files(folder) - names)
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of all stores; a row for each store and kind."""
    rows = []
    for store in args.stores:
        with tempfile.TemporaryDirectory(prefix="prefixstore-peers-", dir=args.folder) as scratch:
            base = Path(scratch)
            with Host(store, base / "log") as host:
                places = fill(host, base / "pristine")
                for kind in args.kinds:
                    is_kill = kind == KILL
                    if is_kill:
                        tally = killed(host, base, args)
                    else:
                        tally = damaged(host, kind, base, places, args)
                    rows.append(
                        {
                            "store": store,
                            "case": kind,
                            "cases": tally["cases"],
                            "right": tally["right"],
                            "missing": tally["missing"],
                            "wrong": tally["wrong"],
                            "failed": tally["failed"],
                            "still_missing": tally["still missing"],
                            "said_stored": tally["said"] if is_kill else None,
                            "lost": tally["lost"] if is_kill else None,
                            "files_left": tally["files left"] if is_kill else None,
                        }
                    )
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # it takes long
    return rows


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruption_peers")
    add_arguments(parser)
    parser.add_argument("--cases", type=int, default=40, help="of each kind and store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stores", nargs="+", choices=list(MODULES), default=list(MODULES))
    kinds = [*DAMAGE, KILL]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--folder", help="on the disk to use (the temporary folder)")
    args = parser.parse_args()
    rows = run(args)
    ours = [row for row in rows if row["store"] == OURS]
    bars = [
        Bar(f"{what} of this store", float(sum(row[key] or 0 for row in ours)), 0.0, "<=")
        for what, key in (("wrong chunks", "wrong"), ("failed uses", "failed"), ("losses", "lost"))
        if ours
    ]
    report("Corruption and kills", rows, bars, args)


if __name__ == "__main__":
    main()
