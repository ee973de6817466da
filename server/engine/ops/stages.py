"""One opcode applied to some rows at once, each with an operand of its own or all with the same one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from server.engine.banks import Bank, Resident
from server.engine.edits import Condition, Edit, Function, Opcode
from server.engine.operands import Role


@dataclass(frozen=True, slots=True)
class BoundEdit:
    """An edit of a request, with its operand found in the bank. `index` is its place in the program; `scope` is that
    of the gate that it obeys.
    """

    index: int
    edit: Edit
    resident: Resident | None
    scope: str | None


@dataclass(frozen=True, slots=True)
class Member:
    """One batch row, or one run of rows, that takes part in a stage."""

    position: int
    """Its index in the batch, 0 for a run."""
    state_row: int
    counter: int
    """Index into the flattened counters of a site."""
    fresh: int
    """Tokens to count; they are the last ones of a run."""
    bound: BoundEdit


@dataclass(slots=True)
class Stage:
    """The k-th edit of those batch rows whose k-th edit has this opcode and shape.

    Tensors have one row per member, or a single row for a run and for an operand that all members share.
    """

    opcode: Opcode
    positions: torch.Tensor | slice | None
    """Which of the batch's rows [members], or None for all of them in order."""
    strengths: torch.Tensor
    """[members, 1] float32."""
    residents: tuple[Resident, ...]
    """One per member, or one that all share."""
    starts: dict[Role, torch.Tensor]
    """Where each role's tensor begins in the bank, int64 [layers, residents]."""
    function: Function
    low: torch.Tensor | None
    """[members, rank] or [members, 1] float32, as is `high`."""
    high: torch.Tensor | None
    condition: Condition | None
    thresholds: torch.Tensor | None
    """[members, 1] float32."""
    scope: str | None
    state_rows: torch.Tensor | None
    indices: torch.Tensor | None
    gates: torch.Tensor | None
    """For each member of a gate, or behind one: its row of the decisions, the index of its edit, and the index of the
    gate that it obeys.
    """
    counters: np.ndarray
    fresh: np.ndarray
    kept: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    """By layer: what the stage reads there, gathered when it first ran."""


def stage_key(bound: BoundEdit) -> tuple[object, ...]:
    """Edits with equal keys can be applied as one stage."""
    edit = bound.edit
    shape: object = None
    if edit.opcode == "map":
        shape = id(bound.resident)  # matrices are shared, never gathered
    elif edit.opcode == "rank":
        assert bound.resident is not None
        function = edit.function or Function()
        bounds = (function.low, function.high)
        shape = (
            tuple(bound.resident.rank(layer) for layer in edit.layers),
            function.activation,
            tuple(each is None for each in bounds),
            tuple(len(each) for each in bounds if each is not None),
        )
    elif edit.condition is not None:
        shape = (edit.condition.readout, edit.condition.above, edit.condition.scope)
    return edit.opcode, shape, bound.scope, None if bound.resident is None else bound.resident.width


def make_stage(members: list[Member], whole: bool, layers: int, device: torch.device) -> Stage:
    """Lay out members with equal keys. `whole`: they are all the rows of the batch, in order."""
    first = members[0].bound
    edits = [member.bound.edit for member in members]
    residents = tuple(member.bound.resident for member in members if member.bound.resident is not None)
    if all(each is residents[0] for each in residents):
        residents = residents[:1]
    gates = [edit.gate for edit in edits if edit.gate is not None]
    is_gated = bool(gates) or first.edit.condition is not None

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    return Stage(
        opcode=first.edit.opcode,
        positions=None if whole else _positions([member.position for member in members], device),
        strengths=column([edit.strength for edit in edits]),
        residents=residents,
        starts={
            role: torch.from_numpy(_starts(residents, role, layers)).to(device)
            for role in (residents[0].starts if residents else ())
        },
        function=first.edit.function or Function(),
        low=_bounds([edit.function.low for edit in edits if edit.function is not None], device),
        high=_bounds([edit.function.high for edit in edits if edit.function is not None], device),
        condition=first.edit.condition,
        thresholds=column([edit.condition.threshold for edit in edits if edit.condition is not None])
        if first.edit.condition is not None
        else None,
        scope=first.scope,
        state_rows=torch.tensor([member.state_row for member in members], device=device) if is_gated else None,
        indices=torch.tensor([member.bound.index for member in members], device=device) if is_gated else None,
        gates=torch.tensor(gates, device=device) if gates else None,
        counters=np.array([member.counter for member in members]),
        fresh=np.array([member.fresh for member in members]),
    )


def _positions(rows: list[int], device: torch.device) -> torch.Tensor | slice:
    """Rows in a row as a slice: reading and writing them costs far less."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _starts(residents: tuple[Resident, ...], role: Role, layers: int) -> np.ndarray:
    """[layers, residents]; -1 where a resident has nothing."""
    columns = [each.starts[role] for each in residents]
    if any(len(column) < layers for column in columns):
        columns = [np.pad(column, (0, layers - len(column)), constant_values=-1) for column in columns]
    return np.stack(columns, 1)


def _bounds(bounds: list[tuple[float, ...] | None], device: torch.device) -> torch.Tensor | None:
    present = [each for each in bounds if each is not None]
    return torch.tensor(present, dtype=torch.float32, device=device) if present else None


def rows_of(stage: Stage, role: Role, layer: int, bank: Bank, width: int) -> torch.Tensor:
    """The vectors of one role [residents, width]; `width` is less than the operand's where it is split over ranks."""
    full = stage.residents[0].width
    rows = bank.rows(full).index_select(0, stage.starts[role][layer] // full)
    return rows if width == full else rows[:, :width]


def _matrices(stage: Stage, role: Role, layer: int, bank: Bank, width: int) -> torch.Tensor:
    """The matrices of one role [residents, rank, width]; a view of the bank where there is one."""
    full = stage.residents[0].width
    count = stage.residents[0].pieces[layer, role][1][0]
    first = stage.starts[role][layer] // full
    if len(first) == 1:
        start = int(first[0])
        return bank.rows(full)[start : start + count, :width][None]
    rows = first[:, None] + torch.arange(count, device=first.device)
    return bank.rows(full)[rows.reshape(-1), :width].view(len(first), count, width)


def _numbers(stage: Stage, role: Role, layer: int, bank: Bank) -> torch.Tensor:
    """The numbers of one role [residents, count]."""
    (count,) = stage.residents[0].pieces[layer, role][1]
    start = stage.starts[role][layer]
    numbers: torch.Tensor = bank.data[start[:, None] + torch.arange(count, device=start.device)]
    return numbers


def _norms(x: torch.Tensor) -> torch.Tensor:
    """[rows, 1]."""
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norms


def change(stage: Stage, layer: int, x: torch.Tensor, x0: torch.Tensor, bank: Bank) -> None:
    """Apply the stage to the activations x [rows, width] float32, in place; `x0` are those before the program's first
    edit here.
    """
    if stage.opcode == "renorm":
        norm = _norms(x).clamp_min_(torch.finfo(torch.float32).tiny)
        x.mul_(_norms(x0).div_(norm))
        return
    kept = stage.kept.get(layer)
    if kept is None:
        kept = stage.kept[layer] = _gather(stage, layer, bank, x.shape[1])
    match stage.opcode:
        case "add":
            x.add_(kept[0])
        case "add_norm":
            x.addcmul_(_norms(x), kept[0])
        case "scale":
            x.mul_(kept[0])
        case "set":
            x.copy_(kept[0])
        case "rank":
            _combine(x, _coefficients(stage, x, *kept[:3]), kept[3])
        case "map":
            x.add_(stage.strengths * (x @ kept[0].T if len(kept) == 1 else x @ kept[0].T @ kept[1]))
        case _:
            raise AssertionError(f"{stage.opcode} changes nothing")


def _gather(stage: Stage, layer: int, bank: Bank, width: int) -> tuple[torch.Tensor, ...]:
    """What the stage reads at a layer, with the strengths in it where the formula allows."""
    match stage.opcode:
        case "add":
            return (stage.strengths * rows_of(stage, "vector", layer, bank, width),)
        case "add_norm":
            direction = rows_of(stage, "vector", layer, bank, width) * _numbers(stage, "inverse_norm", layer, bank)
            return (stage.strengths * direction,)
        case "scale":
            return (1 + stage.strengths * rows_of(stage, "mask", layer, bank, width),)
        case "rank":
            numbers = (_numbers(stage, role, layer, bank) for role in ("bias", "threshold"))
            decoder = stage.strengths[:, :, None] * _matrices(stage, "decoder", layer, bank, width)
            return _matrices(stage, "encoder", layer, bank, width), *numbers, decoder
        case "map":
            roles: tuple[Role, ...] = ("matrix",) if "matrix" in stage.starts else ("right", "left")
            return tuple(_matrices(stage, role, layer, bank, width)[0] for role in roles)
    return (rows_of(stage, "vector", layer, bank, width),)


def _coefficients(
    stage: Stage, x: torch.Tensor, encoder: torch.Tensor, bias: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """c [rows, rank] of `rank`."""
    if len(encoder) == 1:
        c = torch.addmm(bias, x, encoder[0].T)
    else:
        c = torch.baddbmm(bias[:, :, None], encoder, x[:, :, None]).squeeze(2)
    if stage.function.activation == "relu":
        c = c.relu_()
    elif stage.function.activation == "jumprelu":
        c = torch.where(c > threshold, c, 0)
    return torch.clamp(c, stage.low, stage.high) - c if stage.function.clamps else c


def _combine(x: torch.Tensor, coefficients: torch.Tensor, decoder: torch.Tensor) -> None:
    """x += c d; `decoder` has one matrix for each row, or one for all."""
    if len(decoder) == 1:
        x.addmm_(coefficients, decoder[0])
    else:
        x[:, None].baddbmm_(coefficients[:, None], decoder)


def read_gate(stage: Stage, layer: int, x: torch.Tensor, bank: Bank) -> torch.Tensor:
    """Whether the gate is open at each row [rows], bool."""
    assert stage.condition is not None and stage.thresholds is not None
    value = (x * rows_of(stage, "vector", layer, bank, x.shape[1])).sum(1, keepdim=True)
    if stage.condition.readout == "cosine":
        norm = _norms(x)
        value = torch.where(norm > 0, value / norm, 0) * _numbers(stage, "inverse_norm", layer, bank)
    return (value > stage.thresholds if stage.condition.above else value < stage.thresholds)[:, 0]
