"""The chunks of vLLM's streams, one server-sent event each, and what is added to them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from pydantic import BaseModel

DONE = "data: [DONE]"


async def with_receipt(
    chunks: AsyncGenerator[str], name: str, receipt: Callable[[], Awaitable[BaseModel]]
) -> AsyncGenerator[str]:
    """The chunks, with the receipt as a field of the one before [DONE]."""
    held = None
    async for chunk in chunks:
        if held is not None:
            if chunk.startswith(DONE) and not holds_error(held):
                held = with_field(held, name, (await receipt()).model_dump())
            yield held
        held = chunk
    if held is not None:
        yield held


def holds_error(chunk: str) -> dict[str, Any] | None:
    """The error in an SSE chunk, which vLLM sends where a stream breaks off."""
    return json.loads(chunk.removeprefix("data: ")).get("error") if chunk.startswith("data: {") else None


def with_field(chunk: str, name: str, value: Any) -> str:
    """Add a field to an SSE chunk; a chunk that holds an error stays as it is."""
    if holds_error(chunk):
        return chunk
    body = json.loads(chunk.removeprefix("data: "))
    return f"data: {json.dumps(body | {name: value}, ensure_ascii=False)}\n\n"
