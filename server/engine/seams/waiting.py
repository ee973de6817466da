"""On CPUs: a process of the engine that waits for another one sleeps, where vLLM spins for up to a second.

On a machine of few cores one that spins takes a core from the model and from those that answer requests; at times it
kept them from running for seconds (Linux 6.18, 2 cores). What the sleep costs is little beside a step on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from server.engine.seams import wrap

PAUSE: Final = 0.0002
"""Seconds between two looks at whether there is something to read."""


def patch() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(self: Any, timeout_ms: int | None = None) -> None:
            if time.monotonic() <= self.last_read + self.busy_loop_s:
                time.sleep(PAUSE)
            else:
                original(self, timeout_ms)

        return wait

    wrap(SpinCondition, "wait", ("self", "timeout_ms"), make)
