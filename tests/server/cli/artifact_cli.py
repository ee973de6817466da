"""Runs `polyhelm artifact` in this process, and publishes something for it to work on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors.numpy import save
from typer.testing import CliRunner, Result

from server.cli.artifact import app
from steering_store import Store

FILE = "vectors.safetensors"
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "kind": "steering_vector",
    "description": "[bold]not markup[/bold]",
    "model": {"architecture": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 4},
    "sites": [{"point": "resid_post", "layer": 2, "file": FILE, "tensor": "v", "shape": [8], "dtype": "F32"}],
    "default_strength": 4.0,
    "provenance": {"method": "caa"},
}


def vector(fill: float = 1.0) -> bytes:
    return save({"v": np.full(8, fill, np.float32)})


def publish_versions(store: Store, count: int, name: str = "mood") -> None:
    for number in range(count):
        store.publish(name, MANIFEST, {FILE: vector(number + 1)})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def run_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_fails(result: Result, code: int, word: str) -> None:
    assert result.exit_code == code, result.output
    assert word in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
