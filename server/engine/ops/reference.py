"""What a program does to the activations of one request, token by token: the definition that the fast paths must meet.

Plain torch in float32, written for reading. Edits act in order, each on x as the ones before it left it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.banks import Bank, Resident
from server.engine.edits import Condition, Edit, Function, Point, Program
from server.engine.operands import NUMBERS, Role


class Applied(NamedTuple):
    """The edited activations float32 [tokens, width], and which edits acted on which tokens, bool [tokens, edits]: what
    a receipt counts. A gate counts where it was read.
    """

    x: Tensor
    acted: Tensor


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of one edit's operand at one layer, or at one rank's part of it."""

    bank: Bank
    resident: Resident
    layer: int
    width: int

    def __getitem__(self, role: Role) -> Tensor:
        """float32 [..., width], or [rank] of the roles with one number per row."""
        tensor = self.bank.tensor(*self.resident.pieces[self.layer, role])
        return tensor if role in NUMBERS else tensor[..., : self.width]

    def has(self, role: Role) -> bool:
        return (self.layer, role) in self.resident.pieces


def apply_reference(
    x: Tensor,
    program: Program,
    active: Tensor,
    bank: Bank,
    residents: Sequence[Resident | None],
    point: Point,
    layer: int,
    decisions: list[bool | None],
) -> Applied:
    """Edit the activations of one request at one site.

    `x` is float32 [tokens, width], in the order of their positions; `active` bool [tokens, edits] says which spans
    cover which tokens; `residents` has one entry per edit. `decisions` has one entry per edit too, and is updated: what
    a gate for the whole sequence decided when it was first read, None before. Edits behind an undecided gate don't act.
    """
    rows, acted = [], torch.zeros_like(active)
    for token in range(len(x)):
        row = start = x[token].clone()
        open_here: set[int] = set()
        for index, edit in enumerate(program.edits):
            if edit.point != point or layer not in edit.layers or not active[token, index]:
                continue
            if edit.gate is not None and edit.gate not in open_here and not decisions[edit.gate]:
                continue
            acted[token, index] = True
            resident = residents[index]
            operands = Operands(bank, resident, layer, x.shape[1]) if resident is not None else None
            if edit.condition is None:
                row = edited(row, edit, operands, start)
            elif edit.condition.scope == "sequence":
                if decisions[index] is None:
                    decisions[index] = is_open(row, edit.condition, operands)
            elif is_open(row, edit.condition, operands):
                open_here.add(index)
        rows.append(row)
    return Applied(torch.stack(rows) if rows else x.clone(), acted)


def edited(x: Tensor, edit: Edit, operands: Operands | None, start: Tensor) -> Tensor:
    """x [width] after one edit that acts on it. `start` [width] is the activation before the first edit here."""
    if edit.opcode == "renorm":
        norm = float(x.norm())
        return x * (float(start.norm()) / norm) if norm > 0 else x
    assert operands is not None
    if edit.opcode == "set":
        return operands["vector"].clone()
    if edit.strength == 0:
        return x
    if edit.opcode == "add":
        return x + edit.strength * operands["vector"]
    if edit.opcode == "add_norm":
        return x + edit.strength * float(x.norm()) * operands["vector"] * operands["inverse_norm"]
    if edit.opcode == "scale":
        return x * (1 + edit.strength * operands["mask"])
    if edit.opcode == "rank":
        c = coefficients(x, edit.function or Function(), operands)
        return x + edit.strength * (c @ operands["decoder"])
    if edit.opcode == "map":
        if operands.has("matrix"):
            return x + edit.strength * (operands["matrix"] @ x)
        return x + edit.strength * ((operands["right"] @ x) @ operands["left"])
    raise ValueError(f"{edit.opcode} changes no activation")


def coefficients(x: Tensor, function: Function, operands: Operands) -> Tensor:
    """c [rank] of a `rank` edit."""
    c = operands["encoder"] @ x + operands["bias"]
    if function.activation == "relu":
        c = c.relu()
    elif function.activation == "jumprelu":
        c = torch.where(c > operands["threshold"], c, 0)
    if not function.clamps:
        return c
    low = torch.tensor(function.low or (-math.inf,), device=c.device)
    high = torch.tensor(function.high or (math.inf,), device=c.device)
    return torch.minimum(torch.maximum(c, low), high) - c


def is_open(x: Tensor, condition: Condition, operands: Operands | None) -> bool:
    """Whether a gate is open for the activation x [width]. The cosine with a zero vector is 0."""
    assert operands is not None
    readout = float(x @ operands["vector"])
    if condition.readout == "cosine":
        norm = float(x.norm())
        readout = readout / norm * float(operands["inverse_norm"]) if norm > 0 else 0.0
    return readout > condition.threshold if condition.above else readout < condition.threshold
