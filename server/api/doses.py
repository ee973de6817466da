"""Relative doses: how large the vector that an edit adds is, measured by the activations that it is added to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from server.api.errors import ApiError
from server.api.prepared import Prepared
from server.engine.operands import Operand
from server.engine.site_names import site_name

REMEMBERED_NORMS = 10_000


@dataclass
class Doses:
    """Of an `add` at a layer `|strength| * ||v|| / ||h||`, with the artifact's `h_norm`; of an `add_norm` `|strength|`;
    the other opcodes have none. `limit` is the server's own.
    """

    limit: float | None = None
    _norms: dict[str, dict[int, float]] = field(default_factory=dict)

    def check_request(self, asked: float | None) -> None:
        """ApiError 422 where a request asks for more than the server allows."""
        if asked is not None and self.limit is not None and asked > self.limit:
            raise ApiError(
                422,
                f"max_relative_dose {asked:g} is above this server's, {self.limit:g}: a request may only lower it",
                "steering.max_relative_dose",
            )

    async def check(self, prepared: Prepared) -> None:
        """Put the doses into `prepared.doses`. ApiError 400 where one is above the limit, or limited and unknown."""
        limits = [each for each in (prepared.settings.max_relative_dose, self.limit) if each is not None]
        for index, owner in enumerate(prepared.owners):
            doses = {} if owner is None else await self._by_layer(prepared, index, owner)
            if not doses:
                continue
            edit = prepared.program.edits[index]
            unknown = sorted(set(edit.layers) - {layer for layer, dose in doses.items() if dose is not None})
            known = {layer: dose for layer, dose in doses.items() if dose is not None}
            if not unknown:
                prepared.doses[edit] = round(max(known.values()), 6)
            for limit in limits:
                _refuse(prepared, index, known, unknown, limit)

    async def _by_layer(self, prepared: Prepared, index: int, owner: int) -> Mapping[int, float | None]:
        """None where the artifact doesn't say how large activations are."""
        edit = prepared.program.edits[index]
        if edit.opcode == "add_norm" or (edit.opcode == "add" and edit.strength == 0):
            return dict.fromkeys(edit.layers, abs(edit.strength))
        if edit.opcode != "add" or edit.operand is None:
            return {}
        norms = self._norms.get(edit.operand)
        if norms is None:
            norms = vector_norms(await prepared.operands[edit.operand]())
            if len(self._norms) >= REMEMBERED_NORMS:
                self._norms.clear()
            self._norms[edit.operand] = norms
        h_norm = prepared.versions[owner].manifest.h_norm
        return {
            layer: abs(edit.strength) * norms[layer] / h_norm[layer] if layer in h_norm else None
            for layer in edit.layers
        }


def vector_norms(operand: Operand) -> dict[int, float]:
    """The L2 norm of an operand's vector, by layer."""
    return {
        piece.layer: float(np.linalg.norm(operand.data[piece.start : piece.start + operand.width].astype(np.float64)))
        for piece in operand.pieces
        if piece.role == "vector"
    }


def _refuse(prepared: Prepared, index: int, known: Mapping[int, float], unknown: list[int], limit: float) -> None:
    where = prepared.field(index)
    if unknown:
        raise ApiError(
            400,
            f"{where}: the dose at layers {unknown} is unknown, and max_relative_dose is {limit:g}: the artifact "
            "has no h_norm there; publish it with one",
            f"{where}.artifact",
        )
    layer = max(known, key=lambda each: known[each])
    if known[layer] > limit:
        site = site_name(prepared.program.edits[index].point, layer)
        raise ApiError(
            400,
            f"{where}: a relative dose of {known[layer]:.4g} at {site} is above max_relative_dose, {limit:g}; "
            "lower the strength",
            f"{where}.strength",
        )
