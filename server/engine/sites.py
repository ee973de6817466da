"""Finds the sites of a loaded model and installs the op there.

`resid_post` of a decoder layer is the residual stream after it. vLLM's layers return it in one of three forms: a pair
whose sum it is, a pair with None, or one tensor. Other forms (stacked streams) are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from server.engine.banks import Bank
from server.engine.ops.apply import apply
from server.engine.routing import Router

CONFIG_KEY = "polyhelm"
"""Our section of vLLM's `additional_config`; being there, it also salts vLLM's compile cache."""


class UnsupportedModel(RuntimeError):
    """A model or engine configuration in which edits would not be exact."""


@dataclass(frozen=True, slots=True)
class Installation:
    """What the worker keeps beside the model."""

    bank: Bank
    router: Router
    layers: int
    hidden_size: int


def install(model: nn.Module, vllm_config: VllmConfig) -> Installation:
    """Wrap every decoder layer of `model`. Raises UnsupportedModel with the reason."""
    refuse_unsupported(vllm_config)
    config = vllm_config.additional_config[CONFIG_KEY]
    model_config = vllm_config.model_config
    hidden_size = model_config.get_hidden_size()
    layers = decoder_layers(model, model_config.get_total_num_hidden_layers())
    bank = Bank(len(layers), config["bank_slots"], hidden_size, vllm_config.device_config.device)
    max_requests = vllm_config.scheduler_config.max_num_seqs
    router = Router(bank, len(layers), max_requests=max_requests, max_edits=config["max_edits"])
    for site, layer in enumerate(layers):
        layer.forward = _steered(layer.forward, site, bank, router)  # type: ignore[method-assign]
    return Installation(bank, router, len(layers), hidden_size)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedModel for the engine settings under which this version's edits are not exact."""
    parallel = vllm_config.parallel_config
    compilation = vllm_config.compilation_config
    reasons = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.prefill_context_parallel_size > 1,
        "microbatching": parallel.use_ubatching,
        "torch.compile (start with --enforce-eager)": compilation.mode != 0,
        "CUDA graphs (start with --enforce-eager)": compilation.cudagraph_mode.name != "NONE",
        "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
    }
    if refused := [name for name, present in reasons.items() if present]:
        raise UnsupportedModel(f"polyhelm can't yet steer with {', '.join(refused)}")


def decoder_layers(model: nn.Module, expected: int) -> list[nn.Module]:
    """The decoder layers in order: the one list of `expected` modules that each hold an attention layer."""
    candidates = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == expected
        and all(any(isinstance(part, AttentionLayerBase) for part in layer.modules()) for layer in module)
    ]
    if len(candidates) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__}: found {len(candidates)} lists of {expected} decoder layers, need exactly one"
        )
    return candidates[0]


def _steered(forward: Callable[..., Any], site: int, bank: Bank, router: Router) -> Callable[..., Any]:
    works = router.works
    vectors, inverse_norms = bank.vectors[site], bank.inverse_norms[site]

    def steered(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        work = works[site]
        if work is not None:
            hidden, residual = stream(output)
            apply(site, work, vectors, inverse_norms, hidden, residual, router.touched[site])
        return output

    return steered


def stream(output: Any) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The addends of the residual stream in a decoder layer's output; the first is None where there is one tensor."""
    if isinstance(output, torch.Tensor):
        return None, output
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], torch.Tensor):
        hidden, residual = output
        if residual is None:
            return None, hidden
        if isinstance(residual, torch.Tensor) and residual.shape == hidden.shape:
            return hidden, residual
    raise UnsupportedModel(f"a decoder layer returned {type(output).__name__}; need a tensor or (hidden, residual)")
