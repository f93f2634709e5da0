"""The trace of `benchmarks.route`, and what its rows and bars are made of. No engine starts."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import route

RATES = {route.WAYS[0]: 0.4, route.WAYS[1]: 0.7, route.WAYS[2]: 0.5}


def test_each_way_asks_the_same_of_texts_of_its_own() -> None:
    sizes = route.Sizes()
    one, same, other = (route.Talks(sizes, way) for way in ("a", "a", "b"))
    assert (one.said, one.order, one.questions) == (same.said, same.order, same.questions)
    assert (one.order, one.questions) == (other.order, other.questions)
    assert [text[1:] for text in one.said] == [text[1:] for text in other.said]
    assert not {text[:3] for text in one.said} & {text[:3] for text in other.said}
    assert set(Counter(one.order).values()) == {sizes.turns}
    assert len(set(one.said)) == sizes.systems
    assert one.order != sorted(one.order)


def test_bars_compare_with_round_robin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class NoWorkers:
        def __init__(self, sizes: route.Sizes, folder: Path, stack: ExitStack) -> None:
            pass

    def one_way(way: str, *rest: object) -> route.Row:
        return route.row_of(way, [3.0, 1.0, 2.0], 1000, 1000 * RATES[way])

    monkeypatch.setattr(route, "Workers", NoWorkers)
    monkeypatch.setattr(route, "one_way", one_way)
    monkeypatch.setattr(route, "added", lambda *_: ([route.row_of("directly", [5.0])], []))
    rows, bars = route.run(route.QUICK, tmp_path)
    assert [row["hit_rate"] for row in rows] == [0.4, 0.7, 0.5, None]
    assert (rows[0]["median_ms"], rows[0]["max_ms"], rows[0]["requests"]) == (2.0, 3.0, 3)
    assert [bar.value for bar in bars] == pytest.approx([1.75, 1.25])
    assert [bar.ok for bar in bars] == [True, False]
