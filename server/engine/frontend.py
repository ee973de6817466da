"""vLLM's own command line, engine start and OpenAI app, as polyhelm uses them."""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from server.engine.bank_directory import BankFull, BankTooSmall
from server.engine.client import Engine
from server.engine.plugin import ENABLED, PLUGIN
from server.engine.probe import probe
from server.engine.seams import PREFIX_CACHE, SeamError, patch
from server.engine.seams.engine_config import engine_config
from server.engine.sites import CONFIG_KEY, UnsupportedModel, refuse_unsupported
from server.models import ResolvedModel
from server.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM


class EngineStartError(RuntimeError):
    """The engine could not be started; the message says why and what to do."""


class EngineDied(RuntimeError):
    """The engine ended by itself while the server ran."""


def parse_args(model: ResolvedModel, settings: Settings, extra: Sequence[str]) -> Namespace:
    """vLLM's server arguments, with polyhelm's own filled in. vLLM's parser exits with usage on an unknown one."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    except ModuleNotFoundError:  # before vLLM 0.33
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # GiB of KV cache. vLLM's own default takes half of the machine's memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Seconds that an idle connection stays open: longer than gateways and clients keep theirs (nginx 60, httpx 5), so
    # that they close it first. vLLM's 5 broke requests that were sent just when the server closed.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    os.environ[ENABLED] = "1"
    os.environ[PREFIX_CACHE] = settings.prefix_cache
    defaults = ["--model", model.path, "--served-model-name", model.name]
    defaults += ["--host", settings.host, "--port", str(settings.port)]
    # On a GPU nothing can be captured in compiled code, and fits and frozen mode need that; on a CPU, compiled SmolLM2
    # was seen to give wrong text. Whoever wants it all the same says --no-enforce-eager.
    defaults += ["--enforce-eager"]
    # What runs when SIGTERM comes may end; and our own line for each request has what uvicorn's has, and no more.
    defaults += ["--shutdown-timeout", "30", "--disable-uvicorn-access-log"]
    parser = make_arg_parser(FlexibleArgumentParser(prog="polyhelm serve"))
    args = parser.parse_args([*defaults, *extra])
    validate_parsed_serve_args(args)
    args.additional_config = {**(args.additional_config or {}), CONFIG_KEY: engine_config(settings)}
    return args


def check_config(args: Namespace) -> tuple[AsyncEngineArgs, VllmConfig]:
    """The engine's configuration, with the seams of this process installed. Raises EngineStartError."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    engine_args = AsyncEngineArgs.from_cli_args(args)
    try:
        patch()
        vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        refuse_unsupported(vllm_config)
    except (SeamError, UnsupportedModel, ValueError) as error:  # vLLM's own refusals are ValueErrors
        raise EngineStartError(str(error)) from error
    return engine_args, vllm_config


@asynccontextmanager
async def open_engine(args: Namespace, settings: Settings) -> AsyncIterator[Engine]:
    """Start vLLM, install the seams, and prove that steering works; yields the `Engine`. Raises EngineStartError."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    engine_args, vllm_config = check_config(args)
    client = AsyncLLM.from_vllm_config(
        vllm_config=vllm_config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        yield await prove(client, settings)
    finally:
        client.shutdown(timeout=vllm_config.shutdown_timeout)


def serve_several(args: Namespace, settings: Settings) -> None:
    """Serve with `--api-server-count` processes on one engine, until SIGINT or SIGTERM. Raises EngineStartError.

    vLLM's launcher does, and its processes get our endpoint as those of a stock `vllm serve` do.
    """
    from vllm import envs
    from vllm.entrypoints.cli.serve import run_multi_api_server

    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        raise EngineStartError(f"VLLM_PLUGINS leaves out {PLUGIN}: add it, or unset VLLM_PLUGINS")
    check_config(args)
    export(settings)
    try:
        run_multi_api_server(args)
    except RuntimeError as error:
        raise EngineStartError(f"{error}: what it wrote before says why") from error
    except ValueError as error:  # options that vLLM doesn't take together
        raise EngineStartError(str(error)) from error


def export(settings: Settings) -> None:
    """Put every setting into the environment, where the processes that vLLM starts read them."""
    for name, value in settings.model_dump(mode="json").items():
        variable = f"POLYHELM_{name.upper()}"
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = ",".join(value) if isinstance(value, list) else str(value)


async def prove(client: AsyncLLM, settings: Settings) -> Engine:
    """Show that steering works in a started engine. Raises EngineStartError when it doesn't."""
    config = client.vllm_config.additional_config[CONFIG_KEY]
    engine = Engine(
        client, config["max_edits"], config["bank_bytes"], settings.bank_host_bytes, settings.bank_wait_seconds
    )
    await engine.describe()
    try:
        await probe(engine)
    except (SeamError, BankTooSmall, BankFull) as error:
        raise EngineStartError(f"the start-up check failed: {error}") from error
    return engine


def open_socket(args: Namespace) -> socket.socket:
    """Bind the port before the engine starts, so that a taken port is known at once."""
    from vllm.entrypoints.launchers.launcher import setup_server

    _, sock = setup_server(args, reuse_port=False)
    return sock


async def build_vllm_app(engine: Engine, args: Namespace) -> FastAPI:
    """vLLM's own app and handlers, ready to be extended."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await engine.client.get_supported_tasks()
    app = reopen(build_app(args, tasks, engine.client.model_config))
    # Our plugin is for vLLM's own server; here the caller extends the app.
    app.state.endpoint_plugins = [each for each in app.state.endpoint_plugins if each.name != PLUGIN]
    await init_app_state(engine.client, app.state, args, tasks)
    return app


def reopen(app: FastAPI) -> FastAPI:
    """Let vLLM's app take handlers and middleware again, before it serves."""
    # vLLM's bootstrap for SageMaker has built the stack already, and Starlette takes none after that; without a stack
    # it builds one, from all that is registered, when the first message arrives.
    _keep_http_metrics(app)
    app.middleware_stack = None
    return app


def take_api_keys(app: FastAPI) -> list[str]:
    """The keys of vLLM's `--api-key`, taken from its own check, which guards only some of the routes."""
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys: list[str] = []
    for middleware in list(app.user_middleware):
        if middleware.cls is AuthenticationMiddleware:
            keys += middleware.kwargs["tokens"]
            app.user_middleware.remove(middleware)
    return keys


def _keep_http_metrics(app: FastAPI) -> None:
    """Let the next stack count requests in the metrics of the present one."""
    from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware

    layer: Any = app.middleware_stack
    while layer is not None and not isinstance(layer, PrometheusInstrumentatorMiddleware):
        layer = getattr(layer, "app", None)
    if layer is None:
        return
    # A second instance can't register metrics of the same names, and would go on without any, saying nothing.
    for middleware in app.user_middleware:
        if middleware.cls is PrometheusInstrumentatorMiddleware:
            middleware.kwargs["instrumentations"] = layer.instrumentations


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
