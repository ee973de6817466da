from __future__ import annotations

from pathlib import Path

import pytest

from server.api.doses import Doses
from server.api.leases import Leases
from server.api.served import ServedModel
from server.api.steering import Steerer
from server.engine.edits import OPCODES
from server.models import ModelIdentity
from steering_store import Store
from tests.server.api.published import (
    HIDDEN,
    LAYERS,
    NEURONS,
    OURS,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def steerer(store: Store) -> Steerer:
    identity = ModelIdentity(
        architecture="LlamaForCausalLM",
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        vocab_size=16,
        tokenizer_digest=None,
        weights_digest=OURS,
    )
    points = {
        "resid_post": {"width": HIDDEN, "opcodes": OPCODES, "shards": 1, "reason": None},
        "mlp_out": {"width": HIDDEN, "opcodes": OPCODES, "shards": 1, "reason": None},
        "attn_out": {
            "width": 0,
            "opcodes": (),
            "shards": 1,
            "reason": "it isn't installed: name it in POLYHELM_POINTS",
        },
        "resid_pre": {"width": HIDDEN, "opcodes": OPCODES, "shards": 1, "reason": None},
        "mlp_act": {"width": NEURONS, "opcodes": ("add", "scale", "set"), "shards": 2, "reason": "it is split"},
    }
    model = ServedModel(identity, LAYERS, HIDDEN, points, "weights")
    return Steerer(store, model, max_edits=6, max_strength=100.0, doses=Doses(), leases=Leases(store))
