"""What workers say of themselves: their load, models, the shape of their cache, their identity.

Each is asked once a second; one that fails to answer a few times in a row gets no requests until
it does. What must hold: every question has a deadline and a bound, and a page that is no page of
metrics is a failed poll, nothing worse.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout

from prefixstore.route import limits
from prefixstore.route.asked import read_most
from prefixstore.route.workers import Load, Worker

_TIMEOUT = ClientTimeout(total=limits.POLL_ANSWER_S, sock_connect=limits.CONNECT_S)
_LINE = re.compile(
    r"^(vllm:num_requests_running|vllm:num_requests_waiting|vllm:kv_cache_usage_perc"
    r"|vllm:cache_config_info|prefixstore:identity_info|process_start_time_seconds)"
    r"(?:\{(.*)\})? (\S+)",
    re.MULTILINE,
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def lines_of(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample that matters here. Raises ValueError."""
    for name, labels, value in _LINE.findall(page):
        number = float(value)
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {value}")
        yield name, dict(_LABEL.findall(labels)), number


def take_metrics(worker: Worker, page: str) -> None:
    """Note what a page of metrics says; of several engines of one worker, in all. Raises
    ValueError."""
    load, blocks, shares, seen = Load(ours=worker.most_requests), 0, [0.0], False
    for name, labels, value in lines_of(page):
        seen = seen or name.startswith("vllm:")
        if name == "vllm:num_requests_running":
            load.running += value
        elif name == "vllm:num_requests_waiting":
            load.waiting += value
        elif name == "vllm:kv_cache_usage_perc":
            shares.append(value)
        elif name == "vllm:cache_config_info" and labels.get("num_gpu_blocks", "").isdigit():
            if labels.get("enable_prefix_caching") != "False":
                blocks += int(labels["num_gpu_blocks"])
            if labels.get("block_size", "").isdigit() and int(labels["block_size"]):
                worker.known.shape(int(labels["block_size"]), blocks)
        elif name == "prefixstore:identity_info" and not worker.spec.identity:
            worker.identity = labels.get("identity", "")
        elif name == "process_start_time_seconds" and value != worker.started_s:
            if worker.started_s:
                worker.known.restart()
            worker.started_s = value
    if not seen:
        raise ValueError("no page of vLLM's metrics")
    load.cache_share = max(shares)
    worker.load, worker.most_requests = load, worker.requests


async def poll(session: ClientSession, worker: Worker) -> None:
    """Ask once. Raises ClientError, OSError, ValueError, TimeoutError."""
    page = await _text(session, f"{worker.spec.url}/metrics")
    if not worker.answers or time.monotonic() - worker.named_s > limits.MODELS_S:
        told = json.loads(await _text(session, f"{worker.spec.url}/v1/models"))
        worker.models, worker.named_s = cards_in(told), time.monotonic()
    take_metrics(worker, page)


def cards_in(told: Any) -> dict[str, dict[str, Any]]:
    """The models of an answer of ``/v1/models``, by name. Raises ValueError."""
    cards = told.get("data") if isinstance(told, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise ValueError("no list of models")
    return {str(card.get("id")): card for card in cards}


async def _text(session: ClientSession, url: str) -> str:
    async with session.get(url, timeout=_TIMEOUT, allow_redirects=False) as answer:
        if answer.status != 200:
            raise ValueError(f"{url} answers {answer.status}")
        return (await read_most(answer, limits.PAGE_BYTES_MAX)).decode()


async def watch(session: ClientSession, worker: Worker) -> None:
    """Poll for ever."""
    while True:
        try:
            await poll(session, worker)
            worker.answers, worker.failed_polls = True, 0
        except (ClientError, OSError, ValueError, RecursionError, asyncio.TimeoutError):
            worker.failed_polls += 1
            if worker.failed_polls >= limits.POLLS_FAILED_MAX:
                worker.answers = False
        await asyncio.sleep(limits.POLL_S)
