"""Operands resident on the device.

`Bank` lives in each worker: one arena of float32 numbers, read by the op. Who lies where in it is decided in the engine
core, by `bank_directory.py`; all workers do as they are told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from server.engine.operands import Piece, Role


@dataclass(frozen=True)
class Resident:
    """An operand in the bank: where its tensors start in `Bank.data`, and their shapes, by layer and role."""

    width: int
    pieces: dict[tuple[int, Role], tuple[int, tuple[int, ...]]]

    @cached_property
    def layers(self) -> frozenset[int]:
        return frozenset(layer for layer, _ in self.pieces)

    @cached_property
    def starts(self) -> dict[Role, npt.NDArray[np.int64]]:
        """For each role, where its tensor starts at each layer [highest layer + 1]; -1 where there is none."""
        starts = {role: np.full(max(self.layers) + 1, -1, np.int64) for _, role in self.pieces}
        for (layer, role), (start, _) in self.pieces.items():
            starts[role][layer] = start
        return starts

    @cached_property
    def ranks(self) -> npt.NDArray[np.int64]:
        """Rows of `encoder`, `right` or `matrix`, or how many `indices` there are [highest layer + 1]; 0 at layers that
        have none.
        """
        ranks = np.zeros(max(self.layers) + 1, np.int64)
        for (layer, role), (_, shape) in self.pieces.items():
            if role in ("encoder", "right", "matrix", "indices"):
                ranks[layer] = shape[0]
        return ranks

    @cached_property
    def first(self) -> int:
        """Where the operand begins in the bank: tells one from another."""
        return min(start for start, _ in self.pieces.values())


class Bank:
    """Lives in the worker: `data` float32 [numbers], one allocation for good, so that kernels and graphs can hold its
    address. Who lies where is decided by the engine core's `BankDirectory`; all workers do as they are told.
    """

    def __init__(self, numbers: int, device: torch.device | str = "cpu") -> None:
        self.data = torch.zeros(numbers, dtype=torch.float32, device=device)
        self._residents: dict[str, Resident] = {}

    @property
    def device(self) -> torch.device:
        return self.data.device

    def rows(self, width: int) -> torch.Tensor:
        """The bank as a matrix [rows, width]; every tensor of rows that wide starts at a whole row."""
        return self.data[: len(self.data) // width * width].view(-1, width)

    def tensor(self, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self.data[start : start + math.prod(shape)].view(shape)

    def write(self, start: int, data: bytes) -> None:
        """Put little-endian float32 numbers at `start`. IndexError where the bank ends before them."""
        values = torch.from_numpy(np.frombuffer(data, "<f4").copy())
        if not 0 <= start <= len(self.data) - len(values):
            raise IndexError(f"{len(values)} numbers at {start} are outside the bank of {len(self.data)}")
        self.data[start : start + len(values)].copy_(values)

    def bind(self, key: str, start: int, width: int, pieces: Sequence[Piece], shard: tuple[int, int] = (0, 1)) -> None:
        """Make `key` readable, once its run at `start` is written.

        `shard` is (rank, ranks) at a point whose activation is split over ranks. Each row keeps its place and its full
        length; its first width / ranks numbers become this rank's part.
        """
        if start % width:
            raise ValueError(f"{key!r} starts at {start}, which is no multiple of its width {width}")
        rank, ranks = shard
        # Indices count from the beginning of the whole row.
        kept = [piece for piece in pieces if ranks == 1 or piece.role != "indices"]
        resident = Resident(width, {(piece.layer, piece.role): (start + piece.start, piece.shape) for piece in kept})
        part = width // ranks
        for first, shape in resident.pieces.values() if rank else ():
            if shape[-1] == width:
                rows = self.tensor(first, shape).view(-1, width)
                rows[:, :part] = rows[:, rank * part : (rank + 1) * part].clone()
        self._residents[key] = resident

    def drop(self, key: str) -> None:
        self._residents.pop(key, None)

    def resident(self, key: str) -> Resident:
        """Where `key` lies; RuntimeError when it doesn't: a request must never run without its operand."""
        if key not in self._residents:
            raise RuntimeError(f"bank has no {key!r}: a request reached the worker before its operand")
        return self._residents[key]
