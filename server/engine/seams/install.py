"""Installs the op in the target model, and what the worker that holds it needs besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.engine.seams import wrap


def patch() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
            model = original(self, vllm_config, model_config, *args, **kwargs)
            # Draft models have a model_config of their own and are left alone.
            if model_config is vllm_config.model_config:
                from server.engine.seams import runner_v1, runner_v2, worker_rpc
                from server.engine.sites import install

                model.polyhelm = install(model, vllm_config)
                (runner_v2 if vllm_config.use_v2_model_runner else runner_v1).patch()
                worker_rpc.patch()
            return model

        return load_model

    wrap(BaseModelLoader, "load_model", ("self", "vllm_config", "model_config"), make)
