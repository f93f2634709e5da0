"""What the simulated processes do with the store, and what the model says to each answer."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.simulation.machine import LIVE_DIR, Machine
from benchmarks.simulation.model import Model
from benchmarks.simulation.scheduler import Process, active
from prefixstore import admin, owned
from prefixstore.accounting import check_accounting, rows_without_slot
from prefixstore.config import LEASE_S
from prefixstore.errors import DamagedError, FormatError, StoreError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Roi
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS, Namespace
from prefixstore.putting import PutState
from prefixstore.store import Store
from prefixstore.testing_data import identity_for, outputs, region_of, tokens_of

LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=64)
LABELS, PROMPTS, CHUNKS = ("a", "b"), 5, 4
PARTS = (Roi(0, 2, 0, 1), Roi(0, 2, 1, 2))
DEADLINES_S = (0.02, 1.0, 10.0)


class Workload:
    """What all processes of a run share."""

    def __init__(
        self, model: Model, rng: random.Random, counts: Counter[str], quotas: bool
    ) -> None:
        self.model, self.rng, self.counts, self.quotas = model, rng, counts, quotas
        self.ending = False
        self.slot_bytes = LAYOUT.slot_bytes
        self.seen: dict[bytes, ChunkRef] = {}  # all chunks that were ever put
        self.names: set[bytes] = set()

    def namespace(self, store: Store, label: str) -> Namespace:
        namespace = store.namespace(identity_for(label, LAYOUT), LAYOUT)
        self.model.payloads[namespace.name] = LAYOUT.payload_bytes
        return namespace


class Client:
    """One thread of a process."""

    def __init__(self, workload: Workload, store: Store, process: Process) -> None:
        self._load, self._store, self._process = workload, store, process
        self._model, self._rng = workload.model, workload.rng
        self._spaces: dict[str, Namespace] = {}
        self._operations: dict[Callable[[], None], int] = {
            self._put: 30, self._put_part: 14, self._get: 20, self._lease: 8, self._delete: 4,
            self._set_ttl: 2, self._pin: 2, self._flush: 6, self._prefetch: 3, self._pause: 12,
            self._retire: 1, self._empty_memory: 1, self._verify: 1, self._quota: 2,
        }  # fmt: skip

    def work(self) -> None:
        """Do one thing after another."""
        rng = self._rng
        names, weights = list(self._operations), list(self._operations.values())
        for _ in range(rng.randint(5, 40)):
            if self._load.ending:
                return
            operation = rng.choices(names, weights)[0]
            name = operation.__name__[1:]
            self._load.counts["operations"] += 1
            self._load.counts[name] += 1
            try:
                operation()
                active().step(f"did {name}")
            except DamagedError as error:
                self._model.fail(f"{name}: {error}: {error.__cause__!r}")
            except FormatError:  # retired by another
                self._spaces.clear()
            except StoreError as error:
                self._load.counts[type(error).__name__] += 1
                active().step(f"{name}: {type(error).__name__}")
                self._spaces.clear()

    # ------------------------------------------------------------------ what it works on
    def _space(self) -> Namespace:
        label = self._rng.choice(LABELS)
        if label not in self._spaces:
            self._spaces[label] = self._load.namespace(self._store, label)
        return self._spaces[label]

    def _refs(self, space: Namespace) -> list[ChunkRef]:
        refs = space.chain(tokens_of(self._rng.randrange(PROMPTS), CHUNKS, LAYOUT)).refs()
        refs = refs[: self._rng.randint(1, CHUNKS)]
        self._load.seen.update((ref.key, ref) for ref in refs)
        return refs

    # ------------------------------------------------------------------ operations
    def _put(self) -> None:
        self._put_region(None, 0)

    def _put_part(self) -> None:
        self._put_region(self._rng.choice(PARTS), self._rng.choice((1, 1, 2)))

    def _put_region(self, roi: Roi | None, group: int) -> None:
        rng, space = self._rng, self._space()
        refs = self._refs(space)
        keys = [ref.key for ref in refs]
        ttl_s = rng.choice((0.5, 5.0, 100.0)) if rng.random() < 0.1 else None
        wholes = [self._model.content(key, LAYOUT.payload_bytes) for key in keys]
        data = [region_of(whole, LAYOUT, roi) for whole in wholes] if roi else wholes
        if ttl_s is not None:
            self._model.removal_begins(keys)
        began = active().steps
        self._model.put_begins(self._process, keys)
        states = space.put(
            refs, data, roi=roi, group=group, ttl_s=ttl_s, pin=rng.random() < 0.05,
            wait=rng.random() < 0.7, deadline_s=rng.choice(DEADLINES_S),
        )  # fmt: skip
        self._model.put_ends(self._process, keys)  # one that raised may take effect later
        active().trace(" ".join(state.value for state in states))
        for key, state in zip(keys, states, strict=True):
            self._load.counts[state.value] += 1
            if state is PutState.STORED and self._store.has_disk:
                self._model.stored(self._process, key, began)

    def _check(self, refs: Sequence[ChunkRef], space: Namespace, roi: Roi | None) -> list[int]:
        gone = [self._model.must_miss(ref.key) for ref in refs]
        outs = outputs(LAYOUT, len(refs), roi)
        tiers = space.get(refs, outs, roi=roi)
        for ref, tier, out, absent in zip(refs, tiers, outs, gone, strict=True):
            self._load.counts["hits" if tier else "misses"] += 1
            if tier == MISS:
                continue
            right = self._model.content(ref.key, LAYOUT.payload_bytes)
            if out != (region_of(right, LAYOUT, roi) if roi else right):
                self._model.fail(f"wrong bytes of {ref.key.hex()} from tier {tier}")
            if absent and self._model.must_miss(ref.key):
                self._model.fail(f"{ref.key.hex()} was deleted and came back in tier {tier}")
        active().trace(f"tiers {tiers}")
        return tiers

    def _get(self) -> None:
        space = self._space()
        refs = self._refs(space)
        roi = self._rng.choice((None, None, *PARTS))
        if self._rng.random() < 0.5:
            refs = refs[: space.match(refs).num_chunks]
        self._check(refs, space, roi)

    def _lease(self) -> None:
        """What was leased is there as long as the lease lasts, unless somebody removes it."""
        space = self._space()
        refs = self._refs(space)
        tiers = space.match(refs).tiers
        began, jumps = active().steps, self._load.counts["jumps"]
        faults = self._load.counts["faults"]
        start_s = active().wall_s()
        wait = self._rng.random() < 0.7
        lease, held = space.lease(refs[: len(tiers)], tiers, wait=wait)
        if self._rng.random() < 0.7:
            active().sleep(self._rng.choice((0.01, 0.3, 2.0)))
        found = self._check(refs[:held], space, None)
        in_time = active().wall_s() - start_s < LEASE_S and jumps == self._load.counts["jumps"]
        if wait and in_time and faults == self._load.counts["faults"]:
            for ref, tier in zip(refs, found, strict=False):
                known = self._model.known(ref.key)
                if (
                    tier == MISS
                    and known.removal_began < 0
                    and space.name not in (self._model.retired)
                ):
                    self._model.fail(f"leased chunk {ref.key.hex()} was not there ({began})")
        if self._rng.random() < 0.8:
            space.release(lease)

    def _delete(self) -> None:
        space = self._space()
        refs = self._refs(space)
        keys = [ref.key for ref in refs]
        began = self._model.removal_begins(keys)
        owned.delete(space, refs)
        self._model.removal_ends(keys, began)

    def _set_ttl(self) -> None:
        space = self._space()
        refs = self._refs(space)
        self._model.removal_begins([ref.key for ref in refs])
        space.set_ttl(refs, self._rng.choice((None, 0.5, 3.0, 1000.0)))

    def _pin(self) -> None:
        space = self._space()
        owned.pin(space, self._refs(space), self._rng.random() < 0.6)

    def _flush(self) -> None:
        owed = dict(self._model.owed.get(self._process, {}))
        if self._store.flush(self._rng.choice((*DEADLINES_S, 30.0))):
            active().trace("flushed")
            self._model.flushed(self._process, owed)
        else:
            self._model.told(self._process)

    def _prefetch(self) -> None:
        space = self._space()
        owned.prefetch(space, self._refs(space))

    def _pause(self) -> None:
        active().sleep(self._rng.choice((0.001, 0.02, 0.2, 1.5)))

    def _retire(self) -> None:
        if self._rng.random() < 0.5:
            return
        space = self._space()
        self._model.retired.setdefault(space.name, active().steps)
        if self._rng.random() < 0.5:
            space.retire()
        else:
            space.bump()
        self._spaces.clear()

    def _empty_memory(self) -> None:
        admin.empty_memory(self._store, deadline_s=2.0)

    def _verify(self) -> None:
        admin.verify(self._store, fix=True)

    def _quota(self) -> None:
        if not self._load.quotas:
            return
        space, rng = self._space(), self._rng
        limit = rng.choice((None, 2 * LAYOUT.slot_bytes, 5 * LAYOUT.slot_bytes))
        self._store.quotas.set(rng.choice((MEMORY, DISK)), limit, namespace=space.name)


def judge(load: Workload, store: Store, machine: Machine) -> None:
    """When all is quiet: nothing is left over, all adds up, what has a row can be read."""
    model = load.model
    flushed = store.flush(60.0)
    if not flushed and store.has_disk:
        store.flush(60.0)  # the first may only have told of what was given up
    tables = machine.databases[f"{LIVE_DIR}/live"].tables
    for name in ("lease", "leased", "pending", "claim"):
        if tables[name].data:
            model.fail(f"{len(tables[name].data)} left in table {name} when all was quiet")
    if store.has_disk and tables["dirty"].data:
        model.fail(f"{len(tables['dirty'].data)} chunks are dirty after a flush")
    for tier in (MEMORY, DISK):
        with store.live.read() as txn:
            wrong = check_accounting(store.ledger, txn, tier)
        wrong += [f"{key.hex()}: {why}" for key, why in rows_without_slot(store, tier).items()]
        if wrong:
            model.fail(f"the books of tier {tier}: {wrong[:3]}")
    _read_all(load, store)
    report = admin.verify(store)
    if not report.sound:
        model.fail(f"verify says {report}")


def _read_all(load: Workload, store: Store) -> None:
    model = load.model
    spaces = {label: load.namespace(store, label) for label in LABELS}
    for space in spaces.values():
        for prompt in range(PROMPTS):
            refs = space.chain(tokens_of(prompt, CHUNKS, LAYOUT)).refs()
            with store.live.read() as live, store.index.read() as index:
                there = [live.get("chunk", r.key) or index.get("chunk", r.key) for r in refs]
            gone = list(map(model.must_miss, [ref.key for ref in refs]))
            outs = outputs(LAYOUT, len(refs))
            tiers = space.get(refs, outs)
            for ref, row, out, tier, absent in zip(refs, there, outs, tiers, gone, strict=True):
                right = model.content(ref.key, LAYOUT.payload_bytes)
                if tier != MISS and (out != right or absent):
                    model.fail(f"{ref.key.hex()} is wrong, or back, at the end")
                if tier == MISS and row is not None and model.known(ref.key).removal_began < 0:
                    model.fail(f"{ref.key.hex()} has a row and cannot be read")
