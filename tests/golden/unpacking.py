"""Copies of golden stores."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in HERE.glob("*.json"))


def unpack(name: str, parent: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A copy of a golden store in a folder, and what must be found in it."""
    with tarfile.open(HERE / f"{name}.tar.gz") as archive:
        archive.extractall(parent, filter="data")
    return parent / "store", json.loads((HERE / f"{name}.json").read_text())
