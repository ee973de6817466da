"""The reference against formulas that are written out here, number by number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.edits import Condition, Edit, Function, Program
from server.engine.operands import Role
from server.engine.ops.reference import Applied, apply_reference
from tests.server.engine.ops.batches import resident

X = np.array([[1.0, -2.0, 3.0, 0.5], [0.0, 4.0, -1.0, 2.0]], np.float32)
V = np.array([0.5, 1.0, -1.0, 2.0], np.float32)
MASK = np.array([0.0, 1.0, 1.0, 0.0], np.float32)
E = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]], np.float32)
D = np.array([[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 0.0, -1.0]], np.float32)
B = np.array([-0.5, 0.25], np.float32)
W = np.arange(16, dtype=np.float32).reshape(4, 4) / 8
OPERANDS: dict[str, Mapping[Role, np.ndarray]] = {
    "v": {"vector": V},
    "mask": {"mask": MASK},
    "features": {"encoder": E, "decoder": D, "bias": B, "threshold": np.array([3.0, 3.0], np.float32)},
    "dense": {"matrix": W},
    "factors": {"left": W[:, :2], "right": W[:2]},
}


def applied(*edits: Edit, active: Any = None, decisions: list[bool | None] | None = None) -> Applied:
    bank, residents = resident({key: {3: roles} for key, roles in OPERANDS.items()})
    active = torch.ones(len(X), len(edits), dtype=torch.bool) if active is None else torch.tensor(active)
    found = [None if edit.operand is None else residents[edit.operand] for edit in edits]
    decisions = [None] * len(edits) if decisions is None else decisions
    return apply_reference(torch.from_numpy(X), Program(edits), active, bank, found, "resid_post", 3, decisions)


def edit(opcode: Any, operand: str | None, strength: float = 1.0, **fields: Any) -> Edit:
    return Edit(opcode, operand, (3,), strength, **fields)


def rank(c: Any, strength: float = 0.5) -> list[list[float]]:
    """x + s (c_0 d_0 + c_1 d_1), where `c` maps a coefficient before its function to the one after it."""
    rows = []
    for x in X.astype(float):
        first = c(float(sum(a * b for a, b in zip(x, E[0], strict=True)) + B[0]))
        second = c(float(sum(a * b for a, b in zip(x, E[1], strict=True)) + B[1]))
        rows.append([x[i] + strength * (first * D[0][i] + second * D[1][i]) for i in range(4)])
    return rows


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (edit("add", "v", 2.0), X + 2 * V),
        (edit("add_norm", "v", 2.0), [x + 2 * math.hypot(*x) * V / math.hypot(*V) for x in X]),
        (edit("scale", "mask", -1.0), X * (1 - MASK)),
        (edit("scale", "mask", 0.5), X * [1, 1.5, 1.5, 1]),
        (edit("set", "v"), [V, V]),
        (edit("set", "v", 0.0), [V, V]),
        (edit("map", "dense", 0.5), X + 0.5 * X @ W.T),
        (edit("map", "factors", 0.5), X + 0.5 * X @ (W[:, :2] @ W[:2]).T),
        (edit("rank", "features", 0.5), rank(lambda c: c)),
        (edit("rank", "features", 0.5, function=Function("relu")), rank(lambda c: max(c, 0))),
        (edit("rank", "features", 0.5, function=Function("jumprelu")), rank(lambda c: c if c > 3 else 0)),
        (
            edit("rank", "features", 0.5, function=Function(low=(1.0, -1.0), high=(2.0, 1.0))),
            [
                X[0] + 0.5 * ((2 - 3.5) * D[0] + (-1 - -1.25) * D[1]),
                X[1] + 0.5 * ((1 - -1.5) * D[0] + (1 - 6.25) * D[1]),
            ],
        ),
        (
            edit("rank", "features", 0.5, function=Function("relu", high=(2.0,))),
            rank(lambda c: min(max(c, 0), 2) - max(c, 0)),
        ),
        (edit("rank", "features", 0.5, function=Function(low=(5.0,), high=(5.0,))), rank(lambda c: 5 - c)),
    ],
    ids=lambda value: value.opcode if isinstance(value, Edit) else "",
)
def test_every_opcode_is_its_formula(one: Edit, expected: Any) -> None:
    result = applied(one)
    np.testing.assert_allclose(result.x, np.array(expected, np.float32), rtol=1e-6, atol=1e-6)
    assert result.acted.all()


def test_edits_act_in_order_each_on_what_the_one_before_left() -> None:
    after_add, after_scale = (
        applied(edit("add", "v"), edit("scale", "mask")),
        applied(edit("scale", "mask"), edit("add", "v")),
    )
    np.testing.assert_allclose(after_add.x, (X + V) * (1 + MASK))
    np.testing.assert_allclose(after_scale.x, X * (1 + MASK) + V)


def test_renorm_gives_back_the_norm_before_the_first_edit() -> None:
    result = applied(edit("add", "v"), edit("scale", "mask"), edit("renorm", None)).x.numpy()
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), np.linalg.norm(X, axis=1), rtol=1e-6)
    direction = (X + V) * (1 + MASK)
    np.testing.assert_allclose(
        result / np.linalg.norm(result, axis=1, keepdims=True),
        direction / np.linalg.norm(direction, axis=1, keepdims=True),
        rtol=1e-6,
    )


def test_renorm_leaves_a_zero_alone() -> None:
    removed = applied(edit("set", "v"), edit("add", "v", -1.0), edit("renorm", None))
    assert not removed.x.any()


@pytest.mark.parametrize("above", (True, False))
@pytest.mark.parametrize("readout", ("dot", "cosine"))
def test_a_gate_for_single_tokens_opens_where_its_read_out_crosses_the_threshold(readout: Any, above: bool) -> None:
    """x . v is -3.5 for the first token and 9 for the second."""
    values = X @ V / (np.linalg.norm(X, axis=1) * np.linalg.norm(V) if readout == "cosine" else 1)
    threshold = float(values.mean())
    result = applied(
        edit("gate", "v", condition=Condition(readout, threshold, above)),
        edit("add", "v", gate=0),
    )
    acts = values > threshold if above else values < threshold
    np.testing.assert_array_equal(result.acted, np.stack([[True, True], acts], 1))
    np.testing.assert_array_equal(result.x, X + acts[:, None] * V)


def test_the_cosine_of_a_zero_is_zero() -> None:
    for threshold, acts in ((-0.1, True), (0.0, False), (0.1, False)):
        result = applied(
            edit("scale", "mask", 0.0),
            edit("set", "v"),
            edit("add", "v", -1.0),
            edit("gate", "v", condition=Condition("cosine", threshold)),
            edit("add", "v", gate=3),
        )
        np.testing.assert_array_equal(result.acted[:, 4], [acts, acts])


def test_a_gate_for_the_sequence_decides_when_first_read_and_holds() -> None:
    gate = edit("gate", "v", condition=Condition("dot", 0.0, above=False, scope="sequence"))
    add = edit("add", "v", gate=0)
    decisions: list[bool | None] = [None, None]
    assert not applied(gate, add, active=[[False, True], [False, True]], decisions=decisions).acted.any(), "undecided"
    first = applied(gate, add, active=[[True, True], [True, True]], decisions=decisions)
    assert decisions == [True, None]
    np.testing.assert_array_equal(first.acted, [[True, True], [True, True]])
    decisions = [False, None]
    held = applied(gate, add, active=[[True, True], [True, True]], decisions=decisions)
    np.testing.assert_array_equal(held.acted, [[True, False], [True, False]])
    np.testing.assert_array_equal(held.x, X)


def test_edits_act_only_at_their_site_and_in_their_span() -> None:
    elsewhere = applied(
        Edit("add", "v", (2,)),
        Edit("add", "v", (3,), point="mlp_out"),
        edit("add", "v"),
        active=[[True] * 3, [True, True, False]],
    )
    np.testing.assert_array_equal(elsewhere.acted, [[False, False, True], [False, False, False]])
    np.testing.assert_array_equal(elsewhere.x, [X[0] + V, X[1]])


@pytest.mark.parametrize(
    "edits",
    [
        *[(edit(opcode, operand, 0.0),) for opcode, operand in (("add", "v"), ("add_norm", "v"), ("scale", "mask"))],
        *[
            (edit(opcode, operand, 0.0),)
            for opcode, operand in (("rank", "features"), ("map", "dense"), ("map", "factors"))
        ],
        (edit("renorm", None),),
        (edit("gate", "v", condition=Condition("dot", 1e9)), edit("set", "v", gate=0)),
    ],
    ids=lambda edits: "-".join(edit.opcode for edit in edits),
)
def test_what_changes_nothing_keeps_every_bit(edits: tuple[Edit, ...]) -> None:
    result = applied(*edits)
    assert torch.equal(result.x.view(torch.int32), torch.from_numpy(X).view(torch.int32))
    assert result.acted[:, 0].all()
