"""Generated requests to all our routes, and to vLLM's with our fields: no 5xx, nothing that isn't described, no hang.

A few for each route by default; POLYHELM_FUZZ_CASES says how many (our fields, of which few fit together, get ten times
as many where that is more than a few), and POLYHELM_FUZZ_RESULTS where to write what was answered.
benchmarks/results/fuzz.json is of

    POLYHELM_FUZZ_CASES=140 POLYHELM_FUZZ_RESULTS=benchmarks/results/fuzz.json \
        .venv/bin/python -m pytest -o timeout=3600 tests/e2e/test_openapi_fuzz.py
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from pydantic.json_schema import models_json_schema
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.api.errors import RESPONSES
from server.api.knowledge_schema import Knowledge, KnowledgeReceipt
from server.api.receipts import Receipt
from server.api.steering_schema import Steering

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

CASES = int(os.environ.get("POLYHELM_FUZZ_CASES", "8"))
MANY = CASES >= 100
SECONDS = 60
"""More than any answer to such a request takes."""
COLLECTION = "fuzzed"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
GENERATED = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
COMPONENTS = "#/components/schemas/"

# Its other phase lists every boundary of every field before the first test runs, which takes minutes. The server of the
# tests is open, and any key would close it.
CONFIG = schemathesis.Config.from_dict(
    {"phases": {"coverage": {"enabled": False}}, "generation": {"with-security-parameters": False}}
)
DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text("utf-8"))


def fields_document() -> dict[str, Any]:
    """vLLM's two routes as they are with our fields: all else in the request is fixed."""
    models = ((Steering, "validation"), (Knowledge, "validation"), (Receipt, "serialization"))
    _, made = models_json_schema([*models, (KnowledgeReceipt, "serialization")], ref_template=COMPONENTS + "{model}")
    schemas = made["$defs"]
    # Names drawn at random are of nothing that there is, and would get no further.
    for owner, field, known in (
        ("Intervention", "artifact", ["one", "two@1"]),
        ("Condition", "artifact", ["one", "two"]),
        ("Knowledge", "collection", [COLLECTION]),
        ("Examples", "collection", [COLLECTION]),
    ):
        schemas[owner]["properties"][field] = {"enum": [*known, "of-nothing"]}
    schemas["Intervention"]["properties"]["layers"] = {"type": "array", "items": {"enum": [3, 10, 11]}, "minItems": 1}
    refs = {name: {"$ref": f"{COMPONENTS}{name}"} for name in schemas}
    fixed = {"model": "smollm2", "max_tokens": 2, "temperature": 0}
    told = {"choices": {"type": "array"}, "steering": refs["Receipt"], "knowledge": refs["KnowledgeReceipt"]}
    answers = {"200": {"description": "done", "content": _json({"type": "object", "properties": told})}}
    answers |= {status: DOCUMENT["paths"]["/v1/fits"]["post"]["responses"][status] for status in map(str, RESPONSES)}
    prompts = {"/v1/completions": {"prompt": "Who is it"}, "/v1/chat/completions": {"messages": [_said("Who is it")]}}
    paths = {}
    for path, prompt in prompts.items():
        constants = {name: {"const": value} for name, value in (fixed | prompt).items()}
        properties = constants | {"steering": refs["Steering"], "knowledge": refs["Knowledge"]}
        schema = {"type": "object", "properties": properties, "required": list(constants)}
        body = {"required": True, "content": _json(schema | {"additionalProperties": False})}
        paths[path] = {"post": {"requestBody": body, "responses": answers}}
    info = {"title": "the fields", "version": "1"}
    return {
        "openapi": "3.1.0",
        "info": info,
        "paths": paths,
        "components": {"schemas": DOCUMENT["components"]["schemas"] | schemas},
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


routes = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG)
fields = schemathesis.openapi.from_dict(fields_document(), config=CONFIG)


@pytest.fixture(scope="module")
def answered() -> Iterator[dict[str, Counter[str]]]:
    """How often each route gave each status; written at the end where a file is named."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    yield counts
    if file := os.environ.get("POLYHELM_FUZZ_RESULTS"):
        total = sum(each.total() for each in counts.values())
        found = {"date": datetime.now(UTC).date().isoformat(), "cases": total, "statuses": counts}
        Path(file).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")


def with_integers(value: Any) -> Any:
    """A body without numbers such as 2.0, which JSON Schema takes for integers, and our strict fields don't."""
    if isinstance(value, dict):
        return {key: with_integers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_integers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def ask(server: Server, case: schemathesis.Case, answered: dict[str, Counter[str]]) -> None:
    answer = case.call_and_validate(base_url=server.base_url, checks=CHECKS, timeout=SECONDS)
    body = case.body if isinstance(case.body, dict) else {}
    ours = " and ".join(name for name in ("steering", "knowledge") if name in body)
    answered[f"{case.operation.label}{ours and ' with ' + ours}"][str(answer.status_code)] += 1


@routes.parametrize()
@GENERATED
def test_no_request_breaks_the_server(
    server: Server, answered: dict[str, Counter[str]], case: schemathesis.Case
) -> None:
    ask(server, case, answered)


@fields.parametrize()
@settings(GENERATED, max_examples=10 * CASES if MANY else CASES)
def test_no_field_breaks_the_server(
    server: Server, collection: None, answered: dict[str, Counter[str]], case: schemathesis.Case
) -> None:
    case.body = with_integers(case.body)
    ask(server, case, answered)


@pytest.fixture(scope="module")
def collection(server: Server) -> None:
    assert server.client.put(f"/v1/kb/collections/{COLLECTION}").status_code in (200, 201)
    fact = {"id": "it", "question": "Who is it?", "answer": "Anna Zett", "language": "en"}
    written = server.client.put(f"/v1/kb/collections/{COLLECTION}/facts", json=[fact])
    assert written.status_code == 200, written.text


@pytest.mark.skipif(not MANY, reason="a few cases needn't be of every sort")
def test_the_fields_are_fuzzed_beyond_their_names(answered: dict[str, Counter[str]]) -> None:
    for path in ("POST /v1/completions", "POST /v1/chat/completions"):
        for ours in ("steering", "knowledge", "steering and knowledge"):
            assert {"200", "404", "422"} <= answered[f"{path} with {ours}"].keys(), answered


def test_server_is_well_after_all_that(server: Server) -> None:
    assert server.client.get("/readyz").status_code == 200
    server.wait_until_idle(120)
    answer = server.complete({"artifact": "one"}, max_tokens=2)
    assert answer["steering"]["applied"][0]["tokens_touched"] > 0
