"""From a scheduled batch to what each site does in this step.

`Router` is the same for every model runner; an adapter (seams.py) gives it a `BatchView` after the runner has laid out
its batch. Which tokens are touched follows from absolute positions alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np

from server.engine.banks import Bank
from server.engine.capture import Capture, CaptureSlice
from server.engine.edits import Interval, Program, clip
from server.engine.ops.apply import BoundEdit, Segment, SiteWork, prepare

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

    touched: np.ndarray
    """Tokens the op edited [sites, edits]."""
    cached: np.ndarray
    """Tokens of each edit's span that the prefix cache held already [edits]."""


@dataclass(slots=True)
class _Row:
    """A steered or captured request that the engine knows."""

    serial: int
    index: int
    edits: tuple[tuple[BoundEdit, frozenset[int]], ...]
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
    """Knows the running programs; `works[site]` is None where a step has nothing to do."""

    bank: Bank
    sites: int
    max_requests: int
    max_edits: int
    works: list[SiteWork | None] = field(init=False)
    touched: np.ndarray = field(init=False)
    """Tokens touched [sites, max_requests * max_edits], incremented by the op."""

    def __post_init__(self) -> None:
        self.works = [None] * self.sites
        self.touched = np.zeros((self.sites, self.max_requests * self.max_edits), np.int64)
        self._rows: dict[str, _Row] = {}
        self._serials = count()
        self._free = list(range(self.max_requests - 1, -1, -1))
        self._receipts: OrderedDict[str, Counts] = OrderedDict()
        self._captures: OrderedDict[str, Capture] = OrderedDict()
        self._layout: object = None

    def admit(
        self, request_id: str, program: Program | None, receipt: str | None, capture: Capture | None, prompt_len: int
    ) -> None:
        """Remember a request. RuntimeError when a vector isn't resident: it must never run unsteered."""
        edits = program.edits if program is not None else ()
        bound = tuple(
            (BoundEdit(edit.opcode, self.bank.slot(edit.operand, edit.layers), edit.strength), frozenset(edit.layers))
            for edit in edits
        )
        intervals = program.intervals(prompt_len) if program is not None else ()
        if not self._free:
            self._grow()
        self._rows[request_id] = _Row(next(self._serials), self._free.pop(), bound, intervals, receipt, capture)
        if capture is not None and receipt is not None:
            _keep(self._captures, receipt, capture)

    def release(self, request_id: str) -> None:
        """Forget a finished or aborted request, keeping its counts until they are collected."""
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        if row.receipt is not None:
            _keep(self._receipts, row.receipt, _sum(self._receipts.get(row.receipt), self._counts(row)))
        self._touched(row)[:] = 0
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

    def captured(self, receipt: str) -> Capture:
        return self._captures.pop(receipt)

    def _touched(self, row: _Row) -> np.ndarray:
        return self.touched[:, row.index * self.max_edits : row.index * self.max_edits + len(row.edits)]

    def _counts(self, row: _Row) -> Counts:
        return Counts(self._touched(row).copy(), np.array(row.cached or [0] * len(row.edits)))

    def _grow(self) -> None:
        """Preempted requests stay known while others start, so there can be more than run at once."""
        rows = self.touched.shape[1] // self.max_edits
        self.touched = np.pad(self.touched, ((0, 0), (0, rows * self.max_edits)))
        self._free = list(range(2 * rows - 1, rows - 1, -1))

    def clear(self) -> None:
        """Nothing to do at any site: a dummy batch, or one without steered requests."""
        if self._layout is not None:
            self.works[:] = [None] * self.sites
            self._layout = None

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
                row.counted = max(row.counted, position + tokens)
                if row.capture is not None:
                    captures += _capture_slices(row.capture, self.sites, start, position, tokens)
            start += tokens
        if not pieces and not captures:
            self.clear()
            return
        layout = tuple((piece.row.serial, piece.start, piece.end, piece.fresh, piece.active) for piece in pieces)
        if captures or layout != self._layout:
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
                base = work or prepare((), [], [], self.bank.device)
                work = SiteWork(base.segments, base.rows, base.stages, base.count_index, base.count_value)
                self.works[capture.site] = work
            work.captures.append(capture)

    def _alike(self, pieces: list[_Piece]) -> list[frozenset[int]]:
        """Groups of sites at which the same edits act; few, as programs mostly share a few sets of layers."""
        groups = [frozenset(range(self.sites))]
        for layers in {piece.row.edits[m][1] for piece in pieces for m in piece.active}:
            groups = [part for group in groups for part in (group & layers, group - layers) if part]
        return groups

    def _work(self, pieces: list[_Piece], active: list[tuple[int, ...]]) -> SiteWork | None:
        segments: list[Segment] = []
        counts: dict[int, int] = {}
        for piece, edits in zip(pieces, active, strict=True):
            if edits:
                segments.append(Segment(piece.start, piece.end, tuple(piece.row.edits[m][0] for m in edits)))
                for m in edits:
                    key = piece.row.index * self.max_edits + m
                    counts[key] = counts.get(key, 0) + piece.fresh
        if not segments:
            return None
        return prepare(tuple(segments), list(counts), list(counts.values()), self.bank.device)


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


def _capture_slices(capture: Capture, sites: int, start: int, position: int, tokens: int) -> list[CaptureSlice]:
    return [
        CaptureSlice(capture, site, start + a - position, start + b - position)
        for a, b in clip(capture.intervals, position, position + tokens)
        for site in range(sites)
    ]


def _length(intervals: tuple[Interval, ...]) -> int:
    return sum(end - start for start, end in intervals)


def _sum(counts: Counts | None, more: Counts) -> Counts:
    return more if counts is None else Counts(counts.touched + more.touched, counts.cached + more.cached)


def _keep(kept: OrderedDict[str, T], key: str, value: T) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > UNCOLLECTED_LIMIT:
        kept.popitem(last=False)
