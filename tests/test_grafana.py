"""The dashboard against what is really at /metrics: of a server, and of the connector."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixstore import admin
from prefixstore.serve import metrics
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from tests.serve.raw import ask
from tests.serve.support import running
from tests.store_helpers import Place, wait_for
from tests.test_docs import README, section, table

pytest_plugins = ["tests.store_fixtures"]
FILE = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "prefixstore.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
SUFFIX = re.compile(r"_(?:bucket|sum|count)$")


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def used() -> dict[str, set[str]]:
    """Names of metrics in the dashboard, with the labels that they are asked for."""
    found: dict[str, set[str]] = {}
    for expression in expressions():
        by = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression)
              for label in group.split(",")}  # fmt: skip
        for name, selector in re.findall(r"(prefixstore[_:]\w+)(?:\{([^}]*)\})?", expression):
            labels = set(re.findall(r"(\w+)[=!]", selector)) - {"instance"}
            found.setdefault(name, set()).update(labels | by)
    return found


@pytest.fixture
def at_metrics(place: Place) -> Iterator[str]:
    """The page of a server at which something of each kind has happened."""
    with place.open("4MiB", "4MiB") as store, running(store) as server, server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = ns.chain(tokens_of(1, 2)).refs()
        ns.put(refs, [content_of(ref.key, CONTRACT_LAYOUT.payload_bytes) for ref in refs])
        ns.match(refs)
        ns.get(refs, outputs(CONTRACT_LAYOUT, 2))
        ask(server.address, "GET", "/v1/nothing")
        assert store.flush(10)
        wait_for(lambda: admin.stats(store)["counters"], "counters are written now and then")
        server.server.state.metrics.add("broken_transfers_total", way="get")
        yield ask(server.address, "GET", "/metrics")[1].decode()


def test_every_metric_of_the_server_is_one_it_has(at_metrics: str) -> None:
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", at_metrics, re.MULTILINE))
    samples: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? [\d.e+-]+$", at_metrics, re.MULTILINE):
        samples.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    mine = {name: labels for name, labels in used().items() if ":" not in name}
    assert len(mine) > 15
    for name, labels in mine.items():
        assert name in samples, name
        assert labels <= samples[name], (name, labels)
        family = SUFFIX.sub("", name) if SUFFIX.sub("", name) in kinds else name
        has_rate = any(f"rate({name}" in one or f"increase({name}" in one for one in expressions())
        assert has_rate == (kinds[family] in ("counter", "histogram")), name
    assert {f"prefixstore_{name}" for name in metrics._HELP} <= set(mine)


def test_every_metric_of_the_engine_is_in_the_table() -> None:
    listed = {row[0]: row[1] for row in table(section(README, "Metrics"))}
    engine = {name: labels for name, labels in used().items() if ":" in name}
    assert len(engine) > 5
    for name, labels in engine.items():
        family = SUFFIX.sub("", name).removesuffix("_total")
        assert family in listed, name
        assert labels - {"le"} <= set(listed[family].split(", ")), name


def test_it_is_a_dashboard_that_can_be_imported() -> None:
    assert DASHBOARD["uid"] == DASHBOARD["title"] == "prefixstore"
    names = {one["name"] for one in DASHBOARD["templating"]["list"]}
    for variable in re.findall(r"\$(?!__)\{?(\w+)", FILE.read_text(encoding="utf-8")):
        assert variable in names, variable
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert target["expr"].count("(") == target["expr"].count(")")
