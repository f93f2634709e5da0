"""One run of `benchmarks.scale`: requests arrive, are routed, loaded, computed and saved.

A simulation by events on a heap. Where the product decides, its own functions do: which engine
(`prefixstore.route.choose`), how much of a hit to load (`connector.plan`), what a full tier drops
(`prefixstore.evict`). What must hold: every unit of a prompt comes from exactly one place, every
byte that leaves one place arrives at another, and the same arguments give the same result.

A request: its engine is chosen; what that engine's cache lacks is looked up in its host's store and
the pool, and loaded if that is faster; then it waits for the engine, which computes one prompt
after the other and pays for the answer right behind. What was computed goes to the host's memory as
fast as it was measured to, and from there to disk and pool.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.scale_costs import Costs
from benchmarks.scale_fleet import TIERS, Asked, Engine, Fleet, Site, leading
from benchmarks.scale_store import Store
from benchmarks.traces import Request
from prefixstore.route import choose
from prefixstore.route.workers import Serving, Worker


@dataclass(slots=True)
class Job:
    """A request on its way. Counts are in units of the prompt: ``own`` in the engine's cache when
    it arrived, ``have`` once loads are done, ``moved`` behind that to be blended."""

    request: Request
    at_s: float
    counted: bool
    engine: Engine
    serving: Serving
    done: Callable[[], object]
    own: int = 0
    have: int = 0
    moved: int = 0
    began_s: float = 0.0
    tiers: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.path[: self.request.prompt_chunks]


@dataclass
class Totals:
    """What a run counted, of the requests that arrived after the warm-up; ``busy`` is the share of
    that time that lanes of a kind worked, in the mean and the busiest one."""

    ttft_s: list[float] = field(default_factory=list)
    units: Counter[str] = field(default_factory=Counter)  # of prompts, by where they came from
    saved: Counter[str] = field(default_factory=Counter)  # of those computed, what became of them
    engine_s: float = 0.0  # spent on prompts, without answers
    window_s: float = 0.0
    network_bytes: float = 0.0  # between hosts and pool
    busy: dict[str, tuple[float, float]] = field(default_factory=dict)


class Run:
    """See the module docstring. ``arrivals``: seconds and requests, in order; the first
    ``warm`` of them are not counted."""

    def __init__(
        self, fleet: Fleet, costs: Costs, arrivals: Sequence[tuple[float, Request]], warm: int,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.fleet, self.costs, self.site = fleet, costs, Site(fleet, costs)
        self.store = Store(self.site, fleet, costs)
        self.totals = Totals()
        self._arrivals, self._warm = arrivals, warm
        self._rng = random.Random(f"scale/{seed}")
        self._events: list[tuple[float, int, Callable[[float], object]]] = []
        self._number = 0
        workers = [engine.worker for engine in self.site.engines]
        cells = -(-len(workers) // fleet.router_engines)
        ends = [len(workers) * number // cells for number in range(cells + 1)]
        self._cells = [workers[at:end] for at, end in itertools.pairwise(ends)]
        self._of = {one.worker: one for one in self.site.engines}

    def run(self) -> Totals:
        """Until the last request has its answer; once only."""
        marks = []
        arrivals = self._arrivals
        for number, (at_s, request) in enumerate(arrivals):
            self._until(at_s)
            if number in (self._warm, len(arrivals) - 1):
                marks.append((at_s, self._busy(at_s), self._network()))
            self._arrive(at_s, request, number)
        self._until(float("inf"))
        if len(marks) == 2 and marks[1][0] > marks[0][0]:
            self._close(*marks)
        return self.totals

    def _until(self, end_s: float) -> None:
        events = self._events
        while events and events[0][0] <= end_s:
            at_s, _, act = heapq.heappop(events)
            act(at_s)

    def _at(self, at_s: float, act: Callable[[float], object]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, act))

    # ------------------------------------------------------------- a request
    def _arrive(self, now_s: float, request: Request, number: int) -> None:
        prompt = request.path[: request.prompt_chunks]
        asked = Asked(prompt, self.fleet.unit_tokens)
        worker, left = self._choose(asked, request, number)
        context = worker.serving(asked, left)
        job = Job(
            request, now_s, number >= self._warm, self._of[worker], context.__enter__(),
            lambda: context.__exit__(None, None, None),
        )  # fmt: skip
        job.own = job.have = leading(job.engine.cache, prompt)
        ready_s = self._load(now_s, job, prompt) if self.fleet.store else now_s
        if ready_s > now_s:
            self._at(ready_s, lambda at_s: self._loaded(at_s, job))
        else:
            self._enqueue(now_s, job)

    def _choose(self, asked: Asked, request: Request, number: int) -> tuple[Worker, int]:
        """The worker, and the tokens that the router thinks it must compute. A conversation stays
        with its router, others come to any."""
        cell = self._cells[(request.session or number) % len(self._cells)]
        if self.fleet.routing == "robin":
            worker = self.site.engines[number % len(self.site.engines)].worker
        else:
            best = choose.cheapest(cell, asked, {}, self._rng)
            assert best is not None, "a cell has workers"
            worker = best
        return worker, choose.work(worker, asked, {})[1]

    def _load(self, now_s: float, job: Job, prompt: tuple[int, ...]) -> float:
        """Decide what to load, and begin it; when it is done."""
        engine, store, size = job.engine, self.store, self.fleet.unit_tokens
        tiers: list[int] = []
        for unit in prompt[job.own :]:
            tier = store.tier_of(engine.host, unit)
            if tier is None:
                break
            tiers.append(tier)
        if tiers:
            job.have = engine.planner.stop(tiers, job.own * size, None, None)
        job.tiers = tiers[: job.have - job.own]
        units = list(enumerate(prompt))[job.own : job.have]
        if self.fleet.blend and job.request.texts:
            found, where = store.segments(engine, job.request, job.have)
            job.moved = len(found)
            units, job.tiers = units + found, job.tiers + where
        return store.fetch(now_s, engine, units, job.tiers)

    def _loaded(self, now_s: float, job: Job) -> None:
        for unit in reversed(job.prompt[: job.have]):
            job.engine.cache.use(unit)
        self._enqueue(now_s, job)

    def _enqueue(self, now_s: float, job: Job) -> None:
        job.engine.queue.append(job)
        if not job.engine.running:
            self._begin(now_s, job.engine)

    def _begin(self, now_s: float, engine: Engine) -> None:
        engine.running = bool(engine.queue)
        if not engine.queue:
            return
        job: Job = engine.queue.popleft()
        fleet, costs, prompt = self.fleet, self.costs, job.prompt
        late = leading(engine.cache, prompt) - job.have  # what others computed meanwhile
        if not job.tiers:  # nothing of it was held for this request
            job.own = job.have = job.have + late
        late = max(0, late) if job.tiers else 0
        if late:
            job.moved = max(0, min(job.moved, len(prompt) - job.have - late))
        have, total = (job.have + late) * fleet.unit_tokens, len(prompt) * fleet.unit_tokens
        if job.moved:
            took_s = costs.blend_s(job.moved * fleet.unit_tokens, have, total)
        else:
            took_s = costs.compute_s(have, total)
        self._count(job, late, took_s)
        job.began_s = now_s
        first_s = engine.compute.take(now_s, took_s)
        ttft_s = first_s - job.at_s + max(0.0, costs.floor(total) - took_s)
        if job.counted:
            self.totals.ttft_s.append(ttft_s)
        free_s = engine.compute.take(now_s, fleet.answer_tokens * costs.answer_token_s)
        self._at(first_s, lambda at_s: self._first(at_s, job))
        self._at(free_s, lambda at_s: self._begin(at_s, engine))
        self._at(first_s + fleet.answer_tokens * costs.step_s, lambda _: job.done())

    def _first(self, now_s: float, job: Job) -> None:
        """The prompt is computed: it is in the engine's cache, and goes to the store."""
        job.serving.began()
        path = job.request.path if not job.moved else job.prompt[: job.have]
        for unit in reversed(path):  # as vLLM frees them: the end of a prompt goes first
            job.engine.cache.use(unit)
        if self.fleet.store:
            new = self.store.new(job.engine.host, path)
            kept = self.store.save(job.began_s, now_s, job.engine, job.request, new, self._at)
            if job.counted:
                self.totals.saved["kept"] += kept
                self.totals.saved["dropped"] += len(new) - kept

    # ---------------------------------------------------------------- counts
    def _count(self, job: Job, late: int, took_s: float) -> None:
        if not job.counted:
            return
        units, loaded = self.totals.units, job.have - job.own
        units["gpu"] += job.own + late
        for tier in job.tiers[:loaded]:
            units[TIERS[tier]] += 1
        units["blended"] += job.moved
        units["computed"] += len(job.prompt) - job.have - late - job.moved
        self.totals.engine_s += took_s

    def _busy(self, now_s: float) -> dict[str, list[float]]:
        return {
            kind: [lane.busy_s(now_s) for lane in lanes]
            for kind, lanes in self.site.lanes().items()
        }

    def _network(self) -> float:
        return sum(host.inward.amount + host.outward.amount for host in self.site.hosts)

    def _close(
        self, first: tuple[float, dict[str, list[float]], float],
        last: tuple[float, dict[str, list[float]], float],
    ) -> None:  # fmt: skip
        totals = self.totals
        totals.window_s = last[0] - first[0]
        totals.network_bytes = last[2] - first[2]
        for kind, before in first[1].items():
            shares = [(b - a) / totals.window_s for a, b in zip(before, last[1][kind], strict=True)]
            mean = sum(shares) / len(shares) if shares else 0.0
            totals.busy[kind] = (mean, max(shares, default=0.0))
