"""vLLM's OpenAI handlers, extended by the `knowledge` field.

It takes `knowledge` off the request, puts facts into the prompt where the question is about one, and adds the receipt
to the response, or to the last chunk of a stream. All else, `steering` too, is the inner handler's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from server.api.chunks import with_receipt
from server.api.errors import ApiError
from server.api.knowledge_schema import KnowledgeReceipt, parse
from server.knowledge import Adviser


class KnowledgeHandler:
    """Stands where the handler stood; `method` is the one that is extended, everything else passes through."""

    def __init__(self, inner: Any, method: str, adviser: Adviser) -> None:
        self._inner = inner
        self._create = getattr(inner, method)
        self._adviser = adviser
        setattr(self, method, self._informed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def _informed(self, request: Any, raw_request: Any = None) -> Any:
        raw = (request.model_extra or {}).pop("knowledge", None)
        if raw is None:
            return await self._create(request, raw_request)
        settings = parse(raw)
        advice = await self._adviser.advise(settings, prompt_of(request))
        if advice.prompt is not None:
            request = rewritten(request, advice.prompt)
        result = await self._create(request, raw_request)
        if hasattr(result, "__aiter__"):
            return _stream(result, advice.receipt)
        # vLLM returns refusals as objects that have no choices.
        if hasattr(result, "choices"):
            result.knowledge = advice.receipt.model_dump()
        return result


def prompt_of(request: Any) -> str:
    """The text of the last user message, or the prompt. ApiError 400 where there is none, or not only text."""
    if not hasattr(request, "messages"):
        if not isinstance(request.prompt, str):
            raise ApiError(400, "knowledge takes one prompt, as text: send the prompts one by one", "prompt")
        return request.prompt
    message = request.messages[_last_user_message(request)]
    content = message.get("content")
    if isinstance(content, str):
        return content
    # Pydantic may have left an iterator there, which can be read only once.
    message["content"] = parts = list(content or ())
    if not parts or any(part.get("type") not in ("text", "input_text") for part in parts):
        raise ApiError(400, "knowledge needs a last user message that is text, and only text", "messages")
    return "\n".join(part["text"] for part in parts)


def rewritten(request: Any, prompt: str) -> Any:
    """A copy of the request that asks with this prompt."""
    if not hasattr(request, "messages"):
        return request.model_copy(update={"prompt": prompt})
    index = _last_user_message(request)
    messages = list(request.messages)
    messages[index] = {**messages[index], "content": prompt}
    return request.model_copy(update={"messages": messages})


def _last_user_message(request: Any) -> int:
    for index in range(len(request.messages) - 1, -1, -1):
        if request.messages[index].get("role") == "user":
            return index
    raise ApiError(400, "knowledge needs a user message: it looks up the last one", "messages")


async def _stream(chunks: AsyncGenerator[str], receipt: KnowledgeReceipt) -> AsyncGenerator[str]:
    async def known() -> KnowledgeReceipt:
        return receipt

    async with aclosing(chunks), aclosing(with_receipt(chunks, "knowledge", known)) as told:
        async for chunk in told:
            yield chunk
