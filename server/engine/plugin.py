"""vLLM's `vllm.general_plugins` entry point: runs in every vLLM process, and acts only where polyhelm started it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess

ENABLED = "POLYHELM_ENGINE"
"""Set in the environment by polyhelm's server before it starts the engine, and inherited by the engine's processes."""


def register() -> None:
    if os.environ.get(ENABLED) == "1":
        from server.engine.seams import patch

        patch()
        parent = multiprocessing.parent_process()
        if parent is not None and sys.platform == "linux":
            die_with(parent)


def die_with(parent: BaseProcess) -> None:
    """Have the kernel kill this process when the one that started it is gone, however that ended.

    Without it an engine outlives a server that was killed, and a restarted server runs beside it.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if not parent.is_alive():  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)
