"""The table of fuzzing targets, by name."""

from __future__ import annotations

from benchmarks import (
    fuzz_answers,
    fuzz_files,
    fuzz_index,
    fuzz_network,
    fuzz_pool,
    fuzz_records,
)
from benchmarks.fuzz_target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (fuzz_records, fuzz_index, fuzz_network, fuzz_answers, fuzz_files, fuzz_pool)
    for target in module.TARGETS
}
