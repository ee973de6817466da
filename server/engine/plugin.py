"""vLLM's `vllm.general_plugins` entry point: runs in every vLLM process, and does nothing unless polyhelm started
it.
"""

from __future__ import annotations

import os

ENABLED = "POLYHELM_ENGINE"
"""Set in the environment by polyhelm's server before it starts the engine, and inherited by the engine's processes."""


def register() -> None:
    if os.environ.get(ENABLED) == "1":
        from server.engine.seams import patch

        patch()
