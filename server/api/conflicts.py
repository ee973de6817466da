"""`conflict: "error"`: finds two interventions that write the same direction of the same site for a common token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from server.engine.edits import Edit, Program
from server.engine.operands import Operand, Role
from server.engine.site_names import site_name
from server.engine.spans import Interval

PARALLEL = 1 - 1e-6
"""Directions whose cosine is above this, either way, are one."""

WRITES: dict[str, Role] = {"add": "vector", "add_norm": "vector", "rank": "decoder", "scale": "mask"}
"""The tensor whose rows say what an opcode writes. A gate writes nothing, the others everything."""


class Conflict(NamedTuple):
    """The numbers of two interventions, and the site where they meet."""

    first: int
    second: int
    site: str


def find(
    program: Program, owners: Sequence[int | None], operands: Mapping[str, Operand], prompt_lengths: Iterable[int]
) -> Conflict | None:
    """The first conflict between edits of different interventions, for prompts of these lengths in tokens."""
    intervals = [program.intervals(length) for length in prompt_lengths]
    writers = [
        (index, owner)
        for index, (edit, owner) in enumerate(zip(program.edits, owners, strict=True))
        if owner is not None and edit.opcode != "gate" and edit.strength != 0
    ]
    for (a, owner_a), (b, owner_b) in combinations(writers, 2):
        first, second = program.edits[a], program.edits[b]
        if owner_a == owner_b or first.point != second.point:
            continue
        if not any(_meet(each[a], each[b]) for each in intervals):
            continue
        for layer in sorted(set(first.layers) & set(second.layers)):
            if _same_direction(_written(first, layer, operands), _written(second, layer, operands)):
                return Conflict(owner_a, owner_b, site_name(first.point, layer))
    return None


def _meet(first: tuple[Interval, ...], second: tuple[Interval, ...]) -> bool:
    return any(a < d and c < b for a, b in first for c, d in second)


class _Written(NamedTuple):
    """Unit directions [n, width], and whether they are axes, as a mask [width]."""

    directions: np.ndarray
    mask: np.ndarray | None = None


def _written(edit: Edit, layer: int, operands: Mapping[str, Operand]) -> _Written | None:
    """What an edit writes at a layer; None is everything."""
    if edit.opcode not in WRITES or edit.operand is None:
        return None
    operand, role = operands[edit.operand], WRITES[edit.opcode]
    (piece,) = (piece for piece in operand.pieces if (piece.layer, piece.role) == (layer, role))
    size = int(np.prod(piece.shape))
    rows = operand.data[piece.start : piece.start + size].reshape(-1, operand.width).astype(np.float64)
    if edit.opcode == "scale":
        return _Written(np.empty((0, operand.width)), rows[0] != 0)
    norms = np.linalg.norm(rows, axis=1)
    return _Written(rows[norms > 0] / norms[norms > 0, None])


def _same_direction(first: _Written | None, second: _Written | None) -> bool:
    if first is None or second is None:
        return True
    if first.mask is not None and second.mask is not None:
        return bool((first.mask & second.mask).any())
    for axes, other in ((first.mask, second), (second.mask, first)):
        if axes is not None:
            return bool((np.abs(other.directions[:, axes]) > PARALLEL).any())
    return bool((np.abs(first.directions @ second.directions.T) > PARALLEL).any())
