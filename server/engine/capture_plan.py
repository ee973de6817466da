"""What a user asks to be captured, checked against the model: sites, positions, lengths, bytes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from server.engine.edits import POINTS, Point, layers_at
from server.engine.site_names import SiteNameError, parse_site
from server.engine.spans import Span, clip

Site = tuple[Point, int]
Positions = Literal["last", "mean", "all"] | Sequence[int]
Points = Mapping[str, Mapping[str, Any]]
"""By point: its `width`, and the `reason` where that is 0."""

NAMED_POSITIONS = ("last", "mean", "all")


class PlanError(ValueError):
    """A field that can't be meant; `field` is its dotted path."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class NotInstalled(PlanError):
    """A site that the model may have, but at which nothing is installed."""


@dataclass(frozen=True)
class CapturePlan:
    """The sites, the tokens, and whether their mean is asked for, of every prompt."""

    sites: tuple[Site, ...]
    positions: Positions
    generation: bool

    @property
    def keep(self) -> Literal["mean", "rows"]:
        return "mean" if self.positions == "mean" else "rows"

    @property
    def span(self) -> Span:
        if isinstance(self.positions, str):
            if self.positions == "last":
                return Span(prompt=False, generation=self.generation, prompt_positions=(-1,))
            return Span(generation=self.generation)
        return Span(prompt=False, generation=self.generation, prompt_positions=tuple(sorted(set(self.positions))))

    def check_positions(self, prompt_len: int) -> None:
        """PlanError for a position outside of a prompt."""
        for index, position in enumerate(() if isinstance(self.positions, str) else self.positions):
            if not -prompt_len <= position < prompt_len:
                raise PlanError(
                    f"positions.{index}",
                    f"{position} is outside a prompt of {prompt_len} tokens; use {-prompt_len} to {prompt_len - 1}",
                )

    def ran(self, prompt_len: int, generated: int) -> np.ndarray:
        """The captured positions, int64, in order. The last generated token is returned without being run."""
        intervals = clip(self.span.intervals(prompt_len), 0, prompt_len + generated - 1)
        return np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in intervals])

    def nbytes(self, prompt_len: int, max_tokens: int, points: Points, item_bytes: int) -> int:
        """How large the answer to one prompt can become."""
        rows = 1 if self.keep == "mean" else len(self.ran(prompt_len, max_tokens))
        return rows * item_bytes * sum(int(points[point]["width"]) for point, _ in self.sites)


def chosen_positions(raw: object) -> Positions:
    """Raises PlanError."""
    if isinstance(raw, str) and raw in NAMED_POSITIONS:
        return cast(Positions, raw)
    if isinstance(raw, Sequence) and not isinstance(raw, str) and raw:
        for index, position in enumerate(raw):
            if type(position) is not int or abs(position) >= 1 << 31:
                raise PlanError(f"positions.{index}", "need an integer; negative ones count from the prompt's end")
        return list(raw)
    raise PlanError("positions", f"need one of {', '.join(NAMED_POSITIONS)}, or a list of positions in the prompt")


def chosen_sites(raw: object, layers: int, points: Points) -> tuple[Site, ...]:
    """Names of sites, or {"points": [...], "layers": [...] or None for all}, each once. Raises PlanError."""
    if isinstance(raw, Mapping):
        found = _crossed(raw, layers)
    elif isinstance(raw, Sequence) and not isinstance(raw, str) and raw:
        found = [(_named(name, f"sites.{index}"), f"sites.{index}") for index, name in enumerate(raw)]
    else:
        raise PlanError("sites", 'need names such as "resid_post.14", or an object with points and layers')
    for (point, layer), where in found:
        if layer >= layers:
            raise PlanError(where, f"layer {layer} is outside the model's {layers} layers")
        if not points[point]["width"]:
            raise NotInstalled(where, f"{point}: {points[point]['reason']}")
    return tuple(dict.fromkeys(site for site, _ in found))


def _named(name: object, where: str) -> Site:
    if not isinstance(name, str):
        raise PlanError(where, "need the name of a site")
    try:
        return parse_site(name)
    except SiteNameError as error:
        raise PlanError(where, str(error)) from None


def _crossed(raw: Mapping[Any, Any], layers: int) -> list[tuple[Site, str]]:
    if unknown := [key for key in raw if key not in ("points", "layers")]:
        raise PlanError(f"sites.{unknown[0]}", "no such field; remove it")
    points, wanted = raw.get("points"), raw.get("layers")
    if not isinstance(points, list) or not points:
        raise PlanError("sites.points", f"need a list of points: {', '.join(POINTS)}")
    for index, point in enumerate(points):
        if point not in POINTS:
            raise PlanError(f"sites.points.{index}", f"no such point; the points are {', '.join(POINTS)}")
    if wanted is None:
        return [
            ((point, layer), f"sites.points.{i}")
            for i, point in enumerate(points)
            for layer in layers_at(point, layers)
        ]
    if not isinstance(wanted, list) or not wanted:
        raise PlanError("sites.layers", "need a list of layers, or null for all")
    for index, layer in enumerate(wanted):
        if type(layer) is not int or not 0 <= layer < layers:
            raise PlanError(f"sites.layers.{index}", f"need a layer from 0 to {layers - 1}")
        if bare := [point for point in points if layer not in layers_at(point, layers)]:
            instead = f"write resid_post.{layer - 1}, the same tensor"
            raise PlanError(f"sites.layers.{index}", f"{bare[0]} is at layer 0 only: {instead}")
    return [((point, layer), f"sites.points.{i}") for i, point in enumerate(points) for layer in wanted]
