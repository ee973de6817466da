"""The kernels against the reference: the CPU's, and Triton's in its interpreter. Collected by test_kernel.py, each in a
process of its own: Triton has to be imported in interpreter mode, which vLLM's own kernels can't share.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.edits import Condition, Edit, Function, Program
from server.engine.ops.tables import Tables
from tests.server.engine.ops.batches import DTYPES, LAYERS, Batch, Request, batches, bits, compare, tensors

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
if INTERPRETED:
    from server.engine.ops.kernel import launch
else:
    from server.engine.ops.cpu_kernel import CpuKernel

    def launch(tables: Tables, site: torch.Tensor, residual: torch.Tensor, hidden: torch.Tensor | None = None) -> None:
        CpuKernel(tables).launch(int(site), residual, hidden)


SITE = torch.zeros(1, dtype=torch.int32)
KINDS = ("add", "add_norm", "scale", "rank", "dense", "factored", "set", "renorm", "gate")
MAPS: dict[str, Any] = {"map_sites": frozenset({0, 1})}
OPEN = Condition("dot", -1e9)
CLOSED = Condition("cosine", 2.0)


def one(kind: str, strength: float = 1.0, **fields: Any) -> Edit:
    opcode = "map" if kind in ("dense", "factored") else kind
    operand = None if kind == "renorm" else kind
    condition = OPEN if kind == "gate" and "condition" not in fields else fields.pop("condition", None)
    return Edit(opcode, operand, (0, 1), strength, condition=condition, **fields)  # type: ignore[arg-type]


def alone(edits: tuple[Edit, ...], width: int = 24, tokens: int = 3, rank: int = 3) -> Batch:
    """One request whose edits, named as in KINDS, act on all its tokens."""
    rng = np.random.default_rng(7)
    program = Program(edits)
    program.check()
    request = Request(program, np.ones((tokens, len(edits)), np.bool_), [None] * len(edits))
    kinds = [edit.operand for edit in edits if edit.operand is not None]
    operands = {kind: {layer: tensors(rng, kind, width, rank) for layer in range(LAYERS)} for kind in kinds}
    return Batch(width, [request], np.zeros(tokens, np.int32), np.ones(tokens, np.bool_), operands)


@settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
@given(batch=batches(), dtype=st.sampled_from(DTYPES), pair=st.booleans(), maps=st.booleans(), seed=st.integers(0, 999))
def test_kernel_equals_the_reference(batch: Batch, dtype: torch.dtype, pair: bool, maps: bool, seed: int) -> None:
    limits: dict[str, Any] = {**MAPS, "max_mapped": 2, "max_map_rank": 4} if maps else {}
    compare(batch, batch.tables(**limits), launch, dtype, pair, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_opcode_on_wide_activations(kind: str) -> None:
    function = Function("relu", low=(0.5,)) if kind == "rank" else None
    width = 300 if kind == "dense" else 5000
    batch = alone((one("scale", 0.5), one(kind, 0.5, function=function)), width, tokens=1, rank=5)
    compare(batch, batch.tables(), launch, torch.bfloat16, True, 0)


@pytest.mark.parametrize("kind", ("add", "scale", "set"))
def test_elementwise_edits_reach_activations_wider_than_one_program_holds(kind: str) -> None:
    batch = alone((one(kind, 0.5),), 20000, tokens=1)
    compare(batch, batch.tables(), launch, torch.float32, True, 0)


@pytest.mark.parametrize("limits", ({}, MAPS), ids=("by token", "map kernels"))
@pytest.mark.parametrize("pair", (True, False), ids=("pair", "single"))
@pytest.mark.parametrize(
    "edits",
    [
        *[(one(kind, 0.0),) for kind in ("add", "add_norm", "scale", "rank", "dense", "factored")],
        (one("renorm"),),
        (one("gate"),),
        *[(one("gate", condition=CLOSED), one(kind, gate=0)) for kind in KINDS if kind != "gate"],
        (replace(one("gate", condition=replace(CLOSED, scope="sequence")), layers=(0,)), one("add", gate=0)),
        (one("rank", function=Function(low=(-1e9,), high=(1e9,))),),
    ],
    ids=lambda edits: "-".join(f"{edit.operand}{edit.strength:g}" for edit in edits),
)
def test_what_changes_nothing_keeps_every_bit(edits: tuple[Edit, ...], pair: bool, limits: dict[str, Any]) -> None:
    batch = alone(edits)
    assert bits_changed(batch, pair, limits) == 0


@pytest.mark.parametrize("pair", (True, False), ids=("pair", "single"))
def test_an_empty_mask_keeps_every_bit(pair: bool) -> None:
    batch = alone((one("scale", -1.0),))
    batch.operands["scale"] = {layer: {"mask": np.zeros(batch.width, np.float32)} for layer in range(LAYERS)}
    assert bits_changed(replace(batch), pair, {}) == 0


@pytest.mark.parametrize("pair", (True, False), ids=("pair", "single"))
def test_set_to_the_captured_value_keeps_every_bit(pair: bool) -> None:
    batch = alone((one("set"),), tokens=1)
    residual, hidden = activations(batch, pair)
    captured = (residual.float() + hidden.float() if hidden is not None else residual.float())[0].numpy()
    batch.operands["set"] = {layer: {"vector": captured} for layer in range(LAYERS)}
    assert bits_changed(replace(batch), pair, {}) == 0


def bits_changed(batch: Batch, pair: bool, limits: dict[str, Any]) -> int:
    residual, hidden = activations(batch, pair)
    before = bits(residual).clone()
    tables = batch.tables(**limits)
    launch(tables, SITE, residual, hidden)
    assert tables.counts(1)[0, 0] == len(batch.owners), "the first edit has to act, or this shows nothing"
    return int((bits(residual) != before).sum())


def activations(batch: Batch, pair: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Zeros of both signs among them."""
    rng = np.random.default_rng(3)
    shape = (len(batch.owners), batch.local)
    residual = torch.from_numpy(rng.choice((-0.0, 0.0, 1.0), shape) * rng.standard_normal(shape)).to(torch.bfloat16)
    return residual, torch.from_numpy(rng.standard_normal(shape)).to(torch.bfloat16) if pair else None


@pytest.mark.parametrize("kind", ("dense", "factored"))
@pytest.mark.parametrize("before", ((), ("set",), ("gate",), ("gate", "set")), ids=str)
@pytest.mark.parametrize("width", (40, 100))
def test_map_kernels_share_a_matrix_among_many_tokens(kind: str, before: tuple[str, ...], width: int) -> None:
    """Three requests, two of them with the same operand; a `set` covers every other token."""
    rng = np.random.default_rng(11)
    names = (f"{kind}0", f"{kind}1", f"{kind}0")
    operands = {key: {layer: tensors(rng, key[:-1], width, 33) for layer in range(LAYERS)} for key in {*names}}
    operands |= {key: {layer: tensors(rng, key, width, 1) for layer in range(LAYERS)} for key in before}
    owners = np.repeat(np.array([0, 1, 2, -1, 0], np.int32), (9, 3, 12, 2, 8))
    requests = []
    for index, name in enumerate(names):
        edits = (*(one(each) for each in before), Edit("map", name, (0, 1), 0.5))
        active = np.ones(((owners == index).sum(), len(edits)), np.bool_)
        active[::2, [edit.opcode == "set" for edit in edits]] = False
        requests.append(Request(Program(edits), active, [None] * len(edits)))
    batch = Batch(width, requests, owners, np.ones(len(owners), np.bool_), operands)
    tables = batch.tables(**MAPS)
    tables.mapped.fill_(torch.nan)
    compare(batch, tables, launch, torch.float32, True, 0)
    listed = int((owners >= 0).sum())
    assert torch.isfinite(tables.mapped[:listed]).all(), "the map kernels computed these"
    assert torch.isnan(tables.mapped[listed:]).all(), "and nothing else"


@pytest.mark.parametrize("first", ("add", "scale", "rank", "renorm", "add_norm", "dense"))
def test_a_map_behind_another_edit_is_computed_in_its_place(first: str) -> None:
    batch = alone((one(first, 0.5), one("factored", 0.5)))
    tables = batch.tables(**MAPS)
    compare(batch, tables, launch, torch.float32, True, 0)


@pytest.mark.parametrize("limit", ("max_mapped", "max_map_rank"))
@pytest.mark.parametrize("kind", ("dense", "factored"))
def test_maps_that_the_map_kernels_have_no_room_for_are_computed_in_their_place(kind: str, limit: str) -> None:
    batch = alone((one("set"), one(kind, 0.5)), tokens=4, rank=3)
    batch.requests[0].active[1::2, 0] = False
    compare(batch, batch.tables(**MAPS, **{limit: 2}), launch, torch.float32, True, 0)


@pytest.mark.skipif(not INTERPRETED, reason="on a CPU it is known at which sites there can be any")
def test_maps_can_be_left_out_of_a_launch() -> None:
    batch = alone((one("dense", 0.5),))
    tables = batch.tables(**MAPS)
    tables.mapped.fill_(torch.nan)
    compare(batch, tables, lambda *args: launch(*args, maps=False), torch.float32, True, 0)


def test_a_gate_for_the_sequence_holds_what_it_decided_until_the_row_is_given_away() -> None:
    edits = (replace(one("gate"), layers=(0,), condition=Condition("dot", 0.0, scope="sequence")), one("add", gate=0))
    batch = alone(edits, tokens=1)
    vector = torch.from_numpy(batch.operands["gate"][0]["vector"])
    tables = batch.tables()

    def step(x: torch.Tensor, bits: int) -> bool:
        """Whether the token was edited."""
        tables.stage(np.array([1], np.int32), np.array([bits], np.int32), np.array([True]))
        edited = x.clone()[None]
        launch(tables, SITE, edited)
        return not torch.equal(edited[0], x)

    assert not step(vector, 0b10), "undecided"
    assert step(vector, 0b11), "decided, and seen by the edits behind it at once"
    assert step(-vector, 0b10)
    assert step(-vector, 0b11), "the first decision holds"
    tables.set_row(1, batch.requests[0].program, batch.of(batch.requests[0]), LAYERS)
    assert not step(-vector, 0b11)
    assert not step(vector, 0b10)
    assert tables.counts(1)[0].tolist()[:2] == [1, 0], "what the former request counted is gone"


def test_a_cleared_row_does_nothing_even_where_tokens_name_it() -> None:
    batch = alone(tuple(one(kind) for kind in KINDS))
    tables = batch.tables(**MAPS)
    tables.clear_row(1)
    for _ in range(2):
        x = torch.randn(len(batch.owners), batch.width)
        before = x.clone()
        launch(tables, SITE, x)
        assert torch.equal(x, before)
        tables.stage(batch.owners + 1, batch.bits(), batch.fresh)
    assert not tables.counts(1).any()
    tables.set_row(1, Program((one("add"),)), [batch.residents["add"]], LAYERS)
    x = torch.zeros(len(batch.owners), batch.width)
    launch(tables, SITE, x)
    assert torch.equal(x[0], torch.from_numpy(batch.operands["add"][0]["vector"]))


def test_an_idle_step_touches_nothing() -> None:
    batch = alone(tuple(one(kind) for kind in KINDS))
    tables = batch.tables(**MAPS)
    tables.idle()
    x = torch.randn(len(batch.owners) + 2, batch.width)
    before = x.clone()
    launch(tables, SITE, x)
    assert torch.equal(x, before)
    assert not tables.counts(1).any()


def test_launch_refuses_activations_that_it_would_read_wrongly() -> None:
    batch = alone((one("add"),))
    tables = batch.tables()
    x = torch.zeros(3, batch.width)
    with pytest.raises(ValueError, match="over the limit of 5" if INTERPRETED else "token 2 of a step"):
        launch(tables, SITE, torch.zeros(6 if INTERPRETED else 2, batch.width))
    with pytest.raises(ValueError, match="without gaps"):
        launch(tables, SITE, torch.zeros(3, 2 * batch.width)[:, ::2])
    with pytest.raises(ValueError, match="shape of residual"):
        launch(tables, SITE, x, x[:2])
