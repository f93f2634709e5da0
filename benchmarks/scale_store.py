"""The store's side of `benchmarks.scale`: where a unit is, loads, saves, copies to disk and pool.

Owns what moves between engine, host and pool, and over which lanes. What must hold: a unit is in a
tier only after its bytes have passed the lanes before it, and each lane of a way gets all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.scale_costs import Costs
from benchmarks.scale_fleet import (
    BEHIND_S,
    DISK,
    MEMORY,
    POOL,
    TIERS,
    Engine,
    Fleet,
    Host,
    Lane,
    Site,
)
from benchmarks.traces import Request
from prefixstore.config import GIB

UNKNOWN_BYTES_S = 1e12  # a tier that was never measured counts as fast, as for exact prefixes
STEP_TOKENS = 8192  # that an engine computes at once
At = Callable[[float, Callable[[float], object]], None]  # have something done at that time
Numbered = list[tuple[int, int]]  # places in a prompt, and the units there


class Store:
    """See the module docstring. ``counts``: copies that were left out, and bytes loaded by tier."""

    def __init__(self, site: Site, fleet: Fleet, costs: Costs) -> None:
        self._site, self._fleet, self._costs = site, fleet, costs
        self._unit_bytes = fleet.unit_tokens * costs.kv_bytes
        # Of each host: which unit it stores has the same text as one that was stored by itself.
        self._copies: dict[int, dict[int, int]] = {id(host): {} for host in site.hosts}
        self.counts: Counter[str] = Counter()

    def tier_of(self, host: Host, unit: int) -> int | None:
        """The nearest that has it."""
        if unit in host.memory:
            return MEMORY
        if host.disk is not None and unit in host.disk:
            return DISK
        if self._site.nodes and unit in self._site.node_of(unit).units:
            return POOL
        return None

    def segments(self, engine: Engine, request: Request, have: int) -> tuple[Numbered, list[int]]:
        """Units stored elsewhere that stand in the prompt behind what it has, and their tiers; none
        if computing is faster."""
        found: Numbered = []
        tiers: list[int] = []
        copies = self._copies[id(engine.host)]
        for start, alone in request.texts:
            for at, unit in enumerate(alone, start):
                for name in (copies.get(unit, unit), unit) if at >= have else ():
                    tier = self.tier_of(engine.host, name)
                    if tier is not None:
                        found.append((at, name))
                        tiers.append(tier)
                        break
        if not found:
            return [], []
        speeds, size = engine.planner.speeds.tier_bytes_per_s, self._fleet.unit_tokens
        load_s = sum(self._unit_bytes / speeds.get(tier, UNKNOWN_BYTES_S) for tier in tiers)
        done, total = have * size, request.prompt_chunks * size
        blended_s = self._costs.blend_s(len(found) * size, done, total)
        worth = load_s + blended_s < self._costs.compute_s(done, total)
        return (found, tiers) if worth else ([], [])

    def fetch(self, now_s: float, engine: Engine, units: Numbered, tiers: Sequence[int]) -> float:
        """Load units to the engine, each from its tier; when all are there."""
        host, ready_s = engine.host, now_s
        for tier in (MEMORY, DISK, POOL):
            chosen = [one for one, where in zip(units, tiers, strict=True) if where == tier]
            if not chosen:
                continue
            moved = len(chosen) * self._unit_bytes
            self.counts[TIERS[tier]] += moved
            ends = [engine.load.take(now_s, moved)]
            if tier == DISK:
                ends.append(host.disk_read.take(now_s, moved))
            if tier == POOL:
                ends += [engine.pool_get.take(now_s, moved), host.inward.take(now_s, moved)]
                for _, unit in chosen:
                    node = self._site.node_of(unit)
                    node.units.use(unit)
                    ends.append(node.outward.take(now_s, self._unit_bytes))
                ends.append(max(ends) + self._costs.pool_lookup_s)
            engine.planner.speeds.saw_load(tier, moved / (max(ends) - now_s))
            ready_s = max(ready_s, *ends)
            for place, unit in chosen:
                host.memory.use(unit, place)
                if host.disk is not None and unit in host.disk:
                    host.disk.use(unit, place)
        return ready_s

    def new(self, host: Host, path: Sequence[int]) -> Numbered:
        """What of a prompt and its answer the host has not."""
        return [one for one in enumerate(path) if self.tier_of(host, one[1]) in (None, POOL)]

    def save(
        self, began_s: float, now_s: float, engine: Engine, request: Request, new: Numbered, at: At
    ) -> int:
        """Put units, computed step by step since ``began_s``, into the host's memory, as many as
        staging has room for at the end of each step; how many."""
        kept: Numbered = []
        end_s, size = now_s, STEP_TOKENS // self._fleet.unit_tokens
        steps = range(0, len(new), size)
        for number, first in enumerate(steps, 1):
            step_s = began_s + (now_s - began_s) * number / len(steps)
            waits = engine.save.wait_s(step_s) * engine.save.per_s
            room = max(0, int((self._fleet.staging_gib * GIB - waits) / self._unit_bytes))
            some = new[first : first + size][:room]
            end_s = max(end_s, engine.save.take(step_s, len(some) * self._unit_bytes))
            kept += some
        if kept:
            at(end_s, lambda done_s: self._stored(done_s, engine, request, kept, at))
        return len(kept)

    def _stored(
        self, now_s: float, engine: Engine, request: Request, kept: Numbered, at: At
    ) -> None:
        host, nodes = engine.host, self._site.nodes
        for place, unit in kept:
            host.memory.use(unit, place)
        self._note_texts(host, request, dict(kept))
        for place, unit in kept:
            if host.disk is not None:
                self._copy(now_s, (host.disk_write,), at, partial(host.disk.use, unit, place))
            node = self._site.node_of(unit) if nodes else None
            if node is not None and unit not in node.units:
                lanes = engine.pool_put, host.outward, node.inward
                self._copy(now_s, lanes, at, partial(node.units.use, unit))

    def _note_texts(self, host: Host, request: Request, kept: dict[int, int]) -> None:
        for start, alone in request.texts:
            here = ((unit, kept[at]) for at, unit in enumerate(alone, start) if at in kept)
            self._copies[id(host)].update(here)

    def _copy(
        self, now_s: float, lanes: Sequence[Lane], at: At, enter: Callable[[], object]
    ) -> None:
        """Copy a unit, unless a lane is too far behind; it is there when all lanes are done."""
        if any(lane.wait_s(now_s) > BEHIND_S for lane in lanes):
            self.counts["not copied"] += 1
            return
        at(max(lane.take(now_s, self._unit_bytes) for lane in lanes), lambda _: enter())
