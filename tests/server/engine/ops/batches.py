"""Random batches of requests with programs, run by the reference and by the kernel. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from server.engine.banks import Bank, Resident
from server.engine.edits import Condition, Edit, Function, Point, Program, site_index
from server.engine.operands import Role, pack
from server.engine.ops.reference import Applied, apply_reference
from server.engine.ops.tables import OPEN, Tables

LAYERS = 2
POINT: Point = "resid_post"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Request:
    """A program, one bool per token and edit for its spans, and what its gates for the sequence decided before."""

    program: Program
    active: np.ndarray
    decisions: list[bool | None]


@dataclass
class Batch:
    """Tokens of several requests, side by side; `owners` has each token's request, -1 for none."""

    width: int
    requests: list[Request]
    owners: np.ndarray
    fresh: np.ndarray
    operands: dict[str, Mapping[int, Mapping[Role, np.ndarray]]]
    shard: tuple[int, int] = (0, 1)
    point: Point = POINT
    bank: Bank = field(init=False)
    residents: dict[str, Resident] = field(init=False)

    def __post_init__(self) -> None:
        self.bank, self.residents = resident(self.operands, self.shard)

    @property
    def local(self) -> int:
        """The width of this rank's part of the activation."""
        return self.width // self.shard[1]

    def of(self, request: Request) -> list[Resident | None]:
        return [None if edit.operand is None else self.residents[edit.operand] for edit in request.program.edits]

    def tables(self, device: str = "cpu", **limits: Any) -> Tables:
        """Tables that hold the batch, request r in row r + 1."""
        if device != "cpu":
            self.bank.data = self.bank.data.to(device)
        widths = {site_index(self.point, layer, LAYERS): self.local for layer in range(LAYERS)}
        sites = 5 * LAYERS
        tables = Tables(self.bank, sites, widths, **{"max_rows": 8, "max_tokens": len(self.owners) + 2, **limits})
        for index, request in enumerate(self.requests):
            tables.set_row(index + 1, request.program, self.of(request), LAYERS)
            decided = [0 if each is None else OPEN if each else OPEN - 1 for each in request.decisions]
            tables.decisions[index + 1, : len(decided)] = torch.tensor(decided, dtype=torch.int8)
        tables.stage(self.owners + 1, self.bits(), self.fresh)
        return tables

    def bits(self) -> np.ndarray:
        bits = np.zeros(len(self.owners), np.int32)
        for index, request in enumerate(self.requests):
            values = (request.active << np.arange(request.active.shape[1])).sum(1)
            bits[self.owners == index] = values
        return bits

    def reference(self, x: Tensor, layer: int) -> list[tuple[np.ndarray, Applied]]:
        """By request: its tokens, and what the program does to them. Updates the requests' decisions."""
        results = []
        for index, request in enumerate(self.requests):
            tokens = np.flatnonzero(self.owners == index)
            active = torch.from_numpy(request.active)
            applied = apply_reference(
                x[tokens], request.program, active, self.bank, self.of(request), self.point, layer, request.decisions
            )
            results.append((tokens, applied))
        return results


def resident(
    operands: Mapping[str, Mapping[int, Mapping[Role, np.ndarray]]], shard: tuple[int, int] = (0, 1)
) -> tuple[Bank, dict[str, Resident]]:
    """A bank that holds the operands, given by key, layer and role."""
    packed = {key: pack(tensors) for key, tensors in operands.items()}
    bank = Bank(1 + sum(len(operand.data) + operand.width for operand in packed.values()))
    residents, end = {}, 1
    for key, operand in packed.items():
        start = -(-end // operand.width) * operand.width
        bank.write(start, operand.data.tobytes())
        bank.bind(key, start, operand.width, operand.pieces, shard)
        residents[key] = bank.resident(key)
        end = start + len(operand.data)
    return bank, residents


def tensors(rng: np.random.Generator, kind: str, width: int, rank: int) -> dict[Role, np.ndarray]:
    """What one layer of an operand holds; the numbers keep activations at about their size."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    if kind == "scale":
        # Sparse ones are read by their indices.
        return {"mask": (rng.random(width) < rng.choice((0.05, 0.4))).astype(np.float32) * normal(width)}
    if kind == "rank":
        biases: dict[Role, np.ndarray] = {"bias": normal(rank), "threshold": np.abs(normal(rank))}
        return {"encoder": normal(rank, width), "decoder": normal(rank, width) / width, **biases}
    if kind == "dense":
        return {"matrix": normal(width, width) / width**0.5}
    if kind == "factored":
        return {"right": normal(rank, width) / width**0.5, "left": normal(width, rank) / rank**0.5}
    return {"vector": normal(width)}


@st.composite
def batches(draw: st.DrawFn, max_width: int = 70, max_tokens: int = 6) -> Batch:
    """Up to three requests of up to five edits each, over sharded and whole activations."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shards = draw(st.sampled_from((1, 1, 1, 2)))
    width = draw(st.integers(1, max_width // shards)) * shards
    operands: dict[str, Any] = {}
    requests = []
    owners = np.array(draw(st.lists(st.integers(-1, 2), min_size=1, max_size=max_tokens)), np.int32)
    for index in range(owners.max() + 1):
        edits: list[Edit] = []
        for _ in range(draw(st.integers(1, 5))):
            edits.append(draw(some_edit(rng, edits, operands, width, elementwise=shards > 1)))
        program = Program(tuple(edits))
        program.check()
        requests.append(draw(some_request(program, int((owners == index).sum()))))
    fresh = np.array(draw(st.lists(st.booleans(), min_size=len(owners), max_size=len(owners))), np.bool_)
    return Batch(width, requests, owners, fresh, operands, (draw(st.integers(0, shards - 1)), shards))


@st.composite
def some_edit(
    draw: st.DrawFn,
    rng: np.random.Generator,
    before: Sequence[Edit],
    operands: dict[str, Any],
    width: int,
    *,
    elementwise: bool,
) -> Edit:
    kinds = ("add", "scale", "set")
    if not elementwise:
        kinds += ("add_norm", "rank", "dense", "factored", "renorm", "gate", "gate")
    kind = draw(st.sampled_from(kinds))
    rank = draw(st.integers(1, 6))
    layers = draw(st.sampled_from(((0, 1), (0, 1), (0,), (1,))))
    operand = None
    if kind != "renorm":
        alike = [key for key in operands if key.startswith(kind)]
        operand = draw(st.sampled_from([*alike, f"{kind}{len(operands)}"]))
        if operand not in operands:
            operands[operand] = {layer: tensors(rng, kind, width, rank) for layer in range(LAYERS)}
        rank = len(operands[operand][0].get("encoder", ()))
    strength = draw(st.sampled_from((0.0, 1.0, -1.0, 0.4, -0.7)))
    if kind == "gate":
        scope = draw(st.sampled_from(("token", "sequence")))
        condition = Condition(
            draw(st.sampled_from(("dot", "cosine"))), float(rng.normal(0, 0.3)), draw(st.booleans()), scope
        )
        return Edit("gate", operand, layers[:1] if scope == "sequence" else layers, condition=condition)
    function = draw(functions(rng, rank)) if kind == "rank" else None
    opcode = "map" if kind in ("dense", "factored") else kind
    edit = Edit(opcode, operand, layers, strength, function=function)  # type: ignore[arg-type]
    gates = [i for i, each in enumerate(before) if each.condition is not None]
    gate = draw(st.sampled_from([None, *gates]))
    if gate is not None and before[gate].condition.scope == "token":  # type: ignore[union-attr]
        edit = replace(edit, layers=tuple(set(layers) & set(before[gate].layers)) or before[gate].layers)
    return replace(edit, gate=gate)


@st.composite
def functions(draw: st.DrawFn, rng: np.random.Generator, rank: int) -> Function | None:
    activation = draw(st.sampled_from((None, "identity", "relu", "jumprelu")))
    if activation is None:
        return None
    low, high = np.sort(rng.normal(0, 2, (2, rank)), axis=0)
    if draw(st.booleans()):
        low = low[:1]
    bounds = draw(st.sampled_from(("none", "low", "high", "both", "constant")))
    return Function(
        activation,
        tuple(low.tolist()) if bounds in ("low", "both", "constant") else None,
        tuple((low if bounds == "constant" else high).tolist()) if bounds in ("high", "both", "constant") else None,
    )


@st.composite
def some_request(draw: st.DrawFn, program: Program, tokens: int) -> Request:
    """A gate for the sequence is read at the last token, as at the end of a prompt, or was decided before. As with
    `Program.intervals`, edits behind one that decides now act from that token on.
    """
    edits = program.edits
    active = np.array(
        draw(st.lists(st.booleans(), min_size=tokens * len(edits), max_size=tokens * len(edits))), np.bool_
    ).reshape(tokens, len(edits))
    decisions: list[bool | None] = [None] * len(edits)
    for index, edit in enumerate(edits):
        if edit.condition is not None and edit.condition.scope == "sequence":
            decisions[index] = draw(st.sampled_from((None, True, False)))
            active[:-1, index] = False
        if edit.gate is not None and decisions[edit.gate] is None and _is_sequence(edits[edit.gate]):
            active[:-1, index] = False
    return Request(program, active, decisions)


def _is_sequence(gate: Edit) -> bool:
    return gate.condition is not None and gate.condition.scope == "sequence"


def compare(batch: Batch, tables: Tables, launch: Any, dtype: torch.dtype, pair: bool, seed: int) -> None:
    """Run both layers, one after the other, and hold kernel against reference: activations, counts and decisions."""
    device = tables.bank.device
    rng = np.random.default_rng(seed)
    counts = np.zeros((len(batch.requests), tables.sites, tables.max_edits), np.int32)
    for layer in range(LAYERS):
        # Two padded tokens at the end, as in a graph.
        shape = (len(batch.owners) + 2, batch.local)
        residual, other = (torch.from_numpy(rng.standard_normal(shape)).to(device, dtype) for _ in range(2))
        hidden = other if pair else None
        x = residual.float() + (other.float() if pair else 0)
        before = residual.clone()
        site = site_index(batch.point, layer, LAYERS)
        launch(tables, torch.tensor([site], dtype=torch.int32, device=device), residual, hidden)
        touched = torch.zeros(shape[0], dtype=torch.bool)
        for index, (tokens, applied) in enumerate(batch.reference(x, layer)):
            changed = applied.x - x[tokens]
            expected = before[tokens].float() + changed if pair else applied.x
            check_close(residual[tokens], expected, x[tokens], dtype)
            same = (changed == 0).cpu()
            # Where the reference changed nothing at all, the kernel may not change a bit.
            still = tokens[same.all(1).numpy()]
            assert torch.equal(bits(residual[still]), bits(before[still]))
            touched[tokens] = applied.acted.any(1).cpu()
            acted = applied.acted.numpy() & batch.fresh[tokens][:, None]
            counts[index, site, : acted.shape[1]] = acted.sum(0)
        assert torch.equal(bits(residual[~touched.to(device)]), bits(before[~touched.to(device)]))
    for index, request in enumerate(batch.requests):
        np.testing.assert_array_equal(tables.counts(index + 1), counts[index])
        decided = tables.decisions[index + 1, : len(request.decisions)].tolist()
        assert decided == [0 if each is None else OPEN if each else OPEN - 1 for each in request.decisions]


def check_close(got: Tensor, expected: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Equal but for the rounding to `dtype`, and the order of float32 sums."""
    size = torch.maximum(expected.abs().amax(1, keepdim=True), x.abs().amax(1, keepdim=True))
    allowed = 2e-5 * size * x.shape[1] ** 0.5 + torch.finfo(dtype).eps * expected.abs() + 1e-6
    wrong = (got.float() - expected).abs() > allowed
    assert not wrong.any(), f"got {got[wrong][:5]}, expected {expected[wrong][:5]}"


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)
