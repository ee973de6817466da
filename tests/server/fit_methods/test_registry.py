"""The specs: what is refused, and where the field is that is at fault."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError

from server.api import errors, fits
from server.fit_methods.base import Activations, OnePassSpec, Wanted
from server.fit_methods.registry import METHODS, Specs, parse_spec, untagged

ANSWERED = [{"prompt": "Is it?", "positive": "yes", "negative": "no"}] * 2
TRANSLATED = [{"source": "habari", "target": "news"}] * 3
BODIES: dict[str, dict[str, Any]] = {
    "caa": {"pairs": [{"positive": "good", "negative": "bad"}] * 2},
    "sadi": {"pairs": ANSWERED},
    "incline": {"pairs": TRANSLATED, "options": {"source_language": "sw"}},
}


def body(method: str, **changes: Any) -> dict[str, Any]:
    return {"method": method, "name": "x"} | BODIES[method] | changes


@pytest.mark.parametrize("method", BODIES)
def test_a_body_becomes_the_spec_of_its_method_and_survives_a_job_on_disk(method: str) -> None:
    spec = parse_spec(body(method))
    assert spec.method == method and method in METHODS
    again = parse_spec(spec.model_dump(mode="json"))
    assert again == spec and again.data_digest() == spec.data_digest()
    assert len(spec.texts()) == 2 * len(spec.items)


def test_every_method_tells_what_it_captures_and_names_its_texts() -> None:
    assert {spec.model_fields["method"].default for spec in get_args(Specs)} == set(METHODS)

    def wanted(**options: Any) -> Wanted:
        ((_, found),) = parse_spec(body("sadi", options=options)).captures()
        return found

    assert wanted() == Wanted(("head_out",), "last")
    assert wanted(component="mlp") == Wanted(("mlp_out",), "last")
    assert wanted(component="neurons", by="written") == Wanted(("mlp_act",), "last")
    assert set(wanted(component="neurons").points) == {"mlp_act", "resid_pre", "resid_post", "attn_out"}
    first, second, *_ = parse_spec(body("sadi")).texts()
    assert first == ("pairs.0.positive", "Is it? yes") and second == ("pairs.0.negative", "Is it? no")
    options = {"source_language": "sw", "component": "attention", "pooling": "mean", "mix": "source_first"}
    mixed = parse_spec(body("incline", options=options))
    assert mixed.wanted() == Wanted(("attn_out",), "mean")
    assert [text for _, text in mixed.texts()] == ["habari", "news", "habari news", "news news", "habari", "news"]


def test_digests_of_equal_data_are_equal_and_of_other_data_are_not() -> None:
    other = [{"prompt": "Is it?", "positive": "no", "negative": "yes"}] * 2
    specs = [parse_spec(body("sadi", pairs=pairs)) for pairs in (ANSWERED, ANSWERED, other)]
    digests = [spec.data_digest() for spec in specs]
    assert digests[0] == digests[1] != digests[2]


WRONG: list[tuple[dict[str, Any], str]] = [
    (body("sadi") | {"method": "nonsense"}, "method"),
    ({"name": "x"}, "method"),
    (body("sadi", pairs=ANSWERED[:1]), "pairs"),
    (body("sadi", pairs=[*ANSWERED, {"positive": "yes"}]), "pairs.2.negative"),
    (body("sadi", pairs=[*ANSWERED, {"positive": "", "negative": "no"}]), "pairs.2.positive"),
    (body("sadi", options={"component": "head"}), "options.component"),
    (body("sadi", options={"top_k": 0}), "options.top_k"),
    (body("sadi", options={"top_k": 2.5}), "options.top_k"),
    (body("sadi", options={"default_strength": float("inf")}), "options.default_strength"),
    (body("sadi", options={"default_layers": [1, 1]}), "options.default_layers"),
    (body("caa", options={"component": "heads"}), "options.component"),
    (body("incline", options={}), "options.source_language"),
    (body("incline", options={"source_language": "no such language"}), "options.source_language"),
    (body("incline", options={"source_language": "sw", "component": "heads"}), "options.component"),
    (body("incline", options={"source_language": "sw", "ridge": 0}), "options.ridge"),
    (body("incline", options={"source_language": "sw", "ridge": 0.1, "solver": "min_norm"}), "options"),
    (body("incline", options={"source_language": "sw", "prior": "mean", "solver": "min_norm"}), "options"),
    (body("incline", options={"source_language": "sw", "prior": "identity", "rank": 2}), "options"),
    (body("incline", options={"source_language": "sw", "rank": 0}), "options.rank"),
]


@pytest.mark.parametrize(("wrong", "field"), WRONG)
def test_a_wrong_field_is_named_as_the_user_wrote_it(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        parse_spec(wrong)
    assert ".".join(map(str, untagged(refused.value.errors()[0])["loc"])) == field


@pytest.mark.parametrize(("wrong", "field"), [each for each in WRONG if "default_strength" not in str(each)])
def test_over_http_it_is_422_with_that_field(wrong: dict[str, Any], field: str) -> None:
    app = FastAPI()
    app.include_router(fits.router)
    errors.install(app)
    app.state.polyhelm = type("Polyhelm", (), {"fits": None})()
    with TestClient(app) as client:
        response = client.post("/v1/fits", json=wrong)
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["param"] == field
    if field == "method":
        assert "need one of caa, " in error["message"]


def test_a_method_that_says_nothing_of_its_data_cannot_be_made() -> None:
    class Half(OnePassSpec):
        def texts(self) -> Any:
            return []

        def wanted(self) -> Wanted:
            return Wanted((), "last")

    with pytest.raises(TypeError, match="fit"):
        Half(method="half", name="x", options={})  # type: ignore[abstract, arg-type]
    assert Activations({}, {}, {}).rows == {}
