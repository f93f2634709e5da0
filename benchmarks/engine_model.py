"""Which model an engine benchmark runs, and the store folder that it leaves nothing of.

What must hold: the same arguments mean the same model in every benchmark.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.demo import forget_memory
from benchmarks.model import demo_text, make_model
from prefixstore.codec import LOSSY_NAMES, NONE


def chosen_model(
    folder: Path | None, small_gib: float, large_gib: float
) -> tuple[Path, dict[str, Any]]:
    """A model's folder, and what an engine is told about it; sizes are those of its KV cache.

    Without a folder a small model is made, in float32 for a CPU. One that has no weights, only a
    config.json, gets random ones: enough for every time.
    """
    if folder is None:
        made = make_model(None, text=demo_text(), layers=4, hidden=256)
        return made, {"dtype": "float32", "kv_cache_gib": small_gib}
    if any(folder.glob("*.safetensors")):
        return folder, {"kv_cache_gib": large_gib}
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True}
    return folder, {**dummy, "kv_cache_gib": large_gib}


GRAPHS = {"decode": "FULL_DECODE_ONLY", "all": "FULL"}


def add_graphs(parser: argparse.ArgumentParser) -> None:
    """Which steps are CUDA graphs, as a server's are."""
    parser.add_argument(
        "--cuda-graphs", nargs="?", const="decode", choices=GRAPHS,
        help="for steps that only decode, or for all of up to 512 tokens; without them the host's "
        "speed is part of every figure",
    )  # fmt: skip


def add_codec(parser: argparse.ArgumentParser) -> None:
    """Whether the engine rounds its KV."""
    parser.add_argument(
        "--codec", choices=(NONE, *LOSSY_NAMES), default=NONE,
        help="that the engine rounds its KV by: answers may differ then, and are only counted",
    )  # fmt: skip


def graphs(args: argparse.Namespace) -> dict[str, Any]:
    """What an engine is told about that. Nothing is compiled: that takes a minute."""
    if args.cuda_graphs is None:
        return {}
    compilation = {"mode": 0, "cudagraph_mode": GRAPHS[args.cuda_graphs]}
    return {"enforce_eager": False, "compilation_config": compilation}


@contextmanager
def store_folder(within: Path | None = None) -> Iterator[Path]:
    """Where a store may be made, in a folder of its own; it and its memory tier go at the end."""
    with tempfile.TemporaryDirectory(prefix="prefixstore-bench-", dir=within) as name:
        folder = Path(name) / "store"
        try:
            yield folder
        finally:
            forget_memory(folder)
