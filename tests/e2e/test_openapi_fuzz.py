"""Generated requests to all of our routes: no 5xx, no answer that the document doesn't describe, and no hang.

A few for each route by default; POLYHELM_FUZZ_CASES says how many.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

CASES = int(os.environ.get("POLYHELM_FUZZ_CASES", "8"))
SECONDS = 60
"""More than any answer to such a request takes."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

# Its other phase lists every boundary of every field before the first test runs, which takes minutes.
CONFIG = schemathesis.Config.from_dict({"phases": {"coverage": {"enabled": False}}})
schema = schemathesis.openapi.from_path(Path(__file__).parents[2] / "docs" / "openapi.json", config=CONFIG)


@schema.parametrize()
@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_no_request_breaks_the_server(server: Server, case: schemathesis.Case) -> None:
    case.call_and_validate(base_url=server.base_url, checks=CHECKS, timeout=SECONDS)


def test_server_is_well_after_all_that(server: Server) -> None:
    assert server.client.get("/readyz").status_code == 200
    server.wait_until_idle(120)
    answer = server.complete({"artifact": "one"}, max_tokens=2)
    assert answer["steering"]["applied"][0]["tokens_touched"] > 0
