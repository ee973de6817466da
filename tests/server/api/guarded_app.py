"""A small app with polyhelm's middleware around it, in the order in which the server has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from server.api import errors
from server.api.admission import Admission, Load
from server.api.authentication import Authentication
from server.api.event_streams import EventStreams
from server.api.middleware import JsonBodies
from server.api.request_log import RequestLog
from server.keys import KeyStore
from server.request_context import current


class Lines(list[dict[str, Any]]):
    """Takes the place of the log, and keeps its lines."""

    def info(self, event: str, **fields: Any) -> None:
        self.append({"event": event, **fields})


def guarded(
    keys: KeyStore,
    *,
    load: Load | None = None,
    lines: Lines | None = None,
    seconds: float = 5.0,
    interval: float = 0.0,
    open_metrics: bool = True,
) -> FastAPI:
    app = FastAPI(openapi_url=None)
    load = load or Load(100, 1 << 20)

    @app.post("/v1/completions")
    async def complete(request: Request) -> dict[str, Any]:
        body = await request.json()
        context = current()
        context.prompt_tokens, context.completion_tokens = body.get("tokens", 0), 0
        await asyncio.sleep(body.get("seconds", 0))
        if body.get("fail"):
            raise RuntimeError("broken inside")
        return {"tenant": context.key.tenant, "request_id": request.headers["x-request-id"]}

    @app.post("/v1/responses")
    async def stream(request: Request) -> StreamingResponse:
        plan = (await request.json())["plan"]

        async def chunks() -> AsyncIterator[str]:
            for step in plan:
                if isinstance(step, (int, float)):
                    await asyncio.sleep(step)
                elif step == "!":
                    raise RuntimeError("broken in the middle")
                else:
                    yield step

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.api_route("/v1/artifacts/{name}", methods=["GET", "PUT"])
    async def artifact(name: str) -> str:
        return name

    for path in ("/livez", "/health", "/metrics", "/v1/models", "/secret"):
        app.get(path)(lambda: "ok")
    errors.install(app)
    app.add_middleware(JsonBodies, max_bytes=1 << 16, load=load)
    app.add_middleware(EventStreams, interval=interval)
    app.add_middleware(Admission, load=load, seconds=seconds)
    app.add_middleware(Authentication, keys=keys, open_metrics=open_metrics)
    app.add_middleware(RequestLog, log=Lines() if lines is None else lines)
    return app
