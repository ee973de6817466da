"""Every patch on vLLM's internals. Each checks what it finds, and fails loudly.

| seam | patched | process |
|---|---|---|
| `engine_config` | `EngineArgs.create_engine_config`: fill our section of `additional_config` | API |
| `endpoints` | `load_endpoint_plugins`: never serve a patched engine without the `steering` field | API |
| `install` | `BaseModelLoader.load_model`: wrap the decoder layers of the target model | worker |
| `runner_v1` | `GPUModelRunner._update_states`, `_prepare_inputs`, `_dummy_run` of the V1 runner | worker |
| `runner_v2` | `GPUModelRunner.execute_model`, `prepare_inputs` of the V2 runner | worker |
| `worker_rpc` | `WorkerBase`: the methods of `worker.py` | worker |
| `core` | `EngineCore.preprocess_add_request`, `Scheduler._free_request` … : hold operands for requests | engine core |
| `prefix_key` | `generate_block_hash_extra_keys`: tag the blocks that a program touched | engine core |
| `admission` | `InputProcessor.process_inputs`: refuse programs that can't act on their prompt | API |
| `waiting` | `SpinCondition.wait`: on CPUs, sleep where it would spin | engine core, worker |

That they work, and not only that they are in place, is checked by `probe.py` before the server says it is ready.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import structlog

from server.engine.edits import Program
from server.engine.supported import SUPPORTED_VLLM

PROGRAM, RECEIPT, CAPTURE = "polyhelm_program", "polyhelm_receipt", "polyhelm_capture"
"""Keys of `SamplingParams.extra_args`. Their values are bytes, which no JSON body can hold, so a client can't forge
them.
"""


PREFIX_CACHE = "POLYHELM_PREFIX_CACHE"
"""`cache_salt` in this variable leaves the prefix keys alone."""

log = structlog.get_logger()


class SeamError(RuntimeError):
    """vLLM isn't as this version of polyhelm knows it."""


def patch() -> None:
    """Install the seams of this process; idempotent. SeamError when vLLM differs from what they were written for."""
    import vllm

    from server.engine.seams import admission, core, endpoints, engine_config, install, prefix_key, waiting

    if vllm.__version__ not in SUPPORTED_VLLM:
        _check_untested(vllm.__version__)
    for seam in (engine_config, endpoints, install, core, admission, waiting):
        seam.patch()
    if os.environ.get(PREFIX_CACHE) == "cache_salt":
        return
    try:
        prefix_key.patch()
    except SeamError as error:
        # Not fatal: the start-up probe sees that blocks aren't tagged, and keeps programs apart by cache_salt instead.
        log.warning("prefix-cache blocks can't be tagged", reason=str(error))


def _check_untested(version: str) -> None:
    from server.engine.seams import contract

    tested = ", ".join(SUPPORTED_VLLM)
    # Without its seam the prefix cache is kept apart by salt, so that is no reason to refuse.
    fatal = [each for each in contract.differences(contract.installed()) if each.seam != "prefix_key"]
    if fatal:
        listed = "; ".join(map(str, fatal))
        raise SeamError(f"vLLM {version} isn't as polyhelm needs it ({listed}): install one of {tested}")
    log.warning("polyhelm wasn't tested with this version of vLLM", version=version, tested=tested)


def wrap(owner: Any, name: str, parameters: tuple[str, ...], make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace `owner.name` by `make(original)` once, after checking that the original starts with `parameters`."""
    original = getattr(owner, name, None)
    if original is None:
        raise SeamError(f"{owner.__name__}.{name} is gone")
    if hasattr(original, "polyhelm_seam"):
        return
    found = tuple(inspect.signature(original).parameters)
    if found[: len(parameters)] != parameters:
        raise SeamError(f"{owner.__name__}.{name} takes {found}, expected {parameters}")
    wrapper = functools.wraps(original)(make(original))
    wrapper.polyhelm_seam = True
    setattr(owner, name, wrapper)


def program_of(sampling_params: Any) -> Program | None:
    """The program that a request carries."""
    wire = (getattr(sampling_params, "extra_args", None) or {}).get(PROGRAM)
    return None if wire is None else _parse(wire)


@functools.lru_cache(maxsize=1024)
def _parse(wire: bytes) -> Program:
    return Program.from_wire(wire)
