"""Which scope each route needs. One table for vLLM's routes and ours; what isn't in it needs an operator's key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from server.keys import Key

SAFE = frozenset({"GET", "HEAD"})
OPEN = "open"
ANY_KEY = "any key"
OPERATOR = "operator"
"""A key with the scope `admin` and without a tenant: what it does concerns the whole server."""


@dataclass(frozen=True)
class Rule:
    """What the routes need whose path matches: a scope, or one of the words above. Reading may need less."""

    pattern: re.Pattern[str]
    need: str
    reading: str

    def needed(self, method: str) -> str:
        return self.reading if method in SAFE else self.need


def _rule(path: str, need: str, reading: str | None = None) -> Rule:
    """`*` is one part of a path, `**` is that path and all below it."""
    pattern = re.escape(path).replace(r"/\*\*", "(?:/.*)?").replace(r"\*", "[^/]+")
    return Rule(re.compile(f"{pattern}/?"), need, need if reading is None else reading)


RULES = (
    # The probes of a supervisor or a gateway, which have no key.
    *(_rule(path, OPEN) for path in ("/livez", "/readyz", "/health", "/ping")),
    _rule("/metrics/**", OPEN),
    *(_rule(path, ANY_KEY) for path in ("/version", "/load", "/v1/models/**", "/v1/capabilities")),
    *(_rule(path, ANY_KEY) for path in ("/docs/**", "/redoc", "/openapi.json")),
    *(_rule(f"/v1/{name}/**", "generate") for name in ("chat/completions", "completions", "responses", "messages")),
    *(_rule(path, "generate") for path in ("/invocations", "/tokenize", "/detokenize", "/generative_scoring")),
    _rule("/v1/systemone", "generate"),
    _rule("/v1/activations", "capture"),
    _rule("/v1/artifacts/**", "admin", reading="read"),
    _rule("/v1/fits/**", "admin", reading="read"),
    _rule("/v1/saes/*/features", "read"),
    _rule("/v1/kb/collections/*/facts/query", "read"),
    _rule("/v1/kb/**", "admin", reading="read"),
)


def rule_for(path: str) -> Rule | None:
    """The first rule that matches, if one does."""
    return next((rule for rule in RULES if rule.pattern.fullmatch(path)), None)


def allows(key: Key, need: str) -> bool:
    """Whether a key has what a route needs."""
    if need == OPERATOR:
        return "admin" in key.scopes and key.tenant is None
    return need in (OPEN, ANY_KEY) or need in key.scopes


def secured(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document that says which operations need a key, and with which scope."""
    schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["key"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of `polyhelm key create`, or a static one. A server without any key is open.",
    }
    for path, operations in document["paths"].items():
        rule = rule_for(path)
        for method, operation in operations.items():
            need = OPERATOR if rule is None else rule.needed(method.upper())
            # Scopes are told of OAuth only before OpenAPI 3.1.
            operation["security"] = [] if need == OPEN else [{"key": [need]}]
    return document
