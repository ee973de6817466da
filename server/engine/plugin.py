"""vLLM's `vllm.general_plugins` entry point: runs in every vLLM process, and acts only where it is switched on."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess

PLUGIN = "polyhelm"
"""The name of both entry points, and so what VLLM_PLUGINS has to list for a stock `vllm serve`."""
ENABLED = "POLYHELM_ENGINE"
"""Set to 1 in the environment by polyhelm's server, or by the user of a stock `vllm serve`; inherited by the engine."""
SERVING_PROCESSES = ("EngineCore", "VllmWorker", "ApiServer")
"""How the names begin of the processes that vLLM starts to hold a model or, several of them, to answer requests."""


def register() -> None:
    if os.environ.get(ENABLED) == "1":
        from server.engine.seams import patch

        patch()
        parent = multiprocessing.parent_process()
        # Not every process that has a parent: a supervisor may have started the whole server, and outlived its thread.
        ours = multiprocessing.current_process().name.startswith(SERVING_PROCESSES)
        if parent is not None and ours and sys.platform == "linux":
            die_with(parent)


def die_with(parent: BaseProcess) -> None:
    """Have the kernel kill this process when the one that started it is gone, however that ended.

    Without it an engine outlives a server that was killed, and a restarted server runs beside it. API processes would
    go on to take connections from the same port, without an engine.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if not parent.is_alive():  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)
