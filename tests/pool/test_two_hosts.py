"""Two hosts, each with a network, a memory and a disk of its own, over one cluster of three."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from prefixstore.found import REMOTE
from prefixstore.ledger import MEMORY
from tests.pool.host_child import DEADLINE_S
from tests.pool.networks import Networks, networks
from tests.pool.servers import Redis, redis_cluster
from tests.store_helpers import ROOT, Place

pytest_plugins = ["tests.store_fixtures"]
SLOW_MAX = 6  # in 3.5 s: the breaker's pauses double, from 0.25 to 2 s
WAIT_S = 60.0
TEXTS = 12


class Host:
    """The process of one host."""

    def __init__(self, enter: list[str], url: str, folder: Path, memory_dir: Path) -> None:
        self.folder, self.memory_dir = folder, memory_dir
        memory_dir.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*enter, sys.executable, "-m", "tests.pool.host_child",
             url, str(folder), str(memory_dir)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.answer() == {"open": True}

    def tell(self, do: str, **words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **words}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told

    def ask(self, do: str, **words: object) -> dict[str, Any]:
        self.tell(do, **words)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)


class Scene:
    """The hosts and the nodes of the engine; the last node has a network of its own."""

    def __init__(self, place: Place, net: Networks, nodes: list[Redis], stack: ExitStack) -> None:
        self.net, self.nodes = net, nodes
        self._place, self._stack = place, stack

    def host(self, name: str) -> Host:
        enter, _ = self.net.add()
        folder, memory = self._place.folder / name, self._place.memory_dir / name
        host = Host(enter, self.nodes[0].url, folder, memory)
        self._stack.callback(host.end)
        return host


@pytest.fixture
def scene(place: Place) -> Iterator[Scene]:
    with networks() as net, ExitStack() as stack:
        enter, address = net.add()
        places = [(net.address, []), (net.address, []), (address, enter)]
        nodes = stack.enter_context(redis_cluster(places))
        yield Scene(place, net, nodes, stack)


def test_what_one_stored_another_serves_also_after_it_was_wiped(scene: Scene) -> None:
    one, two = scene.host("one"), scene.host("two")
    told = one.ask("put", seed=1, count=40)
    assert told == {"states": ["stored"] * 40, "flushed": True}
    assert two.ask("read", seed=1, count=40) == {
        "match": [REMOTE] * 40, "tiers": [REMOTE] * 40, "wrong": 0,
    }  # fmt: skip
    assert two.ask("read", seed=1, count=40)["tiers"] == [MEMORY] * 40
    one.end()
    two.end()
    for host in (one, two):
        shutil.rmtree(host.folder)
        shutil.rmtree(host.memory_dir)
    again = scene.host("two")
    assert again.ask("read", seed=1, count=40) == {
        "match": [REMOTE] * 40, "tiers": [REMOTE] * 40, "wrong": 0,
    }  # fmt: skip
    third, end = scene.host("three"), time.monotonic() + WAIT_S
    while (found := third.ask("segments", seed=1, count=40)["found"]) == []:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert found == [[0, 319, 1]]


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_node_that_is_lost_under_load(scene: Scene, how: str) -> None:
    """No wrong answer, no hang: no turn waits longer than its calls may, and no more of them for a
    deadline than the breaker lets try; the keys of the other nodes are served all the time."""
    one, two = scene.host("one"), scene.host("two")
    for text in range(TEXTS):
        one.ask("put", seed=100 + text, count=4)
    assert two.ask("load", seconds=0.5, seed=100, texts=TEXTS) == {"began": True}
    before = two.answer()
    assert (before["misses"], before["wrong"]) == (0, 0)
    for host in (one, two):
        host.tell("load", seconds=4.0 if how == "cut off" else 2.0, seed=100, texts=TEXTS)
        assert host.answer() == {"began": True}
    time.sleep(0.5)
    node = scene.nodes[2]
    if how == "killed":
        node.kill()
    else:
        scene.net.cut(node.host)
    for host in (one, two):
        told = host.answer()
        assert told["wrong"] == 0
        assert told["misses"] > 0
        assert told["hits"] > told["misses"] / 10
        assert told["slowest_s"] < 4 * DEADLINE_S, "a match and a get, and what they ask again"
        assert told["slow"] <= SLOW_MAX
    told = one.ask("put", seed=999, count=4, flush_s=0.0)
    assert told["states"] == ["stored"] * 4
    assert one.ask("read", seed=999, count=4)["tiers"] == [MEMORY] * 4
