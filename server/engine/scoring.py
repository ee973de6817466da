"""Programs that steer tokens which are given rather than generated, and what the op must have counted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from server.engine.edits import Program
from server.engine.spans import Span, clip


def as_prompt(program: Program, prompt_length: int, total: int) -> Program:
    """The program for a prompt of `total` tokens that acts as it would if all behind the first ones were generated.

    Each edit then says by position where it acts. A gate for the sequence can't be moved: ValueError.
    """
    if any(edit.condition is not None and edit.condition.scope == "sequence" for edit in program.edits):
        raise ValueError("a condition for the sequence is decided at the last prompt token; it can't be scored")

    def relocated(span: Span) -> Span:
        if span == Span():
            return span
        intervals = clip(span.intervals(prompt_length), 0, total)
        positions = tuple(position for start, end in intervals for position in range(start, end))
        return Span(prompt=False, generation=False, prompt_positions=positions)

    return Program(tuple(replace(edit, span=relocated(edit.span)) for edit in program.edits))


def check_touched(
    program: Program, touched: Sequence[Sequence[int]], cached: Sequence[int], prompt_length: int, generated: int
) -> None:
    """RuntimeError unless every edit that no gate decides on acted at every token that it should.

    `touched` [edits][layers of the edit] and `cached` [edits] are what was counted of one prompt.
    """
    # The last generated token is returned without being run.
    ran = prompt_length + max(generated, 1) - 1
    for index, intervals in enumerate(program.intervals(prompt_length)):
        edit = program.edits[index]
        expected = sum(end - start for start, end in clip(intervals, 0, ran))
        found = min(touched[index]) + cached[index]
        if edit.gate is None and found != expected:
            raise RuntimeError(f"{edit.opcode} at {edit.point} acted at {found} tokens and should have at {expected}")
