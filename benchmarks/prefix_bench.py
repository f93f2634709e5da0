"""Prompts of `benchmarks.prefix`, who is asked for them, and what was said.

Engines that are compared are there at the same time and take turns with each prompt, in another
order each time, and where they compute on a GPU they share cores (`cores`): how much quicker one
is, is the median of what the turns say. One after another they differ by the machine's mood.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from benchmarks.cores import share_quickest
from benchmarks.engine import Answer, Engine
from benchmarks.restart import Results, Row, forget
from benchmarks.table import Bar, spread

COLD, OWN = "cold", "vLLM's own prefix cache"
MEMORY, KILLED = "memory tier", "memory tier, after kill -9 and restart"
FIRST = "the same, each prompt's first time"  # after the restart
OWN_KILLED = "vLLM's own prefix cache, after the restart"
DISK, DISK_COLD = "disk tier, page cache", "disk tier, cold"
DISK_AUTO = "disk tier, cold, as much as is worth it"
NATIVE, LMCACHE = "OffloadingConnector, CPU", "LMCache, memory of its server"
PEERS = {"native": NATIVE, "lmcache": LMCACHE}
CASES = (COLD, OWN, MEMORY, OWN_KILLED, KILLED, FIRST, DISK, DISK_COLD, DISK_AUTO, *PEERS.values())
# Behind the last chunk, for everyone to compute. Of a whole block of 16 tokens, who keeps blocks
# would compute the last token only, which is a decode graph.
BEHIND_TOKENS = 15
VOCAB = 1000
DEADLINE_S = 120.0
PASSES_MAX = 8  # until all of a prompt is stored: saves that find no room are dropped


class Bench:
    """See the module docstring. What a peer fails at is noted (``failed``), and it is not asked
    again."""

    def __init__(self, lengths: Sequence[int], prompts: int, rounds: int) -> None:
        self._rounds, chosen = rounds, random.Random(7)
        self.prompts = {
            count: [
                chosen.choices(range(1, VOCAB), k=count + BEHIND_TOKENS) for _ in range(prompts)
            ]
            for count in lengths
        }
        self.results = {count: Results(CASES) for count in lengths}
        self.failed: dict[str, Exception] = {}  # by a peer's case
        # By length, our case and a peer's: our time over theirs, of each turn.
        self._beside: dict[tuple[int, str, str], list[float]] = defaultdict(list)
        self._loops_s: list[float] = []  # of a loop, on any core at any time

    def fill(self, engine: Engine, *, cold: bool) -> None:
        """Ask the prompts until all are stored; ``cold``: the first time counts."""
        chosen = random.Random(8)
        for count, prompts in self.prompts.items():
            ask(engine, chosen.choices(range(1, VOCAB), k=count))  # kernels are compiled
            forget(engine)
            for number, prompt in enumerate(prompts):
                answer = ask(engine, prompt)
                if cold:
                    self.results[count].add(COLD, number, answer)
            store_all(engine, prompts, count)

    def turns(
        self, engines: Mapping[str, Engine], before: Callable[[], None] = lambda: None, *,
        whole: bool = True, first: str | None = None, own: str | None = None,
    ) -> None:  # fmt: skip
        """Ask again, vLLM's own prefix caches emptied before each round; ``engines`` by the case
        they are asked for, ``before`` each question. The first round warms what it needs, and
        counts as the case ``first`` of the first engine, if at all. ``own``: the case of asking
        that engine once more after each turn, when its own prefix cache has the prompt."""
        [ours, *_] = engines
        for count, round_number in itertools.product(self.prompts, range(self._rounds + 1)):
            there = {case: one for case, one in engines.items() if case not in self.failed}
            if len(there) > 1 and torch.cuda.is_available():
                self._loops_s += share_quickest(there.values()).values()
            for case, engine in there.items():
                with self.may_fail(case):
                    forget(engine)
            for number in range(len(self.prompts[count])):
                turn = (round_number - 1) * len(self.prompts[count]) + number
                took: dict[str, float] = {}
                for case in order_of_turn(list(there), turn):
                    if case in self.failed:
                        continue
                    with self.may_fail(case):
                        before()
                        answer = self._hit(there[case], case, count, number, whole=whole)
                        counts_as = case if round_number else first if case == ours else None
                        if counts_as is not None and answer.ttft_ms is not None:
                            self.results[count].add(counts_as, number, answer)
                            took[counts_as] = answer.ttft_ms
                if own is not None and round_number:
                    again = ask(there[ours], self.prompts[count][number])
                    self.results[count].add(own, number, again)
                self._compare(count, took)

    def _hit(self, engine: Engine, case: str, count: int, number: int, *, whole: bool) -> Answer:
        """Raises RuntimeError where the ``whole`` prefix must be found, and is not."""
        answer = ask(engine, self.prompts[count][number])
        if whole and (answer.cached_tokens or 0) < count:
            raise RuntimeError(
                f"{case}: {answer.cached_tokens} of {count} tokens were found; if the "
                "store is too small for all prompts, give it more (--store-gib)"
            )
        return answer

    def _compare(self, count: int, took: Mapping[str, float]) -> None:
        peers = [case for case in PEERS.values() if case in took]
        for ours, theirs in itertools.product(took, peers):
            if ours not in peers:
                self._beside[count, ours, theirs].append(took[ours] / took[theirs])

    @contextmanager
    def may_fail(self, case: str) -> Iterator[None]:
        """A peer may; what was measured is not lost."""
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            if case not in PEERS.values():
                raise
            if case not in self.failed:
                print(f"{case} failed: {error}", file=sys.stderr, flush=True)
                self.failed[case] = error

    def rows(self) -> list[Row]:
        """One line a length and case, one for what a peer is beside, and one for each that
        failed."""
        rows: list[Row] = []
        for count, found in self.results.items():
            rows += [{"tokens": count, **row, "ratio": None} for row in found.rows()]
            for (tokens, ours, theirs), ratios in self._beside.items():
                if tokens == count:
                    said = spread(ratios)
                    named = {"tokens": count, "case": f"{ours} / {theirs}, by turns"}
                    found_by = {"n": len(ratios), "min": said["min"], "max": said["max"]}
                    ratio = {"ratio": said["median"]}
                    rows.append(dict.fromkeys(rows[0]) | named | found_by | ratio)
        for case, error in self.failed.items():
            [why, *_] = str(error).splitlines() or [type(error).__name__]
            rows.append(dict.fromkeys(rows[0]) | {"case": f"{case} failed: {why}"})
        return rows

    def _ratio(self, count: int, case: str, other: str) -> float | None:
        """Of the medians of two cases, which took no turns; None if one was not measured."""
        found = self.results[count]
        ours, theirs = found.median(case), found.median(other)
        return ours / theirs if ours and theirs else None

    def cores(self) -> str:
        """How unlike its cores were, if they were looked at."""
        if not self._loops_s:
            return ""
        least, *_, most = sorted(self._loops_s)
        return f"the same loop took {1e6 * least:.0f} to {1e6 * most:.0f} us on these cores"

    def bars(self, peers: Sequence[str], *, exact: bool = True) -> list[Bar]:
        """What must be reached; with peers, also beside them. ``exact``: nothing was rounded."""
        differing = sum(
            count
            for found in self.results.values()
            for case, count in found.differing.items()
            if case not in PEERS.values()
        )
        bars = []
        if exact:
            bars.append(Bar("first tokens that differ from the cold run's", differing, 0, "=="))
        for count in self.results:
            if (ratio := self._ratio(count, DISK_AUTO, COLD)) is not None:
                bars.append(Bar(f"{count} tokens: {DISK_AUTO} / {COLD}", ratio, 1.03, "<="))
        beside = map(PEERS.__getitem__, peers)
        for theirs, count, case in itertools.product(beside, self.results, (MEMORY, KILLED)):
            ratios = self._beside.get((count, case, theirs))
            ratio = statistics.median(ratios) if ratios else self._ratio(count, case, theirs)
            bars.append(Bar(f"{count} tokens: {case} / {theirs}", ratio, 1.0, "<="))
        return bars


def order_of_turn(cases: Sequence[str], turn: int) -> list[str]:
    """Whoever is first changes with each turn, and who follows whom when all were first once."""
    at, reverse = turn % len(cases), turn // len(cases) % 2
    order = [*cases[at:], *cases[:at]]
    return order[::-1] if reverse else order


def ask(engine: Engine, prompt: list[int]) -> Answer:
    """One token, and the engine at rest."""
    [answer] = engine.generate([prompt], max_tokens=1, timeout_s=DEADLINE_S)
    engine.settle()
    return answer


def store_all(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> None:
    """Ask for prompts until so many leading tokens of each are stored. Raises RuntimeError."""
    for _ in range(PASSES_MAX):
        time.sleep(1.0)
        forget(engine)
        found = [ask(engine, prompt).cached_tokens or 0 for prompt in prompts]
        if min(found) >= tokens:
            return
    raise RuntimeError(f"of prompts of {len(prompts[0])} tokens only {found} are stored")
