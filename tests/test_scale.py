"""The simulation of fleets: its queue against a formula, its caches against a plain model, what
goes in against what comes out, and its costs against the figures they are made of."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale, scale_costs, scale_real
from benchmarks.scale_costs import Costs, Curve, cell, measured
from benchmarks.scale_fleet import Fleet, Lane, leading
from benchmarks.scale_run import Run, Totals
from benchmarks.table import machine
from benchmarks.traces import Request, make_trace
from prefixstore.config import GIB

UNIT = 1024
NOTHING = Curve((0.0,))
FAST = Costs(  # a token takes 10 us to compute, and nothing else takes any time
    kv_bytes=1024, cold=Curve((1e-5, 0.0)), floor=NOTHING, blend=NOTHING, step_s=1e-9,
    answer_token_s=0.0, load_bytes_s=1e12, save_bytes_s=1e12, pool_get_bytes_s=1e12,
    pool_put_bytes_s=1e12, pool_lookup_s=0.0,
)  # fmt: skip
ONE = Fleet(engines=1, store=False, answer_tokens=0, gpu_cache_gib=100 * UNIT * 1024 / GIB)
SMALL = Fleet(engines=20, host_engines=4, gpu_cache_gib=8, memory_gib=16, disk_gib=64, pool_gib=64)


def small(family: str = "chat", seed: int = 1, fleet: Fleet = SMALL) -> scale.Arrivals:
    return scale.arrivals(make_trace(family, seed, 600, 10), fleet, seed)


def played(fleet: Fleet = SMALL, family: str = "chat", seed: int = 1) -> tuple[Run, Totals]:
    run = Run(fleet, measured(), small(family, seed, fleet), 0, seed)
    return run, run.run()


# ---------------------------------------------------------------------- costs
def test_a_single_request_takes_what_was_measured() -> None:
    """Cold, from the engine's cache and from the memory tier, at each length in the table."""
    costs = measured()
    for text in scale_costs.CONTEXTS:
        cold, own, memory = (
            cell(scale_costs.GPU_FILE, (text, scale_costs.CARD), at) / 1000 for at in (2, 3, 4)
        )
        tokens = int(text.replace(",", ""))
        fleet = replace(ONE, gpu_cache_gib=48, answer_tokens=0)
        path = tuple(range(tokens // UNIT))
        request = Request(path, len(path))
        [first] = Run(fleet, costs, [(0.0, request)], 0).run().ttft_s
        assert first == pytest.approx(cold, rel=1e-6)
        _, again = Run(fleet, costs, [(0.0, request), (9.0, request)], 0).run().ttft_s
        assert again == pytest.approx(own, rel=0.15)
        # A second engine of the host loads what the first has saved.
        two = replace(fleet, engines=2, store=True, routing="robin", staging_gib=64)
        _, loaded = Run(two, costs, [(0.0, request), (60.0, request)], 0).run().ttft_s
        assert loaded == pytest.approx(memory, abs=0.015)


def test_saves_under_load_are_dropped_as_was_measured() -> None:
    """Prompts of 8,192 tokens without a pause: the share of them that was not saved on the GPU."""
    row = ("prefill: 16 x (8,192 + 1)", "H100")
    dropped = cell(scale_costs.GPU_FILE, row, 5) / scale_costs.SAVED_CHUNKS
    found = [Request(tuple(range(8 * n, 8 * n + 8)), 8) for n in range(200)]
    fleet = Fleet(engines=1, answer_tokens=0, disk_gib=0, pool_nodes_per_host=0)
    saved = Run(fleet, measured(), [(0.0, one) for one in found], 0).run().saved
    assert saved["dropped"] / sum(saved.values()) == pytest.approx(dropped, abs=0.05)


def test_a_table_that_lost_its_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no row"):
        cell(scale_costs.GPU_FILE, ("4,096", "no such card"), 2)
    with pytest.raises(ValueError, match="has no row"):
        scale_costs.pool_figure("no such thing")
    with pytest.raises(ValueError, match="degree 2"):
        Curve.through([1, 2], [1, 2], 2)


def test_blending_all_costs_what_was_measured_and_nothing_what_computing_costs() -> None:
    costs = measured()
    for tokens in scale_costs.BLENDED:
        assert costs.blend_s(tokens, 0, tokens) == pytest.approx(costs.blend(tokens))
        assert costs.blend_s(0, 0, tokens) == pytest.approx(costs.compute_s(0, tokens))


# --------------------------------------------------------------------- queues
@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_engine_is_an_m_d_1_queue(load: float) -> None:
    """Pollaczek and Khinchine: equal jobs at random times wait load * D / 2 / (1 - load)."""
    service_s = FAST.cold(UNIT)
    rng, at_s = random.Random(3), 0.0
    given = []
    for number in range(40_000):
        at_s += rng.expovariate(load / service_s)
        given.append((at_s, Request((number,), 1)))
    totals = Run(ONE, FAST, given, 0).run()
    waited = sum(totals.ttft_s) / len(totals.ttft_s) - service_s
    assert waited == pytest.approx(load * service_s / 2 / (1 - load), rel=0.06)
    assert totals.busy["compute"][0] == pytest.approx(load, rel=0.03)


def test_a_lane_does_one_thing_after_the_other() -> None:
    lane = Lane(10.0)
    assert [lane.take(0.0, 20), lane.take(1.0, 10), lane.take(9.0, 10)] == [2.0, 3.0, 10.0]
    assert [lane.busy_s(at) for at in (9.0, 9.5, 10.0, 20.0)] == [3.0, 3.5, 4.0, 4.0]
    assert lane.amount == 40


# --------------------------------------------------------------------- caches
class SlowLru:
    """What an engine's cache should do, found by looking at everything each time."""

    def __init__(self, size: int) -> None:
        self.size, self.clock, self.used = size, 0, dict[int, int]()

    def ask(self, units: tuple[int, ...], path: tuple[int, ...]) -> int:
        hits = next((n for n, unit in enumerate(units) if unit not in self.used), len(units))
        for unit in reversed(path):
            self.clock += 1
            self.used[unit] = self.clock
            if len(self.used) > self.size:
                del self.used[min(self.used, key=self.used.__getitem__)]
        return hits


@pytest.mark.parametrize("family", ["chat", "rag", "documents"])
def test_an_engines_hits_are_those_of_a_plain_lru(family: str) -> None:
    trace = make_trace(family, 2, 4000)
    truth = SlowLru(100)
    hits = sum(truth.ask(one.path[: one.prompt_chunks], one.path) for one in trace)
    assert hits > 100
    apart = [(10.0 * number, one) for number, one in enumerate(trace)]
    assert Run(ONE, FAST, apart, 0).run().units["gpu"] == hits


def test_a_larger_cache_never_has_less() -> None:
    trace = [(10.0 * n, one) for n, one in enumerate(make_trace("chat", 4, 4000))]
    found = []
    for units in (20, 50, 100, 300):
        fleet = replace(ONE, gpu_cache_gib=units * UNIT * 1024 / GIB)
        found.append(Run(fleet, FAST, trace, 0).run().units["gpu"])
    assert found == sorted(found)
    assert found[0] < found[-1]


# --------------------------------------------------------------- conservation
@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("family", ["chat", "rag", "documents"])
def test_what_goes_in_comes_out(family: str, blend: bool) -> None:
    fleet = replace(SMALL, blend=blend, save_gb_s=8.0, pool_get_gb_s=20.0, pool_put_gb_s=20.0)
    run, totals = played(fleet, family)
    given = small(family, 1, fleet)
    size, counts = UNIT * measured().kv_bytes, run.store.counts
    assert sum(totals.units.values()) == sum(one.prompt_chunks for _, one in given)
    assert len(totals.ttft_s) == len(given)
    assert min(totals.units.values()) >= 0
    assert (totals.units["blended"] > 0) == (blend and family == "documents")
    site = run.site
    inward = sum(host.inward.amount for host in site.hosts)
    assert inward == sum(node.outward.amount for node in site.nodes) == counts["pool"]
    outward = sum(host.outward.amount for host in site.hosts)
    assert outward == sum(node.inward.amount for node in site.nodes) > 0
    loaded = sum(engine.load.amount for engine in site.engines)
    assert loaded == sum(counts[tier] for tier in ("memory", "disk", "pool")) > 0
    assert sum(engine.save.amount for engine in site.engines) == totals.saved["kept"] * size
    assert totals.network_bytes <= inward + outward
    for kind, (mean, most) in totals.busy.items():
        assert 0 <= mean <= most <= 1 + 1e-9, kind
    assert all(one.worker.requests == one.worker.prefill_tokens == 0 for one in site.engines)


def test_tiers_hold_no_more_than_they_were_given() -> None:
    run, _ = played(replace(SMALL, memory_gib=4, pool_gib=8, save_gb_s=8))
    unit = UNIT * measured().kv_bytes
    for host in run.site.hosts:
        assert 0 < len(host.memory._heats) <= 4 * GIB // unit
    for node in run.site.nodes:
        assert 0 < len(node.units.chunks) <= 8 * GIB // unit


# ----------------------------------------------------------------- behaviours
def test_the_same_seed_gives_the_same_run() -> None:
    assert played()[1] == played()[1]
    assert played(seed=1)[1] != played(seed=2)[1]


def test_more_of_a_thing_is_not_worse() -> None:
    bare, stored = (played(replace(SMALL, store=on))[1] for on in (False, True))
    assert stored.units["computed"] < bare.units["computed"]
    slow, fast = (played(replace(SMALL, save_gb_s=speed))[1] for speed in (0.2, 8.0))
    assert fast.saved["dropped"] < slow.saved["dropped"]
    assert fast.units["computed"] < slow.units["computed"]
    calm, busy = (played(replace(SMALL, tokens_s=rate))[1] for rate in (10_000, 60_000))
    assert sum(calm.ttft_s) < sum(busy.ttft_s)


def test_a_pool_that_is_slower_than_computing_is_left_alone() -> None:
    """As `load: auto` does: but for what it takes to measure it, now and then."""
    trace = make_trace("rag", 1, 8000, 2)
    found = []
    for speed in (20.0, 0.5):
        fleet = replace(SMALL, engines=4, host_engines=1, save_gb_s=8, pool_get_gb_s=speed,
                        pool_put_gb_s=20, memory_gib=2, disk_gib=0, pool_gib=512)  # fmt: skip
        given = scale.arrivals(trace, fleet, 1)
        found.append(Run(fleet, measured(), given, 0, 1).run())
    fast, slow = found
    assert fast.units["pool"] > 100
    assert slow.units["pool"] < fast.units["pool"] / 3


def test_routing_by_prefix_finds_more_than_in_turn() -> None:
    bare = replace(SMALL, store=False)
    found = [played(replace(bare, routing=way))[1].units["gpu"] for way in ("robin", "prefix")]
    assert found[1] > 1.2 * found[0]


def test_routers_have_equally_many_engines() -> None:
    run = Run(replace(SMALL, engines=33), FAST, [], 0)
    assert sorted(len(cell) for cell in run._cells) == [16, 17]
    assert len({id(one) for cell in run._cells for one in cell}) == 33


def test_documents_stand_where_the_trace_says() -> None:
    for request in make_trace("documents", 5, 2000):
        assert request.prompt_chunks == len(request.path)
        ends = [start + len(alone) for start, alone in request.texts]
        starts = [start for start, _ in request.texts]
        assert starts[1:] == ends[:-1]
        assert ends[-1] == len(request.path) - 1  # the question
        assert len({alone for _, alone in request.texts}) == len(request.texts)


# --------------------------------------------------------------- command line
def test_quick_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--quick", "--json", "--engines", "10", "--traces", "documents"])
    told = json.loads(capsys.readouterr().out)
    assert [row["store"] for row in told["rows"]] == ["no", "yes", "blend"]
    for row in told["rows"]:
        assert sum(row[source] for source in scale.SOURCES) == pytest.approx(1)
        assert row[f"busy {row['busiest']}"] == max(
            share for name, share in row.items() if name.startswith("busy ")
        )
    assert len(told["bars"]) == 2
    assert list(told["machine"]) == list(machine())


def test_a_file_of_mooncakes_format_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "public.jsonl"
    line = {"timestamp": 0, "input_length": 1500, "output_length": 3, "hash_ids": [7, 8, 9]}
    lines = [json.dumps({**line, "timestamp": 1000 * n}) for n in range(6)]
    file.write_text("\n".join(lines))
    scale.main(["--json", "--engines", "1", "--trace-file", str(file)])
    bare, _ = json.loads(capsys.readouterr().out)["rows"]
    assert (bare["trace"], bare["requests"], bare["gpu"]) == ("public", 3, 1.0)
    assert len(scale.read_trace(file, 4)) == 4
    for wrong in ("{", "[]", '{"timestamp": 0}', '{"timestamp": 0, "hash_ids": ["x"]}'):
        file.write_text(f"{lines[0]}\n{wrong}\n")
        with pytest.raises(ValueError, match="line 2"):
            scale.read_trace(file, 9)
    with pytest.raises(SystemExit):
        scale.main(["--trace-file", str(file)])
    assert "hash_ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--routing", "best"], "use one of prefix, robin"),
        (["--engines", "0"], "engines is 0"),
        (["--memory-gib", "-1"], "memory_gib is -1"),
        (["--router-engines", "300"], "at most 256"),
        (["--save-gb-s", "2.5", "--busy", "0.0"], "busy is 0.0"),
    ],
)
def test_assumptions_that_make_no_sense_are_one_error(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scale.main(["--quick", *words])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_bars_compare_with_no_store() -> None:
    def row(store: str, p50: float) -> dict[str, Any]:
        return {"trace": "chat", "engines": 10, "store": store, "ttft_p50": p50}

    [bar] = scale.bars([row("no", 2.0), row("yes", 1.0)])
    assert (bar.value, bar.ok) == (0.5, True)
    assert not scale.bars([row("no", 1.0), row("yes", 1.1)])[0].ok


# ------------------------------------------------------- beside the real thing
def test_real_prompts_share_what_units_share() -> None:
    one, two = scale_real.tokens_of([1, 2, 3]), scale_real.tokens_of([1, 2, 4])
    assert one[: 2 * scale_real.UNIT_TOKENS] == two[: 2 * scale_real.UNIT_TOKENS]
    assert one[2 * scale_real.UNIT_TOKENS :] != two[2 * scale_real.UNIT_TOKENS :]
    assert 0 < min(one) <= max(one) < scale_real.VOCAB
    given = scale_real.trace_of(replace(ONE, unit_tokens=scale_real.UNIT_TOKENS), 50, 0)
    assert len(given) == 50
    longest = max(len(request.path) for _, request in given)
    assert longest * scale_real.UNIT_TOKENS < scale_real.MODEL_LEN


def test_costs_of_real_engines_are_lines_that_noise_does_not_bend() -> None:
    took = {
        name: [
            (n, 0.01 + slope * n * (9 if one == 0 else 1)) for n in (500, 1000) for one in (0, 1, 2)
        ]
        for name, slope in (("cold", 1e-3), ("own", 0.0), ("saved", 2e-3), ("memory", 1e-5))
    }
    plain, saved = scale_real.costs_of(took)
    assert plain.compute_s(0, 2000) == pytest.approx(2.01)
    assert saved.compute_s(1000, 2000) == pytest.approx(2.0)
    assert plain.floor(2000) == pytest.approx(0.01)
    assert plain.load_bytes_s == pytest.approx(scale_real.KV_BYTES / 1e-5)


def test_a_slower_machine_takes_so_many_times_as_long() -> None:
    slow, costs = scale_real.slower(measured(), 3.0), measured()
    assert slow.compute_s(1000, 9000) == pytest.approx(3 * costs.compute_s(1000, 9000))
    assert slow.floor(5000) == pytest.approx(3 * costs.floor(5000))
    assert 3 * slow.load_bytes_s == pytest.approx(costs.load_bytes_s)


def test_real_engines_are_two_at_least(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scale_real.main(["--engines", "1"])
    assert "2 and more" in capsys.readouterr().err


def test_rows_set_real_and_simulated_side_by_side() -> None:
    was = scale_real.Seen([0.1, 0.2, 0.4], 50, 100)
    told = scale_real.Seen([0.1, 0.3, 0.4], 40, 100)
    row = scale_real.row_of(ONE, was, told)
    assert (row["hit_rate"], row["hit_simulated"]) == (0.5, 0.4)
    assert row["error_p50"] == pytest.approx(0.5)


def test_leading_stops_at_the_first_that_is_missing() -> None:
    run = Run(ONE, FAST, [(0.0, Request((1, 2, 3), 3))], 0)
    run.run()
    cache = run.site.engines[0].cache
    assert [leading(cache, units) for units in ([1, 2, 3], [1, 9, 3], [9], [])] == [3, 1, 0, 0]
