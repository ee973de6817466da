"""The op on a CPU: edits the rows of a batch in place, reading the bank, and counts what it touched.

A `Batch` is a set of batch rows that are edited together: all one-row segments of a step (the decodes), or one longer
segment (a piece of a prompt). Its stages are applied in order. Arithmetic is in float32 and written back once. The
definition that this must agree with is `reference.py`; on a GPU `kernel.py` does the same from persistent tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from server.engine.banks import Bank
from server.engine.capture import CaptureSlice
from server.engine.ops.stages import BoundEdit, Member, Stage, change, make_stage, read_gate, rows_of, stage_key

UNDECIDED, OPEN, CLOSED = 0, 1, 2


class Segment(NamedTuple):
    """Rows [start, end) of the batch, edited in order; the last `fresh` of them are counted.

    `row` is the request's row of counters and decisions.
    """

    start: int
    end: int
    fresh: int
    row: int
    edits: tuple[BoundEdit, ...]


@dataclass
class State:
    """What the op shares with the router: the bank, the counters and what gates decided.

    `touched` int64 [sites, rows * edits]; `decisions` int8 [rows, edits].
    """

    bank: Bank
    layers: int
    max_edits: int
    touched: np.ndarray
    decisions: torch.Tensor


class Affine(NamedTuple):
    """x -> factor * x + shift, [rows, width] or [1, width]; either is None where it does nothing."""

    factor: torch.Tensor | None
    shift: torch.Tensor | None


@dataclass(slots=True)
class Batch:
    """Rows of the batch that go through the same stages."""

    rows: torch.Tensor | slice
    tokens: int
    operand_rows: int
    """Rows of operands: one for each token, or one for all of a run."""
    stages: tuple[Stage, ...]
    affine: bool
    """Only ungated `add` and `scale`: what they do doesn't depend on x, and is kept in `composed` for as long as the
    batch is laid out the same way.
    """
    composed: dict[int, Affine] = field(default_factory=dict)


@dataclass(slots=True)
class SiteWork:
    """What one site does in one step. `count_*` [n]: tokens to add to the flattened counters of a site."""

    batches: tuple[Batch, ...]
    count_index: np.ndarray
    count_value: np.ndarray
    captures: list[CaptureSlice] = field(default_factory=list)


def prepare(segments: Sequence[Segment], state: State) -> SiteWork:
    """Lay out one site's work so that the op itself does little in Python on a decode step."""
    singles = [segment for segment in segments if segment.end - segment.start == 1]
    batches = [_batch([segment], state) for segment in segments if segment.end - segment.start > 1]
    affine: list[Segment] = []
    others: list[Segment] = []
    for segment in singles:
        (affine if _is_affine(segment) else others).append(segment)
    for part in (affine, others):
        if part:
            # Rows with the same opcodes side by side, so that a stage reads and writes a slice of them.
            part.sort(key=lambda segment: [str(stage_key(bound)) for bound in segment.edits])
            batches.append(_batch(part, state))
    counts: dict[int, int] = {}
    for segment in segments:
        for bound in segment.edits:
            if bound.scope is None:  # what a gate lets pass is counted when it has
                key = segment.row * state.max_edits + bound.index
                counts[key] = counts.get(key, 0) + segment.fresh
    return SiteWork(tuple(batches), np.array(list(counts), np.int64), np.array(list(counts.values()), np.int64))


def _is_affine(segment: Segment) -> bool:
    return all(bound.edit.opcode in ("add", "scale") and bound.scope is None for bound in segment.edits)


def _batch(segments: list[Segment], state: State) -> Batch:
    starts, tokens = [segment.start for segment in segments], sum(each.end - each.start for each in segments)
    rows: torch.Tensor | slice = slice(starts[0], segments[-1].end)
    if len(segments) > 1 and starts != list(range(starts[0], segments[-1].end)):
        rows = torch.tensor(starts, device=state.bank.device)
    stages: list[Stage] = []
    for k in range(max(len(segment.edits) for segment in segments)):
        groups: dict[object, list[Member]] = {}
        for position, segment in enumerate(segments):
            if k < len(segment.edits):
                bound = segment.edits[k]
                counter = segment.row * state.max_edits + bound.index
                member = Member(position, segment.row, counter, segment.fresh, bound)
                groups.setdefault(stage_key(bound), []).append(member)
        for members in groups.values():
            whole = len(members) == len(segments)
            stages.append(make_stage(members, whole, state.layers, state.bank.device))
    return Batch(rows, tokens, len(segments), tuple(stages), all(map(_is_affine, segments)))


def apply(
    site: int, layer: int, work: SiteWork, state: State, hidden: torch.Tensor | None, residual: torch.Tensor
) -> None:
    """Edit `residual` [tokens, width] in place. The activation is `hidden + residual`, or `residual` alone."""
    for batch in work.batches:
        if batch.affine:
            _apply_affine(site, layer, batch, state.bank, hidden, residual)
        else:
            _apply_stages(site, layer, batch, state, hidden, residual)
    state.touched[site][work.count_index] += work.count_value
    for capture in work.captures:
        capture.add(hidden, residual)


def _apply_affine(
    site: int, layer: int, batch: Batch, bank: Bank, hidden: torch.Tensor | None, residual: torch.Tensor
) -> None:
    affine = batch.composed.get(site)
    if affine is None:
        affine = batch.composed[site] = _compose(layer, batch, bank, residual.shape[1])
    factor, shift = affine
    target = _take(residual, batch.rows)
    if factor is None:
        assert shift is not None
        target.add_(shift)
    elif hidden is not None:
        x = target.to(torch.float32, copy=True).add_(_take(hidden, batch.rows))
        delta = x * (factor - 1)
        target.add_(delta if shift is None else delta.add_(shift))
    elif shift is None:
        target.mul_(factor)
    else:
        target.copy_(target * factor + shift)
    if not isinstance(batch.rows, slice):
        residual.index_copy_(0, batch.rows, target)


def _compose(layer: int, batch: Batch, bank: Bank, width: int) -> Affine:
    factor: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def spread(stage: Stage, value: torch.Tensor, rest: float) -> torch.Tensor:
        """[operand rows, width], with `rest` where the stage has no part."""
        if stage.positions is None:
            return value.expand(batch.operand_rows, width)
        full = value.new_full((batch.operand_rows, width), rest)
        full[stage.positions] = value
        return full

    for stage in batch.stages:
        if stage.opcode == "add":
            step = spread(stage, stage.strengths * rows_of(stage, "vector", layer, bank, width), 0)
            shift = step if shift is None else shift + step
        else:
            gain = spread(stage, 1 + stage.strengths * rows_of(stage, "mask", layer, bank, width), 1)
            factor = gain if factor is None else factor * gain
            shift = None if shift is None else shift * gain
    return Affine(factor, shift)


def _apply_stages(
    site: int, layer: int, batch: Batch, state: State, hidden: torch.Tensor | None, residual: torch.Tensor
) -> None:
    target = _take(residual, batch.rows)
    before = target.to(torch.float32, copy=True)
    if hidden is not None:
        before.add_(_take(hidden, batch.rows))
    x = before.clone()
    opened: torch.Tensor | None = None
    for stage in batch.stages:
        part = x if stage.positions is None else x[stage.positions]
        if stage.opcode == "gate":
            if opened is None:
                opened = torch.zeros(batch.tokens, state.max_edits, dtype=torch.bool, device=x.device)
            _decide(stage, batch, read_gate(stage, layer, part, state.bank), opened, state)
            continue
        start = before if stage.positions is None or stage.opcode != "renorm" else before[stage.positions]
        if stage.scope is not None:
            passes, unchanged = _passes(stage, batch, len(part), opened, state), part.clone()
            change(stage, layer, part, start, state.bank)
            part.copy_(torch.where(passes[:, None], part, unchanged))
            _count_passed(stage, site, passes, state)
        else:
            change(stage, layer, part, start, state.bank)
        if isinstance(stage.positions, torch.Tensor):  # then the part is a copy
            x.index_copy_(0, stage.positions, part)
    if hidden is None:
        target.copy_(x)
    else:
        target.add_(x.sub_(before))
    if not isinstance(batch.rows, slice):
        residual.index_copy_(0, batch.rows, target)


def _take(x: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Some rows: a view of them where they are in a row, else a copy."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _rows(stage: Stage, batch: Batch) -> torch.Tensor:
    rows = torch.arange(batch.tokens)
    return rows if stage.positions is None else rows[stage.positions]


def _decide(stage: Stage, batch: Batch, is_open: torch.Tensor, opened: torch.Tensor, state: State) -> None:
    assert stage.condition is not None and stage.state_rows is not None and stage.indices is not None
    if stage.condition.scope == "sequence":
        held = state.decisions[stage.state_rows, stage.indices]
        new = torch.where(is_open, OPEN, CLOSED).to(torch.int8)
        # The first decision holds, also when the token is run again after a preemption.
        state.decisions[stage.state_rows, stage.indices] = torch.where(held == UNDECIDED, new, held)
    elif batch.operand_rows == 1:
        opened[:, stage.indices[0]] = is_open
    else:
        opened[_rows(stage, batch), stage.indices] = is_open


def _passes(stage: Stage, batch: Batch, rows: int, opened: torch.Tensor | None, state: State) -> torch.Tensor:
    """Which of the stage's rows their gate lets pass, bool [rows]."""
    assert stage.gates is not None and stage.state_rows is not None
    if stage.scope == "sequence":
        return (state.decisions[stage.state_rows, stage.gates] == OPEN).expand(rows)
    if opened is None:  # the gate's own span covers none of these rows
        return torch.zeros(rows, dtype=torch.bool)
    if batch.operand_rows == 1:
        return opened[:, stage.gates[0]]
    return opened[_rows(stage, batch), stage.gates]


def _count_passed(stage: Stage, site: int, passes: torch.Tensor, state: State) -> None:
    if len(stage.counters) == len(passes):
        np.add.at(state.touched[site], stage.counters, passes.numpy() * stage.fresh)
    else:  # a run: its last rows are the fresh ones
        fresh = int(stage.fresh[0])
        state.touched[site][stage.counters[0]] += int(passes[len(passes) - fresh :].sum())
