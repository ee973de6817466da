"""Feeds the router from vLLM's V2 model runner, the default on a GPU.

`execute_model` and `prepare_inputs` are patched, and not the narrower `ModelState`: that is told of a removed
request, but not whether it ended or was preempted, and its `prepare_inputs` runs for dummy batches as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.engine.routing import BatchView
from server.engine.seams import requests, wrap


def patch() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def make_execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
        def execute_model(
            self: Any,
            scheduler_output: Any,
            intermediate_tensors: Any = None,
            dummy_run: bool = False,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if dummy_run:
                # It calls no prepare_inputs, and its rows are those of live requests.
                self.model.polyhelm.router.clear()
            else:
                requests.update(self, scheduler_output)
            return original(self, scheduler_output, intermediate_tensors, dummy_run, *args, **kwargs)

        return execute_model

    def make_prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch = original(self, *args, **kwargs)
            # The host's copy of the positions runs ahead of the device's by drafts that are rejected later. Without
            # speculative decoding, which is refused, there are none: the scheduler adds what it scheduled and takes
            # nothing back, with asynchronous scheduling too.
            view = BatchView(batch.req_ids, batch.num_scheduled_tokens.tolist(), batch.num_computed_tokens_np.tolist())
            self.model.polyhelm.router.route(view)
            return batch

        return prepare_inputs

    wrap(
        GPUModelRunner,
        "execute_model",
        ("self", "scheduler_output", "intermediate_tensors", "dummy_run"),
        make_execute_model,
    )
    wrap(GPUModelRunner, "prepare_inputs", ("self", "scheduler_output", "batch_req_state"), make_prepare_inputs)
