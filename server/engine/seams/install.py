"""Installs the op in the target model, and what the worker that holds it needs besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine.seams import log, wrap


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
                if vllm_config.compilation_config.mode == 0 and vllm_config.device_config.device_type == "cpu":
                    do_without_compiler()
                (runner_v2 if vllm_config.use_v2_model_runner else runner_v1).patch()
                worker_rpc.patch()
            return model

        return load_model

    wrap(BaseModelLoader, "load_model", ("self", "vllm_config", "model_config"), make)


def do_without_compiler() -> None:
    """Let an eager engine run where no C++ compiler is installed: vLLM compiles helpers of its sampler even then, and a
    request for log-probabilities would end the engine.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        log.info("no C++ compiler: vLLM's helpers run uncompiled")
        torch.compiler.set_stance("force_eager")
