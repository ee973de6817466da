"""What a response says about the interventions that were applied to it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class AppliedEdit(BaseModel):
    """One edit of the program that ran.

    `tokens_touched` was counted by the op, over all choices and prompts of the request, at the site where it was the
    least; for a gate it counts the tokens at which the gate was read. `tokens_from_cache` are tokens of the span that
    the prefix cache already held, edited in just this way by an earlier request. `relative_dose` is the largest over
    the layers of what doses.py defines, such as `|strength| * ||v|| / ||h||` of an add, with the mean activation norm
    `||h||` of the data that the artifact was fitted on; null for a map, a renorm, a gate and what mode "frozen" puts
    back, and where the artifact has no norms and they matter.
    """

    opcode: str
    sites: list[str]
    strength: float
    relative_dose: float | None = None
    tokens_touched: int = 0
    tokens_from_cache: int = 0


class Applied(BaseModel):
    """One intervention as it was applied.

    `tokens_touched` and `tokens_from_cache` are the smallest, `relative_dose` is the largest, over its edits other than
    gate and renorm. `condition` is the artifact whose gate was obeyed, `name@sha256:HEX64`; `preset` the one that the
    intervention belongs to, `name@version`.
    """

    preset: str | None = None
    artifact: str
    version: int
    digest: str
    kind: str
    op: str
    sites: list[str]
    strength: float
    condition: str | None = None
    relative_dose: float | None = None
    tokens_touched: int = 0
    tokens_from_cache: int = 0
    edits: list[AppliedEdit] = []

    def sum_up(self) -> None:
        """Fill in the intervention's own counts and dose from those of its edits."""
        main = [edit for edit in self.edits if edit.opcode not in ("gate", "renorm")]
        self.tokens_touched = min(edit.tokens_touched for edit in main)
        self.tokens_from_cache = min(edit.tokens_from_cache for edit in main)
        self.relative_dose = max((edit.relative_dose for edit in main if edit.relative_dose is not None), default=None)


class Receipt(BaseModel):
    """What steering did to a response. `frozen` are the edits that put back clean activations in mode "frozen".

    `source_language` is the one by which a preset's interventions were chosen, and `source_language_by` says whether
    the request named it or it was identified.
    """

    fingerprint: str
    mode: Literal["live", "frozen"] = "live"
    source_language: str | None = None
    source_language_by: Literal["request", "identified"] | None = None
    applied: list[Applied]
    frozen: list[AppliedEdit] = []
