"""vLLM's own OpenAI handlers, extended by the `steering` field.

The handler does all the work: templates, tools, structured output, streaming, logprobs. This wrapper takes `steering`
off the request, puts the program into the sampling parameters, and adds the receipt to the response, or to the last
chunk of a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from server import tracing
from server.api import frozen
from server.api.chunks import holds_error, with_receipt
from server.api.errors import ApiError
from server.api.prepared import Prepared
from server.api.receipts import Receipt
from server.api.source_language import prompts_of
from server.api.steering import Steerer
from server.engine.bank_directory import BankFull, BankTooSmall
from server.request_context import current

if TYPE_CHECKING:
    from server.engine.client import Engine

HOLD_SECONDS = 10.0
"""How long a stream is held back for its first chunk."""
RESERVED = "polyhelm"
RENDER = {"create_chat_completion": "render_chat_request", "create_completion": "render_completion_request"}
"""vLLM's own methods that turn a request into prompts of tokens."""


class SteeringHandler:
    """Stands where vLLM's handler stood; `method` is the one that steering extends, everything else passes through."""

    def __init__(self, inner: Any, method: str, steerer: Steerer, engine: Engine) -> None:
        self._inner = inner
        self._create = getattr(inner, method)
        self._render = getattr(inner, RENDER[method])
        self._steerer = steerer
        self._engine = engine
        setattr(self, method, self._steered)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def _steered(self, request: Any, raw_request: Any = None) -> Any:
        if forged := [key for key in request.vllm_xargs or {} if key.startswith(RESERVED)]:
            # The engine refuses them too, but in a stream that has begun with a 200.
            raise ApiError(400, f"vllm_xargs may not hold {forged[0]!r}: use the 'steering' field", "vllm_xargs")
        if getattr(request, "prompt_embeds", None) is not None and "inline" not in current().key.scopes:
            raise ApiError(403, "prompt_embeds needs a key with the scope 'inline'", "prompt_embeds")
        # vLLM's request models keep unknown fields as extras.
        raw = (request.model_extra or {}).pop("steering", None)
        if raw is None:
            return await self._create(request, raw_request)
        if getattr(request, "use_beam_search", False):
            raise ApiError(400, "steering doesn't work with beam search: set use_beam_search to false", "steering")
        with tracing.span("steering.resolve") as span:
            prepared = await self._steerer.look_up_and_prepare(
                raw, lambda: prompts_of(request, self._engine.tokenizer.decode)
            )
            if span is not None:
                span.set_attributes({"polyhelm.steering.fingerprint": prepared.program.fingerprint})
        try:
            result = await self._answer(request, raw_request, prepared)
        except BaseException:
            prepared.life.end()
            raise
        if not hasattr(result, "__aiter__"):
            prepared.life.end()
        return result

    async def _answer(self, request: Any, raw_request: Any, prepared: Prepared) -> Any:
        await self._steerer.check(prepared)
        if prepared.settings.conflict == "error":
            await self._steerer.refuse_conflicts(prepared, await self._prompt_lengths(request))
        if prepared.frozen_sites:
            clean = await frozen.capture(self._create, self._engine, request, raw_request, prepared.frozen_sites)
            if isinstance(clean, frozen.Refusal):
                return clean.response
            prepared = prepared.with_clean(clean)
        result = await self._run(request, raw_request, prepared)
        if hasattr(result, "__aiter__"):
            return await self._stream(result, prepared)
        # vLLM returns refusals as objects that have no choices.
        if hasattr(result, "choices"):
            result.steering = (await self._receipt(prepared)).model_dump()
        return result

    async def _run(self, request: Any, raw_request: Any, prepared: Prepared) -> Any:
        self._engine.mark(request, prepared.program, prepared.receipt)
        try:
            await self._engine.ensure(prepared.program, prepared.operands)
            return await self._create(request, raw_request)
        except BankTooSmall as error:
            raise ApiError(400, str(error), "steering") from error
        except BankFull as error:
            raise ApiError(503, str(error), "steering") from error
        except Exception as error:
            # vLLM's exceptions name the field in an attribute; the engine named it by the edit.
            if hasattr(error, "parameter"):
                error.parameter = prepared.field_at_fault(error.parameter)
            raise

    async def _prompt_lengths(self, request: Any) -> list[int]:
        """In tokens, of the request's prompts; none where vLLM refuses it, as it then will when asked to run it."""
        # vLLM writes into a request that it renders.
        rendered = await self._render(request.model_copy(deep=True))
        prompts = rendered[-1] if isinstance(rendered, tuple) else rendered
        if not isinstance(prompts, list):
            return []
        return [len(prompt.get("prompt_token_ids", ())) for prompt in prompts]

    async def _receipt(self, prepared: Prepared) -> Receipt:
        counts = await self._engine.receipt(prepared.receipt)
        return self._steerer.receipt(prepared, counts.touched, counts.cached)

    async def _stream(self, chunks: AsyncGenerator[str], prepared: Prepared) -> AsyncGenerator[str]:
        """Wait for the first chunk before answering, so that a refused request gets its status and not a 200.

        What the engine refuses it refuses at once. A request that waits for longer stands in a queue, and its client,
        or a proxy before it, for a sign of life.
        """
        first = asyncio.ensure_future(anext(chunks))
        try:
            await asyncio.wait([first], timeout=HOLD_SECONDS)
            if first.done():
                refuse_error(first.result(), prepared)
        except BaseException:
            await _given_up(first, chunks)
            raise
        # A client that leaves before the first byte drops it unstarted, and asyncio closes the chunks with it.
        return self._chunks(first, chunks, prepared)

    async def _chunks(
        self, first: asyncio.Future[str], chunks: AsyncGenerator[str], prepared: Prepared
    ) -> AsyncGenerator[str]:
        try:
            async with (
                aclosing(chunks),
                aclosing(_joined(first, chunks)) as joined,
                aclosing(with_receipt(joined, "steering", lambda: self._receipt(prepared))) as told,
            ):
                async for chunk in told:
                    yield chunk
        finally:
            prepared.life.end()


async def _joined(first: asyncio.Future[str], others: AsyncGenerator[str]) -> AsyncGenerator[str]:
    yield await first
    async for chunk in others:
        yield chunk


async def _given_up(first: asyncio.Future[str], chunks: AsyncGenerator[str]) -> None:
    first.cancel()
    await asyncio.wait([first])
    await chunks.aclose()


def refuse_error(chunk: str, prepared: Prepared) -> None:
    """Raise the ApiError that a stream's first chunk holds, if it does."""
    if error := holds_error(chunk):
        param = prepared.field_at_fault(error.get("param"))
        raise ApiError(int(error.get("code") or 500), str(error.get("message")), param)
