"""`/livez`: the process answers. `/readyz`: it can take traffic, with one entry per check."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.api.errors import EnvelopeRoute

if TYPE_CHECKING:
    from server.app import Polyhelm
    from server.engine.client import Engine

log = logging.getLogger(__name__)
router = APIRouter(tags=["health"], route_class=EnvelopeRoute)

OK = "ok"
DEEP_SECONDS = 10.0
"""How long the engine may take for one token, and how long its answer holds."""


class Alive(BaseModel):
    status: str = OK


class Readiness(BaseModel):
    """`checks` says of each `ok`, or what is wrong with it."""

    status: str
    checks: dict[str, str]


@dataclass
class DeepCheck:
    """Whether the engine really generates. Callers share a run, and its answer while that is fresh."""

    engine: Engine
    seconds: float = DEEP_SECONDS
    _until: float = 0.0
    _answer: str = OK
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self) -> str:
        async with self._asking:
            if time.monotonic() >= self._until:
                self._answer = await self._run()
                self._until = time.monotonic() + self.seconds
            return self._answer

    async def _run(self) -> str:
        try:
            async with asyncio.timeout(self.seconds):
                await self.engine.one_token()
        except TimeoutError:
            return f"the engine made no token in {self.seconds:g} s"
        except Exception as error:  # whatever is wrong with the engine, readiness must say so and not fail
            return _trouble("generation", error)
        return OK


@router.get("/livez", operation_id="livez")
async def livez() -> Alive:
    """Always 200 while the process can answer."""
    return Alive()


@router.get("/readyz", operation_id="readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(request: Request, deep: bool = False) -> JSONResponse:
    """200 when every check is ok, else 503. The server listens only after the engine's self-check has passed.

    With `deep` the engine has to generate a token, at most every ten seconds.
    """
    polyhelm: Polyhelm = request.app.state.polyhelm
    checks = {
        "engine": OK if polyhelm.engine.alive else "the engine has stopped",
        "traffic": "the server is going down" if polyhelm.load.draining else OK,
        "store": await run_in_threadpool(_said, "store", lambda: polyhelm.store.list_artifacts(limit=1)),
        "kb": await run_in_threadpool(_said, "kb", polyhelm.kb.collections),
        "keys": _said("keys", lambda: polyhelm.keys.configured),
    }
    if deep and checks["engine"] == OK:
        checks["generation"] = await polyhelm.deep_check.ask()
    ready = all(state == OK for state in checks.values())
    return JSONResponse({"status": OK if ready else "unavailable", "checks": checks}, 200 if ready else 503)


def _said(what: str, check: Callable[[], object]) -> str:
    try:
        check()
    except Exception as error:  # whatever is wrong with it, readiness must say so and not fail
        return _trouble(what, error)
    return OK


def _trouble(what: str, error: Exception) -> str:
    """What anybody may know of it: messages of exceptions name paths and addresses."""
    log.error("not ready: %s", what, exc_info=error)
    return f"{type(error).__name__}: the server's log says more"
