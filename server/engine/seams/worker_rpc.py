"""Gives vLLM's workers the methods that the API process calls, and leaves `--worker-extension-cls` to the user."""

from __future__ import annotations


def patch() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    from server.engine.worker import WorkerExtension

    for name, attribute in vars(WorkerExtension).items():
        if callable(attribute) and not name.startswith("__"):
            setattr(WorkerBase, name, attribute)
