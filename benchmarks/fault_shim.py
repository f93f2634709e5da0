"""Faults of a disk and of a clock in another process: `fault_shim.c` under LD_PRELOAD.

Owns the built library (kept in the temporary folder, by its source's digest) and, for each process,
a small file that both map. What must hold: without a C compiler `library` says so and nothing is
half done; a process that was started with it behaves as any other until a fault is set.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.fault_means import NotPermittedError

SOURCE = Path(__file__).with_suffix(".c")
BUILD_S = 60.0
_FIELDS = ("read_errno", "write_errno", "sync_errno", "bytes_s", "clock_s", "hits")
_CONTROL = struct.Struct(f"<{len(_FIELDS)}q")


def library() -> Path:
    """The built shim. Raises NotPermittedError where there is no compiler."""
    digest = hashlib.blake2b(SOURCE.read_bytes(), digest_size=8).hexdigest()
    built = Path(tempfile.gettempdir(), f"prefixstore-fault-shim-{os.getuid()}-{digest}.so")
    if not built.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise NotPermittedError("a C compiler is needed for this fault")
        with tempfile.NamedTemporaryFile(dir=built.parent, delete=False) as partial:
            words = ["-O2", "-shared", "-fPIC", "-o", partial.name, str(SOURCE), "-ldl"]
            subprocess.run([compiler, *words], check=True, timeout=BUILD_S)
        os.replace(partial.name, built)
    return built


class Shim:
    """The faults of one process: attach it to the environment it is started with."""

    def __init__(self, control: Path, below: Path) -> None:
        if not control.exists():
            control.write_bytes(bytes(_CONTROL.size))
        with control.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _CONTROL.size)
        self.environment = {
            "LD_PRELOAD": str(library()),
            "FAULT_CONTROL": str(control),
            "FAULT_BELOW": f"{below.resolve()}/",
        }

    @property
    def hits(self) -> int:
        """Calls that were failed or slowed."""
        return int(_CONTROL.unpack(self._map)[-1])

    def set(self, **fields: int) -> None:
        """What happens from now on; what is not named ends."""
        values = [fields.get(name, 0) for name in _FIELDS[:-1]]
        self._map[: 8 * len(values)] = struct.pack(f"<{len(values)}q", *values)

    @contextmanager
    def during(self, **fields: int) -> Iterator[None]:
        """A fault for the length of the block."""
        self.set(**fields)
        try:
            yield
        finally:
            self.set()
