"""What the server holds while it runs: the store, its threads, who is doing what, and leases.

What must hold: each counter that is raised is lowered, whatever happens in between; nothing here
grows without a bound. All of it but the store is lost in a crash, and nothing depends on it: leases
end by themselves.
"""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from prefixstore import owned
from prefixstore.errors import FormatError, StoreError, StoreTimeoutError
from prefixstore.identity import ModelIdentity
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout
from prefixstore.namespace import Namespace
from prefixstore.serve import limits
from prefixstore.serve.auth import Tenant, Tenants, mark_of
from prefixstore.serve.held import HeldLeases
from prefixstore.serve.metrics import Metrics
from prefixstore.serve.pools import Job, Pool
from prefixstore.serve.refusal import RefusedError, busy
from prefixstore.store import Store

T = TypeVar("T")
_BUFFERS_BYTES_MAX = limits.PUT_BYTES_MAX // 8  # kept for the next put


class State:
    """See the module docstring. Used on the event loop's thread only."""

    def __init__(self, store: Store, tenants: Tenants, read_only: bool) -> None:
        self.store, self.tenants, self.read_only = store, tenants, read_only
        self.draining = False
        self.metrics = Metrics()
        self.control = Pool("control", limits.CONTROL_THREADS, self._share)
        self.transfer = Pool("transfer", limits.TRANSFER_THREADS, self._share)
        # Apart, because a put waits for room in a full tier, and gets must go on meanwhile.
        self.storing = Pool("storing", limits.STORE_THREADS, self._share)
        # Apart, because it waits for the disk.
        self.flushing = Pool("flushing", 1, self._share)
        # Apart, because any of the others may hang in the store that is lost.
        self.mending = Pool("mending", 1, self._share)
        self.transfers: Counter[str] = Counter()  # by tenant
        self.bytes_under_way: Counter[str] = Counter()
        self.memory_under_way: Counter[tuple[str, str]] = Counter()  # by tenant and what it is for
        self._asked: Counter[str] = Counter()  # by tenant
        self._slow_until = 0.0
        self._namespaces: dict[bytes, tuple[Namespace, str]] = {}  # and the mark of whose it is
        self.leases = HeldLeases()
        self._buffers: list[bytearray] = []
        self._locks: dict[bytes, asyncio.Lock] = {}

    # ------------------------------------------------------------------ the store
    def check_there(self) -> None:
        """Raise RefusedError while the store is lost: it is opened again (`mending`)."""
        if self.store.gone:
            raise _lost()

    def refusal_of(self, error: StoreError) -> RefusedError:
        """What an error of the store is to a client."""
        return _lost() if self.store.gone else RefusedError.of(error)

    @property
    def busy(self) -> bool:
        """Whether any request is in the store."""
        return self._asked.total() > 0 or self.transfers.total() > 0

    def renew(self, store: Store) -> None:
        """Another stands for the one that was lost, with whose process its leases have ended."""
        self.store, self.leases = store, HeldLeases()
        self._namespaces.clear()

    # ------------------------------------------------------------------ threads
    async def ask(
        self,
        tenant: Tenant,
        work: Callable[[], T],
        deadline_s: float = limits.OP_S,
        pool: Pool | None = None,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """Do what may wait for the store, on a thread. Raises RefusedError when too many do.

        ``undo`` is called with what came of it if that was too late for whoever asked.
        """
        self._check_asked(tenant)
        self._asked[tenant.name] += 1
        job = (pool or self.control).submit(tenant.name, work)
        job.future.add_done_callback(partial(self._answered, tenant.name))
        heard = False
        try:
            await asyncio.wait((job.future,), timeout=deadline_s)
            heard = job.future.done()
        finally:  # cancelled, or too late: what has begun goes on
            if not heard:
                job.give_up(undo)
        if not heard:
            raise StoreTimeoutError(
                f"the store did not answer within {deadline_s:.0f} s", "the disk is slow or stalled"
            )
        with _as_store_error():
            return job.future.result()

    def _check_asked(self, tenant: Tenant) -> None:
        if self._asked.total() >= limits.CONTROL_MAX:
            raise busy(f"{limits.CONTROL_MAX} requests are being answered")
        if self._asked[tenant.name] >= self._share(limits.CONTROL_MAX):
            raise busy(f"{self._asked[tenant.name]} of your requests are being answered", 429)

    def _share(self, most: int) -> int:
        """What one tenant may have of something."""
        return most if len(self.tenants.tenants) < 2 else int(limits.TENANT_SHARE * most)

    async def look_up(
        self,
        tenant: Tenant,
        ns: Namespace,
        refs: Sequence[ChunkRef],
        work: Callable[[], T],
        most: int = limits.INLINE_REFS_MAX,
    ) -> T:
        """Do what reads the rows of chunks only: here, if they are few and in memory.

        Going to a thread and back costs half a millisecond, as much as such a look-up. One that
        waits for a device all the same sends the next ones to threads for a while; one that only
        had to wait for a processor does not, a thread would wait as well.
        """
        now, faults = time.monotonic(), _major_faults()
        few = now >= self._slow_until and len(refs) <= most
        some = refs[:: max(1, len(refs) // limits.INLINE_REFS_MAX)]  # of many: to look twice costs
        if not (few and owned.in_memory(ns, some)):
            return await self.ask(tenant, work)
        self._check_asked(tenant)
        try:
            with _as_store_error():
                return work()
        finally:
            if time.monotonic() - now > limits.INLINE_S and _major_faults() > faults:
                self._slow_until = time.monotonic() + limits.INLINE_PAUSE_S

    def _answered(self, name: str, future: asyncio.Future[T]) -> None:
        self._asked[name] -= 1
        if not future.cancelled():
            future.exception()  # it was awaited, or its request has ended

    @contextmanager
    def transferring(self, tenant: Tenant, num_bytes: int) -> Iterator[None]:
        """A get or put of so many bytes. Raises RefusedError over a bound."""
        name = tenant.name
        if sum(self.transfers.values()) >= limits.TRANSFERS_MAX:
            raise busy(f"{limits.TRANSFERS_MAX} transfers are under way")
        if self.transfers[name] >= limits.TENANT_TRANSFERS_MAX:
            raise busy(f"{limits.TENANT_TRANSFERS_MAX} of your transfers are under way", 429)
        if self.bytes_under_way[name] + num_bytes > limits.TENANT_BYTES_MAX:
            raise busy(f"{self.bytes_under_way[name]} of your bytes are under way", 429)
        self.transfers[name] += 1
        self.bytes_under_way[name] += num_bytes
        try:
            yield
        finally:
            self.transfers[name] -= 1
            self.bytes_under_way[name] -= num_bytes

    @contextmanager
    def memory(self, tenant: Tenant, what: str, num_bytes: int, most: int) -> Iterator[None]:
        """Memory for what is under way: put, checked, body. Raises RefusedError over a bound."""
        name, held, share = (tenant.name, what), self.memory_under_way, self._share(most)
        if num_bytes > share:
            raise RefusedError(
                413, "too_large", f"{num_bytes} bytes at once, read or parsed",
                f"at most {share}; tokens as int32 take the least",
            )  # fmt: skip
        total = sum(count for (_, kind), count in held.items() if kind == what)
        if total + num_bytes > most:
            raise busy(f"{total} bytes of requests are under way")
        if held[name] + num_bytes > share:
            raise busy(f"{held[name]} bytes of your requests are under way", 429)
        held[name] += num_bytes
        try:
            yield
        finally:
            held[name] -= num_bytes

    def buffer(self, num_bytes: int) -> bytearray:
        """A buffer, used before if there is one: fresh memory costs a page fault for each 4 KiB."""
        for i, buffer in enumerate(self._buffers):
            if len(buffer) == num_bytes:
                return self._buffers.pop(i)
        return bytearray(num_bytes)

    def give_back(self, buffers: list[bytearray]) -> None:
        """Buffers nobody uses any more."""
        self._buffers += buffers
        while sum(map(len, self._buffers)) > _BUFFERS_BYTES_MAX:
            self._buffers.pop(0)

    def lock(self, namespace: bytes) -> asyncio.Lock:
        """One part of a chunk at a time: two in one process would find each other busy."""
        if len(self._locks) > limits.NAMESPACES_PER_TENANT_MAX * 16:
            self._locks = {name: lock for name, lock in self._locks.items() if lock.locked()}
        return self._locks.setdefault(namespace, asyncio.Lock())

    # ------------------------------------------------------------------ namespaces
    def register(self, tenant: Tenant, identity: ModelIdentity, layout: Layout) -> Namespace:
        """The tenant's namespace of a model (on a thread). Raises ConfigError, LayoutError,
        RefusedError."""
        marked = tenant.marked(identity)
        known = {record.given.namespace for record in self.store.namespaces()
                 if tenant.owns(record.identity)}  # fmt: skip
        if marked.namespace not in known:
            if self.read_only:
                raise RefusedError(403, "read_only", "this server takes no new namespaces")
            if not tenant.is_local and len(known) >= limits.NAMESPACES_PER_TENANT_MAX:
                raise RefusedError(403, "quota", f"you have {len(known)} namespaces", "use those")
        namespace = self.store.namespace(marked, layout)
        if not self.read_only:
            self.tenants.limit(self.store, tenant, namespace.name)
        return namespace

    def namespace(self, tenant: Tenant, text: object) -> Namespace:
        """A tenant's namespace by its id. Another's is as unknown as one that is not there."""
        unknown = RefusedError(404, "namespace", "no such namespace", "POST /v1/namespaces first")
        try:
            name = bytes.fromhex(text) if isinstance(text, str) else b""
        except ValueError:
            name = b""
        if len(name) != 16:
            raise RefusedError(400, "config", "namespace: 32 hex digits are expected")
        found = self._namespaces.get(name)
        if found is not None and self.store.names.is_retired(name):
            raise unknown
        if found is None:
            try:
                namespace = self.store.namespace_of(name)
            except FormatError:
                raise unknown from None
            for old in [one for one in self._namespaces if self.store.names.is_retired(one)]:
                del self._namespaces[old]
            if len(self._namespaces) >= 16 * limits.NAMESPACES_PER_TENANT_MAX:
                self._namespaces.clear()
            # The mark is kept as well: finding it takes apart what may be long.
            found = self._namespaces[name] = namespace, mark_of(namespace.identity)
        namespace, mark = found
        if not tenant.has_mark(mark):
            raise unknown
        return namespace

    @property
    def num_leases(self) -> int:
        """Leases remembered."""
        return len(self.leases)

    async def close(self, deadline_s: float) -> bool:
        """End the threads; whether they have. The store is its owner's to close, after them."""
        pools = (self.control, self.transfer, self.storing, self.flushing, self.mending)

        def join() -> None:
            for pool in pools:
                pool.executor.shutdown(wait=True, cancel_futures=True)

        for pool in pools:
            pool.close()
        joining = threading.Thread(target=join, name="prefixstore-join", daemon=True)
        joining.start()
        end = time.monotonic() + deadline_s
        while joining.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.005)
        return not joining.is_alive()


def _lost() -> RefusedError:
    return RefusedError(503, "store", "the store was lost and is opened again", "try again")


def _major_faults() -> int:
    """How often this thread has waited for a page from a device: indexes are mapped."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


async def to_end(job: Job[T]) -> T:
    """Wait for a thread. Who is cancelled meanwhile goes only when it has ended, because what it
    uses (buffers, a lock, counters) must stay its own until then. Raises StoreError for OSError."""
    try:
        with _as_store_error():
            return await asyncio.shield(job.future)
    except asyncio.CancelledError:
        job.give_up()
        await asyncio.wait((job.future,))
        raise


@contextmanager
def _as_store_error() -> Iterator[None]:
    """A full or failing device, or no descriptors left, is no fault of the request."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"the store failed: {error.strerror or error}", "try again") from error
