"""A worker for pipeline stages on a CPU.

vLLM 0.32 makes the tensors that a later stage receives in its warm-up run, which its CPU worker
leaves out where nothing is compiled and the KV cache's size is given. The first request then ends
the engine, AssertionError in ``sync_and_gather_intermediate_tensors``, whatever the connector.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class StageWorker(CPUWorker):
    """vLLM's worker, with those tensors."""

    def load_model(self, *args: object, **kwargs: object) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
