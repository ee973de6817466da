"""Which tokens an edit touches, as positions of a request. Pure: no vLLM, no torch.

A span is evaluated from a token's absolute position, never from how the token is scheduled: `position >= prompt_len`
means generated. Chunked prefill, preemption and one-token prefills therefore change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[int, int]
"""Half-open range of absolute token positions."""

END = 1 << 62
"""Upper bound of an interval that never ends."""


class SpanError(ValueError):
    """A span that can't act on the prompt and generation it was given."""


@dataclass(frozen=True, slots=True)
class Span:
    """Which tokens an edit touches. The includes are joined; the excludes always subtract.

    Prompt positions and windows count from the prompt's start, or from its end when negative. Generation windows count
    from the first generated token. Windows are half-open; an end of None means "to the end".
    """

    prompt: bool = True
    generation: bool = True
    prompt_positions: tuple[int, ...] = ()
    prompt_window: tuple[int, int | None] | None = None
    generation_window: tuple[int, int | None] | None = None
    exclude_prompt_positions: tuple[int, ...] = ()
    exclude_prompt_window: tuple[int, int | None] | None = None
    exclude_generation_window: tuple[int, int | None] | None = None

    def intervals(self, prompt_len: int) -> tuple[Interval, ...]:
        """The touched positions as sorted, disjoint, non-empty intervals; END stands for "never ends"."""
        include: list[Interval] = []
        if self.prompt:
            include.append((0, prompt_len))
        if self.generation:
            include.append((prompt_len, END))
        include += _positions(self.prompt_positions, prompt_len)
        include += _prompt_window(self.prompt_window, prompt_len)
        include += _generation_window(self.generation_window, prompt_len)
        exclude = _positions(self.exclude_prompt_positions, prompt_len)
        exclude += _prompt_window(self.exclude_prompt_window, prompt_len)
        exclude += _generation_window(self.exclude_generation_window, prompt_len)
        return _subtract(_union(include), _union(exclude))

    def check(self, prompt_len: int, max_tokens: int) -> None:
        """Raise SpanError when a named position is outside the prompt, or when no token that runs would be touched.

        The last generated token is returned without being run through the model, hence `max_tokens - 1`.
        """
        for position in self.prompt_positions + self.exclude_prompt_positions:
            if not -prompt_len <= position < prompt_len:
                raise SpanError(
                    f"position {position} is outside the prompt of {prompt_len} tokens; "
                    f"use {-prompt_len} to {prompt_len - 1}"
                )
        if not clip(self.intervals(prompt_len), 0, prompt_len + max_tokens - 1):
            raise SpanError(
                f"the span is empty for a prompt of {prompt_len} tokens and max_tokens={max_tokens}; widen it, or "
                "raise max_tokens (the last generated token never runs through the model)"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from the default, so that equal spans have equal canonical forms."""
        default = Span()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) != getattr(default, name)
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Span:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


def _positions(positions: Iterable[int], prompt_len: int) -> list[Interval]:
    absolute = (position + prompt_len if position < 0 else position for position in positions)
    return [(position, position + 1) for position in absolute if 0 <= position < prompt_len]


def _prompt_window(window: tuple[int, int | None] | None, prompt_len: int) -> list[Interval]:
    if window is None:
        return []
    start, end = window
    start = max(start + prompt_len, 0) if start < 0 else start
    end = prompt_len if end is None else end + prompt_len if end < 0 else min(end, prompt_len)
    return [(start, end)]


def _generation_window(window: tuple[int, int | None] | None, prompt_len: int) -> list[Interval]:
    if window is None:
        return []
    start, end = window
    return [(prompt_len + start, END if end is None else prompt_len + end)]


def _union(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _subtract(include: tuple[Interval, ...], exclude: tuple[Interval, ...]) -> tuple[Interval, ...]:
    left: list[Interval] = []
    for start, end in include:
        for cut_start, cut_end in exclude:
            if cut_end <= start or cut_start >= end:
                continue
            if start < cut_start:
                left.append((start, cut_start))
            start = cut_end
        if start < end:
            left.append((start, end))
    return tuple(left)


def clip(intervals: tuple[Interval, ...], start: int, end: int) -> tuple[Interval, ...]:
    """The part of `intervals` inside [start, end)."""
    return tuple(
        (max(a, start), min(b, end)) for a, b in intervals if a < end and b > start and max(a, start) < min(b, end)
    )
