"""Random operands and programs for the tests of the engine: every opcode, gate, span and combination of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from server.engine.edits import Condition, Edit, Function, Point, Program, ProgramError, layers_at
from server.engine.operands import Operand, Role, pack
from server.engine.spans import Span

SPANS = (
    Span(),
    Span(prompt=False),
    Span(generation=False),
    Span(prompt=False, generation=False, prompt_positions=(-1,)),
    Span(prompt_window=(1, 4), prompt=False, generation_window=(2, 4), generation=False),
    Span(exclude_prompt_positions=(0,)),
)
LAST = SPANS[3]
FUNCTIONS = (
    Function(),
    Function("relu"),
    Function("jumprelu"),
    Function("identity", low=(-0.5,), high=(0.5,)),
    Function("jumprelu", low=(0.7, -0.1, 0.2), high=(0.7, 1.0, 0.2)),
    Function("relu", high=(0.3,)),
)
RANK = 3


def tensors_for(layers: int, width: int, scale: float, seed: int) -> dict[str, dict[int, dict[Role, np.ndarray]]]:
    """Two operands of each kind, so that requests can share one or not: `vector-0`, `vector-1`, `mask-0`, ...

    `scale` is the size of a typical number of the activation.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    kinds: dict[str, Callable[[], dict[Role, np.ndarray]]] = {
        "vector": lambda: {"vector": scale * normal(width)},
        "mask": lambda: {"mask": (rng.random(width) < 0.3).astype(np.float32)},
        "rank": lambda: {
            "encoder": normal(RANK, width) / width**0.5 / scale,
            "bias": 0.2 * normal(RANK),
            "threshold": np.abs(0.3 * normal(RANK)),
            "decoder": scale * normal(RANK, width),
        },
        "matrix": lambda: {"matrix": normal(width, width) / width**0.5},
        "factors": lambda: {"left": normal(width, RANK) / RANK**0.5, "right": normal(RANK, width) / width**0.5},
    }
    return {
        f"{kind}-{number}": {layer: make() for layer in range(layers)}
        for number in range(2)
        for kind, make in kinds.items()
    }


def operands(layers: int, width: int) -> dict[str, Operand]:
    return {key: pack(tensors) for key, tensors in tensors_for(layers, width, 1.0, 0).items()}


def random_edit(rng: random.Random, layers: int, points: tuple[Point, ...], strength: float) -> Edit:
    opcode = rng.choice(["add", "add_norm", "scale", "rank", "map", "map", "set", "renorm"])
    number = rng.randrange(2)
    kind = {"add": "vector", "add_norm": "vector", "scale": "mask", "rank": "rank", "set": "vector"}.get(opcode)
    if opcode == "map":
        kind = rng.choice(["matrix", "factors"])
    point = rng.choice(points)
    there = layers_at(point, layers)
    return Edit(
        opcode,  # type: ignore[arg-type]
        None if opcode == "renorm" else f"{kind}-{number}",
        tuple(sorted(rng.sample(there, rng.randint(1, len(there))))),
        rng.choice([rng.uniform(-strength, strength), 0.0]) if rng.random() < 0.3 else rng.uniform(-strength, strength),
        rng.choice(SPANS),
        point,
        function=rng.choice(FUNCTIONS) if opcode == "rank" else None,
    )


def random_program(
    rng: random.Random, layers: int, points: tuple[Point, ...] = ("resid_post",), strength: float = 2.0
) -> Program:
    """One to four edits, sometimes behind a gate; each can act on a prompt of 6 tokens or more and 5 new ones."""
    while True:
        edits = [random_edit(rng, layers, points, strength) for _ in range(rng.randint(1, 4))]
        program = Program(tuple(gated(rng, edits, layers) if rng.random() < 0.5 else edits))
        program.check()
        try:
            program.check_spans(6, 5)
        except ProgramError:
            continue
        return program


def gated(rng: random.Random, edits: list[Edit], layers: int) -> list[Edit]:
    """The same edits behind a gate for their tokens or for the sequence, with some of them obeying it."""
    scope = rng.choice(["token", "sequence"])
    condition = Condition(
        rng.choice(["dot", "cosine"]),
        rng.uniform(-0.3, 0.3),
        rng.random() < 0.5,
        scope,  # type: ignore[arg-type]
    )
    point = edits[0].point
    there = layers_at(point, layers)
    where = there if scope == "token" else (rng.choice(there),)
    gate = Edit("gate", f"vector-{rng.randrange(2)}", where, 1.0, rng.choice(SPANS[:3]), point, condition=condition)
    obeys = [rng.random() < 0.8 and (scope == "sequence" or edit.point == point) for edit in edits]
    return [
        gate,
        *(replace(edit, gate=0) if behind else edit for edit, behind in zip(edits, obeys, strict=True)),
    ]


def by_point(program: Program) -> tuple[Edit, ...]:
    """The program with operands of each edit's own point, such as `mlp_act-vector-0`."""

    def operand(edit: Edit) -> str | None:
        return None if edit.operand is None else f"{edit.point}-{edit.operand}"

    return tuple(replace(edit, operand=operand(edit)) for edit in program.edits)
