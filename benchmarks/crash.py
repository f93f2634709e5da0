"""SIGKILL at any moment and at each named step of the order of writes: what must hold, holds.

``python -m benchmarks.crash [--kills N] [--seed S] [--json] [--check]``

Writers, readers, evictors, warmers and processes that open and close work on one store folder
(`crash_roles`). Some are killed at a random instant, several at once; others kill themselves at a
step of `prefixstore.failpoints` that was named to them, also inside transactions and while the
store is made or opened. After each batch another process opens the store, with survivors at work
or none, and looks at it (`crash_check`): every chunk bit for bit, all that was promised there,
nothing uncommitted or removed, no byte leaked, caps held, leases reaped. Stores of three kinds take
turns: one that evicts nothing, one that always evicts, one without a disk; some are rebuilt as
after a reboot. Bars: no fault, each step died at, and the number of kills.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.crash_check import PINS_EVICTED, Promises, check
from benchmarks.crash_roles import ROLES, ROLES_OF, SCENES, Diary, Scene, Worker
from benchmarks.table import Bar, add_arguments, report
from prefixstore import failpoints

AT_WORK = 5  # processes
KILLS_OF_A_SCENE = 60
ARMED_S = 1.0  # given to one that is to die at a step
CHECK_S = 120.0
OPEN_S_MAX = 5.0  # opening waits for nobody: the rest is a loaded machine
SHOWN = 20
_context = multiprocessing.get_context("fork")


def _work(worker: Worker, role: str) -> None:
    """A process that ends by itself only if something is wrong."""
    try:
        worker.run(role)
    except Exception:  # thread loop: of the whole process; its diary tells
        text = " | ".join(traceback.format_exc().splitlines()[-5:])
        worker.diary.say("wrong", worker.number, text)


def _look(arguments: tuple[Path, Path, Scene, Promises, bool], answer: Path) -> None:
    faults: list[str] = []
    opened_s = 0.0
    try:
        faults, opened_s = check(*arguments)
    except Exception:  # thread loop: of the whole process; what was raised is what is wrong
        faults = [f"the check ended: {' | '.join(traceback.format_exc().splitlines()[-5:])}"]
    answer.write_text(json.dumps([faults, opened_s]))


def look(arguments: tuple[Path, Path, Scene, Promises, bool]) -> tuple[list[str], float]:
    """`check` in a process of its own: this one must hold no store, as its children are forked."""
    with tempfile.NamedTemporaryFile("r", prefix="prefixstore-crash-") as answer:
        process = _context.Process(target=_look, args=(arguments, Path(answer.name)), daemon=True)
        process.start()
        process.join(CHECK_S)
        process.kill()
        process.join()
        text = answer.read()
    if not text:
        return [f"the check ended with status {process.exitcode} and said nothing"], 0.0
    faults, opened_s = json.loads(text)
    return faults, opened_s


class Run:
    """All kills of a run, and what was found."""

    def __init__(self, kills: int, seed: int, scenes: Sequence[Scene] = SCENES) -> None:
        self.kills, self.rng, self.scenes = kills, random.Random(seed), scenes
        self.killed: Counter[str] = Counter()  # by step, or "any instant"
        self.faults: list[str] = []
        self.looks = self.started = self.reboots = 0
        self.promised = self.pins_evicted = 0
        self.opened_s: list[float] = []

    def all_killed(self) -> int:
        return sum(self.killed.values())

    def go(self) -> None:
        """Scene after scene, until enough were killed or something was found."""
        number = 0
        while self.all_killed() < self.kills and not self.faults:
            with (
                tempfile.TemporaryDirectory(prefix="prefixstore-crash-") as disk,
                tempfile.TemporaryDirectory(prefix="prefixstore-crash-", dir=shared()) as memory,
            ):
                stage = _Stage(
                    self, self.scenes[number % len(self.scenes)], Path(disk), Path(memory)
                )
                try:
                    stage.play()
                finally:
                    stage.end()
            number += 1


class _Stage:
    """One store, from when it is made."""

    def __init__(self, run: Run, scene: Scene, disk: Path, memory: Path) -> None:
        self.run, self.scene, self.rng = run, scene, run.rng
        self.memory = memory
        self.where = (disk / "store", memory, scene)
        self.diary = Diary(disk / "diary")
        self.at_work: dict[BaseProcess, Worker] = {}

    def play(self) -> None:
        self._start("opener", self.rng.choice(("", "open.settings", "open.wiped", "open.declared")))
        before = self.run.all_killed()
        while self.run.all_killed() - before < KILLS_OF_A_SCENE and not self.run.faults:
            self._fill()
            self._wait()
            quiet = self.rng.random() < 0.35
            self._kill(len(self.at_work) if quiet else self.rng.randint(1, AT_WORK - 1))
            self._look(quiet)
            if quiet and self.scene.disk_bytes and self.rng.random() < 0.5:
                self._reboot()

    def end(self) -> None:
        self._kill(len(self.at_work))
        self.diary.close()

    # ------------------------------------------------------------------ processes
    def _fill(self) -> None:
        """Have the usual number at work; most of the new ones are to die at a step."""
        while len(self.at_work) < AT_WORK:
            armed = ""
            if self.rng.random() < 0.7:  # one of those that the fewest died at
                names = [*failpoints.NAMES]
                self.rng.shuffle(names)
                names.sort(key=self.run.killed.__getitem__)
                armed = self.rng.choice(names[:8])
            role = self.rng.choice(ROLES_OF[armed.partition(".")[0]] if armed else ROLES)
            self._start(role, armed)

    def _start(self, role: str, armed: str) -> None:
        self.run.started += 1
        worker = Worker(self.run.started, self.rng.randrange(2**31), self.where, self.diary, armed)
        process = _context.Process(target=_work, args=(worker, role), daemon=True)
        process.start()
        self.at_work[process] = worker

    def _wait(self) -> None:
        """A random time; longer for those that are to die at a step."""
        time.sleep(self.rng.choice([0.002, 0.02, 0.1, 0.3]) * self.rng.random())
        end = time.monotonic() + ARMED_S * self.rng.random()
        while self._dead() == 0 and time.monotonic() < end:
            time.sleep(0.005)

    def _dead(self) -> int:
        """Take away those that have died by themselves."""
        dead = [process for process in self.at_work if process.exitcode is not None]
        for process in dead:
            self._buried(process, "")
        return len(dead)

    def _buried(self, process: BaseProcess, how: str) -> None:
        process.join()
        worker = self.at_work.pop(process)
        if process.exitcode == -signal.SIGKILL:
            self.run.killed[how or worker.armed] += 1
        else:
            self.run.faults.append(f"a {worker.armed or 'worker'} ended: {process.exitcode}")
        process.close()

    def _kill(self, many: int) -> None:
        """Kill that many of those alive, all before waiting for any."""
        self._dead()
        # Those that are to die at a step come last: they are given time for it.
        order = sorted(
            self.at_work.items(), key=lambda one: (one[1].armed != "", self.rng.random())
        )
        chosen = [process for process, _ in order[:many]]
        for process in chosen:
            process.kill()
        died = {line[1] for line in self.diary.lines() if line[0] == "died"}
        for process in chosen:
            process.join()
            worker = self.at_work[process]
            self._buried(process, worker.armed if str(worker.number) in died else "any instant")

    # ------------------------------------------------------------------ checks
    def _look(self, quiet: bool) -> None:
        # Read before the store is: what a survivor does meanwhile is not promised yet, and what it
        # takes back meanwhile is no fault either.
        promises = Promises.read(self.diary.lines(), self.scene, durable=False)
        faults, opened_s = look((*self.where, promises, quiet))
        if faults and not quiet:
            later = Promises.read(self.diary.lines(), self.scene, durable=False)
            withdrawn = set(promises.there) - set(later.there)
            faults = [
                fault for fault in faults
                if not any(f"prompt {prompt} was promised" in fault for prompt in withdrawn)
            ]  # fmt: skip
        self.run.looks += 1
        self.run.promised += len(promises.there)
        self.run.opened_s.append(opened_s)
        limits = [fault for fault in faults if fault.startswith(PINS_EVICTED)]
        self.run.pins_evicted += len(limits)
        where = f"{self.scene.name}, {self.run.all_killed()} kills"
        self.run.faults += [f"{where}: {fault}" for fault in faults if fault not in limits]

    def _reboot(self) -> None:
        """The memory tier and the live index are gone."""
        for path in self.memory.iterdir():
            shutil.rmtree(path)
        self.run.reboots += 1
        for armed in self.rng.sample(
            [n for n in failpoints.NAMES if n[:5] == "open."], AT_WORK - 1
        ):
            self._start("opener", armed)


def shared() -> str | None:
    """Where the memory tier goes: shared memory, if there is any."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(arguments: list[str] | None = None, play: Callable[[Run], None] = Run.go) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash")
    add_arguments(parser)
    parser.add_argument("--kills", type=int, default=2000, help="at least how many")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (not of the timing)")
    names = [scene.name for scene in SCENES]
    parser.add_argument("--scenes", nargs="+", choices=names, default=names, help="only these")
    args = parser.parse_args(arguments)
    run = Run(args.kills, args.seed, [one for one in SCENES if one.name in args.scenes])
    started = time.monotonic()
    with suppress(KeyboardInterrupt):  # what was done until then is reported
        play(run)
    for line in run.faults[:SHOWN]:
        print(line, file=sys.stderr)
    steps = ("any instant", *failpoints.NAMES)
    rows = [{"killed_at": name, "kills": run.killed[name]} for name in steps]
    rows += [
        {"killed_at": f"({what})", "kills": value}
        for what, value in (
            ("looks", run.looks), ("promises looked at", run.promised), ("reboots", run.reboots),
            ("looks at pins that gave way to the index", run.pins_evicted),
            ("seconds", round(time.monotonic() - started)),
        )
    ]  # fmt: skip
    unmet = [name for name in failpoints.NAMES if not run.killed[name]]
    if unmet:
        print(f"nobody died at {', '.join(unmet)}", file=sys.stderr)
    bars = [
        Bar("faults", float(len(run.faults)), 0.0, "<="),
        Bar("kills", float(run.all_killed()), float(args.kills), ">="),
        Bar("steps nobody died at", float(len(unmet)), 0.0, "<="),
        Bar("opening, seconds at most", max(run.opened_s, default=None), OPEN_S_MAX, "<="),
    ]
    report("Kills", rows, bars, args)


if __name__ == "__main__":
    main()
