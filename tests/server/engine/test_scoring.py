from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.edits import Condition, Edit, Program
from server.engine.scoring import as_prompt, check_touched
from server.engine.spans import Span, clip

positions = st.integers(-4, 3)
windows = st.tuples(st.integers(-4, 4), st.none() | st.integers(-4, 6))
spans = st.builds(
    Span,
    prompt=st.booleans(),
    generation=st.booleans(),
    prompt_positions=st.lists(positions, max_size=2).map(tuple),
    prompt_window=st.none() | windows,
    generation_window=st.none() | st.tuples(st.integers(0, 3), st.none() | st.integers(3, 6)),
    exclude_prompt_positions=st.lists(positions, max_size=2).map(tuple),
    exclude_generation_window=st.none() | st.just((1, 2)),
)


def touched(program: Program, length: int, total: int) -> list[set[int]]:
    return [
        {each for start, end in clip(intervals, 0, total) for each in range(start, end)}
        for intervals in program.intervals(length)
    ]


@given(spans, st.integers(4, 8), st.integers(1, 5))
def test_given_tokens_are_touched_as_generated_ones_would_be(span: Span, length: int, more: int) -> None:
    program = Program((Edit("add", "a", (1,), span=span), Edit("renorm", None, (1,))))
    moved = as_prompt(program, length, length + more)
    assert touched(moved, length + more, length + more) == touched(program, length, length + more)


def test_a_condition_for_the_sequence_cannot_be_moved() -> None:
    gate = Edit("gate", "g", (1,), condition=Condition("dot", 0.0, scope="sequence"))
    with pytest.raises(ValueError, match="can't be scored"):
        as_prompt(Program((gate, Edit("add", "a", (2,), gate=0))), 4, 6)


@pytest.mark.parametrize(
    ("counted", "cached", "generated", "right"),
    [
        ([[6, 6], [2]], [0, 0], 3, True),
        ([[2, 2], [2]], [4, 0], 3, True),
        ([[5, 6], [2]], [0, 0], 3, False),
        ([[6, 6], [1]], [0, 0], 3, False),
        ([[0, 0], [0]], [0, 0], 3, False),
        ([[7, 7], [2]], [0, 0], 3, False),
        ([[4, 4], [0]], [0, 0], 1, True),
        ([[4, 4], [0]], [0, 0], 0, True),
    ],
)
def test_counts_must_be_those_of_the_tokens_that_ran(
    counted: list[list[int]], cached: list[int], generated: int, right: bool
) -> None:
    program = Program((Edit("add", "a", (1, 2)), Edit("add", "b", (3,), span=Span(prompt=False))))
    if right:
        check_touched(program, counted, cached, 4, generated)
    else:
        with pytest.raises(RuntimeError, match="should have"):
            check_touched(program, counted, cached, 4, generated)


def test_what_a_gate_decides_on_may_act_less_often() -> None:
    gate = Edit("gate", "g", (1,), condition=Condition("dot", 0.0))
    program = Program((gate, Edit("add", "a", (1,), gate=0)))
    check_touched(program, [[4], [1]], [0, 0], 4, 1)
    with pytest.raises(RuntimeError, match="gate"):
        check_touched(program, [[3], [1]], [0, 0], 4, 1)
