"""A run whose writes are recorded in order (`power_loss_shim.c`).

The store of a scene is made, worked on by several processes, rebuilt as after a reboot, and worked
on again. ``python -m benchmarks.power_loss_record FOLDER MEMORY SCENE SEED STEPS`` is the run
itself, with the shim loaded; `record` starts it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.crash_roles import SCENES, Diary, Scene, Worker

SHIM = Path(__file__).with_name("power_loss_shim.c")
ROLES = ("writer", "writer", "evictor", "warmer", "opener")
DEADLINE_S = 300.0


class NoCompilerError(RuntimeError):
    """There is no gcc to build the shim with."""


def build_shim(folder: Path) -> Path:
    """Compile the shim. Raises NoCompilerError."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise NoCompilerError("gcc is needed to build the shim that records writes")
    shim = folder / "power_loss_shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(shim), str(SHIM), "-lpthread"]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    return shim


def record(base: Path, memory: Path, scene: Scene, seed: int, steps: int) -> bytes:
    """Let the run happen below ``base``; the records."""
    shim, log, watched = build_shim(base), base / "records", base / "watched"
    watched.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.power_loss_record", str(watched), str(memory),
         scene.name, str(seed), str(steps)],
        env={**os.environ, "LD_PRELOAD": str(shim), "RECORD_ROOT": str(watched),
             "RECORD_LOG": str(log)},
        cwd=SHIM.parent.parent, timeout=DEADLINE_S, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the recorded run failed:\n{done.stdout}{done.stderr}"[-4000:])
    return log.read_bytes()


def main() -> None:
    folder, memory, name, seed, steps = sys.argv[1:6]
    [scene] = [scene for scene in SCENES if scene.name == name]
    rng = random.Random(int(seed))
    diary = Diary(Path(folder, "diary"))
    context = multiprocessing.get_context("fork")
    where = (Path(folder, "store"), Path(memory), scene)
    for boot in range(2):
        processes = []
        for number, role in enumerate(ROLES):
            worker = Worker(10 * boot + number, rng.randrange(2**31), where, diary)
            processes.append(context.Process(target=worker.run, args=(role, int(steps))))
            processes[-1].start()
        for process in processes:
            process.join(DEADLINE_S)
        if any(process.exitcode != 0 for process in processes):
            raise SystemExit(f"processes ended with {[p.exitcode for p in processes]}")
        for path in Path(memory).iterdir():  # as a reboot does
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
