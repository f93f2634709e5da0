"""Statistics: adding up, the log line, and what Prometheus gets to see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from connector.stats import SAMPLES_MAX, PrefixStoreProm, PrefixStoreStats

COUNTS = {
    "tokens_hit_1": 128, "tokens_hit_2": 64, "bytes_loaded_1": 4096, "miss_absent": 2,
    "bytes_loaded_4": 512,
    "bytes_saved": 100, "chunks_saved": 3, "loads_failed": 1,
}  # fmt: skip


def test_reports_add_up() -> None:
    one = PrefixStoreStats.of({"chunks_saved": 1, "miss_absent": 2}, [0.5], [])
    other = PrefixStoreStats.of({"chunks_saved": 4, "bytes_saved": 7}, [0.25], [1.0])
    total = one.aggregate(other)
    assert total.data == {
        "counts": {"chunks_saved": 5, "miss_absent": 2, "bytes_saved": 7},
        "load_seconds": [0.5, 0.25],
        "save_seconds": [1.0],
    }
    assert PrefixStoreStats().aggregate(one).data["counts"] == one.data["counts"]


def test_samples_are_bounded() -> None:
    full = PrefixStoreStats.of({}, [0.1] * SAMPLES_MAX, [])
    assert len(full.aggregate(full).data["load_seconds"]) == SAMPLES_MAX


def test_empty_is_empty() -> None:
    assert PrefixStoreStats().is_empty()
    assert PrefixStoreStats.of({}, [], []).is_empty()
    stats = PrefixStoreStats.of({"chunks_saved": 1}, [], [])
    assert not stats.is_empty()
    assert not PrefixStoreStats.of({}, [0.1], []).is_empty()
    stats.reset()
    assert stats.is_empty()


def test_a_report_does_not_keep_the_callers_dict() -> None:
    counts = {"chunks_saved": 1}
    stats = PrefixStoreStats.of(counts, [], [])
    counts["chunks_saved"] = 9
    assert stats.data["counts"] == {"chunks_saved": 1}


def test_the_log_line() -> None:
    flat = PrefixStoreStats.of(COUNTS, [0.3, 0.1, 0.2], []).reduce()
    assert flat["tokens_hit_memory"] == 128
    assert flat["tokens_hit_disk"] == 64
    assert flat["load_seconds_median"] == 0.2
    assert "save_seconds_median" not in flat
    assert all(isinstance(value, int | float) for value in flat.values())


class Samples:
    """The metrics on a registry of their own, and a way to read them."""

    def __init__(self, identity: str = "") -> None:
        registry = CollectorRegistry()

        def on(kind: Any) -> Any:
            return lambda **options: kind(registry=registry, **options)

        kinds: dict[type[Any], Any] = {kind: on(kind) for kind in (Counter, Gauge, Histogram)}
        self.registry = registry
        config = SimpleNamespace(kv_transfer_config=None)
        labels: dict[int, list[object]] = {0: ["m", "0"], 1: ["m", "1"]}
        self.prom = PrefixStoreProm(config, kinds, ["model_name", "engine"], labels, identity)

    def __call__(self, name: str, engine: int = 0, **labels: str) -> float | None:
        full = {"model_name": "m", "engine": str(engine), **labels}
        return self.registry.get_sample_value(f"prefixstore:{name}", full)


@pytest.fixture
def samples() -> Samples:
    return Samples()


def test_zeros_show_from_the_start(samples: Samples) -> None:
    for tier in ("memory", "disk"):
        assert samples("tokens_hit_total", tier=tier) == 0
        assert samples("bytes_loaded_total", tier=tier) == 0
    assert samples("bytes_loaded_total", tier="device") == 0
    assert samples("tokens_hit_total", tier="device") is None, "it is the store that is asked"
    reasons = ("absent", "not_needed", "slower_to_load", "bypassed", "stalled", "error")
    for reason in reasons:
        assert samples("misses_total", reason=reason) == 0
    for name in ("chunks_saved", "bytes_saved", "loads_failed", "bad_params", "save_errors"):
        assert samples(f"{name}_total", engine=1) == 0
    assert samples("load_seconds_count") == samples("save_seconds_count") == 0


def test_counts_arrive_under_their_labels(samples: Samples) -> None:
    data = PrefixStoreStats.of(COUNTS, [0.002, 5.0], [0.5]).data
    samples.prom.observe(data)
    samples.prom.observe(data)
    samples.prom.observe(data, 1)
    assert samples("tokens_hit_total", tier="memory") == 256
    assert samples("tokens_hit_total", tier="disk") == 128
    assert samples("bytes_loaded_total", tier="memory") == 8192
    assert samples("bytes_loaded_total", tier="device") == 1024
    assert samples("misses_total", reason="absent") == 4
    assert samples("chunks_saved_total") == 6
    assert samples("chunks_saved_total", engine=1) == 3
    assert samples("load_seconds_count") == 4
    assert samples("load_seconds_sum") == pytest.approx(2 * 5.002)
    assert samples("load_seconds_bucket", le="0.003") == 2
    assert samples("save_seconds_count", engine=1) == 1


def test_the_identity_shows_where_there_is_one(samples: Samples) -> None:
    assert samples("identity_info", identity="") is None
    shown = Samples(identity="ab12")
    assert shown("identity_info", engine=1, identity="ab12") == 1


def test_a_count_of_another_version_is_passed_over(samples: Samples) -> None:
    samples.prom.observe({"counts": {"something_new": 3, "chunks_saved": 1}})
    assert samples("chunks_saved_total") == 1
