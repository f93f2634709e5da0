"""What `benchmarks.scale` simulates: hosts, their engines, a pool, and what is assumed of them.

Owns the parts and their bookkeeping, not what happens when (`benchmarks.scale_run`). What must
hold: a lane is busy at most all the time, and gives what it was given. KV is counted in units of
``Fleet.unit_tokens``, larger than the store's chunks, or a thousand engines would take hours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from benchmarks.eviction_policies import CHOSEN, PlainCache, RankedCache
from benchmarks.scale_costs import Costs
from connector.plan import LoadPlanner
from prefixstore.config import GIB
from prefixstore.layout import Layout
from prefixstore.route.known import Known
from prefixstore.route.limits import WORKERS_MAX
from prefixstore.route.prompt import Prompt
from prefixstore.route.workers import Worker, WorkerSpec

MEMORY, DISK, POOL = range(3)
TIERS = ("memory", "disk", "pool")
ROUTINGS = ("prefix", "robin")
BEHIND_S = 10.0  # a copy to disk or pool that would wait longer is not made


def _assumed(default: float | str, told: str) -> Any:
    return field(default=default, metadata={"told": told})


@dataclass(frozen=True)
class Fleet:
    """How many of what, and everything that was not measured here. Raises ValueError."""

    engines: int = 10
    store: bool = True
    blend: bool = False
    unit_tokens: int = 1024
    routing: str = _assumed("prefix", "prefix, as `prefixstore route` chooses, or robin")
    tokens_s: float = _assumed(30_000, "prompt tokens a second that arrive for each engine")
    answer_tokens: int = _assumed(200, "tokens of an answer")
    router_engines: int = _assumed(32, "engines behind one router (at most 256)")
    host_engines: int = _assumed(8, "engines of a host, which share its store")
    gpu_cache_gib: float = _assumed(48, "KV cache of an engine: an 80 GB card's, 8B in 16 bits")
    memory_gib: float = _assumed(256, "memory tier of a host")
    disk_gib: float = _assumed(4096, "disk tier of a host; 0: none")
    disk_read_gb_s: float = _assumed(24, "GB/s that a host's disks are read at")
    disk_write_gb_s: float = _assumed(12, "GB/s that they are written at")
    staging_gib: float = _assumed(1, "of an engine, before the store: what does not fit is dropped")
    pool_nodes_per_host: float = _assumed(0.25, "nodes of the pool for each host; 0: none")
    pool_gib: float = _assumed(1024, "memory of a node of the pool")
    save_gb_s: float = _assumed(0, "GB/s that an engine saves; 0: as measured on a GPU")
    pool_get_gb_s: float = _assumed(0, "GB/s of an engine's reads; 0: as measured on 2 CPU cores")
    pool_put_gb_s: float = _assumed(0, "GB/s of its writes; 0: as measured")
    host_gbit_s: float = _assumed(100, "network of a host, each way")
    node_gbit_s: float = _assumed(100, "network of a node of the pool, each way")
    gpu_hour: float = _assumed(2.5, "price of an engine's GPU, an hour")
    node_hour: float = _assumed(4, "price of a node of the pool, an hour")
    busy: float = _assumed(0.7, "share of time engines may be busy, where cost is counted")

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing is {self.routing!r}; use one of {', '.join(ROUTINGS)}")
        for name in ("engines", "router_engines", "host_engines", "tokens_s", "gpu_cache_gib",
                     "memory_gib", "disk_read_gb_s", "disk_write_gb_s", "pool_gib", "host_gbit_s",
                     "node_gbit_s", "busy"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")
        if self.router_engines > WORKERS_MAX:
            raise ValueError(f"router_engines is {self.router_engines}; at most {WORKERS_MAX}")

    def units(self, gib: float, kv_bytes: int) -> int:
        """How many units so much memory holds, one at least."""
        return max(1, int(gib * GIB) // (self.unit_tokens * kv_bytes))

    @property
    def hosts(self) -> int:
        """The last one may have fewer engines."""
        return -(-self.engines // self.host_engines)

    @property
    def nodes(self) -> int:
        """Of the pool."""
        share = self.pool_nodes_per_host if self.store else 0
        return max(1, round(share * self.hosts)) if share else 0


ASSUMED = tuple(one for one in fields(Fleet) if "told" in one.metadata)


class Lane:
    """Something that does one thing after the other, at a fixed speed.

    What is asked of it begins when all before it is done; ``amount`` is what it was given in all.
    """

    __slots__ = ("_busy_s", "_free_s", "amount", "per_s")

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.amount = self._free_s = self._busy_s = 0.0

    def take(self, now_s: float, amount: float) -> float:
        """When it will be done. Times asked must not fall."""
        took = amount / self.per_s
        self._free_s = max(now_s, self._free_s) + took
        self._busy_s += took
        self.amount += amount
        return self._free_s

    def wait_s(self, now_s: float) -> float:
        """How long what it has would take."""
        return max(0.0, self._free_s - now_s)

    def busy_s(self, now_s: float) -> float:
        """Seconds it has worked: what it still has to do is done without a pause."""
        return self._busy_s - self.wait_s(now_s)


class Node:
    """A node of the pool: what it holds, least recently used first out, and its network."""

    def __init__(self, fleet: Fleet, kv_bytes: int) -> None:
        self.units = PlainCache(fleet.units(fleet.pool_gib, kv_bytes), lru=True)
        self.inward, self.outward = (Lane(fleet.node_gbit_s / 8 * 1e9) for _ in range(2))


class Host:
    """The store of a host: its tiers, with the store's own policy, its disks and its network."""

    def __init__(self, fleet: Fleet, kv_bytes: int) -> None:
        self.memory = RankedCache(fleet.units(fleet.memory_gib, kv_bytes), CHOSEN)
        disk = fleet.units(fleet.disk_gib, kv_bytes)
        self.disk = RankedCache(disk, CHOSEN) if fleet.disk_gib else None
        self.disk_read = Lane(fleet.disk_read_gb_s * 1e9)
        self.disk_write = Lane(fleet.disk_write_gb_s * 1e9)
        self.inward, self.outward = (Lane(fleet.host_gbit_s / 8 * 1e9) for _ in range(2))


class Sees(Known):
    """What a router knows of an engine that tells of its cache: what is there."""

    def __init__(self, units: PlainCache, unit_tokens: int) -> None:
        super().__init__()
        self._units, self.block_tokens = units, unit_tokens

    def matches(self, keys: Sequence[Any]) -> int:
        return leading(self._units, keys)

    def send(self, keys: Sequence[Any]) -> None:
        pass  # the engine tells


class Asked(Prompt):
    """A prompt as the router wants it, whose units have their names already."""

    def __init__(self, units: Sequence[int], unit_tokens: int) -> None:
        super().__init__()
        self._units, self._tokens = list[Any](units), len(units) * unit_tokens

    def __len__(self) -> int:
        return self._tokens

    def keys(self, block_tokens: int) -> list[Any]:
        return self._units


def leading(cache: PlainCache, units: Sequence[int]) -> int:
    """How many of them a cache has before the first that it has not."""
    held = cache.chunks
    for count, unit in enumerate(units):
        if unit not in held:
            return count
    return len(units)


class Engine:
    """One engine: its own cache and queue, and its ways to the store."""

    def __init__(self, fleet: Fleet, costs: Costs, host: Host, number: int) -> None:
        self.host = host
        self.cache = PlainCache(fleet.units(fleet.gpu_cache_gib, costs.kv_bytes), lru=True)
        self.worker = Worker(WorkerSpec(f"http://e{number}"), Sees(self.cache, fleet.unit_tokens))
        self.planner = LoadPlanner(
            Layout(1, 1, 1, fleet.unit_tokens, costs.kv_bytes), beside=0, auto=True
        )
        self.planner.speeds.saw_prefill(8192, costs.cold(8192))
        self.compute, self.load = Lane(1.0), Lane(costs.load_bytes_s)
        self.save = Lane(1e9 * fleet.save_gb_s or costs.save_bytes_s)
        self.pool_get = Lane(1e9 * fleet.pool_get_gb_s or costs.pool_get_bytes_s)
        self.pool_put = Lane(1e9 * fleet.pool_put_gb_s or costs.pool_put_bytes_s)
        self.queue: deque[Any] = deque()
        self.running = False


class Site:
    """All of a fleet."""

    def __init__(self, fleet: Fleet, costs: Costs) -> None:
        self.hosts = [Host(fleet, costs.kv_bytes) for _ in range(fleet.hosts)]
        self.engines = [
            Engine(fleet, costs, self.hosts[number // fleet.host_engines], number)
            for number in range(fleet.engines)
        ]
        self.nodes = [Node(fleet, costs.kv_bytes) for _ in range(fleet.nodes)]

    def node_of(self, unit: int) -> Node:
        """Where the pool keeps it: units of a prompt are spread, as keys are by their hashes."""
        return self.nodes[unit * 0x9E3779B97F4A7C15 % 2**64 * len(self.nodes) >> 64]

    def lanes(self) -> dict[str, list[Lane]]:
        """All that may be busy, by kind."""
        hosts, engines, nodes = self.hosts, self.engines, self.nodes
        return {
            "compute": [one.compute for one in engines],
            "load": [one.load for one in engines],
            "save": [one.save for one in engines],
            "disk read": [one.disk_read for one in hosts],
            "disk write": [one.disk_write for one in hosts],
            "pool get": [one.pool_get for one in engines],
            "pool put": [one.pool_put for one in engines],
            "host in": [one.inward for one in hosts],
            "host out": [one.outward for one in hosts],
            "pool in": [one.inward for one in nodes],
            "pool out": [one.outward for one in nodes],
        }
