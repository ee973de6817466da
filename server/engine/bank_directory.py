"""Who lies where in the bank: which operands are on the device, which are being uploaded, and which are in use.

`BankDirectory` lives in the engine core, which knows the requests of all API processes. It is pure: the workers hold
the numbers, and do as they are told (`seams/core.py`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

from server.engine.edits import Point


class Want(NamedTuple):
    """An operand that a request needs: `numbers` float32 from a multiple of `width`, to be read at `point`.

    One key has one operand, and one point: at some points a rank keeps only its part of each row.
    """

    key: str
    point: Point
    width: int
    numbers: int


class Grant(NamedTuple):
    """Room for all operands of a request."""

    uploads: dict[str, int]
    """Those that nobody has uploaded to the end yet, each with the serial number of its run."""
    evicted: list[str]
    """Keys that had to go."""


class Refusal(NamedTuple):
    """No room, now or ever. All in bytes; `in_use` is what running or announced requests hold."""

    never: bool
    needed: int
    in_use: int
    budget: int


class BankFull(Exception):
    """No room for a request's operands while others are in use; later there may be."""


class BankTooSmall(Exception):
    """A request's operands fit into no bank of this size, even an empty one."""


class OperandsMissing(Exception):
    """A request arrived whose operands aren't in the bank; it must be sent again once they are."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(f"the bank no longer holds {', '.join(keys)}")
        self.keys = list(keys)


@dataclass(slots=True)
class _Run:
    want: Want
    start: int
    serial: int
    lease: float = -math.inf
    users: int = 0
    loaded: bool = False

    @property
    def end(self) -> int:
        return self.start + self.want.numbers


class BankDirectory:
    """Lives in the engine core: who lies where in the bank, who is being uploaded, and who is in use. Thread-safe.

    A run that no request uses makes room for others, the least recently used first. A run that was just promised, in a
    grant, is leased: it stays until the first request takes it, or until `UPLOAD_SECONDS` have passed without a sign of
    its uploader, or `ARRIVAL_SECONDS` since it could be read. So nobody who leaves before that blocks others for long.
    """

    UPLOAD_SECONDS = 10.0
    ARRIVAL_SECONDS = 2.0

    def __init__(self, numbers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.numbers = numbers
        self._clock = clock
        self._lock = threading.Lock()
        self._serials = count()
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        """By key, the least recently used first."""

    @property
    def resident(self) -> int:
        """Numbers of the operands that can be read."""
        with self._lock:
            return sum(run.want.numbers for run in self._runs.values() if run.loaded)

    def reserve(self, requests: Sequence[Sequence[Want]]) -> list[Grant | Refusal | ValueError]:
        """For each request promise room for all of its operands, or for none. A ValueError says that one of them can't
        be an operand, or isn't what lies under its key.
        """
        with self._lock:
            # Within a call room only shrinks. So many requests that wait for the same much cost one search.
            no_room: dict[int, int] = {}
            return [self._fault(wants) or self._reserve(wants, no_room) for wants in requests]

    def _reserve(self, wants: Sequence[Want], no_room: dict[int, int]) -> Grant | Refusal:
        """`no_room` tells the size of the smallest operand that has none, by width."""
        missing = [want for want in wants if want.key not in self._runs]
        hopeless = any(want.numbers >= no_room.get(want.width, math.inf) for want in missing)
        placed = None if hopeless else self._place(missing, {want.key for want in wants})
        if placed is None:
            if len(missing) == 1 and not hopeless:
                no_room[missing[0].width] = missing[0].numbers
            # Those of its own that are there may be what lies in the way, and would for ever: they are uploaded anew.
            own = [want for want in wants if want.key in self._runs and self._idle(self._runs[want.key])]
            if own:
                placed = self._place([*missing, *own], {want.key for want in wants}, {want.key for want in own})
            if placed is None:
                return self._refusal(wants)
            missing = [*missing, *own]
        starts, evicted = placed
        for key in evicted:
            del self._runs[key]
        for want in missing:
            self._runs[want.key] = _Run(want, starts[want.key], next(self._serials))
        runs = [self._runs[want.key] for want in wants]
        uploads = {run.want.key: run.serial for run in runs if not run.loaded}
        for run in runs:
            self._lease(run, self.UPLOAD_SECONDS if uploads else self.ARRIVAL_SECONDS)
        return Grant(uploads, evicted)

    def run(self, key: str, serial: int) -> tuple[Want, int] | Literal["loaded", "lost"]:
        """What is to be uploaded for that promise and where it starts; `loaded` if it is there already, `lost` if the
        lease ran out and the place was given away. Renews the lease.
        """
        with self._lock:
            run = self._runs.get(key)
            if run is None or run.serial != serial:
                return "lost"
            if run.loaded:
                return "loaded"
            self._lease(run, self.UPLOAD_SECONDS)
            return run.want, run.start

    def loaded(self, key: str) -> None:
        """The operand can be read from now on."""
        with self._lock:
            run = self._runs[key]
            run.loaded = True
            self._lease(run, self.ARRIVAL_SECONDS)

    def take(self, keys: Iterable[str]) -> None:
        """Hold operands for a request, until `release`. Raises OperandsMissing, holding none."""
        with self._lock:
            missing = [key for key in keys if key not in self._runs or not self._runs[key].loaded]
            if missing:
                raise OperandsMissing(missing)
            for key in keys:
                self._runs[key].users += 1
                self._runs[key].lease = -math.inf

    def release(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._runs[key].users -= 1
                self._runs.move_to_end(key)

    def _fault(self, wants: Sequence[Want]) -> ValueError | None:
        for want in wants:
            if not 0 < want.width <= want.numbers:
                return ValueError(f"{want.key!r} of {want.numbers} numbers, {want.width} wide, is no operand")
            if want.key in self._runs and self._runs[want.key].want != want:
                return ValueError(f"{want} isn't what lies under that key: {self._runs[want.key].want}")
        if len({want.key for want in wants}) < len(wants):
            return ValueError("an operand is named twice")
        return None

    def _refusal(self, wants: Sequence[Want]) -> Refusal:
        never = first_fit(wants, [], self.numbers) is None
        in_use = sum(run.want.numbers for run in self._runs.values() if not self._idle(run))
        return Refusal(never, 4 * sum(want.numbers for want in wants), 4 * in_use, 4 * self.numbers)

    def _lease(self, run: _Run, seconds: float) -> None:
        run.lease = self._clock() + seconds

    def _idle(self, run: _Run) -> bool:
        return run.users == 0 and run.lease <= self._clock()

    def _place(
        self, missing: Sequence[Want], keep: set[str], gone: Set[str] = frozenset()
    ) -> tuple[dict[str, int], list[str]] | None:
        """Where the missing operands go and whom that evicts, beside those that are `gone`; None where those in use
        leave no room.

        Nothing is ever moved. So the least recently used go first until the holes they leave are wide enough, and those
        that turn out not to lie in the way stay after all.
        """
        idle = [key for key, run in self._runs.items() if key not in keep and self._idle(run)]

        def fit(evicted: int) -> dict[str, int] | None:
            out = gone | set(idle[:evicted])
            return first_fit(missing, [(r.start, r.end) for k, r in self._runs.items() if k not in out], self.numbers)

        enough, starts = 0, fit(0)
        if starts is None:
            enough, starts = len(idle), fit(len(idle))
            if starts is None:
                return None
            too_few = 0
            while enough - too_few > 1:
                middle = (too_few + enough) // 2
                fitting = fit(middle)
                if fitting is None:
                    too_few = middle
                else:
                    enough, starts = middle, fitting
        runs = [(starts[want.key], starts[want.key] + want.numbers) for want in missing]
        in_the_way = (
            key for key in idle[:enough] if any(a < self._runs[key].end and self._runs[key].start < b for a, b in runs)
        )
        return starts, [*sorted(gone), *in_the_way]


def first_fit(wants: Sequence[Want], taken: Iterable[tuple[int, int]], numbers: int) -> dict[str, int] | None:
    """A start for each operand among the half-open runs that are taken, largest operand first; None if one has none."""
    starts: dict[str, int] = {}
    runs = sorted(taken)
    for want in sorted(wants, key=lambda want: -want.numbers):
        start = 0
        for index, (first, end) in enumerate([*runs, (numbers, numbers)]):
            if start + want.numbers <= first:
                runs.insert(index, (start, start + want.numbers))
                starts[want.key] = start
                break
            start = max(start, -(-end // want.width) * want.width)
        else:
            return None
    return starts
