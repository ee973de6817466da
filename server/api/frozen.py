"""`mode: "frozen"`: the first of its two passes, which captures what the second one puts back.

The released code of SADI and INCLINE runs the question once without edits, keeps the activations of its last prompt
token at every layer, and runs it again with these, edited, in the place of those that the second run computes. So no
edit acts on what an earlier one has changed. The first pass leaves the prompt in the prefix cache for the second, but
for the block of its last token.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from server.api.errors import ApiError
from server.api.prepared import Site
from server.api.steering_schema import LAST_PROMPT_TOKEN
from server.engine.capture import CaptureSpec
from server.engine.site_names import site_name

if TYPE_CHECKING:
    from server.engine.client import Engine

Create = Callable[[Any, Any], Awaitable[Any]]

ONE_TOKEN: dict[str, Any] = {
    "stream": False,
    "stream_options": None,
    "n": 1,
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "min_tokens": 0,
    "echo": False,
    "logprobs": None,
    "top_logprobs": 0,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
}
"""What is different in the first pass: everything that makes the prompt stays."""


class Refusal(NamedTuple):
    """vLLM's own answer to a request that it refuses."""

    response: Any


async def capture(
    create: Create, engine: Engine, request: Any, raw_request: Any, sites: Sequence[Site]
) -> dict[Site, np.ndarray] | Refusal:
    """The activations [width] float32 of the last prompt token at each site, from a run of the request as it is.

    `create` is the method of vLLM's handler that runs it, so that its prompt is rendered as it will be. ApiError 400
    where activations can't be captured, or the request has several prompts.
    """
    if engine.captures is not None:
        raise ApiError(400, f'mode "frozen" needs captured activations: {engine.captures}', "steering.mode")
    prompt = getattr(request, "prompt", None)
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise ApiError(
            400,
            f'mode "frozen" takes one prompt per request, not {len(prompt)}; send one request each',
            "steering.mode",
        )
    known = {name: value for name, value in ONE_TOKEN.items() if name in type(request).model_fields}
    first = request.model_copy(update=known | {"request_id": uuid.uuid4().hex}, deep=True)
    receipt = uuid.uuid4().hex
    engine.mark_capture(first, CaptureSpec(tuple(sites), LAST_PROMPT_TOKEN), receipt)
    result = await create(first, raw_request)
    if not hasattr(result, "choices"):
        return Refusal(result)
    captured = await engine.captured(receipt)
    return {(point, layer): captured[site_name(point, layer)] for point, layer in sites}
