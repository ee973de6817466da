"""Gives the engine core its bank: utility methods for uploads, and a hold on its operands for every request it knows.

A request whose operands aren't resident when it arrives is refused, with `MISSING` as its stop reason, before anything
runs. All API processes, and all data-parallel engines with a bank each, are right by that.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from server.engine.bank_directory import BankDirectory, Grant, OperandsMissing, Want
from server.engine.seams import SeamError, log, program_of, wrap

MISSING = "polyhelm_operands_missing"
_creating = threading.Lock()


def patch() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    def make_preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            preprocessed = original(self, request)
            program = program_of(request.sampling_params)
            if program is not None:
                directory(self).take(program.operands)
                preprocessed[0].polyhelm_release = lambda: directory(self).release(program.operands)
            return preprocessed

        return preprocess_add_request

    def make_preproc_error(original: Callable[..., Any]) -> Callable[..., Any]:
        def _handle_request_preproc_error(self: Any, request: Any) -> None:
            error = sys.exception()
            if not isinstance(error, OperandsMissing):
                return original(self, request)
            log.info("request sent back", request=request.request_id, reason=str(error))
            output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=MISSING)
            outputs = EngineCoreOutputs(finished_requests={request.request_id}, outputs=[output])
            self.output_queue.put_nowait((request.client_index, outputs))

        return _handle_request_preproc_error

    def make_free(original: Callable[..., Any]) -> Callable[..., Any]:
        # Every request that the scheduler knows ends here, once: stopped, aborted or failed. Preemption doesn't.
        def _free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, request, *args, **kwargs)
            if release := vars(request).pop("polyhelm_release", None):
                release()
            return result

        return _free_request

    wrap(EngineCore, "preprocess_add_request", ("self", "request"), make_preprocess)
    wrap(EngineCoreProc, "_handle_request_preproc_error", ("self", "request"), make_preproc_error)
    wrap(Scheduler, "_free_request", ("self", "request"), make_free)
    for method in (polyhelm_reserve, polyhelm_write, polyhelm_bind):
        setattr(EngineCore, method.__name__, method)


def directory(core: Any) -> BankDirectory:
    """The directory of an engine core. Made when first asked for: vLLM loads its plugins inside the core's __init__."""
    with _creating:
        if "polyhelm_bank" not in vars(core):
            core.polyhelm_bank = _new_directory(core)
        found: BankDirectory = core.polyhelm_bank
        return found


def _new_directory(core: Any) -> BankDirectory:
    from vllm.v1.core.sched.scheduler import Scheduler

    from server.engine.sites import CONFIG_KEY

    if not isinstance(core.scheduler, Scheduler):
        raise SeamError(f"{type(core.scheduler).__name__} isn't vLLM's scheduler: it would never let go of operands")
    return BankDirectory(core.vllm_config.additional_config[CONFIG_KEY]["bank_bytes"] // 4)


def polyhelm_reserve(self: Any, requests: Sequence[Sequence[Sequence[Any]]]) -> list[dict[str, Any]]:
    """A `Grant` or a `Refusal` for each request's `Want`s, as a dict; one with `error` where they make no sense.

    Beside it what lies in the bank: `resident_bytes` of `budget_bytes`.
    """
    bank = directory(self)
    answers = bank.reserve([[Want(*want) for want in wants] for wants in requests])
    if evicted := [key for answer in answers if isinstance(answer, Grant) for key in answer.evicted]:
        self.model_executor.collective_rpc("polyhelm_drop", args=(evicted,))
    told = {"resident_bytes": 4 * bank.resident, "budget_bytes": 4 * bank.numbers}
    return [{"error": str(each)} if isinstance(each, ValueError) else each._asdict() | told for each in answers]


def polyhelm_write(self: Any, key: str, serial: int, offset: int, data: bytes) -> str:
    """Write a part of an operand, `offset` numbers from its start, as promised by that serial: `written`, or `loaded`
    where it is there in full already, or `lost` where the promise ended.
    """
    run = directory(self).run(key, serial)
    if isinstance(run, str):
        return run
    want, start = run
    if not 0 <= offset <= want.numbers - len(data) // 4:
        raise ValueError(f"{len(data) // 4} numbers at {offset} are outside of {want}")
    self.model_executor.collective_rpc("polyhelm_write", args=(start + offset, data))
    return "written"


def polyhelm_bind(self: Any, key: str, serial: int, pieces: Sequence[Sequence[Any]]) -> str:
    """Make a written operand readable: `loaded`, or `lost`. Once only: rows of split points are cut in place."""
    run = directory(self).run(key, serial)
    if isinstance(run, str):
        return run
    want, start = run
    self.model_executor.collective_rpc("polyhelm_bind", args=(key, start, want.width, pieces, want.point))
    directory(self).loaded(key)
    return "loaded"
