"""The contract of a pool's backend, as tests: what `pool` relies on, whatever the engine.

Subclass it for an engine, as `testing.StoreContract` for a store; the fixture ``backend`` gives an
open one over a real server. The truth is computed from the names alone. Needs pytest.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from prefixstore.pool.backend import ABSENT, Backend, Get, Put, Written
from prefixstore.testing_data import content_of, wait_for

__all__ = ["BackendContract"]
_DEADLINE_S = 20.0
_SIZES = (1, 2, 63, 64, 65, 4095, 16384, 70_001, 1 << 20, (5 << 20) + 3)
_PLACES = count()  # so that tests of one server have names of their own


class BackendContract:
    """See the module docstring. A subclass must override `backend`."""

    many = 2500  # objects, more than the engine lists at once
    batch = 1500  # objects, more than it takes at once
    turns = 10  # of each thread

    @pytest.fixture
    def backend(self) -> Backend:
        """A backend that is open."""
        raise NotImplementedError("a subclass of BackendContract must define 'backend'")

    @pytest.fixture
    def place(self) -> str:
        """What the names of one test begin with."""
        return f"contract/{next(_PLACES)}"

    # ------------------------------------------------------------------ helpers
    def names(self, place: str, number: int) -> list[str]:
        """So many names."""
        return [f"{place}/{at:05}" for at in range(number)]

    def data(self, name: str, num_bytes: int = 1000) -> bytes:
        """What an object holds."""
        return content_of(name.encode(), num_bytes)

    def put(self, backend: Backend, *names: str, num_bytes: int = 1000) -> list[Written]:
        """Write what `data` says."""
        puts = [Put(name, [self.data(name, num_bytes)]) for name in names]
        return backend.put(puts, deadline_s=_DEADLINE_S)

    def read(self, backend: Backend, name: str, start: int, num_bytes: int) -> bytes | None:
        """A range of one object."""
        out = bytearray(num_bytes)
        [came] = backend.get([Get(name, [(start, memoryview(out))])], deadline_s=_DEADLINE_S)
        return bytes(out[:came]) if came >= 0 else None

    # ------------------------------------------------------------------ tests
    def test_what_is_put_is_got(self, backend: Backend, place: str) -> None:
        """Of any size, in parts of any size, into buffers of any size."""
        rng = random.Random(1)
        wholes = {f"{place}/{size}": self.data(f"{place}/{size}", size) for size in _SIZES}
        puts = []
        for name, whole in wholes.items():
            at = sorted(rng.randrange(len(whole) + 1) for _ in range(3))
            puts.append(
                Put(name, [whole[: at[0]], memoryview(whole)[at[0] : at[2]], whole[at[2] :]])
            )
        assert backend.put(puts, deadline_s=_DEADLINE_S) == [Written.YES] * len(puts)
        outs = {name: bytearray(len(whole)) for name, whole in wholes.items()}
        gets = []
        for name, out in outs.items():
            view, cut = memoryview(out), rng.randrange(len(out) + 1)
            halves = [(0, view[:cut]), (cut, view[cut:])]
            gets.append(Get(name, [(at, half) for at, half in halves if half.nbytes]))
        rng.shuffle(gets)
        came = backend.get(gets, deadline_s=_DEADLINE_S)
        assert came == [len(wholes[get.name]) for get in gets]
        assert outs == wholes

    def test_ranges(self, backend: Backend, place: str) -> None:
        """Any, also several of one object, also past its end."""
        [name] = self.names(place, 1)
        whole = self.data(name, 100_000)
        self.put(backend, name, num_bytes=100_000)
        for start, stop in ((0, 1), (17, 4096), (99_999, 100_000), (50_000, 100_000)):
            assert self.read(backend, name, start, stop - start) == whole[start:stop]
        assert self.read(backend, name, 99_000, 5000) == whole[99_000:]
        outs = [bytearray(n) for n in (10, 20, 30_000, 40)]
        starts = (5, 15, 60_000, 99_990)
        cuts = [(start, memoryview(out)) for start, out in zip(starts, outs, strict=True)]
        assert backend.get([Get(name, cuts)], deadline_s=_DEADLINE_S) == [10 + 20 + 30_000 + 10]
        for start, out in zip(starts[:3], outs[:3], strict=True):
            assert out == whole[start : start + len(out)]
        assert outs[3][:10] == whole[-10:]

    def test_what_is_there_stays(self, backend: Backend, place: str) -> None:
        """A second put does nothing, unless it is to replace."""
        one, other = self.names(place, 2)
        self.put(backend, one)
        puts = [Put(one, [b"x" * 1000]), Put(other, [b"y" * 1000])]
        assert backend.put(puts, deadline_s=_DEADLINE_S) == [Written.THERE, Written.YES]
        assert self.read(backend, one, 0, 1000) == self.data(one)
        assert self.read(backend, other, 0, 1000) == b"y" * 1000
        assert backend.put(puts[:1], deadline_s=_DEADLINE_S, replace=True) == [Written.YES]
        assert self.read(backend, one, 0, 1000) == b"x" * 1000

    def test_what_is_not_there(self, backend: Backend, place: str) -> None:
        """Is told of each by itself."""
        names = self.names(place, 7)
        self.put(backend, *names[1::2])
        there = [i % 2 == 1 for i in range(7)]
        assert backend.exist(names, deadline_s=_DEADLINE_S) == there
        outs = [bytearray(1000) for _ in names]
        gets = [Get(name, [(0, memoryview(out))]) for name, out in zip(names, outs, strict=True)]
        assert backend.get(gets, deadline_s=_DEADLINE_S) == [1000 if t else ABSENT for t in there]
        assert [out == self.data(name) for name, out in zip(names, outs, strict=True)] == there

    def test_delete(self, backend: Backend, place: str) -> None:
        """What is deleted is gone and can be put again."""
        names = self.names(place, 4)
        self.put(backend, *names[:3])
        gone = backend.delete(names[1:], deadline_s=_DEADLINE_S)
        assert gone == [True, True, False]
        assert backend.exist(names, deadline_s=_DEADLINE_S) == [True, False, False, False]
        assert self.put(backend, *names) == [Written.THERE] + [Written.YES] * 3
        assert all(backend.exist(names, deadline_s=_DEADLINE_S))

    def test_a_time_to_live_ends(self, backend: Backend, place: str) -> None:
        """Then it is as if the object had never been; others stay."""
        brief, long, lasting = self.names(place, 3)
        for name, ttl_s in ((brief, 1.0), (long, 3600.0), (lasting, None)):
            backend.put([Put(name, [self.data(name)])], ttl_s=ttl_s, deadline_s=_DEADLINE_S)
        wait_for(
            lambda: backend.exist([brief], deadline_s=_DEADLINE_S) == [False], "the end of its time"
        )
        assert self.read(backend, brief, 0, 1000) is None
        assert self.read(backend, brief, 100, 10) is None
        assert self.put(backend, brief) == [Written.YES]
        for name in (brief, long, lasting):
            assert self.read(backend, name, 0, 1000) == self.data(name)
            assert self.read(backend, name, 990, 1000) == self.data(name)[990:]

    def test_listing(self, backend: Backend, place: str) -> None:
        """All names that begin so, in parts, and no others."""
        names = self.names(f"{place}/a", self.many)
        others = [*self.names(f"{place}/b", 3), f"{place}/ab", f"{place}/a.1"]
        self.put(backend, *names, *others, num_bytes=10)
        assert self.listed(backend, f"{place}/a/") == set(names)
        assert self.listed(backend, f"{place}/none/") == set()
        assert self.listed(backend, f"{place}/") == {*names, *others}

    def listed(self, backend: Backend, prefix: str) -> set[str]:
        """Names that begin so; none twice."""
        parts = backend.names(prefix, deadline_s=_DEADLINE_S)
        names = [name for part in parts for name in part]
        assert len(set(names)) == len(names)
        return set(names)

    def test_a_large_batch(self, backend: Backend, place: str) -> None:
        """More objects than any engine takes at once."""
        names = self.names(place, self.batch)
        assert self.put(backend, *names, num_bytes=50) == [Written.YES] * self.batch
        outs = [bytearray(50) for _ in names]
        gets = [Get(name, [(0, memoryview(out))]) for name, out in zip(names, outs, strict=True)]
        assert backend.get(gets, deadline_s=_DEADLINE_S) == [50] * self.batch
        assert outs == [self.data(name, 50) for name in names]

    def test_no_objects(self, backend: Backend) -> None:
        """Are no error."""
        backend.check_open(_DEADLINE_S)
        assert backend.usable
        assert backend.put([], deadline_s=_DEADLINE_S) == []
        assert backend.get([], deadline_s=_DEADLINE_S) == []
        assert backend.exist([], deadline_s=_DEADLINE_S) == []
        assert backend.delete([], deadline_s=_DEADLINE_S) == []

    def test_callers_do_not_mix(self, backend: Backend, place: str) -> None:
        """Many threads, each with its objects."""

        def work(thread: int) -> None:
            for turn in range(self.turns):
                names = self.names(f"{place}/{thread}/{turn}", 8)
                assert self.put(backend, *names, num_bytes=20_000) == [Written.YES] * 8
                for name in names:
                    assert self.read(backend, name, 0, 20_000) == self.data(name, 20_000)

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(work, range(6)))
