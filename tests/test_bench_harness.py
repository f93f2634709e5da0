"""The benchmark harness: made models, the engine's child process, tables and bars."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from benchmarks.engine import Answer, Engine, EngineDied, EngineError, Request
from benchmarks.engine_nursery import nursery_for
from benchmarks.engine_process import (
    REPO_ROOT,
    child_environment,
    has_exited,
    session_members,
    spawn,
)
from benchmarks.model import demo_text, make_model, tokenize
from benchmarks.table import Bar, add_arguments, machine, print_table, report, spread, told_so_far

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
MODEL_FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
SMALL: dict[str, Any] = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "vocab": 512}


def wait_until_gone(session: int) -> None:
    deadline = time.monotonic() + 20
    while session_members(session):
        assert time.monotonic() < deadline, f"left behind: {session_members(session)}"
        time.sleep(0.02)


# --- model ---------------------------------------------------------------------------------------


def test_demo_text_is_long_enough_under_a_vocabulary_of_1024(tmp_path: Path) -> None:
    text = demo_text()
    model = make_model(tmp_path / "m", text=text, layers=1)
    assert len(tokenize(model, text)) >= 3500
    assert text.startswith((REPO_ROOT / "LICENSE").read_text(encoding="utf-8")[:100])


def test_a_model_is_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    text = demo_text()
    here = make_model(tmp_path / "here", text=text, **SMALL)
    code = (
        "import json, sys; from benchmarks.model import demo_text, make_model;"
        "make_model(sys.argv[1], text=demo_text(), **json.loads(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there"), json.dumps(SMALL)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "PYTHONHASHSEED": "7"},
        check=True,
        timeout=60,
    )
    for name in MODEL_FILES:
        assert (here / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_a_model_is_reused_only_for_the_same_parameters(tmp_path: Path) -> None:
    text = demo_text()
    weights = make_model(tmp_path / "m", text=text, **SMALL) / "model.safetensors"
    first, content = weights.stat().st_ino, weights.read_bytes()
    make_model(tmp_path / "m", text=text, **SMALL)
    assert weights.stat().st_ino == first
    make_model(tmp_path / "m", text=text, seed=1, **SMALL)
    assert weights.read_bytes() != content
    assert [path.name for path in tmp_path.iterdir()] == ["m"]  # nothing half-built is left


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match="not a made model"):
        make_model(tmp_path, text="text", **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arch": "gpt2"}, "use one of llama"),
        ({"dtype": "int8"}, "use one of float32"),
        ({"heads": 8, "kv_heads": 3}, "must be a multiple"),
        ({"vocab": 100}, "need 257"),
        ({"layers": 0}, "1 or more"),
        ({"head_dim": 33}, "even"),
        ({"arch": "qwen2", "head_dim": 64}, "leave head_dim out"),
    ],
)
def test_impossible_parameters_are_refused(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(tmp_path / "m", text="text", **{**SMALL, **wrong})
    assert not (tmp_path / "m").exists()


def test_the_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model = make_model(tmp_path / "m", text=demo_text(), **SMALL)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = "Grant of Copyright  Licence,\n\tnaïve \U0001f600 \x00 end"
    assert tokenizer.decode(tokenize(model, text)) == text
    assert len(tokenize(model, demo_text())) < len(demo_text()) / 1.5  # it has learnt merges


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_answers_vary_and_a_wrong_chunk_shows(tmp_path: Path, arch: str) -> None:
    """Independent truth: the transformers library's own implementation of the architecture."""
    import torch

    transformers = pytest.importorskip("transformers")
    text = (REPO_ROOT / "LICENSE").read_text()  # what changes with the docs would vary at random
    folder = make_model(tmp_path / "m", text=text, arch=arch)
    ids = tokenize(folder, text)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def answer(prompt: list[int]) -> list[int]:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        return list(made[0, len(prompt) :].tolist())

    prompts = [ids[start : start + 300] for start in (0, 700, 1400)]
    answers = [answer(prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in answers}) == len(prompts)
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(set(tokens)) >= 6
        swapped = [*prompt[:64], *ids[3000:3064], *prompt[128:]]
        assert answer(swapped) != tokens


# --- the child process, without vLLM -------------------------------------------------------------


@pytest.mark.parametrize("forked", [False, True])
def test_the_child_dies_with_a_killed_parent(tmp_path: Path, forked: bool) -> None:
    if forked:
        pytest.importorskip("vllm")
    code = (
        "import os, sys; from pathlib import Path;"
        "from benchmarks.engine_process import child_environment, spawn;"
        "forked = sys.argv[2] == 'True';"
        "child = spawn(Path(sys.argv[1]), child_environment(), forked=forked);"
        "print(child[0].pid, flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log"), str(forked)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert session_members(child) == [child]
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=20)
    wait_until_gone(child)


@pytest.mark.parametrize("forked", [False, True])
def test_the_child_answers_a_bad_command_and_goes_on(tmp_path: Path, forked: bool) -> None:
    if forked:
        pytest.importorskip("vllm")
    process, to_child, from_child = spawn(tmp_path / "log", child_environment(), forked=forked)
    with os.fdopen(to_child, "w") as commands, os.fdopen(from_child) as replies:
        for serial, command in enumerate(["settle", "no such command", "shutdown"]):
            arguments = {"seconds": 1} if command == "settle" else {}
            commands.write(json.dumps({"id": serial, "command": command, **arguments}) + "\n")
            commands.flush()
            reply = json.loads(replies.readline())
            assert (reply["id"], reply["ok"]) == (serial, command == "shutdown")
            if command == "settle":
                assert "send start first" in reply["error"]
        assert process.wait(timeout=20) == 0


def test_an_engine_that_does_not_come_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def recording_spawn(*args: Any, **kwargs: Any) -> Any:
        result = spawn(*args, **kwargs)
        started.append(result[0].pid)
        return result

    monkeypatch.setattr("benchmarks.engine.spawn", recording_spawn)
    with pytest.raises(EngineDied, match=r"deadline|did not start"):
        Engine(tmp_path, log=tmp_path / "log", start_timeout_s=0.2)
    assert len(started) == 1
    assert session_members(started[0]) == []


def test_a_forked_child_is_killed_and_told_of(tmp_path: Path) -> None:
    """By a signal of its own, and with its nursery; the next one has another nursery."""
    pytest.importorskip("vllm")
    env = child_environment(extra={"PREFIXSTORE_TEST": "apart"})
    for with_nursery in (False, True):
        child, *pipes = spawn(tmp_path / "log", env, forked=True)
        assert not has_exited(child.pid)
        if with_nursery:
            nursery = nursery_for(env).process
            nursery.kill()
            nursery.wait(timeout=20)
        os.kill(child.pid, signal.SIGKILL)
        wait_until_gone(child.pid)
        assert child.wait(timeout=20) == -signal.SIGKILL
        assert has_exited(child.pid)
        for pipe in pipes:
            os.close(pipe)


def test_arguments_that_are_no_json_start_no_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON values"):
        Engine(tmp_path, log=tmp_path / "log", dtype=object())
    with pytest.raises(ValueError, match="kv_cache_gib"):
        Engine(tmp_path, log=tmp_path / "log", kv_cache_gib=0)
    assert not (tmp_path / "log").exists()


def test_the_child_environment_splits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    env = child_environment(2, extra={"HF_HUB_OFFLINE": "0"})
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env
    assert env["HF_HUB_OFFLINE"] == "0"
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(REPO_ROOT)
    assert child_environment(8)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_an_answer_survives_json_bit_for_bit() -> None:
    rows = [{7: -0.1234567165374756, 3: float("-inf")}]
    given = Answer([7], "x", rows, [None, rows[0]], 3, 1.5, 2.5, 0, 4, "length", {"a": 1})
    value = json.loads(json.dumps(given.__dict__))
    assert Answer.from_json(value) == given


# --- a real engine -------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_a_real_engine_answers_staggers_aborts_and_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    text = demo_text()
    model = make_model(None, text=text)
    ids = tokenize(model, text)
    with Engine(
        model,
        log=tmp_path / "engine.log",
        start_timeout_s=300,
        kv_cache_gib=0.25,
        dtype="float32",
        block_size=32,
        max_model_len=4096,
        max_num_batched_tokens=2048,
        enable_prefix_caching=True,
    ) as engine:
        prompt = ids[:3000]
        cold, warm = (engine.generate([prompt], max_tokens=8, logprobs=3)[0] for _ in range(2))
        assert (cold.cached_tokens, warm.cached_tokens) == (0, 2976)  # whole blocks below the last
        assert warm.token_ids == cold.token_ids
        assert cold.ttft_ms is not None
        assert warm.ttft_ms is not None
        assert warm.ttft_ms < cold.ttft_ms < cold.total_ms
        assert cold.first_token_step == 1  # 3000 tokens at 2048 a step
        assert cold.logprobs is not None
        for token, row in zip(cold.token_ids, cold.logprobs, strict=True):
            assert max(row, key=lambda key: row[key]) == token
        assert engine.metrics("vllm:prefix_cache_hits")["vllm:prefix_cache_hits_total"] == 2976
        assert engine.reset_prefix_cache()
        assert engine.generate([prompt], max_tokens=1)[0].cached_tokens == 0

        late, gone = engine.submit(
            [
                Request(ids[:100], max_tokens=4, arrival_step=3),
                Request(ids[500:600], max_tokens=64, abort_at_step=5),
            ]
        )
        assert (late.first_token_step, late.last_step, late.finish_reason) == (3, 6, "length")
        assert (len(gone.token_ids), gone.last_step, gone.finish_reason) == (5, 5, "abort")
        alone = engine.generate([ids[:100], ids[500:600]], max_tokens=5)
        assert alone[0].token_ids[:4] == late.token_ids
        assert alone[1].token_ids == gone.token_ids

        began = time.monotonic()
        first, second, later = engine.submit(
            [
                Request(ids[3:3003], max_tokens=1, arrival_s=0.0),
                Request(ids[:100], max_tokens=4, arrival_s=0.001),
                Request(ids[500:600], max_tokens=5, arrival_s=2.0),
            ]
        )
        assert time.monotonic() - began >= 2.0 + later.total_ms / 1e3
        assert (second.token_ids, later.token_ids) == (late.token_ids, gone.token_ids)
        assert first.ttft_ms is not None
        assert second.ttft_ms is not None
        assert second.ttft_ms > first.ttft_ms / 2, "it waited for a step that had begun"

        with pytest.raises(EngineError, match="4096"):
            engine.generate([ids[:100], ids[:5000]])
        assert engine.settle()
        assert engine.generate("Licensed under", max_tokens=3)[0].finish_reason == "length"

        threading.Timer(0.2, engine.kill).start()
        with pytest.raises(EngineDied, match="status -9"):
            engine.generate([ids[1000:4000]], max_tokens=1000)
        assert not engine.alive
        assert session_members(engine.pid) == []


# --- table ---------------------------------------------------------------------------------------


def arguments(*given: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser()).parse_args(given)


ROWS: list[dict[str, object]] = [
    {"case": "cold", "ttft_ms": 1234.56, "hits": 0, "same": None},
    {"case": "warm restart", "ttft_ms": 5.678, "hits": 2976, "same": True},
]


def test_the_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", list(ROWS[0]), [list(row.values()) for row in ROWS])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "case          ttft_ms  hits  same",
        "------------  -------  ----  ----",
        "cold             1235     0  -",
        "warm restart     5.68  2976  yes",
    ]


def test_what_ends_early_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [{"case": "cold", "ms": 12}]
    with pytest.raises(SystemExit), told_so_far("Times", lambda: rows):
        sys.exit(143)
    told = capsys.readouterr()
    assert told.out == ""
    assert "Times: as far as it came" in told.err
    assert "cold  12" in told.err
    with told_so_far("Times", lambda: rows):
        pass
    assert capsys.readouterr().err == ""


def test_a_ragged_table_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells"):
        print_table("t", ["a", "b"], [[1]])
    with pytest.raises(ValueError, match="keys"):
        report("t", [{"a": 1}, {"b": 1}], [], arguments())


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [{"case": "x", "value": float("nan")}]
    report("t", rows, [Bar("fast", 2.0, 1.0, ">=")], arguments("--json", "--check"))
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert set(result) == {"title", "rows", "bars", "machine"}
    assert result["rows"] == [{"case": "x", "value": None}]
    assert result["bars"] == [{"name": "fast", "value": 2.0, "op": ">=", "limit": 1.0, "ok": True}]
    assert "case" in err


def test_check_names_each_missed_bar_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    bars = [
        Bar("speedup", 4.0, 5.0, ">="),
        Bar("loss", 0.0, 0.0, "<="),
        Bar("never run", None, 1.0, "<"),
        Bar("broken", float("nan"), 1.0, "<"),
    ]
    report("t", ROWS, bars, arguments())  # without --check a missed bar is only told
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        report("t", ROWS, bars, arguments("--check"))
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "bar missed: speedup: 4, wanted >= 5, short by 1 (20.0 %)",
        "bar missed: never run: not measured, wanted < 1",
        "bar missed: broken: not measured, wanted < 1",
    ]


def test_a_bar_needs_a_known_comparison() -> None:
    with pytest.raises(ValueError, match="use one of"):
        Bar("x", 1.0, 1.0, "=<")


def test_spread_and_machine() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    with pytest.raises(ValueError, match="at least once"):
        spread([])
    info = machine()
    assert info["cores"] == len(os.sched_getaffinity(0))
    assert json.loads(json.dumps(info)) == info
