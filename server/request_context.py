"""What is known of the request that the current task answers: its id, its caller, and what it used."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from server.keys import SCOPES, Key

ANYBODY = Key("", "anybody", SCOPES)
"""Whoever calls a server without keys, and the server itself."""


@dataclass
class RequestContext:
    """Filled in on the way, by whoever learns it. All tasks of one request share it."""

    request_id: str = ""
    key: Key = ANYBODY
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fingerprint: str | None = None
    """Of the program that steered it."""
    reject: str | None = None
    """The reason of the error that answers it."""


_current: ContextVar[RequestContext | None] = ContextVar("polyhelm_request", default=None)


def current() -> RequestContext:
    """That of the request, or an empty one outside of any."""
    return _current.get() or RequestContext()


def enter(context: RequestContext) -> None:
    """Make it that of the current task, and of all that it starts."""
    _current.set(context)
