"""Where the points of a decoder layer are: which module of it returns, or receives, the activation.

| point | activation |
|---|---|
| `resid_post` | the residual stream after the layer: what the layer returns |
| `attn_out` | what the attention module returns, after its output projection |
| `mlp_out` | what the feed-forward module returns |
| `head_out` | what the attention's output projection receives: the heads' context vectors, side by side |
| `mlp_act` | what the feed-forward's down projection receives: its neurons |
| `resid_pre` | the residual stream that the first layer receives: the embeddings, scaled as the model scales them |

These are the tensors that transformers' modules of the same names return or receive. In families that normalise after a
sub-layer (Gemma 2 and 3, OLMo 2), `attn_out` and `mlp_out` are therefore the tensors before that norm.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

from server.engine.edits import POINTS, Point

STREAM = "hidden_states"
"""What vLLM's and transformers' decoder layers call the residual stream that they receive."""


class UnsupportedModel(RuntimeError):
    """A model or engine configuration in which edits would not be exact."""


@dataclass(frozen=True, slots=True)
class Place:
    """The module whose call has the activation: as the argument `receives`, or, without one, as what it returns."""

    module: nn.Module
    receives: str | None
    width: int
    """Of the whole activation."""
    shards: int
    """Ranks of a tensor-parallel group that hold an equal part of it each."""


def decoder_layers(model: nn.Module, expected: int) -> dict[int, nn.Module]:
    """The decoder layers of this pipeline stage by their number: the members of the one list of `expected` modules of
    which all that are here hold an attention layer.
    """
    candidates: list[dict[int, nn.Module]] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            here = {number: layer for number, layer in enumerate(module) if not isinstance(layer, PPMissingLayer)}
            # Gemma 4 has its layers in a second list besides, for the part of it that it compiles by itself.
            if here and all(_attends(layer) for layer in here.values()) and here not in candidates:
                candidates.append(here)
    if len(candidates) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__}: found {len(candidates)} lists of {expected} decoder layers, need exactly one"
        )
    return candidates[0]


def places(layer: nn.Module, hidden_size: int) -> tuple[dict[Point, Place], dict[Point, str]]:
    """Where each point of a layer is, and for the points that can't be found, why not."""
    found: dict[Point, Place] = {"resid_post": Place(layer, None, hidden_size, 1)}
    refused: dict[Point, str] = {}
    if STREAM in parameters(layer):
        found["resid_pre"] = Place(layer, STREAM, hidden_size, 1)
    else:
        refused["resid_pre"] = f"{type(layer).__name__} takes no {STREAM}"
    attention = [child for child in layer.children() if _attends(child)]
    others = [child for child in layer.children() if not _attends(child) and (_rows(child) or _routes(child))]
    names: tuple[tuple[list[nn.Module], str, Point, Point], ...] = (
        (attention, "attention", "attn_out", "head_out"),
        (others, "feed-forward", "mlp_out", "mlp_act"),
    )
    for modules, name, out, inner in names:
        if len(modules) != 1:
            refused[out] = refused[inner] = f"{type(layer).__name__} has {len(modules)} {name} modules, need one"
            continue
        found[out] = Place(modules[0], None, hidden_size, 1)
        projections = _rows(modules[0])
        if _routes(modules[0]) or len(projections) != 1:
            kind = "a mixture of experts" if _routes(modules[0]) else f"{len(projections)} output projections"
            refused[inner] = f"{type(modules[0]).__name__} has {kind}, need one output projection"
            continue
        width = projections[0].input_size
        (received, *_) = parameters(projections[0])
        found[inner] = Place(projections[0], received, width, width // projections[0].input_size_per_partition)
    return {point: found[point] for point in POINTS if point in found}, refused


def parameters(module: nn.Module) -> list[str]:
    """The names of the arguments that its class's `forward` takes."""
    _, *names = inspect.signature(type(module).forward).parameters
    return names


def _attends(module: nn.Module) -> bool:
    return any(isinstance(part, AttentionLayerBase) for part in module.modules())


def _routes(module: nn.Module) -> bool:
    """Whether it holds a mixture of experts."""
    return any(type(part).__module__.startswith("vllm.model_executor.layers.fused_moe") for part in module.modules())


def _rows(module: nn.Module) -> list[RowParallelLinear]:
    return [part for part in module.modules() if isinstance(part, RowParallelLinear)]
