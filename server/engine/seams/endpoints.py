"""Adds polyhelm's endpoint wherever the engine is patched.

vLLM loads an endpoint plugin only if VLLM_PLUGINS names it, goes on without one that fails to load, and ignores fields
that it doesn't know. Then it would answer a request with `steering` as if it had none.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from server.engine.seams import SeamError, wrap


def patch() -> None:
    """SeamError where a front end would serve that knows nothing of the endpoint."""
    from vllm import envs, plugins

    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        raise SeamError("vLLM's Rust front end would ignore the steering field: unset VLLM_USE_RUST_FRONTEND")

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_endpoint_plugins(supported_tasks: Any = None) -> Any:
            from server.engine.endpoint import Endpoint

            others = {each.name for each in entry_points(group=plugins.ENDPOINT_PLUGINS_GROUP)} - {Endpoint.name}
            # vLLM warns of a plugin that VLLM_PLUGINS doesn't name. Ours is switched on otherwise.
            loaded = original(supported_tasks) if others else []
            if "generate" in (supported_tasks or ()) and not any(each.name == Endpoint.name for each in loaded):
                loaded.append(Endpoint())
            return loaded

        return load_endpoint_plugins

    wrap(plugins, "load_endpoint_plugins", ("supported_tasks",), make)
