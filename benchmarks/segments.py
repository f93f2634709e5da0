"""How fast and how surely segments of a prompt are found, and what their index costs.

``python -m benchmarks.segments [--json] [--check] [--quick] [--dir FOLDER]``

100,000 chunks of 64 tokens are stored on disk (of 256 bytes each, so that the index is what is
large). Then prompts of 131,072 tokens, given as numpy arrays, are searched: of which nothing, half
or all stands in stored texts, in runs of 2,048 or 512 tokens from random places, or in one run.
``ms`` is wall-clock time of one search, in one thread; ``cpu_p99`` is what the thread itself used,
which tells a slow search from a busy machine. The heap is frozen before, as vLLM does once its
engine is up: else Python's cyclic collector walks all of the benchmark's own objects now and then.

What is found is compared with the texts: a planted run counts if all of it is found, a segment is
false if a single token differs. A probe is one offset of a random prompt, or of one that agrees
with stored texts for up to 63 tokens at a time. The index is compared with what 8 MiB a chunk take
(8B parameters, grouped heads, bfloat16). Owns a folder under ``--dir``, removed at the end.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from benchmarks.store_sizes import identity_for, temporary_store
from benchmarks.table import Bar, add_arguments, report
from prefixstore import Layout, Store
from prefixstore.segments import Segment

LAYOUT = Layout(num_layers=1, num_planes=1, num_heads=1, chunk_tokens=64, head_bytes=4)
DEFAULT_DIR = Path(__file__).resolve().parents[1] / ".cache" / "bench"
CHUNKS, PROMPT_TOKENS, VOCABULARY = 100_000, 131_072, 128_000
CHUNK_BYTES_8B = 8 << 20
PLANTED, PROBES = 2_000, 1_000_000
DEADLINE_S = 300.0

Tokens = npt.NDArray[np.int32]
Row = dict[str, object]


class Bench:
    """A filled store, the texts in it, and what the searches found."""

    def __init__(self, store: Store, quick: bool) -> None:
        self.store, self.rng = store, np.random.default_rng(0)
        self.space = store.namespace(identity_for(LAYOUT), LAYOUT)
        self.samples = 10 if quick else 300
        self.prompt_tokens = 16_384 if quick else PROMPT_TOKENS
        per_text = self.prompt_tokens // LAYOUT.chunk_tokens
        count = -(-(2_000 if quick else CHUNKS) // per_text)
        self.texts = [self.random(self.prompt_tokens) for _ in range(count)]
        self.chunks = count * per_text
        self.place_of: dict[bytes, tuple[int, int]] = {}  # key -> number of the text, first token
        self.false = 0

    def random(self, count: int) -> Tokens:
        return self.rng.integers(0, VOCABULARY, count, dtype=np.int32)

    def fill(self) -> Iterator[float]:
        """Store the texts; gives the seconds a chunk, on disk, for each text."""
        payload = bytes(LAYOUT.payload_bytes)
        for number, text in enumerate(self.texts):
            refs = self.space.chain(text).refs()
            began = time.perf_counter()
            self.space.put(refs, [payload] * len(refs))
            if not self.store.flush(DEADLINE_S):
                raise RuntimeError(f"the store did not flush within {DEADLINE_S:g} s")
            yield (time.perf_counter() - began) / len(refs)
            size = LAYOUT.chunk_tokens
            self.place_of.update((ref.key, (number, ref.depth * size)) for ref in refs)

    def find(self, prompt: Tokens) -> list[Segment]:
        """Search, and compare what is found with the texts."""
        found = self.space.find_segments(prompt)
        self.false += sum(not self.true(prompt, segment) for segment in found)
        return found

    def true(self, prompt: Tokens, segment: Segment) -> bool:
        at = segment.start
        for piece in segment.pieces:
            number, first = self.place_of[piece.ref.key]
            first += piece.offset
            text = self.texts[number][first : first + piece.num_tokens]
            if not np.array_equal(text, prompt[at : at + piece.num_tokens]):
                return False
            at += piece.num_tokens
        return at == segment.stop

    def planted(self, share: float, run_tokens: int) -> Tokens:
        """A random prompt of which a share is runs of stored texts, evenly spaced."""
        prompt = self.random(self.prompt_tokens)
        run_tokens = min(run_tokens, self.prompt_tokens)
        for at in range(0, self.prompt_tokens - run_tokens + 1, int(run_tokens / share)):
            prompt[at : at + run_tokens] = self.run(run_tokens)
        return prompt

    def run(self, count: int) -> Tokens:
        text = self.texts[self.rng.integers(len(self.texts))]
        first = self.rng.integers(len(text) - count + 1)
        return text[first : first + count]

    # ------------------------------------------------------------------ what is measured
    def times(self, name: str, share: float, run_tokens: int) -> Row:
        """Milliseconds of a search."""
        wall, cpu, tokens = [], [], []
        for _ in range(self.samples):
            prompt = self.planted(share, run_tokens) if share else self.random(self.prompt_tokens)
            began, began_cpu = time.perf_counter(), time.thread_time()
            found = self.space.find_segments(prompt)
            cpu.append(1e3 * (time.thread_time() - began_cpu))
            wall.append(1e3 * (time.perf_counter() - began))
            self.false += sum(not self.true(prompt, segment) for segment in found)
            tokens.append(sum(segment.num_tokens for segment in found))
        return row(f"search, {name}", "ms", wall, cpu, float(np.mean(tokens)) / self.prompt_tokens)

    def planted_found(self, count: int) -> Row:
        """Which of the runs of 128 to 512 tokens at random offsets are found whole."""
        done = hits = 0
        while done < count:
            prompt, places = self.random(self.prompt_tokens), []
            at = int(self.rng.integers(1, 400))
            while at < self.prompt_tokens - 512:
                run = self.run(int(self.rng.integers(128, 513)))
                prompt[at : at + len(run)] = run
                places.append((at, at + len(run)))
                at += len(run) + int(self.rng.integers(1, 800))
            covered = np.zeros(self.prompt_tokens, np.bool_)
            for segment in self.find(prompt):
                covered[segment.start : segment.stop] = True
            done += len(places)
            hits += sum(bool(covered[start:stop].all()) for start, stop in places)
        return row("planted runs of 128 tokens or more found", "share", [hits / done], n=done)

    def false_found(self, probes: int) -> Row:
        """Segments found where there is none; and all found anywhere that are not so."""
        done = found = 0
        while done < probes:
            prompt = self.random(self.prompt_tokens)
            if done >= probes / 2:  # runs that are one token too short
                for at in range(0, self.prompt_tokens - 63, 64):
                    prompt[at : at + 63] = self.run(63)
                    prompt[at + 63] = VOCABULARY
            found += len(self.find(prompt))
            done += self.prompt_tokens
        return row("false segments", "count", [found + self.false], n=done)

    def index_share(self) -> list[Row]:
        """Bytes of the whole durable index, rows of the chunks included, and as a share."""
        size = self.store.index.file_bytes()
        share = size / (self.chunks * CHUNK_BYTES_8B)
        return [
            row("index, a chunk", "bytes", [size / self.chunks], n=self.chunks),
            row("index / chunks of 8 MiB", "share", [share], n=self.chunks),
        ]


def row(
    case: str,
    unit: str,
    values: Sequence[float],
    cpu: Sequence[float] = (),
    found: float | None = None,
    n: int | None = None,
) -> Row:
    """One line of the table."""

    def p99(samples: Sequence[float]) -> float | None:
        return float(np.percentile(samples, 99, method="higher")) if len(samples) > 1 else None

    return {
        "case": case, "unit": unit, "median": float(np.median(values)), "p99": p99(values),
        "cpu_p99": p99(cpu), "max": float(np.max(values)), "found": found,
        "n": len(values) if n is None else n,
    }  # fmt: skip


def put_rows(folder: Path, quick: bool) -> list[Row]:
    """Microseconds a chunk of a put into a store without a disk, with the segment index and
    without. (With a disk, a put does not wait for it.)"""
    rng, count = np.random.default_rng(1), 64 if quick else 512
    seconds: dict[str, list[float]] = {"with segments": [], "without": []}
    with temporary_store(folder, 256 << 20, 0) as store:
        space = store.namespace(identity_for(LAYOUT), LAYOUT)
        for _ in range(2 if quick else 20):
            for name, samples in seconds.items():
                refs = space.chain(rng.integers(0, VOCABULARY, 64 * count, dtype=np.int32)).refs()
                payloads = [bytes(LAYOUT.payload_bytes)] * count
                with ExitStack() as stack:
                    if name == "without":
                        stack.enter_context(patch("prefixstore.putting.enter", lambda *_: None))
                    began = time.perf_counter()
                    space.put(refs, payloads)
                    samples.append(1e6 * (time.perf_counter() - began) / count)
    extra = np.median(seconds["with segments"]) - np.median(seconds["without"])
    rows = [row(f"put in memory, {name}", "us", samples) for name, samples in seconds.items()]
    return [*rows, row("put in memory, extra", "us", [float(extra)], n=len(seconds["without"]))]


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows; ``--quick`` measures only enough to see that it works."""
    parent = Path(args.dir)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prefixstore-bench-", dir=parent) as name:
        rows = put_rows(Path(name) / "memory", args.quick)
        with temporary_store(Path(name) / "disk", 128 << 20, 1 << 30) as store:
            bench = Bench(store, args.quick)
            print(f"storing {bench.chunks} chunks ...", file=sys.stderr, flush=True)
            spilled = [1e6 * seconds for seconds in bench.fill()]
            rows.append(row("put on disk, a chunk", "us", spilled))
            print("searching ...", file=sys.stderr, flush=True)
            with frozen_heap():
                rows += search_rows(bench, args.quick)
            rows += bench.index_share()
    return rows


def search_rows(bench: Bench, quick: bool) -> list[Row]:
    """What is found, and how fast."""
    cases = (
        ("nothing found", 0.0, 0),
        ("half found, runs of 2048", 0.5, 2048),
        ("half found, runs of 512", 0.5, 512),
        ("all found, runs of 2048", 1.0, 2048),
        ("all found, one run", 1.0, PROMPT_TOKENS),
    )
    return [
        *(bench.times(what, share, run_tokens) for what, share, run_tokens in cases),
        bench.planted_found(50 if quick else PLANTED),
        bench.false_found(20_000 if quick else PROBES),
    ]


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What there is by now is left alone by the cyclic garbage collector."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def bars(rows: Sequence[Row]) -> list[Bar]:
    """What must be reached."""
    found = {str(entry["case"]): entry for entry in rows}

    def value(case: str, name: str = "median") -> float | None:
        number = found[case][name] if case in found else None
        return float(number) if isinstance(number, int | float) else None

    made = [
        Bar(f"p99 ms, {case}", value(case, "p99"), 25.0, "<")
        for case in found
        if case.startswith("search, ")
    ]
    planted = "planted runs of 128 tokens or more found"
    return [
        *made,
        Bar(planted, value(planted), 1.0, ">="),
        Bar("false segments", value("false segments"), 0.0, "<="),
        Bar("index / chunks of 8 MiB", value("index / chunks of 8 MiB"), 0.02, "<="),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segments")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its bars mean nothing")
    parser.add_argument("--dir", default=str(DEFAULT_DIR), help="a folder on a disk")
    args = parser.parse_args(argv)
    rows = measure(args)
    title = f"segments: prompts of {PROMPT_TOKENS} tokens against {CHUNKS} chunks"
    if args.quick:
        title = "segments: a quick run"
    report(title, rows, [] if args.quick else bars(rows), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
