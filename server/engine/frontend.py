"""vLLM's own command line, engine start and OpenAI app, as polyhelm uses them."""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from server.engine.plugin import ENABLED
from server.engine.sites import CONFIG_KEY

WORKER_EXTENSION = "server.engine.worker.WorkerExtension"
MAX_EDITS = 16
"""Interventions per request."""


class EngineStartError(RuntimeError):
    """The engine could not be started; the message says why and what to do."""


def parse_args(model: str, name: str, host: str, port: int, bank_slots: int, extra: Sequence[str]) -> Namespace:
    """vLLM's server arguments, with polyhelm's own filled in. vLLM's parser exits with usage on an unknown one."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # GiB of KV cache. vLLM's own default takes half of the machine's memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ[ENABLED] = "1"
    defaults = ["--model", model, "--served-model-name", name, "--host", host, "--port", str(port)]
    # Eager is the only mode that this version steers in; on CPU, compiled SmolLM2 was seen to give wrong text besides.
    defaults += ["--enforce-eager", "--worker-extension-cls", WORKER_EXTENSION]
    parser = make_arg_parser(FlexibleArgumentParser(prog="polyhelm serve"))
    args = parser.parse_args([*defaults, *extra])
    validate_parsed_serve_args(args)
    if args.worker_extension_cls != WORKER_EXTENSION:
        raise EngineStartError("--worker-extension-cls is taken by polyhelm: leave it out")
    if (args.api_server_count or 1) > 1:
        raise EngineStartError("--api-server-count above 1 isn't supported yet: run replicas behind a load balancer")
    args.additional_config = {
        **(args.additional_config or {}),
        CONFIG_KEY: {"bank_slots": bank_slots, "max_edits": MAX_EDITS},
    }
    return args


@asynccontextmanager
async def open_engine(args: Namespace) -> AsyncIterator[Any]:
    """Start vLLM, install the seams, and prove that steering works; yields the `Engine`."""
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

    from server.engine.banks import BankDirectory
    from server.engine.client import Engine
    from server.engine.probe import probe
    from server.engine.seams import patch

    patch()
    async with build_async_engine_client(args) as client:
        config = args.additional_config[CONFIG_KEY]
        engine = Engine(client, BankDirectory(config["bank_slots"]), config["max_edits"])
        await engine.describe()
        await probe(engine)
        yield engine


def open_socket(args: Namespace) -> socket.socket:
    """Bind the port before the engine starts, so that a taken port is known at once."""
    from vllm.entrypoints.launchers.launcher import setup_server

    _, sock = setup_server(args, reuse_port=False)
    return sock


async def build_vllm_app(engine: Any, args: Namespace) -> FastAPI:
    """vLLM's own app and handlers, ready to be extended."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await engine.client.get_supported_tasks()
    app = build_app(args, tasks, engine.client.model_config)
    # vLLM's bootstrap for SageMaker has built the stack already, and Starlette takes no handlers and middleware after
    # that; without one it builds it, from all that is registered, when the first message arrives.
    app.middleware_stack = None
    await init_app_state(engine.client, app.state, args, tasks)
    return app


async def serve_app(app: FastAPI, sock: socket.socket, args: Namespace) -> Any:
    """Serve until SIGINT or SIGTERM; returns the shutdown to await once the engine is closed."""
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import serve_http

    return await serve_http(
        app,
        sock=sock,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
    )
