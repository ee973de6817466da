"""vLLM's `vllm.endpoint_plugins` entry point: a stock `vllm serve` serves what `polyhelm serve` does.

    POLYHELM_ENGINE=1 VLLM_PLUGINS=polyhelm vllm serve MODEL --enforce-eager

Without VLLM_PLUGINS it is added by the seam `endpoints`. Settings come from the environment, as POLYHELM_DATA_DIR does.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from server.app import assemble, extend, open_store
from server.engine import frontend
from server.engine.plugin import ENABLED, PLUGIN
from server.models import ResolvedModel
from server.progress import Reporter
from server.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class Endpoint:
    """vLLM's `EndpointPlugin`. What goes wrong here ends the start of the server."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Keep the app: what our routes and middleware need is there only once the engine has been proved."""
        self.app = app

    async def init_state(self, engine_client: AsyncLLM, state: Any, args: Namespace) -> None:
        """Prove that the engine steers, and extend the app. Raises EngineStartError."""
        if os.environ.get(ENABLED) != "1":
            raise frontend.EngineStartError(f"VLLM_PLUGINS names {PLUGIN}: set {ENABLED}=1 as well, or leave it out")
        settings = Settings()
        engine = await frontend.prove(engine_client, settings)
        name = state.openai_serving_models.base_model_paths[0].name
        model = ResolvedModel(engine_client.model_config.model, name)
        polyhelm = await assemble(settings, model, engine, open_store(settings), Reporter())
        extend(frontend.reopen(self.app), polyhelm)
