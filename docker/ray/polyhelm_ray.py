"""polyhelm on Ray Serve: each replica runs `polyhelm serve` on its node and passes requests on to it.

    serve run serve.yaml

Needs `ray[serve]` and httpx in Ray's environment, and `polyhelm` in its PATH, or named by POLYHELM_COMMAND.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
from typing import Any

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

START_SECONDS = 1800
STOP_SECONDS = 90
# Of one connection only (RFC 9110, section 7.6.1); the length is counted anew for a stream.
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length"}
# Ray's proxy writes its own.
OF_THE_PROXY = {"date", "server"}


@serve.deployment
class Polyhelm:
    """One server. Ray starts another where this one's health check fails, and ends it after its running requests."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [*shlex.split(os.environ.get("POLYHELM_COMMAND", "polyhelm")), "serve", *arguments]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        # Ray has put this replica's GPUs into CUDA_VISIBLE_DEVICES.
        self._process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, start_new_session=True)
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False)
        self._ready = asyncio.Event()

    async def _wait_until_ready(self) -> None:
        async with asyncio.timeout(START_SECONDS):
            while True:
                if (code := self._process.poll()) is not None:
                    raise RuntimeError(f"polyhelm ended with {code}: the log of this replica says why")
                try:
                    if (await self._client.get("/readyz")).status_code == 200:
                        self._ready.set()
                        return
                except httpx.TransportError:
                    pass  # it doesn't listen yet
                await asyncio.sleep(0.5)

    async def check_health(self) -> None:
        """Ray asks before the first request, and then every `health_check_period_s`."""
        if not self._ready.is_set():
            await self._wait_until_ready()
        (await self._client.get("/livez", timeout=5)).raise_for_status()

    async def __call__(self, request: Request) -> Response:
        if not self._ready.is_set():
            await self._wait_until_ready()
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP | {"host"}]
        body = request.stream() if request.method in {"POST", "PUT", "PATCH"} else None
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        sent = self._client.build_request(request.method, url, headers=headers, content=body)
        answer = await self._client.send(sent, stream=True)
        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP | OF_THE_PROXY}
        return StreamingResponse(self._parts(answer), answer.status_code, kept)

    async def _parts(self, answer: httpx.Response) -> Any:
        """The answer's body as it comes. A client that leaves closes it, which stops the generation."""
        try:
            async for part in answer.aiter_raw():
                yield part
        finally:
            await answer.aclose()

    def __del__(self) -> None:
        """Ray calls it when the replica ends."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)


def app(options: dict[str, Any]) -> serve.Application:
    """The application that serve.yaml configures: `arguments` of `polyhelm serve`, and variables of its environment."""
    return Polyhelm.bind(list(options.get("arguments", [])), dict(options.get("environment", {})))
