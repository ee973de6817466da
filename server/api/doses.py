"""Relative doses: how much an edit can add to an activation, measured by that activation's own length.

| opcode | dose at a layer, h being the artifact's `h_norm` there |
|---|---|
| add | `|s| ||v|| / h` |
| add_norm | `|s|` |
| set | `||v|| / h` |
| scale | `max_i |1 + s m_i| - 1`, at least 0 |
| rank | `sum_k ||d_k|| (|y_k| t_k / h + g_k (||e_k|| + |b_k| / h))` |

What an edit takes away has no dose. A `rank` edit makes `(1 - y_k) c_k + y_k t` of a coefficient c_k, t_k being the
largest t that a clamp puts in, away from 0, and g_k how much `|1 - y_k|` is above 1; so an ablation has dose 0. For
`scale` and `rank` it is an upper bound, which an activation along the direction itself reaches. What a map adds depends
on the activation's direction, and `renorm` and `gate` add nothing: these have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from methods.kinds import UNBOUNDED
from server.api.errors import ApiError
from server.api.prepared import Prepared, Site
from server.engine.edits import Edit, Program
from server.engine.operands import Operand, Role
from server.engine.site_names import site_name

Float64 = npt.NDArray[np.float64]

REMEMBERED_OPERANDS = 10_000
DOSED = frozenset({"add", "add_norm", "set", "scale", "rank"})
MOST_EDGES = 8
"""Numbers in a request's spans, up to which it is worked out which edits can meet at a token; beyond, all may."""


@dataclass
class Doses:
    """Works them out, and refuses what is above a limit. `limit` is the server's own."""

    limit: float | None = None
    _sizes: dict[str, dict[int, dict[Role, Float64]]] = field(default_factory=dict)

    def check_request(self, asked: float | None) -> None:
        """ApiError 422 where a request asks for more than the server allows."""
        if asked is not None and self.limit is not None and asked > self.limit:
            raise ApiError(
                422,
                f"max_relative_dose {asked:g} is above this server's, {self.limit:g}: a request may only lower it",
                "steering.max_relative_dose",
            )

    async def check(self, prepared: Prepared) -> None:
        """Put the doses into `prepared.doses`. ApiError 400 where one is above the limit, or limited and unknown, or
        where those of the edits that can act on one token of a site are together above it.
        """
        limits = [each for each in (prepared.settings.max_relative_dose, self.limit) if each is not None]
        sites: dict[Site, dict[int, float]] = {}
        for index, (edit, owner) in enumerate(zip(prepared.program.edits, prepared.owners, strict=True)):
            if owner is None or edit.opcode not in DOSED:
                continue
            doses = await self._by_layer(prepared, edit, owner)
            known = {layer: dose for layer, dose in doses.items() if dose is not None}
            unknown = sorted(doses.keys() - known.keys())
            if not unknown:
                prepared.doses[edit] = round(max(known.values()), 6)
            for limit in limits:
                _refuse(prepared, index, known, unknown, limit)
            for layer, dose in known.items():
                sites.setdefault((edit.point, layer), {})[index] = dose
        if limits:
            _refuse_sums(prepared, sites, min(limits))

    async def _by_layer(self, prepared: Prepared, edit: Edit, owner: int) -> Mapping[int, float | None]:
        """None where the artifact doesn't say how large activations are, and it matters."""
        if edit.opcode == "add_norm" or edit.operand is None:
            return dict.fromkeys(edit.layers, abs(edit.strength))
        sizes = self._sizes.get(edit.operand)
        if sizes is None:
            sizes = sizes_of(await prepared.operands[edit.operand]())
            if len(self._sizes) >= REMEMBERED_OPERANDS:
                self._sizes.clear()
            self._sizes[edit.operand] = sizes
        h_norm = prepared.versions[owner].manifest.h_norm
        doses: dict[int, float | None] = {}
        for layer in edit.layers:
            share, length = _added(edit, sizes[layer], prepared.gains.get(edit.operand))
            if length:
                doses[layer] = share + length / h_norm[layer] if layer in h_norm else None
            else:
                doses[layer] = share
        return doses


def sizes_of(operand: Operand) -> dict[int, dict[Role, Float64]]:
    """By layer, what doses follow from: the norms of an operand's rows, its biases, and a mask's extremes."""
    sizes: dict[int, dict[Role, Float64]] = {}
    for layer, role, start, shape in operand.pieces:
        values = operand.data[start : start + int(np.prod(shape))].astype(np.float64)
        if role in ("vector", "encoder", "decoder"):
            values = np.linalg.norm(values.reshape(-1, operand.width), axis=1)
        elif role == "mask":
            values = np.array([values.min(), values.max()])
        elif role != "bias":
            continue
        sizes.setdefault(layer, {})[role] = values
    return sizes


def _added(edit: Edit, sizes: Mapping[Role, Float64], gains: Sequence[float] | None) -> tuple[float, float]:
    """How much an edit can add, as a share of the activation's length and as a length beside it."""
    strength = edit.strength
    if edit.opcode == "add":
        return 0.0, abs(strength) * float(sizes["vector"][0])
    if edit.opcode == "set":
        return 0.0, float(sizes["vector"][0])
    if edit.opcode == "scale":
        return max(0.0, float(np.abs(1 + strength * sizes["mask"]).max()) - 1), 0.0
    assert edit.opcode == "rank" and edit.function is not None
    decoder = sizes["decoder"]
    gain = np.ones(len(decoder)) if gains is None else np.array(gains)
    # The gains are in the decoder's rows already.
    decoder = np.divide(decoder, np.abs(gain), out=np.zeros_like(decoder), where=gain != 0)
    moved = strength * gain if edit.function.clamps else -strength * gain
    grown = np.maximum(np.abs(1 - moved) - 1, 0)
    put = np.maximum(_bound(edit.function.low), -_bound(edit.function.high)).clip(min=0)
    share = decoder * grown * sizes["encoder"]
    length = decoder * (np.abs(moved) * put + grown * np.abs(sizes["bias"]))
    return float(share.sum()), float(length.sum())


def _bound(bounds: tuple[float, ...] | None) -> Float64:
    """Of each coefficient, or of all; 0 where there is none, as nothing is put in there."""
    values = np.array(bounds or (0.0,))
    return np.where(np.abs(values) < UNBOUNDED, values, 0.0)


def prompt_lengths(program: Program) -> list[int] | None:
    """Lengths of prompts that show every way in which the spans can meet, or None where there are too many.

    Which of two positions is the first changes only where one counted from the prompt's start, p, meets one counted
    from its end, q: at the length p + q.
    """
    edges = {0}
    for span in {edit.span for edit in program.edits}:
        edges.update(map(abs, (*span.prompt_positions, *span.exclude_prompt_positions)))
        for window in (span.prompt_window, span.exclude_prompt_window):
            edges.update(abs(each) for each in window or () if each is not None)
    if len(edges) > MOST_EDGES:
        return None
    lengths = {p + q + near for p in edges for q in edges for near in (-1, 0, 1, 2)}
    return sorted(length for length in lengths if length > 0)


def _refuse_sums(prepared: Prepared, sites: Mapping[Site, Mapping[int, float]], limit: float) -> None:
    several = {site: doses for site, doses in sites.items() if len(doses) > 1 and sum(doses.values()) > limit}
    if not several:
        return
    lengths = prompt_lengths(prepared.program)
    layouts = [prepared.program.intervals(length) for length in lengths or ()]
    for (point, layer), doses in several.items():
        meeting = [
            [index for index in doses if any(a <= start < b for a, b in intervals[index])]
            for intervals in layouts
            for start in {a for index in doses for a, _ in intervals[index]}
        ]
        for together in meeting if lengths is not None else [list(doses)]:
            total = sum(doses[index] for index in together)
            if total > limit:
                fields = list(dict.fromkeys(prepared.field(index) for index in together))
                raise ApiError(
                    400,
                    f"{' and '.join(fields)}: a relative dose of {total:.4g} in all at {site_name(point, layer)} is "
                    f"above max_relative_dose, {limit:g}; lower a strength",
                    f"{fields[-1]}.strength",
                )


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
        edit = prepared.program.edits[index]
        is_set = edit.opcode == "set"
        remedy = "what it sets is too long" if is_set else "lower the strength"
        raise ApiError(
            400,
            f"{where}: a relative dose of {known[layer]:.4g} at {site_name(edit.point, layer)} is above "
            f"max_relative_dose, {limit:g}; {remedy}",
            f"{where}.{'artifact' if is_set else 'strength'}",
        )
