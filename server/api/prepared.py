"""A request's program with all that it takes to run it and to account for it."""

from __future__ import annotations

import re
import uuid
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from server.api.receipts import Applied
from server.api.source_language import Chosen
from server.api.steering_schema import LAST_PROMPT_TOKEN, Steering
from server.engine.edits import Edit, Point, Program
from server.engine.operands import Operand, content_key, pack
from steering_store import ArtifactVersion

Loader = Callable[[], Awaitable[Operand]]
Site = tuple[Point, int]


class Life:
    """That of a request: ended by whoever answers it, or else by nobody holding it any more."""

    def __init__(self) -> None:
        self._ends: list[Callable[[], object]] = []

    def at_end(self, call: Callable[[frozenset[str]], None], digests: frozenset[str]) -> None:
        """Call once, when the request ends."""
        self._ends.append(weakref.finalize(self, call, digests))

    def end(self) -> None:
        for call in self._ends:
            call()


@dataclass(frozen=True)
class Prepared:
    """A program, ready to run unless `frozen_sites` says that clean activations are to be captured first.

    `owners` has the number, among those applied, of the intervention that each edit belongs to, None for frozen mode's
    own; `numbers` has each one's number in the request, where a preset counts once. `operands` has a loader for each
    bank key that the program reads. `applied` and `versions` have one item per intervention; `digests` are those of all
    artifacts that were resolved. `language` is the one that a preset's interventions were chosen by. `doses`
    has the relative doses of the edits, where there are such, once `Doses.check` has run; `gains` has what the rows of
    an operand were multiplied by, where they were. `clean` keeps frozen mode's operands while the request lives.
    """

    program: Program
    owners: tuple[int | None, ...]
    numbers: tuple[int, ...]
    operands: dict[str, Loader]
    applied: list[Applied]
    versions: tuple[ArtifactVersion, ...]
    digests: frozenset[str]
    settings: Steering
    frozen_sites: tuple[Site, ...] = ()
    language: Chosen | None = None
    doses: dict[Edit, float] = field(default_factory=dict)
    gains: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    clean: tuple[Operand, ...] = ()
    receipt: str = field(default_factory=lambda: uuid.uuid4().hex)
    life: Life = field(default_factory=Life)

    def with_clean(self, rows: Mapping[Site, np.ndarray]) -> Prepared:
        """The program with SETs before it that put the clean activations, float32 [width], at the last prompt token.

        As in the released two-pass code of SADI and INCLINE, they are put at every layer of each edited point, not only
        where something is edited, so that no edit acts on what an earlier one has changed.
        """
        sets, clean, operands = [], [], dict(self.operands)
        for point in dict.fromkeys(point for point, _ in self.frozen_sites):
            layers = tuple(layer for each, layer in self.frozen_sites if each == point)
            operand = pack({layer: {"vector": rows[point, layer]} for layer in layers})
            key = content_key(operand, point)
            clean.append(operand)
            operands[key] = _while_alive(operand)
            sets.append(Edit("set", key, layers, span=LAST_PROMPT_TOKEN, point=point))
        edits = {
            edit: edit if edit.gate is None else replace(edit, gate=edit.gate + len(sets))
            for edit in self.program.edits
        }
        return replace(
            self,
            program=Program((*sets, *(edits[edit] for edit in self.program.edits))),
            owners=(*[None] * len(sets), *self.owners),
            operands=operands,
            frozen_sites=(),
            doses={edits[edit]: dose for edit, dose in self.doses.items()},
            clean=tuple(clean),
        )

    def field_at_fault(self, param: str | None) -> str | None:
        """The engine names edits, by number; a user knows interventions."""
        match = re.fullmatch(r"steering\.interventions\.(\d+)\.apply", param or "")
        if match is None:
            return param
        field = self.field(int(match[1]))
        return field if field == "steering" else f"{field}.apply"

    def field(self, edit: int) -> str:
        """The field of the request that an edit comes from."""
        owner = self.owners[edit]
        return "steering" if owner is None else f"steering.interventions.{self.numbers[owner]}"


def _while_alive(operand: Operand) -> Loader:
    """No other request will ask for it, so that whoever keeps the loader must not keep the numbers."""
    reference = weakref.ref(operand)

    async def load() -> Operand:
        kept = reference()
        if kept is None:
            raise RuntimeError("the request that these activations were captured for has ended")
        return kept

    return load
