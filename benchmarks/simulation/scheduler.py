"""Who goes on: threads that run one at a time, a clock that moves only when this says so.

Each simulated thread is a real one that waits for its baton. At every step the thread that has the
baton draws who gets it next; nothing else decides, so a seed gives one run. A thread of a process
that was killed gets the baton once more: its step raises `Killed`, which unwinds it, and every part
of the simulation refuses it meanwhile, so that what it does on the way out has no effect.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from hashlib import blake2b

WALL_START_S = 1_700_000_000
_NS = 1_000_000_000
_WEIGHTS = (1.0, 1.0, 1.0, 0.2, 0.02)  # some threads are starved for a while
_REWEIGH_STEPS = 400


class Killed(BaseException):
    """The process of this thread is no more. No ``except Exception`` of the product sees it."""


class Process:
    """Threads that die together. ``dead`` is for ever."""

    def __init__(self, name: str) -> None:
        self.name, self.dead = name, False
        self.threads: list[Thread] = []
        self.owner = 0  # its number in the store, once it has one


class Gate:
    """What threads wait at, until it is opened or their time is over."""

    __slots__ = ("waiters",)

    def __init__(self) -> None:
        self.waiters: list[Thread] = []


class Thread:
    """One simulated thread. ``join`` it through `Scheduler.wait` at its gate ``ended``."""

    def __init__(self, process: Process, name: str, work: Callable[[], object]) -> None:
        self.process, self.name, self.work = process, name, work
        self.baton = threading.Lock()
        self.baton.acquire()
        self.finished = False
        self.gate: Gate | None = None
        self.ticket = 0  # counts waits, so that an old timer wakes nobody
        self.timed_out = False
        self.weight = 1.0
        self.ended = Gate()


class Scheduler:
    """See the module docstring."""

    def __init__(self, seed: int, steps_max: int) -> None:
        self.rng = random.Random(seed)
        self.steps, self.steps_max = 0, steps_max
        self.now_ns, self.jumped_ns = 0, 0
        self.failure = ""
        self.on_step: Callable[[Thread, str], None] = lambda thread, label: None
        self._trace = blake2b(digest_size=16)
        self.log: list[str] | None = None
        self._ready: list[Thread] = []
        self._dying: list[Thread] = []
        self._alive: list[Thread] = []
        self._timers: list[tuple[int, int, Thread, int]] = []
        self._numbers = 0
        self._running: Thread | None = None
        self._done = threading.Lock()
        self._done.acquire()
        self.processes: list[Process] = []

    # ------------------------------------------------------------------ threads
    @property
    def running(self) -> Thread:
        """The thread that has the baton."""
        assert self._running is not None
        return self._running

    def process(self, name: str) -> Process:
        """A new process, without threads yet."""
        process = Process(name)
        self.processes.append(process)
        return process

    def spawn(self, process: Process, name: str, work: Callable[[], object]) -> Thread:
        """Start a thread; it runs when it is drawn."""
        thread = Thread(process, f"{process.name}/{name}", work)
        process.threads.append(thread)
        self._ready.append(thread)
        self._alive.append(thread)
        threading.Thread(target=self._main, args=(thread,), daemon=True).start()
        return thread

    def run(self) -> None:
        """Let the threads run until all have ended."""
        self._pass_on()
        self._done.acquire()

    def _main(self, thread: Thread) -> None:
        thread.baton.acquire()
        try:
            if not thread.process.dead:
                thread.work()
        except Killed:
            pass
        except BaseException as error:  # thread loop: what no product code caught is a finding
            self.note_failure(f"{thread.name} ended with {type(error).__name__}: {error}")
        thread.finished = True
        self._alive.remove(thread)
        for one in (self._ready, self._dying):
            if thread in one:
                one.remove(thread)
        self.open(thread.ended)
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the baton to somebody; the caller goes on only if it is its own."""
        if not self._alive:
            self._done.release()
            return
        chosen = self._choose()
        if chosen is not self._running or chosen.finished:
            self._running = chosen
            chosen.baton.release()

    def _choose(self) -> Thread:
        if self._dying:
            return self._dying[0]
        while True:
            while self._timers and (not self._ready or self._timers[0][0] <= self.now_ns):
                at, _, thread, ticket = heapq.heappop(self._timers)
                if thread.ticket != ticket or thread.gate is None or thread.finished:
                    continue
                self.now_ns = max(self.now_ns, at)
                thread.gate.waiters.remove(thread)
                thread.gate, thread.timed_out = None, True
                self._ready.append(thread)
            if self._ready:
                break
            self.note_failure(
                "nobody can go on: " + ", ".join(thread.name for thread in self._alive)
            )
            return self._dying[0]
        if self.steps % _REWEIGH_STEPS == 0:
            for thread in self._ready:
                thread.weight = self.rng.choice(_WEIGHTS)
        if len(self._ready) == 1:
            return self._ready[0]
        return self.rng.choices(self._ready, [thread.weight for thread in self._ready])[0]

    # ------------------------------------------------------------------ steps
    def check_alive(self) -> None:
        """Raise Killed for who is dead: nothing it does counts any more."""
        if self.running.process.dead:
            raise Killed

    def step(self, label: str, costs_ns: int = 0) -> None:
        """A point at which others may go on, and at which things happen."""
        self.check_alive()
        thread = self.running
        self.steps += 1
        self.now_ns += costs_ns + self.rng.randrange(1000, 20_000)
        self.trace(f"{thread.name} {label}")
        if self.steps > self.steps_max:
            self.note_failure(f"not at its end after {self.steps_max} steps")
        self.on_step(thread, label)
        self._switch(thread)

    def _switch(self, thread: Thread) -> None:
        self._pass_on_from(thread)
        if thread.process.dead:
            raise Killed

    def _pass_on_from(self, thread: Thread) -> None:
        chosen = self._choose()
        if chosen is not thread:
            self._running = chosen
            chosen.baton.release()
            thread.baton.acquire()

    def trace(self, what: str) -> None:
        """Enter something into the trace, of which `digest` is the hash."""
        line = f"{self.now_ns} {what}\n"
        self._trace.update(line.encode())
        if self.log is not None:
            self.log.append(line)

    @property
    def digest(self) -> str:
        """A hash of all that happened, in order."""
        return self._trace.hexdigest()

    # ------------------------------------------------------------------ waiting
    def wait(self, gate: Gate, timeout_s: float | None = None) -> bool:
        """Wait until the gate is opened; False when the time was over first."""
        self.check_alive()
        thread = self.running
        thread.ticket += 1
        thread.gate, thread.timed_out = gate, False
        gate.waiters.append(thread)
        self._ready.remove(thread)
        if timeout_s is not None:
            self._numbers += 1
            at = self.now_ns + max(0, int(timeout_s * _NS))
            heapq.heappush(self._timers, (at, self._numbers, thread, thread.ticket))
        self._switch(thread)
        return not thread.timed_out

    def open(self, gate: Gate) -> None:
        """Let who waits at a gate go on."""
        for thread in gate.waiters:
            thread.gate = None
            self._ready.append(thread)
        gate.waiters.clear()

    def sleep(self, seconds: float) -> None:
        """Do nothing for a time."""
        self.step("sleep")
        self.wait(Gate(), seconds)

    def sleep_quietly(self, seconds: float) -> None:
        """The same without a step: for who is held up within one."""
        self.wait(Gate(), seconds)

    # ------------------------------------------------------------------ ends
    def kill(self, process: Process) -> None:
        """SIGKILL: no thread of the process does anything any more."""
        process.dead = True
        for thread in process.threads:
            if thread.finished or thread in self._dying:
                continue
            if thread.gate is not None:
                thread.gate.waiters.remove(thread)
                thread.gate = None
            elif thread in self._ready:
                self._ready.remove(thread)
            self._dying.append(thread)

    def note_failure(self, what: str) -> None:
        """Something that must not be: the run ends here, and says so."""
        if not self.failure:
            self.failure = f"step {self.steps}, {self.now_ns / _NS:.3f} s: {what}"
            self.trace(self.failure)
        for process in self.processes:
            self.kill(process)

    def wall_s(self) -> float:
        """What the simulated machine takes for the time of day."""
        return WALL_START_S + (self.now_ns + self.jumped_ns) / _NS


_active: list[Scheduler] = []


def active() -> Scheduler:
    """The scheduler of the run under way."""
    return _active[-1]


def activate(scheduler: Scheduler | None) -> None:
    """Make a scheduler that of the run under way; None: there is none."""
    _active.clear()
    if scheduler is not None:
        _active.append(scheduler)
