"""vLLM's `vllm.general_plugins` entry point: runs in every vLLM process, and does nothing unless polyhelm started
it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

ENABLED = "POLYHELM_ENGINE"
"""Set in the environment by polyhelm's server before it starts the engine, and inherited by the engine's processes."""


def register() -> None:
    if os.environ.get(ENABLED) == "1":
        from server.engine.seams import patch

        patch()
        if multiprocessing.parent_process() is not None and sys.platform == "linux":
            die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone, however that ended.

    Without it an engine outlives a server that was killed, and a restarted server runs beside it.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)
