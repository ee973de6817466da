from __future__ import annotations

import json

import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict

from kb import errors as kb_errors
from kb.encoders import base as encoders
from server.api import errors
from server.api.errors import ApiError, EnvelopeRoute, error_response
from steering_store import errors as store_errors


class Edit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    layer: int


class Body(BaseModel):
    edits: list[Edit]


router = APIRouter(route_class=EnvelopeRoute)


@router.post("/ours")
async def ours(body: Body) -> None:
    raise ApiError(409, "another model; fit it again", "model", {"X-Why": "test"})


@router.get("/http")
async def http() -> None:
    raise HTTPException(403, "no", headers={"X-Why": "test"})


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    app.post("/theirs")(ours)
    errors.install(app)
    return TestClient(app)


def test_every_error_of_ours_has_a_status_and_every_status_a_type() -> None:
    classes = [cls for module in (store_errors, kb_errors, encoders) for cls in vars(module).values()]
    assert {cls for cls in classes if isinstance(cls, type) and issubclass(cls, Exception)} <= set(errors.STATUS)
    assert set(errors.STATUS.values()) <= set(errors.TYPES)


def test_subclass_has_the_status_of_its_base_and_a_stranger_is_500() -> None:
    class Stale(store_errors.ArtifactNotFound):
        pass

    assert error_response(Stale("gone", "ref")).status_code == 404
    stranger = error_response(ValueError("secret"))
    assert stranger.status_code == 500
    assert b"secret" not in stranger.body


def test_api_error_keeps_its_field_and_headers(client: TestClient) -> None:
    response = client.post("/ours", json={"edits": []})
    assert response.json() == {
        "error": {"message": "another model; fit it again", "type": "ConflictError", "param": "model", "code": 409}
    }
    assert response.headers["x-why"] == "test"


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({}, "edits", "Field required"),
        ({"edits": [{"layer": "x"}]}, "edits.0.layer", "integer"),
        ({"edits": [{"layer": 1, "extra": 2}]}, "edits.0.extra", "remove it"),
        ([], "body", "valid dictionary"),
    ],
)
def test_first_bad_field_is_named_by_its_dotted_path(client: TestClient, body: object, param: str, word: str) -> None:
    response = client.post("/ours", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, param, 422)
    assert param in error["message"] and word in error["message"]


def test_body_that_is_not_json_is_422(client: TestClient) -> None:
    response = client.post("/ours", content="{", headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, None)


def test_http_exception_is_put_in_the_envelope(client: TestClient) -> None:
    response = client.get("/http")
    assert response.headers["x-why"] == "test"
    assert response.json()["error"] == {"message": "no", "type": "PermissionDeniedError", "param": None, "code": 403}


def test_routes_of_others_keep_their_own_validation_errors(client: TestClient) -> None:
    assert "detail" in client.post("/theirs", json={}).json()


def test_overload_says_when_to_retry() -> None:
    assert error_response(ApiError(429, "full; wait")).headers["retry-after"] == "1"
    assert error_response(ApiError(503, "full; wait", headers={"Retry-After": "9"})).headers["retry-after"] == "9"
    assert json.loads(error_response(ApiError(418, "tea")).body)["error"]["type"] == "BadRequestError"
