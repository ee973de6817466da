"""vLLM's own OpenAI handlers, extended by the `steering` field.

The handler does all the work: templates, tools, structured output, streaming, logprobs. This wrapper takes `steering`
off the request, puts the program into the sampling parameters, and adds the receipt to the response, or to the last
chunk of a stream.
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from server.api.errors import ApiError
from server.api.steering import Prepared, Receipt, Steerer
from server.engine.banks import BankFull

if TYPE_CHECKING:
    from server.engine.client import Engine

DONE = "data: [DONE]"
RESERVED = "polyhelm"


class SteeringHandler:
    """Stands where vLLM's handler stood; `method` is the one that steering extends, everything else passes through."""

    def __init__(self, inner: Any, method: str, steerer: Steerer, engine: Engine) -> None:
        self._inner = inner
        self._create = getattr(inner, method)
        self._steerer = steerer
        self._engine = engine
        setattr(self, method, self._steered)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def _steered(self, request: Any, raw_request: Any = None) -> Any:
        if forged := [key for key in request.vllm_xargs or {} if key.startswith(RESERVED)]:
            # The engine refuses them too, but in a stream that has begun with a 200.
            raise ApiError(400, f"vllm_xargs may not hold {forged[0]!r}: use the 'steering' field", "vllm_xargs")
        # vLLM's request models keep unknown fields as extras.
        raw = (request.model_extra or {}).pop("steering", None)
        if raw is None:
            return await self._create(request, raw_request)
        if getattr(request, "use_beam_search", False):
            raise ApiError(400, "steering doesn't work with beam search: set use_beam_search to false", "steering")
        prepared = self._steerer.prepare(raw)
        if len(prepared.artifacts) > self._engine.bank.slots:
            raise ApiError(
                422,
                f"{len(prepared.artifacts)} different artifacts: this server holds {self._engine.bank.slots} at a "
                "time; use fewer, or raise --bank-slots",
                "steering.interventions",
            )
        self._engine.mark(request, prepared.program, prepared.receipt)
        hold = AsyncExitStack()
        vectors = {
            digest: lambda version=version: self._steerer.vectors(version)
            for digest, version in prepared.artifacts.items()
        }
        try:
            await hold.enter_async_context(self._engine.holding(vectors))
        except BankFull as error:
            raise ApiError(503, str(error), "steering") from error
        try:
            result = await self._create(request, raw_request)
            if not hasattr(result, "__aiter__"):
                return await self._finish(result, prepared, hold)
        except BaseException:
            await hold.aclose()
            raise
        return await self._stream(result, prepared, hold)

    async def _finish(self, result: Any, prepared: Prepared, hold: AsyncExitStack) -> Any:
        # vLLM returns refusals as objects that have no choices.
        if hasattr(result, "choices"):
            result.steering = (await self._receipt(prepared)).model_dump()
        await hold.aclose()
        return result

    async def _receipt(self, prepared: Prepared) -> Receipt:
        counts = await self._engine.receipt(prepared.receipt)
        return self._steerer.receipt(prepared, counts.touched, counts.cached)

    async def _stream(self, chunks: AsyncIterator[str], prepared: Prepared, hold: AsyncExitStack) -> AsyncIterator[str]:
        """Pull the first chunk before answering, so that a refused request gets its status and not a 200."""
        closing: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()

        async def close() -> None:
            # The engine must have stopped using the vectors before they are let go.
            await chunks.aclose()  # type: ignore[attr-defined]
            await hold.aclose()

        def close_once() -> asyncio.Task[None]:
            nonlocal closing
            closing = closing or loop.create_task(close())
            return closing

        def abandoned() -> None:
            # The collector may run in any thread, and at the end of the process.
            if closing is None and not loop.is_closed():
                loop.call_soon_threadsafe(close_once)

        try:
            first = await anext(chunks)
            refuse_error(first)
        except BaseException:
            await close_once()
            raise
        stream = self._chunks(first, chunks, prepared, close_once)
        # A client that left before the first byte leaves a generator that never runs its `finally`.
        weakref.finalize(stream, abandoned)
        return stream

    async def _chunks(
        self, held: str, chunks: AsyncIterator[str], prepared: Prepared, close_once: Any
    ) -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                if chunk.startswith(DONE) and not holds_error(held):
                    held = with_receipt(held, await self._receipt(prepared))
                yield held
                held = chunk
            yield held
        finally:
            await close_once()


def refuse_error(chunk: str) -> None:
    """Raise the ApiError that a stream's first chunk holds, if it does."""
    if error := holds_error(chunk):
        raise ApiError(int(error.get("code") or 500), str(error.get("message")), error.get("param"))


def holds_error(chunk: str) -> dict[str, Any] | None:
    """The error in an SSE chunk, which vLLM sends where a stream breaks off."""
    return json.loads(chunk.removeprefix("data: ")).get("error") if chunk.startswith("data: {") else None


def with_receipt(chunk: str, receipt: Receipt) -> str:
    """Add the receipt to an SSE chunk; a chunk that holds an error stays as it is."""
    if holds_error(chunk):
        return chunk
    body = json.loads(chunk.removeprefix("data: "))
    return f"data: {json.dumps(body | {'steering': receipt.model_dump()}, ensure_ascii=False)}\n\n"
