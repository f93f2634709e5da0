"""Who is alive: the kernel's word, whatever way a process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prefixstore.liveness import Liveness
from tests.store_helpers import ROOT

HOLD = (
    "import sys\nfrom pathlib import Path\nfrom prefixstore.liveness import Liveness\n"
    "own = Liveness(Path(sys.argv[1]))\nown.become(int(sys.argv[2]))\n"
    "print('holds', flush=True)\nsys.stdin.readline()\n"
)


def holder(path: Path, owner: int) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, str(owner)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "holds\n"
    return child


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_an_owner_is_dead_when_its_process_is(tmp_path: Path, end: str) -> None:
    ours = Liveness(tmp_path / "alive")
    ours.become(1)
    with holder(tmp_path / "alive", 2) as child:
        for _ in range(3):  # asking changes nothing
            assert not ours.is_dead(2)
        assert ours.is_dead(3)
        if end == "kill":
            child.kill()
        child.communicate("\n" if end == "exit" else None)
    assert ours.is_dead(2)
    assert not ours.is_dead(1)
    ours.close()


def test_alone(tmp_path: Path) -> None:
    ours = Liveness(tmp_path / "alive")
    assert ours.alone()
    with holder(tmp_path / "alive", 7) as child:
        assert not ours.alone()
        child.communicate("\n")
    assert ours.alone()
    ours.close()
