"""What each stage moves and computes, how fast, and how fast the machine could.

``python -m benchmarks.roofline [--json] [--quick] [--tokens 16384] [--rows 2048] [--dir FOLDER]``

Bytes are those a stage has to move, each read and each write once; FLOP are those of matrices and
of what a mask leaves of attention. Each limit is measured in the same run. Everywhere: the memory
tier, the hash and the disk tier of the host. With a GPU: copies to and from it, the kernels that
move, hash and rotate KV, attention and matrices of rows that are recomputed, and a whole load, for
a model of Llama-3.1-8B's shape (bfloat16, blocks of 16, chunks of 64 tokens).

``held_by`` is what holds back the rest: the limit itself (over .9 of it); the host, where its calls
take as long as the GPU's work; for a stage made of others, what they take; else the stage itself.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.roofline_host import PAYLOAD_KIB, host_stages
from benchmarks.roofline_rows import Row
from benchmarks.store import DEFAULT_DIR
from benchmarks.table import add_arguments, report

QUICK_KIB = 128


def measure(args: argparse.Namespace) -> list[Row]:
    """All stages."""
    parent = Path(args.dir)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prefixstore-bench-", dir=parent) as name:
        folder = Path(name)
        print("host ...", file=sys.stderr, flush=True)
        kib = QUICK_KIB if args.quick else PAYLOAD_KIB
        stages = host_stages(folder, args.data_mib << 20, args.rounds, kib)
        if torch.cuda.is_available():
            from benchmarks.roofline_gpu import gpu_stages

            print("GPU ...", file=sys.stderr, flush=True)
            stages += gpu_stages(folder, args.tokens, args.rows)
    return [stage.row() for stage in stages]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--tokens", type=int, default=16384, help="moved on a GPU")
    parser.add_argument("--rows", type=int, default=2048, help="recomputed in one step")
    parser.add_argument("--dir", default=str(DEFAULT_DIR), help="a folder on the disk to measure")
    parser.add_argument("--data-mib", type=int, default=512, help="moved on the host")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each stage of the host")
    args = parser.parse_args(argv)
    if args.quick:
        args.data_mib, args.rounds, args.tokens = 16, 2, 2048
    report("stages beside the limits of this machine", measure(args), [], args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    main()
