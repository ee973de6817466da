"""From a scheduled batch to what each site does in this step.

`Router` is the same for every model runner; an adapter (seams/runner_*.py) gives it a `BatchView` after the runner has
laid out its batch. Which tokens are touched follows from absolute positions alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from server.engine.banks import Bank, Resident
from server.engine.capture import Capture, CaptureSlice
from server.engine.edits import POINTS, Edit, Point, Program, site_index
from server.engine.ops.tables import Kept, Tables
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
class _Tally:
    """What requests of one receipt counted: it stays on the device until it is asked for, so that no step waits."""

    edits: tuple[Edit, ...]
    counters: Tensor | None
    """int32 [sites, edits]; None where no step ran."""
    cached: np.ndarray

    def plus(self, more: _Tally | None) -> _Tally:
        """With the counts of another request of this receipt, and so of the same program."""
        if more is None:
            return self
        counters = self.counters
        if more.counters is not None:
            counters = more.counters if counters is None else counters + more.counters
        return _Tally(self.edits, counters, self.cached + more.cached)

    def read(self, layers: int) -> Counts:
        """Waits for the device."""
        counts = None if self.counters is None else self.counters.cpu().numpy()
        touched = [
            np.zeros(len(edit.layers), np.int32)
            if counts is None
            else counts[_sites(edit.point, edit.layers, layers), index]
            for index, edit in enumerate(self.edits)
        ]
        return Counts(touched, self.cached)


@dataclass(slots=True)
class _Row:
    """A steered or captured request that the engine knows."""

    serial: int
    program: Program | None
    residents: tuple[Resident | None, ...]
    sites: tuple[frozenset[int], ...]
    """Where each edit acts."""
    intervals: tuple[tuple[Interval, ...], ...]
    receipt: str | None
    capture: Capture | None
    seat: int | None = None
    """Its row of the tables, while it has one."""
    kept: Kept | None = None
    """What was in that row when it had to be given to another request."""
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
    """Knows the running programs, and lays out each step in the tables.

    `works[site]` is None where a step has nothing to do, else what is to be captured there.
    """

    tables: Tables
    layers: int
    works: list[list[CaptureSlice] | None] = field(init=False)

    def __post_init__(self) -> None:
        self.bank: Bank = self.tables.bank
        self.sites = len(POINTS) * self.layers
        self.works = [None] * self.sites
        self._rows: dict[str, _Row] = {}
        self._serials = count()
        self._free = list(range(self.tables.max_rows, 0, -1))
        self._receipts: OrderedDict[str, _Tally] = OrderedDict()
        self._captures: OrderedDict[str, Capture] = OrderedDict()
        self._layout: object = None

    def admit(
        self, request_id: str, program: Program | None, receipt: str | None, capture: Capture | None, prompt_len: int
    ) -> None:
        """Remember a request. RuntimeError when an operand isn't resident: it must never run unsteered."""
        edits = program.edits if program is not None else ()
        self._rows[request_id] = _Row(
            next(self._serials),
            program,
            tuple(self._resident(edit) for edit in edits),
            tuple(frozenset(_sites(edit.point, edit.layers, self.layers)) for edit in edits),
            program.intervals(prompt_len) if program is not None else (),
            receipt,
            capture,
        )
        if capture is not None and receipt is not None:
            _keep(self._captures, receipt, capture)

    def _resident(self, edit: Edit) -> Resident | None:
        if edit.operand is None:
            return None
        resident = self.bank.resident(edit.operand)
        if missing := set(edit.layers) - resident.layers:
            raise RuntimeError(f"bank has no layers {sorted(missing)} of {edit.operand!r}")
        return resident

    def release(self, request_id: str) -> None:
        """Forget a finished or aborted request, keeping its counts until they are collected."""
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        if row.receipt is not None:
            _keep(self._receipts, row.receipt, self._tally(row).plus(self._receipts.get(row.receipt)))
        if row.seat is not None:
            self.tables.clear_row(row.seat)
            self._free.append(row.seat)

    def receipt(self, receipt: str) -> Counts | None:
        """Counts so far, over all requests (n > 1, several prompts) that carry this receipt; None if none ran.

        The receipt is closed by being read.
        """
        tally = self._receipts.pop(receipt, None)
        for row in self._rows.values():
            if row.receipt == receipt:
                tally = self._tally(row).plus(tally)
                row.receipt = None
        return None if tally is None else tally.read(self.layers)

    def captured(self, receipt: str) -> Capture | None:
        return self._captures.pop(receipt, None)

    def _tally(self, row: _Row) -> _Tally:
        edits = row.program.edits if row.program is not None else ()
        counters = None
        if row.seat is not None:
            counters = self.tables.counters[row.seat, :, : len(edits)].clone()
        elif row.kept is not None:
            counters = row.kept.counts[:, : len(edits)]
        return _Tally(edits, counters, np.array(row.cached or [0] * len(edits)))

    def clear(self) -> None:
        """Nothing to do at any site: a dummy batch, or one without steered requests."""
        if self._layout is not None:
            self.works[:] = [None] * self.sites
            self._layout = None
            self.tables.idle()

    def route(self, view: BatchView) -> None:
        """Lay out the step. Rebuilds nothing when the batch is laid out as in the step before, as in steady decode."""
        if not self._rows:
            self.clear()
            return
        self._seat(view.request_ids)
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
            _stage(self.tables, pieces, start)
            self._build(pieces, captures)
            self._layout = () if captures else layout

    def _seat(self, request_ids: Sequence[str]) -> None:
        """Give each steered request of the step a row of the tables: a free one, or that of a request that is preempted
        and finds what it had decided and counted when it runs again.
        """
        for request_id in request_ids:
            row = self._rows.get(request_id)
            if row is None or row.program is None or row.seat is not None:
                continue
            if not self._free:
                running = set(request_ids)
                away = next((r for i, r in self._rows.items() if r.seat is not None and i not in running), None)
                if away is None:
                    raise RuntimeError(f"a step of more than {self.tables.max_rows} steered requests")
                assert away.seat is not None
                away.kept = self.tables.keep(away.seat)
                self._free.append(away.seat)
                away.seat = None
            self.tables.set_row(self._free[-1], row.program, row.residents, self.layers, row.kept)
            row.seat, row.kept = self._free.pop(), None

    def _build(self, pieces: list[_Piece], captures: list[CaptureSlice]) -> None:
        acting = frozenset().union(*{piece.row.sites[m] for piece in pieces for m in piece.active})
        self.works[:] = [[] if site in acting else None for site in range(self.sites)]
        for capture in captures:
            work = self.works[capture.site]
            if work is None:
                work = self.works[capture.site] = []
            work.append(capture)


@lru_cache(maxsize=1024)
def _sites(point: Point, chosen: tuple[int, ...], layers: int) -> list[int]:
    """The numbers of a point's sites at the chosen layers; programs mostly share a few sets of them."""
    return [site_index(point, layer, layers) for layer in chosen]


def _stage(tables: Tables, pieces: list[_Piece], tokens: int) -> None:
    """Tell the kernels which row and which edits each token of the step has."""
    rows, bits, fresh = [0] * tokens, [0] * tokens, [False] * tokens
    for piece in pieces:
        assert piece.row.seat is not None
        length = piece.end - piece.start
        rows[piece.start : piece.end] = [piece.row.seat] * length
        bits[piece.start : piece.end] = [sum([1 << edit for edit in piece.active])] * length
        fresh[piece.end - piece.fresh : piece.end] = [True] * piece.fresh
    tables.stage(np.array(rows, np.int32), np.array(bits, np.int32), np.array(fresh, np.bool_))


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


def _keep(kept: OrderedDict[str, T], key: str, value: T) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > UNCOLLECTED_LIMIT:
        kept.popitem(last=False)
