"""One fuzzing target under atheris, in a process of its own: ``python -m benchmarks.fuzz_child``.

``NAME FOLDER [libFuzzer's options]``. The code under test is instrumented as it is imported, so
nothing of it may be imported before. Findings are written to FOLDER/findings, one file for all that
fail alike, and the run goes on; only a crash, a hang or too much memory ends it (libFuzzer's files
are then in FOLDER too). What was learned is in FOLDER/corpus.
"""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path

import atheris


def main() -> None:
    """See the module docstring."""
    name, folder, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["prefixstore", "connector", "benchmarks"]):
        from benchmarks.fuzz_target import INPUT_BYTES_MAX
        from benchmarks.fuzz_targets import TARGETS
    target, out = TARGETS[name], Path(folder)
    corpus, findings = out / "corpus", out / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    for number, data in enumerate(target.corpus()):
        (corpus / f"seed-{number}").write_bytes(data)
    known = {json.loads(path.read_text())["where"] for path in findings.iterdir()}

    def one(data: bytes) -> None:
        found = target.check(data)
        if found is not None and found.where not in known:
            known.add(found.where)
            told = {
                "where": found.where,
                "text": found.text,
                "data": base64.b64encode(data).decode(),
            }
            (findings / f"{len(known)}.json").write_text(json.dumps(told))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return target.changed(data, rng)[:most]
        return bytes(atheris.Mutate(data, most))

    arguments = [
        sys.argv[0], str(corpus), f"-max_len={INPUT_BYTES_MAX}", f"-artifact_prefix={folder}/",
        "-print_final_stats=1", "-timeout=20", "-rss_limit_mb=4096", *options,
    ]  # fmt: skip
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
