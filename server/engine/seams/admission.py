"""Refuses, with 400, requests whose program can't act on their prompt or that try to forge one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.engine.edits import Program, ProgramError
from server.engine.seams import program_of, wrap


def patch() -> None:
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
                _check(self.vllm_config, program, len(request.prompt_token_ids), request.sampling_params.max_tokens)
            return request

        return process_inputs

    def _check(vllm_config: Any, program: Program, prompt_len: int, max_tokens: int) -> None:
        try:
            program.check_spans(prompt_len, max_tokens)
        except ProgramError as error:
            raise Refused(str(error), parameter=f"steering.interventions.{error.index}.apply") from error
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1 and any(
            edit.condition is not None and edit.condition.scope == "sequence" for edit in program.edits
        ):
            message = f'a condition with the scope "sequence" can\'t reach all of {stages} pipeline stages: use "token"'
            raise Refused(message, parameter="steering.interventions")

    wrap(InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params"), make)
