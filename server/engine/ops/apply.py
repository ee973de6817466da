"""The op at one site: edits the rows of a batch in place, reading the bank, and counts what it touched.

A `Segment` is a run of batch rows that get the same edits; a `SiteWork` is all segments of one site in one step. Two
paths give the same numbers: decode steps, where every segment is one row, gather vectors and add them in a few tensor
operations; steps with prompt chunks loop over the segments and broadcast. Sums are in float32 and written back once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from server.engine.capture import CaptureSlice
from server.engine.edits import Opcode


@dataclass(frozen=True, slots=True)
class BoundEdit:
    """One edit of one request at one site: where its vector lies in the bank, and how strong it is."""

    opcode: Opcode
    slot: int
    strength: float


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) of the batch, edited in order."""

    start: int
    end: int
    edits: tuple[BoundEdit, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """The k-th edit of every one-row segment that has one."""

    members: torch.Tensor | None
    """Indices into the site's segments [k], or None for all of them in order."""
    slots: torch.Tensor
    """[k] int64."""
    strengths: torch.Tensor
    """[k, 1] float32."""
    is_norm: torch.Tensor | None
    """[k, 1] bool, or None when no edit of the stage is `add_norm`."""


@dataclass(slots=True)
class SiteWork:
    """What one site does in one step."""

    segments: tuple[Segment, ...]
    rows: torch.Tensor | slice | None
    """The segments' rows when all of them are one row long, else None."""
    stages: tuple[Stage, ...]
    count_index: np.ndarray
    """Indices [n] into the flattened counters of a site."""
    count_value: np.ndarray
    """Tokens to add to each of them [n]."""
    captures: list[CaptureSlice] = field(default_factory=list)
    deltas: dict[int, torch.Tensor] = field(default_factory=dict)
    """By site: what one-row segments add, which stays the same for as long as the batch is laid out the same way."""


def prepare(
    segments: tuple[Segment, ...], count_index: list[int], count_value: list[int], device: torch.device
) -> SiteWork:
    """Lay out one site's work so that the op itself does no Python arithmetic on a decode step."""
    rows: torch.Tensor | slice | None = None
    stages: list[Stage] = []
    if segments and all(segment.end - segment.start == 1 for segment in segments):
        first, last = segments[0].start, segments[-1].start
        contiguous = last - first + 1 == len(segments)
        rows = (
            slice(first, last + 1)
            if contiguous
            else torch.tensor([segment.start for segment in segments], device=device)
        )
        depth = max(len(segment.edits) for segment in segments)
        stages = [_stage(segments, k, device) for k in range(depth)]
    return SiteWork(segments, rows, tuple(stages), np.array(count_index, np.int64), np.array(count_value, np.int64))


def _stage(segments: tuple[Segment, ...], k: int, device: torch.device) -> Stage:
    members = [index for index, segment in enumerate(segments) if len(segment.edits) > k]
    edits = [segments[index].edits[k] for index in members]
    norms = [edit.opcode == "add_norm" for edit in edits]
    return Stage(
        members=None if len(members) == len(segments) else torch.tensor(members, device=device),
        slots=torch.tensor([edit.slot for edit in edits], device=device),
        strengths=torch.tensor([[edit.strength] for edit in edits], dtype=torch.float32, device=device),
        is_norm=torch.tensor(norms, device=device)[:, None] if any(norms) else None,
    )


def apply(
    site: int,
    work: SiteWork,
    vectors: torch.Tensor,
    inverse_norms: torch.Tensor,
    hidden: torch.Tensor | None,
    residual: torch.Tensor,
    touched: np.ndarray,
) -> None:
    """Edit `residual` [tokens, hidden] in place.

    The activation is `hidden + residual`, or `residual` alone when `hidden` is None. `vectors` [slots, hidden] float32
    and
    `inverse_norms` [slots] float32 are the bank's rows of this site; `touched` is the site's flattened counters.
    """
    if work.rows is not None:
        _apply_rows(site, work, vectors, inverse_norms, hidden, residual)
    else:
        for segment in work.segments:
            _apply_segment(segment, vectors, inverse_norms, hidden, residual)
    touched[work.count_index] += work.count_value
    for capture in work.captures:
        capture.add(hidden, residual)


def _apply_rows(
    site: int,
    work: SiteWork,
    vectors: torch.Tensor,
    inverse_norms: torch.Tensor,
    hidden: torch.Tensor | None,
    residual: torch.Tensor,
) -> None:
    rows = work.rows
    delta = work.deltas.get(site)
    if delta is None:
        delta = _delta(work, vectors, inverse_norms, hidden, residual)
        if not any(stage.is_norm is not None for stage in work.stages):
            work.deltas[site] = delta
    if isinstance(rows, slice):
        residual[rows].add_(delta)
    else:
        assert rows is not None
        residual.index_copy_(0, rows, (residual.index_select(0, rows) + delta).to(residual.dtype))


def _delta(
    work: SiteWork,
    vectors: torch.Tensor,
    inverse_norms: torch.Tensor,
    hidden: torch.Tensor | None,
    residual: torch.Tensor,
) -> torch.Tensor:
    """What to add to each of the rows, float32 [segments, hidden]."""
    rows = work.rows
    delta: torch.Tensor | None = None
    for stage in work.stages:
        step = vectors.index_select(0, stage.slots)
        strengths = stage.strengths
        if stage.is_norm is not None:
            x = residual[rows].float() if hidden is None else hidden[rows].float() + residual[rows].float()
            x = x if delta is None else x + delta
            x = x if stage.members is None else x[stage.members]
            scale = x.norm(dim=1, keepdim=True) * inverse_norms[stage.slots][:, None]
            strengths = torch.where(stage.is_norm, strengths * scale, strengths)
        step.mul_(strengths)
        if delta is None and stage.members is None:
            delta = step
        else:
            delta = step.new_zeros(len(work.segments), step.shape[1]) if delta is None else delta
            delta = delta.add_(step) if stage.members is None else delta.index_add_(0, stage.members, step)
    assert delta is not None
    return delta


def _apply_segment(
    segment: Segment,
    vectors: torch.Tensor,
    inverse_norms: torch.Tensor,
    hidden: torch.Tensor | None,
    residual: torch.Tensor,
) -> None:
    target = residual[segment.start : segment.end]
    if all(edit.opcode == "add" for edit in segment.edits):
        delta = sum(edit.strength * vectors[edit.slot] for edit in segment.edits)
        target.add_(delta)
        return
    x = target.float() if hidden is None else hidden[segment.start : segment.end].float() + target.float()
    total = torch.zeros_like(x)
    for edit in segment.edits:
        step = edit.strength * vectors[edit.slot]
        if edit.opcode == "add_norm":
            step = step * ((x + total).norm(dim=1, keepdim=True) * inverse_norms[edit.slot])
        total += step
    target.add_(total)
