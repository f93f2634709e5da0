"""The child side of `benchmarks.engine`: one vLLM engine that obeys JSON lines.

``python -m benchmarks.engine_child READ_FD WRITE_FD``; started by `benchmarks.engine.Engine` only.
Owns the engine.  What must hold: nothing but replies is written to WRITE_FD; when READ_FD ends the
parent is gone, and this process takes its whole group (the TP workers) down at once, even while the
main thread is inside vLLM.  It keeps nothing of its own, so a kill at any moment loses nothing.

Every batch goes through add_request/step rather than LLM.generate: that gives one request's time to
its first token without a second request, and arrivals and aborts at known steps.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.messages import Answer, Request

_MAX_QUEUED_COMMANDS = 16
_IDLE_STEP_S = 0.001  # a step shorter than this computed nothing: it waits for a transfer
_HIDDEN_LABELS = ("engine", "model_name")


class Child:
    """Holds the engine and carries out one command at a time."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._serial = 0

    def start(self, kwargs: dict[str, Any]) -> None:
        """Load the engine; ``kwargs`` are those of vLLM's LLM."""
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if isinstance(kwargs.get("kv_transfer_config"), dict):
            kwargs["kv_transfer_config"] = KVTransferConfig(**kwargs["kv_transfer_config"])
        self._llm = LLM(**kwargs)

    def submit(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run a batch to its end; one `Answer`, as a dict, per request."""
        began = time.perf_counter()
        running = [_Running(Request(**value), began) for value in requests]
        try:
            self._drive(running)
        finally:
            # A refused request must not leave its batch running into the next one.
            if left := [entry.id for entry in running if entry.open]:
                self._engine.abort_request(left)
        return [asdict(entry.answer()) for entry in running]

    def settle(self, seconds: float) -> bool:
        """Step until the scheduler waits for nothing; False if ``seconds`` were not enough."""
        deadline = time.monotonic() + seconds
        while self._waits():
            if time.monotonic() > deadline:
                return False
            self._step()
        return True

    def _waits(self) -> bool:
        """Whether the scheduler waits for something; never where the core steps by itself."""
        core = getattr(self._engine.engine_core, "engine_core", None)
        return core is not None and bool(core.scheduler.has_requests())

    def reset_prefix_cache(self, reset_connector: bool) -> bool:
        """Drop vLLM's own prefix cache."""
        self.settle(1.0)  # blocks of ended requests are freed by the step after them
        options = {"reset_connector": True} if reset_connector else {}
        return bool(self._engine.reset_prefix_cache(**options))

    def metrics(self, contains: list[str]) -> dict[str, float]:
        """This process's Prometheus samples whose name contains one of ``contains``; the word
        ``block_pool`` adds three of the scheduler's (only with the engine core in this process)."""
        from prometheus_client import REGISTRY

        found: dict[str, float] = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                if not any(part in sample.name for part in contains):
                    continue
                if sample.name.endswith("_created"):
                    continue
                labels = ",".join(
                    f'{name}="{value}"'
                    for name, value in sorted(sample.labels.items())
                    if name not in _HIDDEN_LABELS
                )
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found | (self._block_pool() if "block_pool" in contains else {})

    def _block_pool(self) -> dict[str, float]:
        """What vLLM's scheduler itself counts: blocks nobody holds, blocks, requests it knows."""
        scheduler = self._engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return {
            "block_pool:free": pool.get_num_free_blocks(),
            "block_pool:blocks": pool.num_gpu_blocks,
            "block_pool:requests": len(scheduler.requests),
        }

    def shutdown(self) -> None:
        """End the engine and its workers; the connector's own shutdown runs in here."""
        if self._llm is not None:
            self._engine.engine_core.shutdown()
            self._llm = None

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise RuntimeError("there is no engine; send start first")
        return self._llm.llm_engine

    def _step(self) -> list[Any]:
        began = time.perf_counter()
        outputs: list[Any] = self._engine.step()
        if not outputs and time.perf_counter() - began < _IDLE_STEP_S:
            time.sleep(_IDLE_STEP_S)  # leave the core to the thread that does the transfer
        return outputs

    def _drive(self, running: list[_Running]) -> None:
        step = 0
        by_id: dict[str, _Running] = {}
        while any(not entry.finished for entry in running):
            for entry in running:
                if entry.id == "" and entry.arrived(step):
                    self._add(entry)
                    by_id[entry.id] = entry
            for entry in running:
                limit = entry.request.abort_at_step
                if entry.open and limit is not None and limit <= step:
                    self._engine.abort_request([entry.id])
                    entry.finish("abort", step)
            if any(entry.open for entry in running):
                for output in self._step():
                    by_id[output.request_id].update(output, step)
            elif any(entry.request.arrival_s is not None for entry in running):
                self._idle()
            step += 1

    def _idle(self) -> None:
        """Until the next arrival the engine does what it does when nobody asks: transfers of
        requests that have ended."""
        if self._waits():
            self._step()
        else:
            time.sleep(_IDLE_STEP_S)

    def _add(self, entry: _Running) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        request = entry.request
        prompt: Any = request.prompt
        if isinstance(prompt, str):
            prompt = self._llm.get_tokenizer().encode(prompt, add_special_tokens=False)
        prompt = TokensPrompt(prompt_token_ids=prompt)
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        if request.image is not None:
            from PIL import Image

            with Image.open(request.image) as image:
                prompt["multi_modal_data"] = {"image": image.convert("RGB")}
        extra = request.kv_transfer_params
        options: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": request.logprobs,
            "prompt_logprobs": request.prompt_logprobs,
            "extra_args": None if extra is None else {"kv_transfer_params": extra},
            **request.sampling,
        }
        lora = LoRARequest(*request.lora) if request.lora else None
        self._serial += 1
        name = f"request-{self._serial}"
        entry.enters()
        self._engine.add_request(name, prompt, SamplingParams(**options), lora_request=lora)
        entry.id = name


class _Running:
    """One request while its batch runs."""

    def __init__(self, request: Request, submitted: float) -> None:
        self.request = request
        self.id = ""  # given when it enters the engine
        self._submitted = submitted  # as are all times here, by time.perf_counter
        self._added = 0.0
        self.finished = False
        self._ended = 0.0
        self._stamps: list[float] = []  # of the steps that gave it tokens
        self._first_step: int | None = None
        self._last_step = 0
        self._output: Any = None
        self._reason = ""

    @property
    def open(self) -> bool:
        """In the engine and not finished."""
        return self.id != "" and not self.finished

    def arrived(self, step: int) -> bool:
        """Whether it is due."""
        seconds = self.request.arrival_s or 0.0
        return self.request.arrival_step <= step and (
            time.perf_counter() - self._submitted >= seconds
        )

    def enters(self) -> None:
        """Its time begins; that it has waited for a step since it arrived is part of it."""
        due = self.request.arrival_s
        self._added = time.perf_counter() if due is None else self._submitted + due

    def update(self, output: Any, step: int) -> None:
        """Take in what a step gave; outputs are cumulative, so the last one has everything."""
        self._output = output
        if output.outputs[0].token_ids:
            self._stamps.append(time.perf_counter())
            self._first_step = step if self._first_step is None else self._first_step
        if output.finished:
            self.finish(str(output.outputs[0].finish_reason), step)

    def finish(self, reason: str, step: int) -> None:
        """Close the request; what it has generated so far is its answer."""
        self.finished = True
        self._ended = time.perf_counter()
        self._last_step = step
        self._reason = reason

    def answer(self) -> Answer:
        """The result; empty for a request that was aborted before its first output."""
        output = self._output
        made = output.outputs[0] if output is not None else None
        return Answer(
            token_ids=[int(token) for token in made.token_ids] if made else [],
            text=made.text if made else "",
            logprobs=_plain(made.logprobs) if made else None,
            prompt_logprobs=_plain(output.prompt_logprobs) if made else None,
            cached_tokens=output.num_cached_tokens if made else None,
            ttft_ms=1e3 * (self._stamps[0] - self._added) if self._stamps else None,
            total_ms=1e3 * (self._ended - self._added),
            first_token_step=self._first_step,
            last_step=self._last_step,
            finish_reason=self._reason,
            params=output.kv_transfer_params if made else None,
            token_ms=[1e3 * (stamp - self._added) for stamp in self._stamps],
        )


def _plain(rows: Any) -> Any:
    """VLLM's per-token {id: Logprob} as {id: float}; None stays None."""
    if rows is None:
        return None
    return [
        None if row is None else {int(token): float(entry.logprob) for token, entry in row.items()}
        for row in rows
    ]


def _read_commands(source: int, commands: queue.Queue[str]) -> None:
    """Thread: hand on the parent's lines; at their end the parent is gone, and so are we."""
    with os.fdopen(source, encoding="utf-8") as lines:
        for line in lines:
            commands.put(line)  # bounded; a parent waits for each reply, so it does not fill
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def serve(source: int, sink: int) -> None:
    """Take commands from one pipe and answer on the other until ``shutdown``."""
    commands: queue.Queue[str] = queue.Queue(_MAX_QUEUED_COMMANDS)
    threading.Thread(target=_read_commands, args=(source, commands), daemon=True).start()
    child = Child()
    table: dict[str, Callable[..., Any]] = {
        "start": child.start,
        "submit": child.submit,
        "settle": child.settle,
        "reset_prefix_cache": child.reset_prefix_cache,
        "metrics": child.metrics,
        "shutdown": child.shutdown,
    }
    with os.fdopen(sink, "w", encoding="utf-8") as replies:
        command = ""
        while command != "shutdown":
            message = json.loads(commands.get())  # ends with the process, see _read_commands
            serial, command = message.pop("id"), message.pop("command")
            reply: dict[str, Any] = {"id": serial, "ok": True}
            try:
                reply["result"] = table[command](**message)
            except Exception as error:  # request loop: the parent decides what vLLM's error means
                traceback.print_exc()
                reply = {"id": serial, "ok": False, "error": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
