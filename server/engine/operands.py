"""What an edit reads from the bank: the tensors of one operand, packed into one run of float32 numbers.

All tensors of an operand that have rows of an activation's width (vectors, masks, encoders, ...) start at a multiple of
that width, so that the bank can be read as a matrix [rows, width]. Numbers per row (bias, threshold) come after them.
Pure but for numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from server.engine.edits import Opcode, Point

Float32 = npt.NDArray[np.float32]
Role = Literal[
    "vector", "inverse_norm", "mask", "indices", "encoder", "bias", "threshold", "decoder", "matrix", "left", "right"
]
NUMBERS: frozenset[Role] = frozenset({"bias", "threshold", "inverse_norm", "indices"})
"""Roles whose tensors have no rows of the activation's width."""
SPARSE = 8
"""A mask of which at most one number in so many isn't 0 has its indices beside it: a CPU then reads no others."""

ROLES: dict[Opcode, tuple[frozenset[Role], ...]] = {
    "add": (frozenset({"vector"}),),
    "add_norm": (frozenset({"vector"}),),
    "scale": (frozenset({"mask"}),),
    "rank": (frozenset({"encoder", "bias", "threshold", "decoder"}),),
    "map": (frozenset({"matrix"}), frozenset({"left", "right"})),
    "set": (frozenset({"vector"}),),
    "renorm": (),
    "gate": (frozenset({"vector"}),),
}
"""What each opcode reads; `map` in one of two forms. `inverse_norm` is derived from `vector`, `indices` from `mask`."""


class Piece(NamedTuple):
    """Where one tensor of an operand lies in its run: `start` in numbers from the run's beginning.

    `left` is stored transposed, [rank, width], so that its rows have the activation's width as all others have.
    """

    layer: int
    role: Role
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """The packed tensors of one bank key at one point: `data` float32 [numbers], `pieces` saying what is where."""

    width: int
    data: Float32
    pieces: tuple[Piece, ...]


def content_key(operand: Operand, point: Point) -> str:
    """A bank key that equal operands share, whatever request they came with, and no others."""
    layout = repr((point, operand.width, [tuple(piece) for piece in operand.pieces])).encode()
    return f"sha256:{hashlib.sha256(layout + b'|' + operand.data.tobytes()).hexdigest()}"


def pack(tensors: Mapping[int, Mapping[Role, Float32]]) -> Operand:
    """Pack tensors by layer and role. ValueError where the tensors of a layer don't fit together.

    Shapes: vector, mask [width]; encoder, decoder, right [rank, width]; left [width, rank]; matrix [width, width];
    bias, threshold [rank], both zero where they are left out.
    """
    (width,) = {_width(roles) for roles in tensors.values()}
    rows: list[tuple[int, Role, Float32]] = []
    numbers: list[tuple[int, Role, Float32]] = []
    for layer, roles in tensors.items():
        complete = _complete(layer, roles, width)
        for role, value in complete.items():
            (numbers if role in NUMBERS else rows).append((layer, role, value))
    pieces, start = [], 0
    for layer, role, value in [*rows, *numbers]:
        pieces.append(Piece(layer, role, start, value.shape))
        start += value.size
    data = np.concatenate([value.reshape(-1) for _, _, value in [*rows, *numbers]]).astype(np.float32, copy=False)
    return Operand(width, data, tuple(pieces))


def _width(roles: Mapping[Role, Float32]) -> int:
    for role in ("vector", "mask", "encoder", "right", "matrix"):
        if role in roles:
            return int(roles[role].shape[-1])
    raise ValueError(f"no opcode reads {sorted(roles)}")


def _complete(layer: int, roles: Mapping[Role, Float32], width: int) -> dict[Role, Float32]:
    complete: dict[Role, Float32] = {role: np.asarray(value, np.float32) for role, value in roles.items()}
    if "encoder" in complete:
        rank = len(complete["encoder"])
        for role in ("bias", "threshold"):
            complete.setdefault(role, np.zeros(rank, np.float32))
        _expect(layer, complete, {"encoder": (rank, width), "decoder": (rank, width), "bias": (rank,)})
        _expect(layer, complete, {"threshold": (rank,)})
    elif "right" in complete:
        rank = len(complete["right"])
        _expect(layer, complete, {"right": (rank, width), "left": (width, rank)})
        complete["left"] = np.ascontiguousarray(complete["left"].T)
    elif "matrix" in complete:
        _expect(layer, complete, {"matrix": (width, width)})
    else:
        for role in complete:
            _expect(layer, complete, {role: (width,)})
    if "vector" in complete:
        norm = float(np.linalg.norm(complete["vector"].astype(np.float64)))
        complete["inverse_norm"] = np.array([1 / norm if norm else 0], np.float32)
    if "mask" in complete:
        indices = np.flatnonzero(complete["mask"])
        if 0 < len(indices) <= width // SPARSE:
            complete["indices"] = indices.astype(np.float32)
    return complete


def _expect(layer: int, tensors: Mapping[Role, Float32], shapes: Mapping[Role, tuple[int, ...]]) -> None:
    for role, shape in shapes.items():
        if role not in tensors:
            raise ValueError(f"layer {layer}: {role} {list(shape)} is missing")
        if tensors[role].shape != shape:
            raise ValueError(f"layer {layer}: {role} is {list(tensors[role].shape)}, expected {list(shape)}")
