"""Lets a request in by its key, or refuses it: 401 without one, 403 without the scope, 429 over a limit.

A server without any key is open. With one, every route needs a key but those that `access.RULES` lists as open.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.access import ANY_KEY, OPEN, OPERATOR, allows, rule_for
from server.api.errors import ApiError, error_response
from server.api.rate_limits import RateLimits
from server.keys import Key, KeyStore
from server.request_context import RequestContext, current


@dataclass
class Authentication:
    """Pure ASGI. Sets the key of the request's context, and counts the request against the key's limits."""

    app: ASGIApp
    keys: KeyStore
    open_metrics: bool = True
    limits: RateLimits = field(default_factory=RateLimits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser asks with OPTIONS, and without a key, whether it may send one.
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            await self.app(scope, receive, send)
            return
        need = self._needed(scope)
        if need == OPEN:
            await self.app(scope, receive, send)
            return
        try:
            key = self._key(scope, need)
            headers = {} if key is None else self.limits.admit(key)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        if key is None:
            await self.app(scope, receive, send)
            return
        context = current()
        context.key = key
        counted = _Counted(self.limits, context, headers, send)
        try:
            await self.app(scope, receive, counted.send)
        finally:
            counted.end()

    def _needed(self, scope: Scope) -> str:
        path = get_route_path(scope)
        rule = rule_for(path)
        if rule is not None:
            need = rule.needed(scope.get("method", "GET"))
            return ANY_KEY if need == OPEN and path.startswith("/metrics") and not self.open_metrics else need
        # Nothing that isn't there needs an operator: any key is told that it isn't.
        routes = scope["app"].router.routes
        return OPERATOR if any(route.matches(scope)[0] != Match.NONE for route in routes) else ANY_KEY

    def _key(self, scope: Scope, need: str) -> Key | None:
        """The key that the request may use, None on a server without keys. Raises ApiError."""
        try:
            if not self.keys.configured:
                return None
            key = self.keys.find(_token(scope))
        except sqlite3.Error as error:
            raise ApiError(503, f"the keys can't be read now ({error}): retry", reason="keys_unreadable") from error
        if key is None:
            raise _unknown("this key isn't known; send Authorization: Bearer KEY with one that is", "key_unknown")
        if problem := key.problem():
            raise _unknown(f"this key {problem}; ask for another", "key_over")
        if not allows(key, need):
            words = "the scope 'admin' and no tenant" if need == OPERATOR else f"the scope {need!r}"
            raise ApiError(403, f"this needs a key with {words}, and this one has {_listed(key)}", reason="key_scope")
        return key


def _token(scope: Scope) -> str:
    sent = Headers(scope=scope).getlist("authorization")
    scheme, _, token = (sent[0] if len(sent) == 1 else "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _unknown("this server needs a key: send Authorization: Bearer KEY, once", "key_missing")
    return token.strip()


def _unknown(message: str, reason: str) -> ApiError:
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"}, reason=reason)


def _listed(key: Key) -> str:
    return ", ".join(sorted(key.scopes)) + (f", and the tenant {key.tenant!r}" if key.tenant else "")


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:120]})
    else:
        await error_response(error)(scope, receive, send)


@dataclass
class _Counted:
    """One request that was let in. It is counted out before its client has the last byte and can send the next."""

    limits: RateLimits
    context: RequestContext
    headers: Mapping[str, str]
    _send: Send
    _running: bool = True

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(self.headers)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.end()
        await self._send(message)

    def end(self) -> None:
        if self._running:
            self._running = False
            self.limits.end(self.context.key, self.context.prompt_tokens + self.context.completion_tokens)
