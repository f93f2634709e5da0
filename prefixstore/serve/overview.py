"""The overview: what a `Recorder` holds, as one JSON object with stable names.

`GET /v1/overview`, the page at `/` and `prefixstore top` show the same numbers. Texts are named by
the key of their first chunk and the tag it was stored with; no tokens. A tenant's tags are its own
affair: those of others than `local` are left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import prefixstore
from prefixstore.glance import Glance
from prefixstore.serve.recorder import FLOWS, SAMPLE_S, WINDOW_S, Recorder, Sample
from prefixstore.serve.sketches import PERCENTS, percentile

SPACES_SHOWN = 64
TEXTS_SHOWN = 16
CLIENTS_SHOWN = 64
MISSES_SHOWN = 32
ACTIVITY_SHOWN = 32
RATE_S = 10.0  # rates of the moment are over so many seconds
_FOUND = ("memory", "disk", "missing")
Owners = Mapping[bytes, str]  # namespace -> tenant


def overview(recorder: Recorder, owners: Owners, since_s: float = 0.0) -> dict[str, Any]:
    """The object. ``since_s`` (Unix seconds): leave out what of ``history`` is older."""
    now = time.time()
    glance = recorder.glance
    before = _sample_at(recorder, now - WINDOW_S)
    return {
        "version": prefixstore.__version__,
        "time_s": round(now, 3),
        "started_s": round(recorder.started_s, 3),
        "window_s": WINDOW_S,
        "tiers": {} if glance is None else glance.tiers,
        "found": {name: recorder.found[name] for name in _FOUND},
        "found_lately": {
            name: recorder.found[name] - (before.found[name] if before else 0) for name in _FOUND
        },
        "rates": _rates(recorder, now),
        "routes": _routes(recorder),
        "namespaces": _spaces(glance, owners),
        "namespaces_more": max(0, len(glance.spaces) - SPACES_SHOWN) if glance else 0,
        "texts": _texts(recorder, owners),
        "clients": _clients(recorder),
        "misses": _misses(recorder, owners),
        "activity": _activity(recorder, owners),
        "counters": {} if glance is None else glance.counters,
        "leases": 0 if glance is None else glance.leases,
        "being_stored": 0 if glance is None else glance.being_stored,
        "history": _history(recorder, since_s),
    }


def _sample_at(recorder: Recorder, time_s: float) -> Sample | None:
    """The last sample before that time, or the first there is; None: counts began after it."""
    found = None
    for sample in recorder.samples:
        if sample.time_s > time_s:
            break
        found = sample
    return found


def _rates(recorder: Recorder, now: float) -> dict[str, float]:
    names = ("received_bytes_s", "sent_bytes_s", "requests_s", *(f"{f}_s" for f in FLOWS))
    last = recorder.samples[-1] if recorder.samples else None
    first = _sample_at(recorder, now - RATE_S) or (recorder.samples[0] if last else None)
    if last is None or first is None or last.time_s <= first.time_s:
        return dict.fromkeys(names, 0.0)
    return _between(first, last)


def _between(first: Sample, last: Sample) -> dict[str, float]:
    """Amounts a second from one sample to another."""
    seconds = last.time_s - first.time_s
    amounts = {
        "received_bytes_s": last.received_bytes - first.received_bytes,
        "sent_bytes_s": last.sent_bytes - first.sent_bytes,
        "requests_s": last.requests - first.requests,
        **{f"{flow}_s": last.flows[flow] - first.flows[flow] for flow in FLOWS},
    }
    return {name: round(amount / seconds, 2) for name, amount in amounts.items()}


def _routes(recorder: Recorder) -> list[dict[str, Any]]:
    now = time.monotonic()
    shown = []
    for name, route in recorder.routes.items():
        lately = route.latencies.over(now, WINDOW_S)
        entry: dict[str, Any] = {
            "route": name,
            "requests": route.requests,
            "failed": route.failed,
            "requests_lately": lately.total(),
        }
        for percent in PERCENTS:
            seconds = percentile(lately, percent)
            entry[f"p{percent}_ms"] = None if seconds is None else round(1000 * seconds, 3)
        shown.append(entry)
    return sorted(shown, key=lambda entry: (-entry["requests_lately"], -entry["requests"]))


def _spaces(glance: Glance | None, owners: Owners) -> list[dict[str, Any]]:
    if glance is None:
        return []
    return [
        {**used.to_json(), "tenant": owners.get(used.record.identity.namespace)}
        for used in glance.spaces[:SPACES_SHOWN]
    ]


def _texts(recorder: Recorder, owners: Owners) -> list[dict[str, Any]]:
    return [
        {
            "key": key.hex(),
            "tag": recorder.tags.get(key),
            "namespace": text.namespace.hex(),
            "tenant": owners.get(text.namespace),
            "prompts": prompts,
            "found_tokens": text.found_tokens,
            "longest_tokens": text.longest_tokens,
        }
        for key, text, prompts in recorder.hottest(TEXTS_SHOWN)
    ]


def _clients(recorder: Recorder) -> list[dict[str, Any]]:
    clients = sorted(recorder.clients.items(), key=lambda pair: -pair[1].requests)
    return [
        {
            "tenant": tenant,
            "way": way,
            "requests": client.requests,
            "refused": client.refused,
            "received_bytes": client.received_bytes,
            "sent_bytes": client.sent_bytes,
            "last_s": round(client.last_s, 3),
        }
        for (tenant, way), client in clients[:CLIENTS_SHOWN]
    ]


def _misses(recorder: Recorder, owners: Owners) -> list[dict[str, Any]]:
    return [
        {
            "time_s": round(miss.time_s, 3),
            "tenant": miss.tenant,
            "namespace": miss.namespace.hex(),
            "key": miss.ref.key.hex(),
            "found_chunks": miss.found,
            "asked_chunks": miss.asked,
            "why": miss.why,
            "request_id": miss.request_id,
        }
        for miss in list(recorder.misses)[: -MISSES_SHOWN - 1 : -1]
    ]


def _activity(recorder: Recorder, owners: Owners) -> list[dict[str, Any]]:
    return [
        {
            "time_s": round(one.time_s, 3),
            "kind": one.kind,
            "tier": one.tier,
            "namespace": one.namespace.hex(),
            "tenant": owners.get(one.namespace),
            "chunks": one.chunks,
            "bytes": one.num_bytes,
        }
        for one in list(recorder.activity)[: -ACTIVITY_SHOWN - 1 : -1]
    ]


def _history(recorder: Recorder, since_s: float) -> dict[str, Any]:
    """Columns of equal length, oldest first; rates are those up to each sample."""
    samples = list(recorder.samples)
    pairs = [
        (one, other) for one, other in pairwise(samples) if other.time_s > max(since_s, one.time_s)
    ]
    columns: dict[str, list[float]] = {
        "time_s": [sample.time_s for _, sample in pairs],
        "memory_bytes": [sample.used.get("memory", 0) for _, sample in pairs],
        "disk_bytes": [sample.used.get("disk", 0) for _, sample in pairs],
    }
    for name in _FOUND:
        columns[f"found_{name}"] = [b.found[name] - a.found[name] for a, b in pairs]
    rates = [_between(a, b) for a, b in pairs]
    for name in ("received_bytes_s", "sent_bytes_s", "requests_s"):
        columns[name] = [one[name] for one in rates]
    return {"interval_s": SAMPLE_S, **columns}
