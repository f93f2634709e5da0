"""The names of failpoints are those that the source reaches; without an action nothing happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefixstore import failpoints

SOURCE = Path(failpoints.__file__).parent


def test_the_list_of_names_is_complete() -> None:
    found = [
        name
        for path in SOURCE.glob("*.py")
        for name in re.findall(r'\breached\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(found) == sorted(failpoints.NAMES)


def test_an_action_is_called_until_it_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(failpoints, "_action", None)
    failpoints.reached("put.claimed")
    failpoints.set_action(seen.append)
    failpoints.reached("put.copied")
    failpoints.set_action(None)
    failpoints.reached("put.finished")
    assert seen == ["put.copied"]
