"""The admin scope: with POLYHELM_ADMIN_API_KEY set, only that key may change what the store holds.

Without it, whoever may ask for completions may: those who know vLLM's `--api-key`, or everybody where there is none.
"""

from __future__ import annotations

import hashlib
import secrets

from fastapi import FastAPI, Request

from server.api.errors import ApiError

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


async def admin_scope(request: Request) -> None:
    """A dependency of whole routers, so that a route added later is guarded too. Raises ApiError 401 or 403."""
    key = request.app.state.polyhelm.settings.admin_api_key
    if key is None or request.method in SAFE:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise ApiError(
            401, "this needs the admin key: send Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"}
        )
    if not secrets.compare_digest(_hashed(token), _hashed(key)):
        raise ApiError(403, "this needs the admin key, and another was sent; it is POLYHELM_ADMIN_API_KEY")


def admit(app: FastAPI, key: str) -> None:
    """Let the admin key pass vLLM's own check of `--api-key`, where there is one: an admin may do what others may."""
    for middleware in app.user_middleware:
        if getattr(middleware.cls, "__name__", "") == "AuthenticationMiddleware":
            middleware.kwargs["tokens"] = [*middleware.kwargs["tokens"], key]


def _hashed(text: str) -> bytes:
    # Of one length, and never non-ASCII, which compare_digest refuses in text.
    return hashlib.sha256(text.encode()).digest()
