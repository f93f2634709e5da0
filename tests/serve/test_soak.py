"""The soak of the server runs, finds nothing wrong, and would find what is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak_client import SIZE, Client
from tests.serve.support import running
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]
SAMPLES = [(90_000, 40), (100_000, 50), (100_000, 50), (101_000, 51), (100_500, 50), (101_000, 50)]


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    """Two cycles, in the first of which the server is killed."""
    found = soak.soak(0.15, tmp_path, cycles=2)
    rows, bars = soak.rows_and_bars(found)
    assert [bar.shortfall() for bar in bars if not bar.ok] == []
    values = {row["what"]: row["value"] for row in rows}
    assert values["kills"] == 1
    for name in ("operations", "get", "put", "match", "rude clients", "bytes changed on disk"):
        assert values[name] > 0, name  # type: ignore[operator]


def result(**changes: object) -> dict[str, object]:
    """What a good run finds."""
    counts = Counter({"requests": 18_000, "hits": 10})
    return {"minutes": 1.0, "counts": counts, "samples": SAMPLES, "exit_code": 0,
            "tracebacks": 0, "unsound": 0, **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, None),
        ({"counts": Counter({"hits": 1, "operations": 1, "wrong: bytes": 1})}, "wrong bytes"),
        ({"samples": [*SAMPLES[:-2], (140_000, 50), (140_000, 50)]}, "growth of its memory"),
        ({"samples": [*SAMPLES[:-2], (100_000, 70), (100_000, 70)]}, "growth of its descriptors"),
        ({"tracebacks": 1}, "tracebacks"),
        ({"exit_code": -1}, "exit code"),
        ({"unsound": 2}, "faults of the store"),
        ({"counts": Counter({"operations": 1})}, "hits"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, object], missed: str | None) -> None:
    rows, bars = soak.rows_and_bars(result(**changes))
    short = [bar.name for bar in bars if not bar.ok]
    assert len(short) == (missed is not None)
    assert all(name.startswith(str(missed)) for name in short)
    if not changes:
        assert {"what": "hours of ordinary load", "value": 1.0} in rows


def test_a_client_notices_wrong_bytes_and_ghosts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A get that gives other bytes, and chunks that were deleted."""
    with place.open("8MiB", 0) as store, running(store) as server, server.open() as remote:
        counts: Counter[str] = Counter()
        client = Client(remote, 1, counts)
        while not counts["hits"]:
            client.put()
            client.get()
        assert not [name for name in counts if name.startswith("wrong")]
        client.maybe.clear()  # as if all had been deleted
        for _ in range(20):
            client.get()
        assert counts["wrong: a chunk that cannot be there"] > 0
        monkeypatch.setattr("benchmarks.soak_client.payload_of", lambda key: bytes(SIZE))
        for _ in range(20):
            client.get()
        assert counts["wrong: bytes"] > 0
