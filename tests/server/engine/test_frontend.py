"""What `polyhelm serve --api-server-count N` hands to the processes that vLLM starts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.testclient import TestClient
from vllm.engine.arg_utils import AsyncEngineArgs

from server.engine import frontend
from server.engine.plugin import ENABLED
from server.engine.seams import PREFIX_CACHE
from server.models import ResolvedModel
from server.settings import Settings

CHANGED = Settings(
    model="folder",
    host="0.0.0.0",
    port=0,
    data_dir=Path("some where/data"),
    demo=True,
    bank_bytes=8192,
    bank_wait_seconds=0.5,
    points=["resid_post", "mlp_out"],
    map_points=["mlp_out"],
    prefix_cache="cache_salt",
    model_match="shape",
    max_strength=12.5,
    max_relative_dose=0.25,
    max_fit_pairs=3,
)


@pytest.mark.parametrize("settings", [Settings(), CHANGED], ids=["defaults", "changed"])
def test_exported_settings_are_read_back(settings: Settings) -> None:
    with pytest.MonkeyPatch.context() as patched:
        for name in Settings.model_fields:  # of which it takes back what `export` does, too
            patched.setenv(f"POLYHELM_{name.upper()}", "left over")
        frontend.export(settings)
        assert Settings() == settings


@pytest.mark.parametrize(("extra", "eager"), [([], True), (["--no-enforce-eager"], False)])
def test_models_run_eagerly_unless_asked_otherwise(
    extra: list[str], eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("VLLM_CPU_KVCACHE_SPACE", ENABLED, PREFIX_CACHE):  # which it sets, and monkeypatch takes back
        monkeypatch.setenv(variable, "1")
        monkeypatch.delenv(variable)
    args = frontend.parse_args(ResolvedModel("some/folder", "a-model"), Settings(), extra)
    assert AsyncEngineArgs.from_cli_args(args).enforce_eager is eager  # what the engine is configured by


def test_a_plugin_list_without_polyhelm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another,one")
    with pytest.raises(frontend.EngineStartError, match="VLLM_PLUGINS leaves out polyhelm"):
        frontend.serve_several(Namespace(), Settings())


def test_requests_are_counted_after_the_app_was_reopened() -> None:
    registry = CollectorRegistry()
    app = FastAPI()
    Instrumentator(registry=registry).add().instrument(app)
    app.middleware_stack = app.build_middleware_stack()  # as vLLM's bootstrap for SageMaker does
    frontend.reopen(app)
    TestClient(app).get("/openapi.json")
    labels = {"handler": "/openapi.json", "method": "GET", "status": "2xx"}
    assert registry.get_sample_value("http_requests_total", labels) == 1
