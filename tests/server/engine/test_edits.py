from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.edits import Condition, Edit, Function, Program, ProgramError
from server.engine.spans import END, Span, SpanError, clip

POSITION = st.integers(-12, 12)
WINDOW = st.none() | st.tuples(POSITION, st.none() | POSITION)
COUNTED = st.none() | st.tuples(st.integers(0, 12), st.none() | st.integers(0, 12))
SPANS = st.builds(
    Span,
    prompt=st.booleans(),
    generation=st.booleans(),
    prompt_positions=st.lists(POSITION, max_size=3).map(tuple),
    prompt_window=WINDOW,
    generation_window=COUNTED,
    exclude_prompt_positions=st.lists(POSITION, max_size=3).map(tuple),
    exclude_prompt_window=WINDOW,
    exclude_generation_window=COUNTED,
)


def touched_by_definition(span: Span, position: int, prompt_len: int) -> bool:
    """The vocabulary of `apply`, read off token by token."""
    in_prompt = position < prompt_len
    generated = position - prompt_len

    def in_positions(positions: tuple[int, ...]) -> bool:
        return in_prompt and (position in positions or position - prompt_len in positions)

    def in_prompt_window(window: tuple[int, int | None] | None) -> bool:
        return in_prompt and window is not None and position in range(prompt_len)[slice(*window)]

    def in_generation_window(window: tuple[int, int | None] | None) -> bool:
        return not in_prompt and window is not None and generated in range(1000)[slice(*window)]

    included = (
        (span.prompt and in_prompt)
        or (span.generation and not in_prompt)
        or in_positions(span.prompt_positions)
        or in_prompt_window(span.prompt_window)
        or in_generation_window(span.generation_window)
    )
    excluded = (
        in_positions(span.exclude_prompt_positions)
        or in_prompt_window(span.exclude_prompt_window)
        or in_generation_window(span.exclude_generation_window)
    )
    return included and not excluded


@given(span=SPANS, prompt_len=st.integers(1, 10))
def test_intervals_hold_exactly_the_positions_that_the_vocabulary_names(span: Span, prompt_len: int) -> None:
    intervals = span.intervals(prompt_len)
    for position in range(prompt_len + 20):
        inside = any(start <= position < end for start, end in intervals)
        assert inside == touched_by_definition(span, position, prompt_len)
    assert all(start < end for start, end in intervals)
    assert all(before[1] < after[0] for before, after in zip(intervals, intervals[1:], strict=False))


@given(span=SPANS)
def test_a_span_survives_the_wire(span: Span) -> None:
    assert Span.from_json(json.loads(json.dumps(span.to_json()))) == span


@given(span=SPANS, prompt_len=st.integers(1, 10), start=st.integers(0, 20), length=st.integers(1, 8))
def test_a_block_is_tagged_exactly_when_something_in_it_is_touched(
    span: Span, prompt_len: int, start: int, length: int
) -> None:
    program = Program((Edit("add", "v", (0,), 1.0, span),))
    tag = program.block_tag(program.intervals(prompt_len), start, start + length)
    touched = any(touched_by_definition(span, position, prompt_len) for position in range(start, start + length))
    assert (tag is not None) == touched


def test_blocks_are_shared_when_the_same_tokens_were_touched_whatever_the_prompt_length() -> None:
    program = Program((Edit("add", "v", (0,), 1.0),))
    assert program.block_tag(program.intervals(5), 0, 16) == program.block_tag(program.intervals(16), 0, 16)
    after_prompt = Program((Edit("add", "v", (0,), 1.0, Span(prompt=False)),))
    assert after_prompt.block_tag(after_prompt.intervals(5), 0, 16) != after_prompt.block_tag(
        after_prompt.intervals(6), 0, 16
    )


@pytest.mark.parametrize(
    "other",
    [
        Edit("add", "v", (0,), 1.5),
        Edit("add", "w", (0,), 1.0),
        Edit("add", "v", (1,), 1.0),
        Edit("add_norm", "v", (0,), 1.0),
    ],
)
def test_blocks_are_not_shared_between_different_edits(other: Edit) -> None:
    one, two = Program((Edit("add", "v", (0,), 1.0),)), Program((other,))
    assert one.block_tag(one.intervals(4), 0, 4) != two.block_tag(two.intervals(4), 0, 4)
    assert one.fingerprint != two.fingerprint


def test_the_fingerprint_of_a_program_is_stable() -> None:
    program = Program((Edit("add", "sha256:ab", (3, 4), 2.5, Span(prompt=False, generation_window=(0, 8))),))
    assert program.wire == (
        b'[{"layers":[3,4],"opcode":"add","operand":"sha256:ab",'
        b'"span":{"generation_window":[0,8],"prompt":false},"strength":2.5}]'
    )
    assert Program.from_wire(program.wire) == program


@pytest.mark.parametrize(
    ("span", "prompt_len", "max_tokens", "reason"),
    [
        (Span(prompt=False, generation=False, prompt_positions=(7,)), 5, 8, "position 7 is outside the prompt"),
        (Span(exclude_prompt_positions=(-6,)), 5, 8, "position -6 is outside the prompt"),
        (Span(prompt=False), 5, 1, "empty"),
        (Span(prompt=False, generation=False, generation_window=(8, 9)), 5, 9, "empty"),
        (Span(generation=False, exclude_prompt_window=(0, None)), 5, 8, "empty"),
    ],
)
def test_a_span_that_cannot_act_is_refused(span: Span, prompt_len: int, max_tokens: int, reason: str) -> None:
    with pytest.raises(SpanError, match=reason):
        span.check(prompt_len, max_tokens)


def test_a_span_that_can_act_is_accepted() -> None:
    Span().check(1, 1)
    Span(prompt=False, generation=False, generation_window=(7, 9)).check(5, 9)


def test_clip_keeps_what_is_inside() -> None:
    assert clip(((0, 4), (8, END)), 3, 10) == ((3, 4), (8, 10))


def test_a_condition_that_is_decided_behind_the_span_is_refused() -> None:
    gate = Edit("gate", "v", (2,), condition=Condition("cosine", 0.0, scope="sequence"))

    def behind(span: Span, layer: int = 3) -> Program:
        return Program((gate, Edit("add", "v", (layer,), 1.0, span, gate=0)))

    behind(Span()).check_spans(6, 4)
    behind(Span(generation=False)).check_spans(6, 4)  # at the last prompt token
    with pytest.raises(ProgramError, match="decided at the last prompt token") as refused:
        behind(Span(generation=False), layer=1).check_spans(6, 4)  # which has passed layer 1 by then
    assert refused.value.index == 1
    with pytest.raises(ProgramError, match="decided at the last prompt token"):
        behind(Span(generation=False, exclude_prompt_positions=(-1,))).check_spans(6, 4)
    with pytest.raises(ProgramError, match="empty"):
        Program((Edit("add", "v", (0,), 1.0, Span(prompt=False)),)).check_spans(6, 1)


def test_the_embeddings_are_a_site_of_the_first_layer_only() -> None:
    Program((Edit("add", "v", (0,), point="resid_pre"),)).check()
    with pytest.raises(ProgramError, match="layer 0 only") as refused:
        Program((Edit("add", "v", (0,)), Edit("add", "v", (0, 1), point="resid_pre"))).check()
    assert refused.value.index == 1


def test_more_bounds_than_a_row_on_the_device_has_room_for_are_refused() -> None:
    clamped = Edit("rank", "sae", (1,), function=Function(low=(0.0,) * 256))
    Program((clamped,) * 4).check()
    with pytest.raises(ProgramError, match="1025 bounds up to here, over the limit of 1024") as refused:
        Program((*(clamped,) * 4, replace(clamped, function=Function(high=(1.0,))))).check()
    assert refused.value.index == 4
