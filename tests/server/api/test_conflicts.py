"""Two interventions that write the same direction of a site."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from server.api.errors import ApiError
from server.api.steering import Steerer
from steering_store import Store
from tests.server.api.published import (
    FEATURE,
    HIDDEN,
    NEURONS,
    prepare,
    publish,
    publish_map,
    publish_neurons,
    publish_sae,
)


def conflict(steerer: Steerer, *interventions: dict[str, Any], lengths: tuple[int, ...] = (4,)) -> str | None:
    prepared = prepare(steerer, *interventions, conflict="error")
    try:
        asyncio.run(steerer.refuse_conflicts(prepared, lengths))
    except ApiError as error:
        assert (error.status, error.param) == (400, "steering.conflict")
        return error.message
    return None


def test_two_interventions_on_one_direction_of_a_site_are_a_conflict(store: Store, steerer: Steerer) -> None:
    publish(store)
    publish(store, "opposite", {(3, None): np.full(HIDDEN, -0.1, np.float32)})
    message = conflict(steerer, {}, {"artifact": "opposite"})
    assert message is not None and "interventions 0 and 1" in message and "resid_post.3" in message
    assert conflict(steerer, {"layers": [2]}, {"artifact": "opposite"}) is None
    assert conflict(steerer, {"op": "ablate"}, {"artifact": "opposite", "op": "add_norm"}) is not None


def test_different_directions_are_no_conflict_but_what_writes_everything_always_is(
    store: Store, steerer: Steerer
) -> None:
    publish(store)
    publish(store, "aside", {(3, None): np.array([1.0] * 7 + [1.01], np.float32)})
    publish_map(store)
    aside = {"artifact": "aside"}
    assert conflict(steerer, {}, aside) is None
    assert conflict(steerer, {"artifact": "map"}, aside) is not None
    assert conflict(steerer, {"op": "set"}, aside) is not None
    assert conflict(steerer, {"renorm": True}, aside) is not None
    assert conflict(steerer, {"renorm": True, "layers": [2]}, aside) is None
    assert conflict(steerer, {"artifact": "map", "strength": 0}, aside) is None


def test_tokens_that_only_one_of_them_touches_are_no_conflict(store: Store, steerer: Steerer) -> None:
    publish(store)
    prompt, answer = {"apply": {"prompt": "all"}}, {"apply": {"generation": "all"}}
    assert conflict(steerer, prompt, answer) is None
    first, last = {"apply": {"prompt_positions": [0]}}, {"apply": {"prompt_positions": [-1]}}
    assert conflict(steerer, first, last) is None
    assert conflict(steerer, first, last, lengths=(4, 1)) is not None


def test_neurons_and_axes_conflict_where_they_meet(store: Store, steerer: Steerer) -> None:
    publish_neurons(store, 0, 7, name="some")
    publish_neurons(store, 7, 9, name="others")
    publish_neurons(store, 8, name="apart")
    axis = np.zeros(NEURONS, np.float32)
    axis[7] = 3
    publish(store, "axis", {(2, None): axis}, "mlp_act")
    some = {"artifact": "some"}
    assert conflict(steerer, some, {"artifact": "others"}) is not None
    assert conflict(steerer, some, {"artifact": "apart"}) is None
    assert conflict(steerer, some, {"artifact": "axis"}) is not None
    assert conflict(steerer, {"artifact": "axis"}, {"artifact": "apart"}) is None


def test_features_of_two_interventions_conflict_and_of_one_do_not(store: Store, steerer: Steerer) -> None:
    publish_sae(store)

    def features(*indices: int) -> dict[str, Any]:
        return {"artifact": "sae", "features": [{"index": index, "op": "add", "value": 1.0} for index in indices]}

    assert conflict(steerer, features(1), {"artifact": "sae", "features": [FEATURE]}) is not None
    assert conflict(steerer, features(2), {"artifact": "sae", "features": [FEATURE]}) is None
    both = {"artifact": "sae", "features": [FEATURE, {"index": 2, "op": "add", "value": 1.0}]}
    assert conflict(steerer, both) is None
