"""The faults of `benchmarks.faults_inside`: each happens to the process that has the store open."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from errno import EIO
from pathlib import Path
from typing import ClassVar

from benchmarks.fault_means import filled
from benchmarks.fault_shim import Shim
from benchmarks.soak_client import LAYOUT, SIZE
from prefixstore import Store, admin
from prefixstore.config import LEASE_S
from prefixstore.errors import StoreError
from prefixstore.leases import LEASE
from prefixstore.namespace import MISS, Namespace
from prefixstore.putting import PutState
from prefixstore.testing_data import content_of, identity_for, outputs, tokens_of

MEMORY, DISK_SIZE = "3MiB", "6MiB"
SLOW_BYTES_S = 1_000_000
DAY_S = 86_400
FORKS = 6
FORK_S = 30.0
FILL_S = 20.0  # at most until every slot is held


class Fault:
    """One fault, and what it must not do besides; this one is none."""

    memory, disk = MEMORY, DISK_SIZE

    def __init__(self, store: Store, folder: Path, shim: Shim | None) -> None:
        self.store, self.folder, self._shim = store, folder, shim
        self.wrong: Counter[str] = Counter()

    @property
    def shim(self) -> Shim:
        """Of this process."""
        assert self._shim is not None, "start this with benchmarks.fault_shim"
        return self._shim

    def happen(self, seconds: float) -> None:
        """Begin, go on for so long, end."""
        time.sleep(seconds)

    def after(self) -> None:
        """Look at what it did."""


class DiskFull(Fault):
    """The file system of the folder is smaller than the disk tier, and somebody else fills it."""

    disk = "32MiB"

    def happen(self, seconds: float) -> None:
        """Room for nothing."""
        with filled(self.folder):
            time.sleep(seconds)


class OfDevice(Fault):
    """Something of the device, as the shim does it."""

    faults: ClassVar[dict[str, int]]

    def happen(self, seconds: float) -> None:
        """All calls."""
        with self.shim.during(**self.faults):
            time.sleep(seconds)
        if not self.shim.hits:
            self.wrong["the fault met nobody"] += 1


class DiskSlow(OfDevice):
    """One device of 1 MB/s."""

    faults: ClassVar[dict[str, int]] = {"bytes_s": SLOW_BYTES_S}


class DiskErrors(OfDevice):
    """Reads and writes of the folder fail."""

    faults: ClassVar[dict[str, int]] = {"read_errno": EIO, "write_errno": EIO}


class SyncFails(OfDevice):
    """A sync fails, and what was to be synced is gone: no row may speak of it."""

    faults: ClassVar[dict[str, int]] = {"sync_errno": EIO}

    def after(self) -> None:
        """Read everything from disk."""
        admin.empty_memory(self.store)
        damaged = admin.verify(self.store).damaged
        self.wrong["a row of bytes that were lost"] += len(damaged)
        self.wrong["a row of bytes that were lost, met"] += dict(
            admin.stats(self.store)["counters"]
        ).get("corrupt_disk", 0)


class AllLeased(Fault):
    """Every slot of the memory tier is held by somebody."""

    disk = "0"

    def happen(self, seconds: float) -> None:
        """Hold all, again and again: what is put meanwhile too."""
        held, full, number = [], False, 0
        ns = self.store.namespace(identity_for("held", LAYOUT), LAYOUT)
        end = time.monotonic() + seconds
        while time.monotonic() < end or not (full or time.monotonic() > end + FILL_S):
            refs = ns.chain(tokens_of(number, 64, LAYOUT)).refs()
            states = ns.put(refs, [content_of(ref.key, SIZE) for ref in refs], wait=False)
            full = full or PutState.FULL in states
            match = ns.match(refs)
            if match.num_chunks:
                held.append(ns.lease(refs[: match.num_chunks], match.tiers)[0])
            number += 1
            time.sleep(0.01)
        if not full:
            self.wrong["there was always a slot free"] += 1
        for lease in held:
            ns.release(lease)


class ClockJumps(Fault):
    """A day forward, a day back, and so on; leases and what waits must not last a day."""

    def happen(self, seconds: float) -> None:
        """Eight jumps; the last leaves the clock where it was."""
        for i in range(8):
            self.shim.set(clock_s=(DAY_S, -DAY_S, 3600, 0)[i % 4])
            time.sleep(seconds / 8)
        self.shim.set()

    def after(self) -> None:
        """No lease may end later than one that is made now."""
        self.store.on_keeper(self.store.reap)
        with self.store.live.read() as txn:
            ends = [LEASE.unpack_from(record)[1] for _, record in txn.scan("lease")]
        late = sum(end > time.time() + LEASE_S + 1 for end in ends)
        self.wrong["a lease that lasts for hours"] += late


class Fork(Fault):
    """Children that are forked in the middle of everything, and use what they have inherited."""

    def happen(self, seconds: float) -> None:
        """The parent goes on meanwhile."""
        ns = self.store.namespace(identity_for("parent", LAYOUT), LAYOUT)
        for number in range(FORKS):
            pid = os.fork()
            if pid == 0:
                signal.alarm(int(FORK_S))
                os._exit(self._child(ns, number))
            end = time.monotonic() + FORK_S + 5
            while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
                time.sleep(0.01)
            if ended[1]:
                self.wrong[f"a child ended with {ended[1]}"] += 1
            time.sleep(seconds / FORKS)

    def _child(self, ns: Namespace, number: int) -> int:
        refs = ns.chain(tokens_of(number, 2, LAYOUT)).refs()
        payloads = [content_of(ref.key, SIZE) for ref in refs]
        for work in (lambda: ns.put(refs, payloads), lambda: ns.get(refs, outputs(LAYOUT, 2))):
            began = time.monotonic()
            try:
                work()
                return 3  # what was inherited must say that it is not usable
            except StoreError:
                if time.monotonic() - began > 5:
                    return 4
        self.store.close()
        with suppress(StoreError):  # to LMDB it is open in this process
            Store.open(self.folder, create=False)
            return 5
        with Store.open(
            self.folder.parent / f"own-{number}",
            memory_bytes="1MiB",
            disk_bytes="1MiB",
            memory_dir=self.store.settings.memory_dir,
        ) as own:
            mine = own.namespace(identity_for("child", LAYOUT), LAYOUT)
            refs = mine.chain(tokens_of(number, 2, LAYOUT)).refs()
            payloads = [content_of(ref.key, SIZE) for ref in refs]
            mine.put(refs, payloads)
            outs = outputs(LAYOUT, 2)
            if MISS in mine.get(refs, outs) or [bytes(out) for out in outs] != payloads:
                return 6
        return 0


class NoDescriptors(Fault):
    """The process has as many files open as it may."""

    def happen(self, seconds: float) -> None:
        """Opening a store fails with an error of ours."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = []
        most = len(os.listdir("/proc/self/fd")) + 8
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for label, opening in (("folder", self._open), ("namespace", self._namespace)):
                    try:
                        opening()
                    except StoreError:
                        pass
                    except OSError as error:
                        self.wrong[f"{label}: {error}"] += 1
                time.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in taken:
                os.close(descriptor)

    def _open(self) -> None:
        Store.open(self.folder.parent / "other", memory_bytes="1MiB", disk_bytes=0).close()

    def _namespace(self) -> None:
        other = replace(LAYOUT, head_bytes=256)  # a file of its own
        ns = self.store.namespace(identity_for("other", other), other)
        refs = ns.chain(tokens_of(1, 1, other)).refs()
        ns.put(refs, [bytes(other.payload_bytes)], wait=False)


FAULTS: dict[str, type[Fault]] = {
    "none": Fault,
    "disk full": DiskFull,
    "disk slow": DiskSlow,
    "disk errors": DiskErrors,
    "sync fails": SyncFails,
    "memory all leased": AllLeased,
    "clock jumps": ClockJumps,
    "fork": Fork,
    "no descriptors": NoDescriptors,
}
ON_DEVICE = {name for name, kind in FAULTS.items() if issubclass(kind, OfDevice)} | {"clock jumps"}
