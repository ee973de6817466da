from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api import capabilities
from server.encoding import BatchedEncoder
from server.settings import Settings
from tests.kb.ngrams import Ngrams


def told() -> dict[str, Any]:
    whole = {"width": 8, "opcodes": ("add", "rank"), "shards": 1, "reason": None}
    split = {"width": 12, "opcodes": ("add",), "shards": 2, "reason": "it is split over 2 ranks"}
    missing = {"width": 0, "opcodes": (), "shards": 1, "reason": "name it in POLYHELM_POINTS"}
    engine = SimpleNamespace(
        layers=4,
        hidden_size=8,
        dtype="float32",
        points={"resid_post": whole, "mlp_act": split, "attn_out": missing},
        captures="start with --enforce-eager",
        prefix_cache="tagged",
        runner="V1",
        max_model_len=64,
        max_edits=16,
        bank_bytes=4096,
    )
    app = FastAPI()
    app.include_router(capabilities.router)
    app.state.polyhelm = SimpleNamespace(
        engine=engine,
        settings=Settings(max_relative_dose=1.5),
        model_name="tiny",
        encoder=BatchedEncoder(Ngrams()),
        steerer=SimpleNamespace(model=SimpleNamespace(identity={"architecture": "X"})),
    )
    answer: dict[str, Any] = TestClient(app).get("/v1/capabilities").json()
    return answer


def test_points_say_what_acts_there_and_why_something_does_not() -> None:
    points = told()["points"]
    assert points["resid_post"] == {"opcodes": ["add", "rank"], "width": 8, "shards": 1, "reason": None}
    assert (points["mlp_act"]["opcodes"], points["mlp_act"]["shards"]) == (["add"], 2)
    assert points["attn_out"]["width"] is None and "POLYHELM_POINTS" in points["attn_out"]["reason"]


def test_kinds_have_their_ops_and_limits_their_numbers() -> None:
    answer = told()
    assert answer["artifact_kinds"]["steering_vector"] == ["add", "add_norm", "ablate", "clamp", "set"]
    assert answer["artifact_kinds"]["sae"] == ["add", "scale", "clamp", "ablate"]
    assert answer["encoders"] == [{"name": "ngrams", "dimension": 64, "digest": "sha256:ngrams-64"}]
    assert answer["captures"] == "start with --enforce-eager"
    limits = answer["limits"]
    assert (limits["max_edits"], limits["bank_bytes"], limits["max_relative_dose"]) == (16, 4096, 1.5)
