"""Fills polyhelm's section of vLLM's `additional_config`, so that the workers find it and the compile cache is salted.

`polyhelm serve` states it; a stock `vllm serve` gets the defaults of `Settings`, which reads the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from server.engine.seams import wrap

if TYPE_CHECKING:
    from server.settings import Settings

MAX_EDITS = 16
"""Of a request's program: a condition, `renorm` and frozen mode's own are edits beside those of its interventions."""


def engine_config(settings: Settings) -> dict[str, Any]:
    """What the workers are to know."""
    return {
        "bank_bytes": settings.bank_bytes,
        "max_edits": MAX_EDITS,
        "points": settings.points,
        "map_points": settings.map_points,
    }


def patch() -> None:
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            from server.engine.sites import CONFIG_KEY
            from server.settings import Settings

            given = self.additional_config or {}
            section = {**engine_config(Settings()), **given.get(CONFIG_KEY, {})}
            self.additional_config = {**given, CONFIG_KEY: section}
            return original(self, *args, **kwargs)

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", ("self", "usage_context"), make)
