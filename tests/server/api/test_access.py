"""Every route of the whole app, vLLM's and ours, has a rule of its own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from server.api.access import ANY_KEY, OPEN, OPERATOR, RULES, allows, rule_for
from server.app import ROUTERS
from server.engine.frontend import parse_args, take_api_keys
from server.keys import SCOPES, Key
from server.models import ResolvedModel
from server.settings import Settings

OPERATORS_ONLY = {
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/kv_event_sources",
    "/inference/v1/generate",
    "/inference/v1/abort_requests",
}
"""Routes of vLLM's that concern the whole server: they have no rule on purpose."""


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """vLLM's app as the server builds it, with our routers, and no engine."""
    from vllm.entrypoints.launchers.app import build_app

    args = parse_args(ResolvedModel("model", "model"), Settings(), ["--api-key", "one", "two"])
    app = build_app(args, ("generate",))
    assert take_api_keys(app) == ["one", "two"]
    assert take_api_keys(app) == []
    for router in ROUTERS:
        app.include_router(router)
    return app


def paths(app: FastAPI) -> Iterable[tuple[str, set[str]]]:
    for route in app.routes:
        assert isinstance(route, (APIRoute, Route, Mount)), f"{route}: of a kind that no rule was thought of for"
        yield route.path, set(getattr(route, "methods", None) or {"GET"})


def test_every_route_has_a_rule_or_is_for_operators_by_intent(app: FastAPI) -> None:
    without = {path for path, _ in paths(app) if rule_for(path) is None}
    assert without == OPERATORS_ONLY & {path for path, _ in paths(app)}


def test_every_rule_has_a_route(app: FastAPI) -> None:
    used = {rule_for(path) for path, _ in paths(app)}
    assert [rule.pattern.pattern for rule in RULES if rule not in used] == []


def test_only_probes_are_open_and_only_reading_needs_less_than_changing(app: FastAPI) -> None:
    open_paths = {path for path, _ in paths(app) if (rule := rule_for(path)) is not None and rule.need == OPEN}
    assert open_paths == {"/livez", "/readyz", "/health", "/ping", "/metrics"}
    for path, methods in paths(app):
        rule = rule_for(path)
        if rule is not None and methods & {"PUT", "PATCH", "DELETE"}:
            assert all(rule.needed(method) == "admin" for method in methods - {"GET", "HEAD"}), path


def test_the_table_says_what_it_should() -> None:
    table = {
        ("POST", "/v1/chat/completions"): "generate",
        ("POST", "/v1/chat/completions/batch"): "generate",
        ("POST", "/v1/completions"): "generate",
        ("POST", "/v1/responses"): "generate",
        ("GET", "/v1/responses/resp_1"): "generate",
        ("POST", "/v1/messages/count_tokens"): "generate",
        ("POST", "/invocations"): "generate",
        ("POST", "/tokenize"): "generate",
        ("POST", "/v1/activations"): "capture",
        ("GET", "/v1/models"): ANY_KEY,
        ("GET", "/v1/artifacts"): "read",
        ("HEAD", "/v1/artifacts/a/versions/1/files/x/y"): "read",
        ("POST", "/v1/artifacts/a/versions"): "admin",
        ("PUT", "/v1/artifacts/a/aliases/b"): "admin",
        ("POST", "/v1/fits"): "admin",
        ("GET", "/v1/fits/fit-1"): "read",
        ("PUT", "/v1/kb/collections/c"): "admin",
        ("POST", "/v1/kb/collections/c/facts/query"): "read",
        ("POST", "/v1/kb/collections/c/facts/delete"): "admin",
        ("GET", "/v1/kb/collections/c/facts"): "read",
        ("GET", "/metrics"): OPEN,
    }
    for (method, path), need in table.items():
        rule = rule_for(path)
        assert rule is not None and rule.needed(method) == need, (method, path)
    for path in ("/v1/completionsx", "/v1/chat", "/pause", "/v1/load_lora_adapter", "/collective_rpc", "/livez/x", "/"):
        assert rule_for(path) is None, path


def test_an_operator_has_admin_and_no_tenant() -> None:
    assert allows(Key("1", "", SCOPES), OPERATOR)
    assert not allows(Key("1", "", SCOPES, tenant="acme"), OPERATOR)
    assert not allows(Key("1", "", SCOPES - {"admin"}), OPERATOR)
