"""What holds for all tests: no network, no telemetry, and engine tests only where vLLM is."""

from __future__ import annotations

import importlib.util
import os

import pytest

# Set before anything imports vLLM or transformers: both read these once, at import.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``engine`` where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is not None:
        return
    skip = pytest.mark.skip(reason="vLLM is not installed; scripts/setup installs it")
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(skip)
