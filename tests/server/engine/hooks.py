"""The edit program on transformers with forward hooks, written from the formulas alone: what the engine must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from server.engine.edits import Edit, Point, Program, layers_at

Tensors = Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]
"""By bank key, layer and role; `left` as [width, rank]."""


def module_of(layer: nn.Module, point: Point) -> tuple[nn.Module, bool]:
    """The module at a point, and whether the activation is what it receives."""
    return {
        "resid_post": (layer, False),
        "attn_out": (layer.self_attn, False),
        "mlp_out": (layer.mlp, False),
        "head_out": (layer.self_attn.o_proj, True),
        "mlp_act": (layer.mlp.down_proj, True),
        "resid_pre": (layer, True),
    }[point]


@contextmanager
def hooked(model: nn.Module, points: Any, at: Callable[[Point, int, torch.Tensor], torch.Tensor]):
    """Call `at(point, layer, x)` with each activation [tokens, width], and go on with what it returns."""
    with ExitStack() as stack:
        for number, layer in enumerate(model.model.layers):
            for point in points:
                if number not in layers_at(point, len(model.model.layers)):
                    continue
                module, receives = module_of(layer, point)
                handle = (module.register_forward_pre_hook if receives else module.register_forward_hook)(
                    _hook(point, number, receives, at)
                )
                stack.callback(handle.remove)
        yield


def _hook(point: Point, number: int, receives: bool, at: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def before(module, args):
        return (at(point, number, args[0][0])[None], *args[1:])

    def after(module, args, output):
        if isinstance(output, tuple):
            return (at(point, number, output[0][0])[None], *output[1:])
        return at(point, number, output[0])[None]

    return before if receives else after


def activations(model: nn.Module, points: Any, ids: list[int]) -> dict[tuple[Point, int], torch.Tensor]:
    """What transformers computes at the points: float32 [tokens, width]."""
    seen = {}

    def at(point: Point, layer: int, x: torch.Tensor) -> torch.Tensor:
        seen[point, layer] = x.clone()
        return x

    with torch.no_grad(), hooked(model, points, at):
        model(torch.tensor([ids]))
    return seen


class Reference(NamedTuple):
    """The log-probability of every token but the first, with the program acting. `margin` is how near any value came to
    a threshold at which the result jumps, as a cosine: within the rounding of float32 either side is right.
    """

    log_probabilities: list[float]
    margin: float


def log_probabilities(
    model: nn.Module, tensors: Tensors, program: Program, ids: list[int], prompt_len: int
) -> Reference:
    margins = [torch.inf]
    # What a gate for the sequence decides depends on the prompt alone, but acts on layers before it as well, later.
    decisions = _run(model, tensors, program, ids[:prompt_len], prompt_len, {}, margins)[1]
    logits, _ = _run(model, tensors, program, ids[:-1], prompt_len, decisions, margins)
    return Reference(torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].tolist(), min(margins))


def _run(
    model: nn.Module,
    tensors: Tensors,
    program: Program,
    ids: list[int],
    prompt_len: int,
    decisions: dict[int, bool],
    margins: list[float],
) -> tuple[torch.Tensor, dict[int, bool]]:
    decided = dict(decisions)

    def at(point: Point, layer: int, x: torch.Tensor) -> torch.Tensor:
        start, opened = x, {}
        for index, edit in enumerate(program.edits):
            if edit.point != point or layer not in edit.layers:
                continue
            acts = _covered(edit, len(x), prompt_len)
            operand = None
            if edit.operand is not None:
                operand = {role: torch.from_numpy(v) for role, v in tensors[edit.operand][layer].items()}
            if edit.condition is not None:
                is_open = _open(edit, x, operand["vector"])
                if edit.condition.scope == "token":
                    opened[index] = is_open & acts
                    margins.extend(_gap(edit, x, operand["vector"])[acts].tolist())
                else:
                    margins.append(_gap(edit, x, operand["vector"])[prompt_len - 1].item())
                    decided.setdefault(index, bool(is_open[prompt_len - 1]))
                continue
            if edit.gate is not None:
                gate = program.edits[edit.gate]
                if gate.condition.scope == "token":
                    acts = acts & opened[edit.gate]
                else:
                    decisive = gate.layers[0]
                    sees = min(edit.layers) > decisive or (edit.point == gate.point and min(edit.layers) >= decisive)
                    acts = acts & (torch.arange(len(x)) >= prompt_len - (1 if sees else 0))
                    acts = acts & decided.get(edit.gate, False)
            if edit.function is not None and edit.function.activation == "jumprelu" and acts.any():
                e, c = operand["encoder"], x @ operand["encoder"].T + operand["bias"]
                gaps = (c - operand["threshold"]).abs() / (x.norm(dim=1)[:, None] * e.norm(dim=1))
                margins.append(gaps[acts].min().item())
            x = torch.where(acts[:, None], _edited(edit, x, start, operand), x)
        return x

    points = {edit.point for edit in program.edits}
    with torch.no_grad(), hooked(model, points, at):
        return model(torch.tensor([ids])).logits[0].float(), decided


def _covered(edit: Edit, tokens: int, prompt_len: int) -> torch.Tensor:
    covered = torch.zeros(tokens, dtype=torch.bool)
    for start, end in edit.span.intervals(prompt_len):
        covered[start : min(end, tokens)] = True
    return covered


def _read(edit: Edit, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return x @ v if edit.condition.readout == "dot" else torch.cosine_similarity(x, v[None], dim=1)


def _gap(edit: Edit, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    gap = (_read(edit, x, v) - edit.condition.threshold).abs()
    return gap / (x.norm(dim=1) * v.norm()) if edit.condition.readout == "dot" else gap


def _open(edit: Edit, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    value = _read(edit, x, v)
    return value > edit.condition.threshold if edit.condition.above else value < edit.condition.threshold


def _edited(edit: Edit, x: torch.Tensor, start: torch.Tensor, t: Any) -> torch.Tensor:
    s = edit.strength
    if edit.opcode == "add":
        return x + s * t["vector"]
    if edit.opcode == "add_norm":
        return x + s * x.norm(dim=1, keepdim=True) * t["vector"] / t["vector"].norm()
    if edit.opcode == "scale":
        return x * (1 + s * t["mask"])
    if edit.opcode == "map":
        matrix = t["matrix"] if "matrix" in t else t["left"] @ t["right"]
        return x + s * x @ matrix.T
    if edit.opcode == "set":
        return t["vector"].expand_as(x)
    if edit.opcode == "renorm":
        return x * start.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True)
    c = x @ t["encoder"].T + t["bias"]
    if edit.function.activation == "relu":
        c = torch.relu(c)
    if edit.function.activation == "jumprelu":
        c = c * (c > t["threshold"])
    if edit.function.low is not None or edit.function.high is not None:
        low = -torch.inf if edit.function.low is None else torch.tensor(edit.function.low)
        high = torch.inf if edit.function.high is None else torch.tensor(edit.function.high)
        c = torch.minimum(torch.maximum(c, torch.as_tensor(low)), torch.as_tensor(high)) - c
    return x + s * c @ t["decoder"]
