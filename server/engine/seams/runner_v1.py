"""Feeds the router from vLLM's V1 model runner, which also serves the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.engine.routing import BatchView
from server.engine.seams import requests, wrap


def patch() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make_update_states(original: Callable[..., Any]) -> Callable[..., Any]:
        def _update_states(self: Any, scheduler_output: Any) -> Any:
            result = original(self, scheduler_output)
            requests.update(self, scheduler_output)
            return result

        return _update_states

    def make_prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
        # After the original: only then does the input batch hold this step's requests in their final order.
        def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
            result = original(self, scheduler_output, num_scheduled_tokens)
            batch = self.input_batch
            positions = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
            self.model.polyhelm.router.route(BatchView(batch.req_ids, num_scheduled_tokens.tolist(), positions))
            return result

        return _prepare_inputs

    def make_dummy_run(original: Callable[..., Any]) -> Callable[..., Any]:
        def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.model.polyhelm.router.clear()
            return original(self, *args, **kwargs)

        return _dummy_run

    wrap(GPUModelRunner, "_update_states", ("self", "scheduler_output"), make_update_states)
    wrap(GPUModelRunner, "_prepare_inputs", ("self", "scheduler_output", "num_scheduled_tokens"), make_prepare_inputs)
    wrap(GPUModelRunner, "_dummy_run", ("self", "num_tokens"), make_dummy_run)
