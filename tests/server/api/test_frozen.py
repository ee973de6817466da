"""The program of frozen mode: what is put back, and where."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from server.api.steering import Steerer
from server.api.steering_schema import LAST_PROMPT_TOKEN
from steering_store import Store
from tests.server.api.published import (
    FIRST,
    HIDDEN,
    LAYERS,
    load,
    prepare,
    publish,
    refused,
    tensor,
)


def test_frozen_mode_puts_back_clean_activations_at_every_layer_first(store: Store, steerer: Steerer) -> None:
    publish(store)
    publish(store, "elsewhere", point="mlp_out")
    gated = {"artifact": "elsewhere", "layers": [3], "condition": {"artifact": "elsewhere", "threshold": 0.5}}
    prepared = prepare(steerer, {"layers": [2]}, gated, mode="frozen")
    assert prepared.frozen_sites == tuple((point, layer) for point in ("resid_post", "mlp_out") for layer in range(6))
    assert all(edit.span == LAST_PROMPT_TOKEN for edit in prepared.program.edits)
    clean = {site: np.full(HIDDEN, number, np.float32) for number, site in enumerate(prepared.frozen_sites)}
    final = prepared.with_clean(clean)
    first, second, *rest = final.program.edits
    assert (first.opcode, first.point, first.layers) == ("set", "resid_post", tuple(range(LAYERS)))
    assert (second.opcode, second.point, second.span) == ("set", "mlp_out", LAST_PROMPT_TOKEN)
    assert [edit.gate for edit in rest] == [None, None, 3]
    final.program.check()
    assert final.owners == (None, None, 0, 1, 1)
    for site, row in clean.items():
        edit = first if site[0] == "resid_post" else second
        np.testing.assert_array_equal(tensor(load(final, edit.operand), site[1], "vector"), row)
    counts = [[number] * len(edit.layers) for number, edit in enumerate(final.program.edits)]
    asyncio.run(steerer.check(prepared))
    said = steerer.receipt(prepared.with_clean(clean), counts, [0] * 5)
    assert said.mode == "frozen"
    assert [(edit.opcode, edit.tokens_touched) for edit in said.frozen] == [("set", 0), ("set", 1)]
    assert [[edit.tokens_touched for edit in each.edits] for each in said.applied] == [[2], [3, 4]]
    assert said.applied[0].relative_dose is not None


def test_the_embeddings_are_put_back_at_layer_0_alone(store: Store, steerer: Steerer) -> None:
    publish(store, "embeddings", {(0, None): np.ones(HIDDEN, np.float32)}, "resid_pre", h_norm={"0": 10.0})
    publish(store)
    prepared = prepare(steerer, {"artifact": "embeddings"}, {}, mode="frozen")
    assert prepared.frozen_sites == (("resid_pre", 0), *(("resid_post", layer) for layer in range(LAYERS)))
    final = prepared.with_clean({site: np.zeros(HIDDEN, np.float32) for site in prepared.frozen_sites})
    assert [edit.layers for edit in final.program.edits[:2]] == [(0,), tuple(range(LAYERS))]
    final.program.check()


def test_clean_activations_share_a_key_exactly_when_they_are_equal(store: Store, steerer: Steerer) -> None:
    publish(store)
    prepared = prepare(steerer, mode="frozen")

    def key(change: float, layer: int) -> str | None:
        rows = {site: np.ones(HIDDEN, np.float32) for site in prepared.frozen_sites}
        rows["resid_post", layer][0] += change
        return prepared.with_clean(rows).program.edits[0].operand

    assert key(0, 0) == key(0, 1)
    assert len({key(0, 0), key(1, 0), key(1, 1)}) == 3
    publish(store, "elsewhere", point="mlp_out")
    both = prepare(steerer, {}, {"artifact": "elsewhere"}, mode="frozen")
    first, second, *_ = both.with_clean({site: np.ones(HIDDEN, np.float32) for site in both.frozen_sites}).program.edits
    assert first.operand == key(0, 0) != second.operand


def test_loader_of_clean_activations_does_not_keep_them_alive(store: Store, steerer: Steerer) -> None:
    publish(store)
    prepared = prepare(steerer, mode="frozen")
    final = prepared.with_clean({site: np.ones(HIDDEN, np.float32) for site in prepared.frozen_sites})
    loader = final.operands[final.program.edits[0].operand or ""]
    del final
    with pytest.raises(RuntimeError, match="has ended"):
        asyncio.run(loader())  # type: ignore[arg-type]


def test_frozen_mode_edits_the_last_prompt_token_only(store: Store, steerer: Steerer) -> None:
    publish(store)
    assert prepare(steerer, {"apply": {"prompt_positions": [-1]}}, mode="frozen").frozen_sites
    for apply in ({}, {"prompt": "all"}, {"prompt_positions": [-1], "generation": "all"}):
        refused(steerer, 422, f"{FIRST}.apply", "last prompt token only", {"apply": apply}, mode="frozen")


def test_frozen_modes_own_edits_count(store: Store, steerer: Steerer) -> None:
    publish(store)
    assert prepare(steerer, *[{}] * 5, mode="frozen").frozen_sites
    refused(steerer, 422, "steering.interventions", "6 interventions make 7 edits", *[{}] * 6, mode="frozen")
