from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.engine.banks import Bank, Resident
from server.engine.edits import Condition, Edit, Function, Program, site_index
from server.engine.ops.tables import Tables
from tests.server.engine.ops.batches import resident, tensors

LAYERS = 2
WIDTH = 8


def filled(width: int = WIDTH, **limits: Any) -> tuple[Tables, dict[str, Resident]]:
    """Tables whose bank has one operand of each kind; activations at resid_post are `width` wide."""
    rng = np.random.default_rng(0)
    kinds = ("add", "scale", "rank", "dense", "factored", "gate")
    bank, residents = resident(
        {kind: {0: tensors(rng, kind, WIDTH, 3), 1: tensors(rng, kind, WIDTH, 3)} for kind in kinds}
    )
    return tables_of(bank, width, **limits), residents


def tables_of(bank: Bank, width: int = WIDTH, **limits: Any) -> Tables:
    sizes: dict[str, Any] = {"max_rows": 3, "max_tokens": 6, "max_edits": 4, **limits}
    return Tables(bank, 5 * LAYERS, {0: width, 1: width}, **sizes)


def set_row(tables: Tables, residents: dict[str, Resident], *edits: Edit, row: int = 1) -> None:
    found = [None if edit.operand is None else residents[edit.operand] for edit in edits]
    tables.set_row(row, Program(edits), found, LAYERS)


def stage(tables: Tables, rows: list[int], bits: list[int]) -> None:
    tables.stage(np.array(rows, np.int32), np.array(bits, np.int32), np.ones(len(rows), np.bool_))


def buffers(tables: Tables) -> list[torch.Tensor]:
    return [value for value in (*vars(tables).values(), tables.plan.data) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Edit("add", "add", (0,))] * 5, "5 edits is over the limit of 4"),
        (
            [Edit("rank", "rank", (0,), function=Function(low=(1.0,) * 3))] * 2,
            "6 or more bounds is over the limit of 5",
        ),
        ([Edit("rank", "rank", (0,), function=Function(low=(1.0,) * 2))], "2 bounds for an operand of rank 3"),
        ([Edit("add", "add", (0,), point="mlp_out")], "add at mlp_out: site 2 has no activation here"),
        ([Edit("add", "scale", (0,))], "scale has no vector for layer 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_written(edits: list[Edit], message: str) -> None:
    tables, residents = filled(max_bounds=5)
    before = [buffer.clone() for buffer in buffers(tables)]
    with pytest.raises(ValueError, match=message):
        set_row(tables, residents, *edits)
    assert all(torch.equal(*pair) for pair in zip(buffers(tables), before, strict=True))


@pytest.mark.parametrize("opcode", ("rank", "gate"))
def test_edits_that_need_more_than_this_ranks_part_are_refused(opcode: Any) -> None:
    tables, residents = filled(width=WIDTH // 2)
    condition = Condition("dot", 0.0) if opcode == "gate" else None
    with pytest.raises(ValueError, match="reads an activation 8 wide, of which 4 are here"):
        set_row(tables, residents, Edit(opcode, opcode, (0,), condition=condition))
    set_row(tables, residents, Edit("add", "add", (0,)), Edit("scale", "scale", (1,)))


def test_edits_that_need_the_whole_of_a_too_wide_activation_are_refused() -> None:
    rng = np.random.default_rng(0)
    bank, residents = resident({kind: {0: tensors(rng, kind, 20000, 1)} for kind in ("add", "gate")})
    tables = tables_of(bank, 20000)
    set_row(tables, residents, Edit("add", "add", (0,)))
    with pytest.raises(ValueError, match="20000 wide, over 16384"):
        set_row(tables, residents, Edit("gate", "gate", (0,), condition=Condition("dot", 0.0)))


def test_rows_and_steps_outside_the_limits_are_refused() -> None:
    tables, residents = filled()
    for row in (0, 4, -1):
        with pytest.raises(ValueError, match="outside 1 to 3"):
            set_row(tables, residents, Edit("add", "add", (0,)), row=row)
        with pytest.raises(ValueError, match="outside 1 to 3"):
            tables.clear_row(row)
    with pytest.raises(ValueError, match="7 tokens is over the limit of 6"):
        stage(tables, [1] * 7, [1] * 7)
    with pytest.raises(ValueError, match="outside 0 to 3"):
        stage(tables, [1, 4], [1, 1])


def test_no_buffer_ever_moves() -> None:
    tables, residents = filled(map_sites=frozenset({0, 1}))
    before = [buffer.data_ptr() for buffer in buffers(tables)]
    set_row(tables, residents, Edit("map", "dense", (0, 1)))
    stage(tables, [1, 0, 1], [1, 0, 1])
    tables.idle()
    tables.clear_row(1)
    assert [buffer.data_ptr() for buffer in buffers(tables)] == before


def test_a_step_covers_what_the_longer_one_before_it_left() -> None:
    tables, residents = filled()
    set_row(tables, residents, Edit("add", "add", (0,)))
    stage(tables, [1, 0, 1, 1, 1], [1, 1, 0, 1, 1])
    stage(tables, [0, 1], [0, 1])
    assert tables.tokens[:, :3].tolist() == [[0, 0, 1], [1, 1, 1], *[[0, 0, 0]] * 4]
    tables.idle()
    assert not tables.tokens[:, :3].any()


def test_a_step_like_the_one_before_it_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, residents = filled(map_sites=frozenset({0, 1}))
    set_row(tables, residents, Edit("map", "dense", (0,)))
    stage(tables, [1, 1], [1, 1])
    copied: list[Any] = []
    monkeypatch.setattr(tables, "_copy", lambda target, source: copied.append(target))
    stage(tables, [1, 1], [1, 1])
    assert not copied
    stage(tables, [1, 1], [1, 0])
    assert copied
    tables.idle()
    copied.clear()
    tables.idle()
    assert not copied
    set_row(tables, residents, Edit("map", "factored", (0,)), row=2)
    copied.clear()
    tables.idle()
    assert copied, "a plan made for other programs is worth nothing"


def plan_of(tables: Tables, site: int) -> list[list[int]]:
    """The tiles' tokens."""
    data = tables.plan.data.tolist()
    start = data[site]
    if start == 0:
        return []
    tiles = data[start]
    firsts, lengths = data[start + 1 : start + 1 + tiles], data[start + 1 + tiles : start + 1 + 2 * tiles]
    tokens = data[start + 1 + 2 * tiles :]
    return [tokens[first : first + length] for first, length in zip(firsts, lengths, strict=True)]


def test_tokens_of_one_matrix_share_tiles() -> None:
    tables, residents = filled(map_sites=frozenset({0, 1}), max_tokens=64)
    set_row(tables, residents, Edit("map", "factored", (0,)), row=1)
    set_row(tables, residents, Edit("add", "add", (0, 1)), Edit("map", "dense", (1,)), row=2)
    set_row(tables, residents, Edit("add", "add", (1,)), Edit("map", "factored", (0, 1)), row=3)
    rows = [1, 3, 2, 0, *[3] * 20, 1]
    stage(tables, rows, [0b11] * len(rows))
    same_matrix = [t for t, row in enumerate(rows) if row in (1, 3)]
    assert plan_of(tables, 0) == [same_matrix[:16], same_matrix[16:]]
    assert plan_of(tables, 1) == [], "behind an add, a map waits for its turn"
    assert tables.tokens[: len(rows), 3].tolist() == [*range(2), -1, -1, *range(2, 23)]
    stage(tables, [2, 1], [0b11, 0b10])
    assert plan_of(tables, 0) == []


def test_tokens_of_different_matrices_are_sorted_apart() -> None:
    tables, residents = filled(map_sites=frozenset({0, 1}))
    set_row(tables, residents, Edit("map", "factored", (0, 1)), row=1)
    set_row(tables, residents, Edit("map", "dense", (0, 1)), row=2)
    stage(tables, [1, 2, 1, 2], [1] * 4)
    assert sorted(plan_of(tables, 0)) == [[0, 2], [1, 3]]
    assert tables.plan.data[0] == tables.plan.data[1], "sites at which the same edits act share a plan"


def test_a_plan_holds_as_many_tokens_as_there_is_room_for() -> None:
    tables, residents = filled(map_sites=frozenset({0, 1}), max_mapped=2)
    set_row(tables, residents, Edit("map", "dense", (0, 1)))
    stage(tables, [0, 1, 1, 1], [1, 1, 1, 1])
    assert plan_of(tables, 0) == plan_of(tables, 1) == [[1, 2]]
    assert tables.tokens[:4, 3].tolist() == [-1, 0, 1, -1]


@pytest.mark.parametrize("gates", ((None, None), (None, 0), (0, 0)))
def test_a_set_before_a_map_makes_its_input(gates: tuple[int | None, int | None]) -> None:
    tables, residents = filled(map_sites=frozenset({0}))
    gate = Edit("gate", "gate", (0,), condition=Condition("dot", 0.0))
    set_row(tables, residents, gate, Edit("set", "add", (0,), gate=gates[0]), Edit("map", "dense", (0,), gate=gates[1]))
    stage(tables, [1], [0b111])
    assert plan_of(tables, 0) == [[0]]


def test_a_map_that_can_act_without_the_set_before_it_waits_for_its_turn() -> None:
    tables, residents = filled(map_sites=frozenset({0}))
    gate = Edit("gate", "gate", (0,), condition=Condition("dot", 0.0))
    set_row(tables, residents, gate, Edit("set", "add", (0,), gate=0), Edit("map", "dense", (0,)))
    stage(tables, [1], [0b111])
    assert plan_of(tables, 0) == []


def test_sites_are_numbered_as_in_programs() -> None:
    assert site_index("resid_post", 1, LAYERS) == 1
    tables, residents = filled()
    set_row(tables, residents, Edit("add", "add", (1,)), Edit("scale", "scale", (0, 1)))
    fields = tables.rows[1, 4 * 8 : 4 * 8 + 10 * 4].view(10, 4)
    assert fields[:, 0].tolist() == [0b10, 0b11, *[0] * 8]
