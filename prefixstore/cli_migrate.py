"""The verb ``migrate``: a store of an older format version becomes one of this version's."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(sub: Any) -> None:
    """The options of ``migrate``."""
    sub.add_argument(
        "--to", type=int, metavar="N", help="format version to stop at (the newest known)"
    )
    sub.add_argument("--dry-run", action="store_true", help="only say what would be done")


def run_migrate(args: argparse.Namespace) -> int:
    """Do it, or say that there is nothing to do."""
    from pathlib import Path

    from prefixstore.cli_run import args_folder
    from prefixstore.migrating import migrate

    folder = args_folder(args)
    made = migrate(Path(folder), args.to, dry_run=args.dry_run)
    steps = [step.what for step in made.steps]
    if args.json:
        told = {"found": made.found, "target": made.target, "steps": steps, "done": made.done}
        print(json.dumps(told))
        return 0
    if made.done:
        print(f"{folder} has format version {made.target} now (it had {made.found})")
    elif not steps:
        print(f"{folder} has format version {made.found}: nothing to do")
    else:
        print(f"{folder} would go from format version {made.found} to {made.target}:")
    for what in steps:
        print(f"  {what}")
    return 0
