"""The edit program: what one request does to the model's activations.

A program is an ordered tuple of edits. An edit names an opcode, a point and the layers at which it acts, the bank key
of its operand, a strength and a span of tokens. The canonical form of a program is JSON with sorted keys; its SHA-256
is the program's fingerprint. This module is pure: no vLLM, no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from server.engine.spans import END, Interval, Span, SpanError, clip

Opcode = Literal["add", "add_norm", "scale", "rank", "map", "set", "renorm", "gate"]
Point = Literal["resid_post", "mlp_out", "attn_out", "head_out", "mlp_act", "resid_pre"]
Activation = Literal["identity", "relu", "jumprelu"]

OPCODES: tuple[Opcode, ...] = get_args(Opcode)
POINTS: tuple[Point, ...] = get_args(Point)
WITHOUT_OPERAND: frozenset[Opcode] = frozenset({"renorm"})


def layers_at(point: Point, layers: int) -> tuple[int, ...]:
    """The layers of a model at which a point is. `resid_pre` is at the first only, where it is the embeddings: before
    any other layer the residual stream is the `resid_post` of the one before.
    """
    return (0,) if point == "resid_pre" else tuple(range(layers))


def site_index(point: Point, layer: int, layers: int) -> int:
    """Number of a site among the `len(POINTS) * layers` sites of a model."""
    return POINTS.index(point) * layers + layer


@dataclass(frozen=True, slots=True)
class Function:
    """The f of `rank`: the coefficient of row k is c = a(x . e_k + b_k), or clip(c, low_k, high_k) - c with bounds.

    `low` and `high` have one number per row of the operand, or one for all; equal bounds pin the feature to a constant.
    An absent bound is infinite. `jumprelu` is 0 at or below the operand's threshold, and the identity above it.
    """

    activation: Activation = "identity"
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    @property
    def clamps(self) -> bool:
        return self.low is not None or self.high is not None

    @property
    def bounds(self) -> int:
        """How many pairs of bounds there are: one per row, one for all, or none."""
        return max(len(self.low or ()), len(self.high or ()))


@dataclass(frozen=True, slots=True)
class Condition:
    """When a `gate` is open: its read-out of x, `dot` = x . v or `cosine` = x . v / (||x|| ||v||), is above the
    threshold, or below it.

    `token` decides for every token at each of the gate's sites. `sequence` decides once, at the last prompt token of
    the gate's only site, and holds for the generation.
    """

    readout: Literal["dot", "cosine"]
    threshold: float
    above: bool = True
    scope: Literal["token", "sequence"] = "token"


@dataclass(frozen=True, slots=True)
class Edit:
    """One opcode at one point of some layers. For a token's activation x [width], in float32 and written back once:

    | opcode | formula | operand, per layer |
    |---|---|---|
    | add | x += s v | vector v [width] |
    | add_norm | x += s ||x|| v / ||v|| | vector v [width] |
    | scale | x_i *= 1 + s m_i | mask m [width] |
    | rank | c_k = f(x . e_k + b_k); x += s sum_k c_k d_k | encoder e and decoder d [rank, width], bias b, threshold |
    | map | x += s W x | matrix W [width, width], or left [width, rank] and right [rank, width] with W = left right |
    | set | x = r | vector r [width] |
    | renorm | x *= ||x0|| / ||x||, x0 being the activation before the program's first edit here | none |
    | gate | the edits that name it act only while it is open | vector v [width] |

    s is `strength`. `operand` is a bank key, such as an artifact digest. `gate` is the index, in the program, of an
    earlier gate that this edit obeys.
    """

    opcode: Opcode
    operand: str | None
    layers: tuple[int, ...]
    strength: float = 1.0
    span: Span = Span()
    point: Point = "resid_post"
    function: Function | None = None
    condition: Condition | None = None
    gate: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Fields at their defaults are left out, so that equal edits have equal canonical forms."""
        fields: dict[str, Any] = {
            "opcode": self.opcode,
            "layers": list(self.layers),
            "strength": self.strength,
            "span": self.span.to_json(),
        }
        if self.operand is not None:
            fields["operand"] = self.operand
        if self.point != "resid_post":
            fields["point"] = self.point
        if self.function is not None:
            fields["function"] = _plain(self.function)
        if self.condition is not None:
            fields["condition"] = _plain(self.condition)
        if self.gate is not None:
            fields["gate"] = self.gate
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Edit:
        function, condition = fields.get("function"), fields.get("condition")
        return cls(
            opcode=fields["opcode"],
            operand=fields.get("operand"),
            layers=tuple(fields["layers"]),
            strength=fields["strength"],
            span=Span.from_json(fields["span"]),
            point=fields.get("point", "resid_post"),
            function=Function(**_tuples(function)) if function is not None else None,
            condition=Condition(**condition) if condition is not None else None,
            gate=fields.get("gate"),
        )


MAX_BOUNDS = 1024
"""Bounds of all of a program's functions: what its row on the device has room for."""


class ProgramError(ValueError):
    """A program whose edits contradict each other. `index` is the edit at fault."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Program:
    """An ordered tuple of edits."""

    edits: tuple[Edit, ...]

    @cached_property
    def wire(self) -> bytes:
        """Canonical JSON: what is hashed, and what travels to the engine."""
        return _canonical([edit.to_json() for edit in self.edits])

    @cached_property
    def fingerprint(self) -> str:
        return f"sha256:{hashlib.sha256(self.wire).hexdigest()}"

    @classmethod
    def from_wire(cls, wire: bytes) -> Program:
        return cls(tuple(Edit.from_json(fields) for fields in json.loads(wire)))

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """The bank keys that the program reads, each once."""
        return tuple(dict.fromkeys(edit.operand for edit in self.edits if edit.operand is not None))

    @cached_property
    def _body_digest(self) -> str:
        """Digest of the edits without their spans, for tagging cache blocks by what was done rather than by how it
        was asked.
        """
        bodies = [{**edit.to_json(), "span": None} for edit in self.edits]
        return hashlib.sha256(_canonical(bodies)).hexdigest()

    def check(self) -> None:
        """Raise ProgramError where an edit acts at no site or names no fitting gate, a gate couldn't decide for it, or
        there are more bounds than MAX_BOUNDS.
        """
        bounds = 0
        for index, edit in enumerate(self.edits):
            bounds += edit.function.bounds if edit.function is not None else 0
            if bounds > MAX_BOUNDS:
                raise ProgramError(index, f"{bounds} bounds up to here, over the limit of {MAX_BOUNDS}: clamp fewer")
            if edit.point == "resid_pre" and edit.layers != (0,):
                raise ProgramError(index, f"resid_pre is at layer 0 only, and the edit acts at {list(edit.layers)}")
            if (edit.opcode == "gate") != (edit.condition is not None):
                raise ProgramError(index, "a gate needs a condition, and nothing else has one")
            if (edit.opcode in WITHOUT_OPERAND) != (edit.operand is None):
                raise ProgramError(index, f"{edit.opcode} and its operand don't fit together")
            if edit.condition is not None and edit.condition.scope == "sequence" and len(edit.layers) != 1:
                raise ProgramError(index, "a gate for the whole sequence decides at one layer")
            if edit.gate is not None:
                self._check_gate(index, edit, edit.gate)

    def _check_gate(self, index: int, edit: Edit, gate_index: int) -> None:
        if not 0 <= gate_index < index or self.edits[gate_index].condition is None:
            raise ProgramError(index, f"edit {gate_index} is no gate before this edit")
        gate = self.edits[gate_index]
        assert gate.condition is not None
        if edit.opcode == "gate":
            raise ProgramError(index, "a gate can't obey another gate")
        if gate.condition.scope == "token" and (edit.point != gate.point or set(edit.layers) - set(gate.layers)):
            raise ProgramError(index, "a gate for single tokens decides only at its own point and layers")

    def check_spans(self, prompt_len: int, max_tokens: int) -> None:
        """Raise ProgramError where an edit can act on no token that runs, or names a position outside the prompt."""
        intervals = self.intervals(prompt_len)
        for index, edit in enumerate(self.edits):
            try:
                edit.span.check(prompt_len, max_tokens)
            except SpanError as error:
                raise ProgramError(index, str(error)) from error
            # The last generated token is returned without being run through the model.
            if not clip(intervals[index], 0, prompt_len + max_tokens - 1):
                raise ProgramError(
                    index,
                    "the condition is decided at the last prompt token, behind all tokens of the span; widen the span, "
                    'or use the scope "token"',
                )

    def intervals(self, prompt_len: int) -> tuple[tuple[Interval, ...], ...]:
        """The positions at which each edit acts, for a prompt of that many tokens.

        A gate for the sequence is read at the last prompt token. Edits behind it act from that token on at the gate's
        site and at later layers, and from the first generated token on elsewhere, where that token has passed already.
        Were they to act there when the token is run again after a preemption, the answer would depend on the schedule.
        """
        return tuple(self._intervals(edit, prompt_len) for edit in self.edits)

    def _intervals(self, edit: Edit, prompt_len: int) -> tuple[Interval, ...]:
        if edit.condition is not None and edit.condition.scope == "sequence":
            return ((prompt_len - 1, prompt_len),)
        intervals = edit.span.intervals(prompt_len)
        gate = self.edits[edit.gate] if edit.gate is not None else None
        if gate is None or gate.condition is None or gate.condition.scope == "token":
            return intervals
        return clip(intervals, prompt_len - 1 if follows(edit, gate) else prompt_len, END)

    def block_tag(self, intervals: tuple[tuple[Interval, ...], ...], start: int, end: int) -> str | None:
        """What this program did to the KV-cache block of positions [start, end); None when it touched nothing there.

        `intervals` is `self.intervals(prompt_len)`. Two requests may share the block exactly when their tags agree:
        equal edits that touched the same positions of it. Hash chaining carries what happened in earlier blocks.
        """
        touched = [
            () if edit.opcode == "gate" else clip(each, start, end)
            for edit, each in zip(self.edits, intervals, strict=True)
        ]
        if not any(touched):
            return None
        return f"{self._body_digest}:{touched}"


def follows(edit: Edit, gate: Edit) -> bool:
    """Whether the edit acts at the gate's own site or only at layers after it, so that it sees the decision at once."""
    layer = gate.layers[0]
    return all(each > layer or (each == layer and edit.point == gate.point) for each in edit.layers)


def _plain(part: Function | Condition) -> dict[str, Any]:
    """The fields of a dataclass that differ from its defaults."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, field in part.__dataclass_fields__.items()
        if (value := getattr(part, name)) != field.default
    }


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
