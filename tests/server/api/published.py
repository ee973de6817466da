"""Artifacts of every kind for a small made-up model, and requests that use them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from server.api.errors import ApiError
from server.api.prepared import Prepared
from server.api.steering import Steerer
from server.api.steering_schema import parse
from server.engine.operands import Operand
from steering_store import ArtifactVersion, Store

HIDDEN, NEURONS, LAYERS, SITES = 8, 12, 6, (2, 3, 5)
OURS, OTHERS = "sha256:" + "a" * 64, "sha256:" + "b" * 64
FILE = "vectors.safetensors"
FIRST = "steering.interventions.0"
FEATURE = {"index": 1, "op": "ablate"}
DTYPES = {"float32": "F32", "int64": "I64"}


def vectors(fill: float = 1.0) -> dict[tuple[int, str | None], np.ndarray]:
    # Out of order, as a client may write them.
    return {(layer, None): np.full(HIDDEN, fill * layer, np.float32) for layer in reversed(SITES)}


def publish(
    store: Store,
    name: str = "mood",
    tensors: dict[tuple[int, str | None], np.ndarray] | None = None,
    point: str = "resid_post",
    **changes: Any,
) -> ArtifactVersion:
    """Publish tensors, by layer and role; a steering_vector unless told otherwise."""
    tensors = tensors or vectors()
    names = {key: f"{key[0]}.{key[1]}" for key in tensors}
    sites = [
        {
            "point": point,
            "layer": layer,
            "role": role,
            "file": FILE,
            "tensor": names[layer, role],
            "shape": list(tensor.shape),
            "dtype": DTYPES[tensor.dtype.name],
        }
        for (layer, role), tensor in tensors.items()
    ]
    model = {"architecture": "LlamaForCausalLM", "hidden_size": HIDDEN, "num_layers": LAYERS}
    manifest = {
        "schema_version": 1,
        "kind": "steering_vector",
        "model": model | {"weights_digest": OURS, "widths": {"mlp_act": NEURONS}} | changes.pop("model", {}),
        "sites": sites,
        "default_strength": 4.0,
        "h_norm": {str(layer): 10.0 for layer in SITES},
        "provenance": {"method": "caa"},
    }
    file = save({names[key]: tensor for key, tensor in tensors.items()})
    return store.publish(name, manifest | changes, {FILE: file}).version


def publish_sae(store: Store, layers: tuple[int, ...] = (3,), **changes: Any) -> ArtifactVersion:
    rng = np.random.default_rng(0)
    tensors: dict[tuple[int, str | None], np.ndarray] = {}
    for layer in layers:
        for role in ("encoder", "decoder"):
            tensors[layer, role] = rng.standard_normal((20, HIDDEN)).astype(np.float32)
        tensors[layer, "encoder_bias"] = np.zeros(20, np.float32)
    return publish(store, "sae", tensors, **({"kind": "sae", "activation": "relu", "default_strength": 1.0} | changes))


def publish_neurons(store: Store, *indices: int, name: str = "neurons", point: str = "mlp_act") -> ArtifactVersion:
    return publish(store, name, {(2, None): np.array(indices, np.int64)}, point, kind="neuron_set")


def publish_map(store: Store, biased: tuple[int, ...] = ()) -> ArtifactVersion:
    maps: dict[tuple[int, str | None], np.ndarray] = {}
    for layer in SITES:
        maps[layer, "matrix"] = np.full((HIDDEN, HIDDEN), float(layer), np.float32)
        if layer in biased:
            maps[layer, "bias"] = np.full(HIDDEN, -float(layer), np.float32)
    return publish(store, "map", maps, kind="linear_map")


def prepare(steerer: Steerer, *interventions: dict[str, Any], **fields: Any) -> Prepared:
    return steerer.prepare({"interventions": [{"artifact": "mood"} | each for each in interventions or ({},)]} | fields)


def refused(
    steerer: Steerer, status: int, param: str, word: str, *interventions: dict[str, Any], **fields: Any
) -> None:
    with pytest.raises(ApiError) as error:
        prepare(steerer, *interventions, **fields)
    assert (error.value.status, error.value.param) == (status, param), error.value.message
    assert word in error.value.message


def load(prepared: Prepared, key: str | None) -> Operand:
    assert key is not None
    return asyncio.run(prepared.operands[key]())  # type: ignore[arg-type]


def tensor(operand: Operand, layer: int, role: str) -> np.ndarray:
    (piece,) = (piece for piece in operand.pieces if (piece.layer, piece.role) == (layer, role))
    return operand.data[piece.start : piece.start + int(np.prod(piece.shape))].reshape(piece.shape)


def receipt(steerer: Steerer, prepared: Prepared, touched: int = 1) -> Any:
    asyncio.run(steerer.check(prepared))
    counts = [[touched] * len(edit.layers) for edit in prepared.program.edits]
    return steerer.receipt(prepared, counts, [0] * len(counts))


def refusal(raw: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse(raw)
    assert error.value.status == 422
    return error.value
