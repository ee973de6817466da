"""docs/openapi.json says what our routes are. Written anew by `python -m tests.server.test_openapi`."""

from __future__ import annotations

import json
from pathlib import Path

from server.app import openapi

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"
METHODS = {"get", "put", "post", "delete", "patch", "head"}


def written() -> str:
    return json.dumps(openapi(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def test_committed_document_is_what_the_routes_are() -> None:
    assert FILE.read_text("utf-8") == written(), "run python -m tests.server.test_openapi, and look at the difference"


def test_every_operation_has_a_name_and_tells_its_errors_in_the_envelope() -> None:
    document = openapi()
    operations = [
        operation for path in document["paths"].values() for method, operation in path.items() if method in METHODS
    ]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for operation in operations:
        for status in ("422", "default"):
            schema = operation["responses"][status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Envelope"}, operation["operationId"]


def test_every_operation_says_which_scope_its_key_needs() -> None:
    document = openapi()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    told = {
        f"{method} {path}": operation["security"]
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert told["get /livez"] == told["get /readyz"] == []
    assert told["get /v1/artifacts/{name}"] == [{"key": ["read"]}]
    assert told["post /v1/artifacts/{name}/versions"] == [{"key": ["admin"]}]
    assert told["post /v1/activations"] == [{"key": ["capture"]}]
    assert sum(not each for each in told.values()) == 2


if __name__ == "__main__":
    FILE.write_text(written(), "utf-8")
