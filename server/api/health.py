"""`/livez`: the process answers. `/readyz`: it can take traffic, with one entry per check."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from server.api.errors import EnvelopeRoute

router = APIRouter(tags=["health"], route_class=EnvelopeRoute)


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Always 200 while the process can answer."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """200 when every check is ok, else 503. The server listens only after the engine's self-check has passed."""
    polyhelm = request.app.state.polyhelm
    checks = {
        "engine": "ok" if polyhelm.engine.alive else "the engine has stopped",
        "store": await run_in_threadpool(_store, polyhelm.store),
    }
    ready = all(state == "ok" for state in checks.values())
    return JSONResponse({"status": "ok" if ready else "unavailable", "checks": checks}, 200 if ready else 503)


def _store(store: object) -> str:
    try:
        store.list_artifacts(limit=1)  # type: ignore[attr-defined]
    except Exception as error:  # whatever is wrong with the store, readiness must say so and not fail
        return f"{type(error).__name__}: {error}"
    return "ok"
