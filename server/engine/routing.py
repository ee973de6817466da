"""From a scheduled batch to what each site does in this step.

`Router` is the same for every model runner; an adapter (seams/runner_*.py) gives it a `BatchView` after the runner has
laid out its batch. Which tokens are touched follows from absolute positions alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from server.engine.banks import Bank
from server.engine.capture import Capture, CaptureSlice
from server.engine.edits import POINTS, Point, Program, site_index
from server.engine.ops.apply import OPEN, UNDECIDED, Segment, SiteWork, State, prepare
from server.engine.ops.stages import BoundEdit
from server.engine.ops.tables import Tables
from server.engine.spans import Interval, clip

T = TypeVar("T")

UNCOLLECTED_LIMIT = 4096
"""Receipts and captures kept for requests that nobody asked about again, such as cancelled ones."""


class BatchView(NamedTuple):
    """One step's batch, in row order. Row t of request i has absolute position `first_positions[i] + t`."""

    request_ids: Sequence[str]
    num_tokens: Sequence[int]
    first_positions: Sequence[int]


class Counts(NamedTuple):
    """What one receipt says."""

    touched: list[np.ndarray]
    """For each edit, the tokens that the op edited at each of its layers; for a gate, those at which it was read."""
    cached: np.ndarray
    """Tokens of each edit's span that the prefix cache held already [edits]."""


@dataclass(slots=True)
class _Row:
    """A steered or captured request that the engine knows."""

    serial: int
    index: int
    edits: tuple[tuple[BoundEdit, frozenset[int]], ...]
    """Each edit and the sites at which it acts."""
    intervals: tuple[tuple[Interval, ...], ...]
    receipt: str | None
    capture: Capture | None
    counted: int | None = None
    """Positions below this were counted; a preempted request runs them again. None before the first step."""
    cached: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Piece:
    """A run of batch rows of one request in which the same of its edits are active."""

    row: _Row
    start: int
    end: int
    fresh: int
    active: tuple[int, ...]


@dataclass
class Router:
    """Knows the running programs; `works[site]` is None where a step has nothing to do.

    With `tables`, programs and steps are laid out there, for the kernels, and a `SiteWork` holds no more than captures.
    """

    bank: Bank
    layers: int
    max_requests: int
    max_edits: int
    tables: Tables | None = None
    works: list[SiteWork | None] = field(init=False)
    state: State = field(init=False)

    def __post_init__(self) -> None:
        self.sites = len(POINTS) * self.layers
        self.works = [None] * self.sites
        touched = np.zeros((self.sites, self.max_requests * self.max_edits), np.int64)
        decisions = torch.zeros(self.max_requests, self.max_edits, dtype=torch.int8, device=self.bank.device)
        self.state = State(self.bank, self.layers, self.max_edits, touched, decisions)
        self._rows: dict[str, _Row] = {}
        self._serials = count()
        self._free = list(range(self.max_requests - 1, -1, -1))
        self._receipts: OrderedDict[str, Counts] = OrderedDict()
        self._captures: OrderedDict[str, Capture] = OrderedDict()
        self._layout: object = None

    def admit(
        self, request_id: str, program: Program | None, receipt: str | None, capture: Capture | None, prompt_len: int
    ) -> None:
        """Remember a request. RuntimeError when an operand isn't resident: it must never run unsteered."""
        bound = tuple(self._bind(program, index) for index in range(len(program.edits))) if program is not None else ()
        intervals = program.intervals(prompt_len) if program is not None else ()
        if not self._free:
            self._grow()
        row = _Row(next(self._serials), self._free.pop(), bound, intervals, receipt, capture)
        if self.tables is not None and program is not None:
            self.tables.set_row(row.index + 1, program, [each.resident for each, _ in bound], self.layers)
        self._rows[request_id] = row
        if capture is not None and receipt is not None:
            _keep(self._captures, receipt, capture)

    def _bind(self, program: Program, index: int) -> tuple[BoundEdit, frozenset[int]]:
        edit = program.edits[index]
        resident = None if edit.operand is None else self.bank.resident(edit.operand)
        if resident is not None and (missing := set(edit.layers) - resident.layers):
            raise RuntimeError(f"bank has no layers {sorted(missing)} of {edit.operand!r}")
        gate = None if edit.gate is None else program.edits[edit.gate].condition
        sites = frozenset(_sites(edit.point, edit.layers, self.layers))
        return BoundEdit(index, edit, resident, None if gate is None else gate.scope), sites

    def release(self, request_id: str) -> None:
        """Forget a finished or aborted request, keeping its counts until they are collected."""
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        if row.receipt is not None:
            _keep(self._receipts, row.receipt, _sum(self._receipts.get(row.receipt), self._counts(row)))
        self._touched(row)[:] = 0
        self.state.decisions[row.index] = UNDECIDED
        if self.tables is not None:
            self.tables.clear_row(row.index + 1)
        self._free.append(row.index)

    def receipt(self, receipt: str) -> Counts | None:
        """Counts so far, over all requests (n > 1, several prompts) that carry this receipt; None if none ran.

        The receipt is closed by being read.
        """
        counts = self._receipts.pop(receipt, None)
        for row in self._rows.values():
            if row.receipt == receipt:
                counts = _sum(counts, self._counts(row))
                row.receipt = None
        return counts

    def captured(self, receipt: str) -> Capture | None:
        return self._captures.pop(receipt, None)

    def _touched(self, row: _Row) -> np.ndarray:
        if self.tables is not None:
            return self.tables.counts(row.index + 1)
        return self.state.touched[:, row.index * self.max_edits : row.index * self.max_edits + len(row.edits)]

    def _counts(self, row: _Row) -> Counts:
        touched = self._touched(row)
        by_edit = [
            touched[_sites(bound.edit.point, bound.edit.layers, self.layers), bound.index] for bound, _ in row.edits
        ]
        return Counts(by_edit, np.array(row.cached or [0] * len(row.edits)))

    def _grow(self) -> None:
        """Preempted requests stay known while others start, so there can be more than run at once."""
        if self.tables is not None:
            raise RuntimeError(f"more than {self.max_requests} steered requests are running or preempted")
        state = self.state
        rows = len(state.decisions)
        state.touched = np.pad(state.touched, ((0, 0), (0, rows * self.max_edits)))
        state.decisions = torch.cat([state.decisions, torch.zeros_like(state.decisions)])
        self._free = list(range(2 * rows - 1, rows - 1, -1))

    def clear(self) -> None:
        """Nothing to do at any site: a dummy batch, or one without steered requests."""
        if self._layout is not None:
            self.works[:] = [None] * self.sites
            self._layout = None
            if self.tables is not None:
                self.tables.idle()

    def route(self, view: BatchView) -> None:
        """Lay out the step. Rebuilds nothing when the batch is laid out as in the step before, as in steady decode."""
        if not self._rows:
            self.clear()
            return
        pieces: list[_Piece] = []
        captures: list[CaptureSlice] = []
        start = 0
        for request_id, tokens, position in zip(view.request_ids, view.num_tokens, view.first_positions, strict=True):
            row = self._rows.get(request_id)
            if row is not None:
                if row.counted is None:
                    row.counted = position
                    row.cached = [_length(clip(intervals, 0, position)) for intervals in row.intervals]
                pieces += _pieces(row, start, position, tokens)
                if row.capture is not None:
                    captures += _capture_slices(row, row.capture, start, position, tokens)
                row.counted = max(row.counted, position + tokens)
            start += tokens
        if not pieces and not captures:
            self.clear()
            return
        layout = tuple((piece.row.serial, piece.start, piece.end, piece.fresh, piece.active) for piece in pieces)
        if captures or layout != self._layout:
            if self.tables is not None:
                _stage(self.tables, pieces, start)
            self._build(pieces, captures)
            self._layout = () if captures else layout

    def _build(self, pieces: list[_Piece], captures: list[CaptureSlice]) -> None:
        for sites in self._alike(pieces):
            site = next(iter(sites))
            active = [tuple(m for m in piece.active if site in piece.row.edits[m][1]) for piece in pieces]
            work = self._work(pieces, active)
            for site in sites:
                self.works[site] = work
        for capture in captures:
            work = self.works[capture.site]
            if work is None or not work.captures:
                # A work is shared by sites that do the same; captures are per site, so give this site its own.
                base = work or prepare((), self.state)
                work = SiteWork(base.batches, base.count_index, base.count_value)
                self.works[capture.site] = work
            work.captures.append(capture)

    def _alike(self, pieces: list[_Piece]) -> list[frozenset[int]]:
        """Groups of sites at which the same edits act; few, as programs mostly share a few sets of layers."""
        groups = [frozenset(range(self.sites))]
        for layers in {piece.row.edits[m][1] for piece in pieces for m in piece.active}:
            groups = [part for group in groups for part in (group & layers, group - layers) if part]
        return groups

    def _work(self, pieces: list[_Piece], active: list[tuple[int, ...]]) -> SiteWork | None:
        segments = []
        for piece, edits in zip(pieces, active, strict=True):
            bound = tuple(each for m in edits if (each := self._decided(piece.row, m)) is not None)
            if bound:
                segments.append(Segment(piece.start, piece.end, piece.fresh, piece.row.index, bound))
        if not segments:
            return None
        return prepare(segments if self.tables is None else (), self.state)

    def _decided(self, row: _Row, index: int) -> BoundEdit | None:
        """An edit as it acts in this step; behind a gate that has decided for the sequence it is free, or gone."""
        bound = row.edits[index][0]
        if bound.scope != "sequence" or self.tables is not None:
            return bound
        decision = int(self.state.decisions[row.index, bound.edit.gate])
        if decision == UNDECIDED:
            return bound
        return replace(bound, scope=None) if decision == OPEN else None


@lru_cache(maxsize=1024)
def _sites(point: Point, chosen: tuple[int, ...], layers: int) -> list[int]:
    """The numbers of a point's sites at the chosen layers; programs mostly share a few sets of them."""
    return [site_index(point, layer, layers) for layer in chosen]


def _stage(tables: Tables, pieces: list[_Piece], tokens: int) -> None:
    """Tell the kernels which row and which edits each token of the step has."""
    rows, bits, fresh = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32), np.zeros(tokens, np.bool_)
    for piece in pieces:
        rows[piece.start : piece.end] = piece.row.index + 1
        bits[piece.start : piece.end] = sum(1 << edit for edit in piece.active)
        fresh[piece.end - piece.fresh : piece.end] = True
    tables.stage(rows, bits, fresh)


def _pieces(row: _Row, start: int, position: int, tokens: int) -> list[_Piece]:
    """Cut rows [start, start + tokens) where the set of active edits changes. Rows without an edit are left out."""
    if tokens == 1:  # decode, where this runs for every request in every step
        active = tuple(m for m, each in enumerate(row.intervals) if any(a <= position < b for a, b in each))
        return [_Piece(row, start, start + 1, int(position >= (row.counted or 0)), active)] if active else []
    end = position + tokens
    clipped = [clip(intervals, position, end) for intervals in row.intervals]
    cuts = sorted({position, end, *(edge for each in clipped for interval in each for edge in interval)})
    pieces: list[_Piece] = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        active = tuple(m for m, each in enumerate(clipped) if any(x <= a < y for x, y in each))
        if active:
            fresh = max(0, b - max(a, row.counted or 0))
            pieces.append(_Piece(row, start + a - position, start + b - position, fresh, active))
    return pieces


def _capture_slices(row: _Row, capture: Capture, start: int, position: int, tokens: int) -> list[CaptureSlice]:
    """What to read of rows [start, start + tokens); tokens that run again after a preemption were read before."""
    first = max(position, row.counted or 0)
    return [
        CaptureSlice(capture, site, start + a - position, start + b - position)
        for a, b in clip(capture.intervals, first, position + tokens)
        for site in capture.sites
    ]


def _length(intervals: tuple[Interval, ...]) -> int:
    return sum(end - start for start, end in intervals)


def _sum(counts: Counts | None, more: Counts) -> Counts:
    if counts is None:
        return more
    touched = [a + b for a, b in zip(counts.touched, more.touched, strict=True)]
    return Counts(touched, counts.cached + more.cached)


def _keep(kept: OrderedDict[str, T], key: str, value: T) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > UNCOLLECTED_LIMIT:
        kept.popitem(last=False)
