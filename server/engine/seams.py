"""Every patch on vLLM's internals. Each names the version it was read against, checks what it finds, and fails loudly.

| seam | patched | process |
|---|---|---|
| install | `BaseModelLoader.load_model`: wrap the decoder layers of the target model | worker |
| route | `GPUModelRunner._update_states`, `_prepare_inputs`, `_dummy_run` (V1 runner) | worker |
| prefix key | `generate_block_hash_extra_keys`: tag the blocks that a program touched | engine core |
| admission | `InputProcessor.process_inputs`: refuse programs that can't act on their prompt | API |

That they work, and not only that they are in place, is checked by `probe.py` before the server says it is ready.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import structlog
import vllm

from server.engine.capture import Capture, pooling_span
from server.engine.edits import Program, SpanError
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
    if vllm.__version__ not in SUPPORTED_VLLM:
        raise SeamError(f"vLLM {vllm.__version__} isn't supported: install one of {', '.join(SUPPORTED_VLLM)}")
    _patch_install()
    _patch_admission()
    if os.environ.get(PREFIX_CACHE) == "cache_salt":
        return
    try:
        _patch_prefix_key()
    except SeamError as error:
        # Not fatal: the start-up probe sees that blocks aren't tagged, and keeps programs apart by cache_salt instead.
        log.warning("prefix-cache blocks can't be tagged", reason=str(error))


def _wrap(owner: Any, name: str, parameters: tuple[str, ...], make: Callable[[Callable[..., Any]], Any]) -> None:
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


def _patch_install() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
            model = original(self, vllm_config, model_config, *args, **kwargs)
            # Draft models have a model_config of their own and are left alone.
            if model_config is vllm_config.model_config:
                from server.engine.sites import install

                model.polyhelm = install(model, vllm_config)
                _patch_v1_runner()
            return model

        return load_model

    _wrap(BaseModelLoader, "load_model", ("self", "vllm_config", "model_config"), make)


def _patch_v1_runner() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from server.engine.routing import BatchView

    def make_update_states(original: Callable[..., Any]) -> Callable[..., Any]:
        def _update_states(self: Any, scheduler_output: Any) -> Any:
            result = original(self, scheduler_output)
            installation = self.model.polyhelm
            for request_id in scheduler_output.finished_req_ids:
                installation.router.release(request_id)
            for new in scheduler_output.scheduled_new_reqs:
                _admit(installation, new.req_id, new.sampling_params, new.prompt_len)
            return result

        return _update_states

    def make_prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
        # After the original: only then does the input batch hold this step's requests in their final order.
        def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
            result = original(self, scheduler_output, num_scheduled_tokens)
            batch = self.input_batch
            positions = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
            self.model.polyhelm.router.route(BatchView(batch.req_ids, num_scheduled_tokens.tolist(), positions))
            return result

        return _prepare_inputs

    def make_dummy_run(original: Callable[..., Any]) -> Callable[..., Any]:
        def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.model.polyhelm.router.clear()
            return original(self, *args, **kwargs)

        return _dummy_run

    _wrap(GPUModelRunner, "_update_states", ("self", "scheduler_output"), make_update_states)
    _wrap(GPUModelRunner, "_prepare_inputs", ("self", "scheduler_output", "num_scheduled_tokens"), make_prepare_inputs)
    _wrap(GPUModelRunner, "_dummy_run", ("self", "num_tokens"), make_dummy_run)


def _admit(installation: Any, request_id: str, sampling_params: Any, prompt_len: int) -> None:
    extra = getattr(sampling_params, "extra_args", None) or {}
    program = program_of(sampling_params)
    receipt = extra[RECEIPT].decode() if RECEIPT in extra else None
    capture = None
    if CAPTURE in extra:
        intervals = pooling_span(extra[CAPTURE].decode()).intervals(prompt_len)
        capture = Capture(installation.layers, installation.hidden_size, intervals, installation.bank.device)
    if program is not None or capture is not None:
        installation.router.admit(request_id, program, receipt, capture, prompt_len)


def _patch_prefix_key() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.simple_kv_offload import manager

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_block_hash_extra_keys(
            request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
        ) -> tuple[tuple[Any, ...] | None, int]:
            keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
            program = program_of(request.sampling_params)
            if program is None:
                return keys, next_mm_idx
            tag = program.block_tag(_intervals(request, program), start_token_idx, end_token_idx)
            return (keys if tag is None else (*(keys or ()), ("polyhelm", tag))), next_mm_idx

        return generate_block_hash_extra_keys

    name = "generate_block_hash_extra_keys"
    parameters = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
    _wrap(kv_cache_utils, name, parameters, make)
    for importer in (block_pool, manager):
        if not hasattr(importer, name):
            raise SeamError(f"{importer.__name__} no longer imports {name}")
        setattr(importer, name, getattr(kv_cache_utils, name))
    _check_prefix_key(kv_cache_utils.generate_block_hash_extra_keys)


def _intervals(request: Any, program: Program) -> Any:
    intervals = getattr(request, "polyhelm_intervals", None)
    if intervals is None:
        intervals = request.polyhelm_intervals = program.intervals(request.num_prompt_tokens)
    return intervals


def _check_prefix_key(generate: Callable[..., Any]) -> None:
    wire = b'[{"layers":[0],"opcode":"add","operand":"check","span":{"prompt":false},"strength":1.0}]'
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={PROGRAM: wire}),
        num_prompt_tokens=8,
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        prompt_embeds=None,
    )
    if generate(request, 0, 8, 0)[0] is not None or not generate(request, 0, 16, 0)[0]:
        raise SeamError("prefix-cache keys don't follow the program")


def _patch_admission() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    class Refused(VLLMValidationError):
        """vLLM answers it as 400; its own class would append the field to the message."""

        def __str__(self) -> str:
            return str(self.args[0])

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            extra = getattr(params, "extra_args", None) or {}
            for key, value in extra.items():
                if key.startswith("polyhelm") and not isinstance(value, bytes):
                    raise Refused(f"vllm_xargs may not hold {key!r}: use the 'steering' field", parameter="vllm_xargs")
            request = original(self, request_id, prompt, params, *args, **kwargs)
            program = program_of(params)
            if program is not None:
                if request.resumable or request.prompt_token_ids is None:
                    raise Refused("steering needs a prompt of tokens", parameter="steering")
                _check_spans(program, len(request.prompt_token_ids), request.sampling_params.max_tokens)
            return request

        return process_inputs

    def _check_spans(program: Program, prompt_len: int, max_tokens: int) -> None:
        for index, edit in enumerate(program.edits):
            try:
                edit.span.check(prompt_len, max_tokens)
            except SpanError as error:
                raise Refused(str(error), parameter=f"steering.interventions.{index}.apply") from error

    _wrap(InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params"), make)
