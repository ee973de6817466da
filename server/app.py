"""Builds the FastAPI app (vLLM's OpenAI routes, ours, middleware) and runs it."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from kb import encoders
from kb.index import IndexOptions
from kb.knowledge_base import KnowledgeBase
from kb.scope import storage as scope
from server import __version__, experts, metrics
from server.api import (
    access,
    activations,
    aliases,
    artifact_files,
    artifacts,
    capabilities,
    errors,
    fits,
    health,
    kb_collections,
    kb_facts,
    kb_import,
    saes,
)
from server.api.admission import Admission, Load
from server.api.authentication import Authentication
from server.api.doses import Doses
from server.api.event_streams import EventStreams
from server.api.health import DeepCheck
from server.api.knowledge import KnowledgeHandler
from server.api.leases import Leases
from server.api.lifecycle import Lifecycle
from server.api.middleware import JsonBodies
from server.api.openai import SteeringHandler
from server.api.request_log import RequestLog, access_logger
from server.api.served import ServedModel
from server.api.steering import Steerer
from server.connections import HeaderLimits
from server.demo import ensure_demo
from server.encoding import BatchedEncoder
from server.engine import frontend
from server.engine.spool import Spools
from server.fit_jobs import FitJobs
from server.keys import KeyStore
from server.knowledge import Adviser
from server.locks import holding
from server.models import ResolvedModel, model_identity, resolve_model
from server.progress import Reporter
from server.remote_sources import check_places
from server.replays import Replays
from server.settings import Settings
from steering_store import Store, remote_replica

if TYPE_CHECKING:
    from server.engine.client import Engine

log = logging.getLogger(__name__)

ROUTERS = tuple(
    module.router
    for module in (
        activations,
        aliases,
        artifact_files,
        artifacts,
        capabilities,
        fits,
        health,
        kb_collections,
        kb_facts,
        kb_import,
        saes,
    )
)


@dataclass(frozen=True)
class Polyhelm:
    """What our routes find at `app.state.polyhelm`."""

    settings: Settings
    model_name: str
    engine: Engine
    store: Store
    steerer: Steerer
    fits: FitJobs
    captures: Spools
    leases: Leases
    kb: KnowledgeBase
    encoder: BatchedEncoder
    adviser: Adviser
    replays: Replays
    keys: KeyStore
    load: Load
    lifecycle: Lifecycle
    deep_check: DeepCheck


def serve(settings: Settings, engine_args: Sequence[str], report: Reporter) -> None:
    """Convert the model if needed, start and check the engine, fit the demo if asked for, and serve until told to."""
    check_places(settings)
    report.step(f"model {settings.model}")
    model = resolve_model(settings.model, settings.data_dir, report.step)
    args = frontend.parse_args(model, settings, engine_args)
    if (args.api_server_count or 1) > 1:
        report.step(f"starting vLLM and {args.api_server_count} API processes, which check that every site steers")
        frontend.serve_several(args, settings)
    else:
        asyncio.run(_serve(settings, model, args, report))


async def _serve(settings: Settings, model: ResolvedModel, args: Namespace, report: Reporter) -> None:
    """All in this process but the engine."""
    store = open_store(settings)
    sock = frontend.open_socket(args)
    report.step("starting vLLM and checking that every site steers")
    async with frontend.open_engine(args, settings) as engine:
        polyhelm = await assemble(settings, model, engine, store, report)
        app = extend(await frontend.build_vllm_app(engine, args), polyhelm)
        report.step(f"serving {model.name} on http://{settings.host}:{settings.port}")
        shutdown = await frontend.serve_app(app, sock, args)
    await shutdown
    if polyhelm.lifecycle.engine_died:
        raise frontend.EngineDied("the engine has died; its last words are above")


def open_store(settings: Settings) -> Store:
    """The store that the settings name; one at a URL learns in the background what other machines publish.

    Raises StoreError where it, or another place that the settings name, isn't allowed.
    """
    check_places(settings)
    store = remote_replica.open_store(
        settings.data_dir,
        settings.store,
        cache_bytes=settings.store_cache_bytes,
        max_files=settings.max_artifact_files,
        max_bytes=settings.max_artifact_bytes,
    )
    if isinstance(store, remote_replica.RemoteBackedStore):
        store.follow(settings.store_refresh_seconds)
    return store


def open_kb(settings: Settings) -> KnowledgeBase:
    """The knowledge base that the settings name."""
    options = IndexOptions(kind=settings.kb_index, exact_below=settings.kb_exact_below)
    return KnowledgeBase.open(settings.kb_url or settings.data_dir / "kb", options)


async def assemble(
    settings: Settings, model: ResolvedModel, engine: Engine, store: Store, report: Reporter
) -> Polyhelm:
    """What our routes need, beside a started engine. Fits the demo if asked for."""
    # Not before: a hub model is in the local cache only once vLLM has loaded it.
    identity = model_identity(model.path)
    if settings.demo:
        # The first of several processes fits, and the others find the artifacts there.
        async with holding(settings.data_dir / "demo.lock"):
            await ensure_demo(engine, store, identity, report.progress)
    served = ServedModel(identity, engine.layers, engine.hidden_size, engine.points, settings.model_match)
    leases = Leases(store)
    steerer = Steerer(store, served, engine.max_edits, settings.max_strength, Doses(settings.max_relative_dose), leases)
    find = experts.listed(settings.expert_models, settings.data_dir)
    jobs = FitJobs(settings.data_dir / "fits", engine, store, identity, find)
    captures = Spools(settings.data_dir / "captures")
    kb = open_kb(settings)
    encoder = BatchedEncoder(encoders.load(settings.kb_encoder))
    adviser = Adviser(kb, encoder, scope.load(settings.kb_scope) if settings.kb_scope else scope.default())
    replays = Replays(settings.data_dir / "kb" / "replays.sqlite3")
    keys = KeyStore(settings.data_dir, settings.admin_api_key)
    load = Load(settings.max_requests, settings.max_bytes_in_flight)
    # Some of the time is vLLM's, to close what ran.
    lifecycle = Lifecycle(engine, load, 0.8 * engine.shutdown_seconds)
    return Polyhelm(
        settings,
        model.name,
        engine,
        store,
        steerer,
        jobs,
        captures,
        leases,
        kb,
        encoder,
        adviser,
        replays,
        keys,
        load,
        lifecycle,
        DeepCheck(engine),
    )


def extend(app: FastAPI, polyhelm: Polyhelm) -> FastAPI:
    """Add steering, our routes and our middleware to vLLM's app, and go on with the fits that a restart cut off."""
    state = app.state
    state.polyhelm = polyhelm
    wrap = (polyhelm.steerer, polyhelm.engine)
    for name, method in (
        ("openai_serving_chat", "create_chat_completion"),
        ("openai_serving_completion", "create_completion"),
    ):
        steered = SteeringHandler(getattr(state, name), method, *wrap)
        setattr(state, name, KnowledgeHandler(steered, method, polyhelm.adviser))
    include_routes(app)
    guard(app, polyhelm)
    polyhelm.fits.start()
    polyhelm.leases.start()
    state.follow_facts = asyncio.create_task(metrics.follow_facts(polyhelm.kb))
    return app


def include_routes(app: FastAPI) -> None:
    """Our routes, and how all errors are told."""
    for router in ROUTERS:
        app.include_router(router, responses=errors.RESPONSES)
    errors.install(app)


def openapi() -> dict[str, Any]:
    """The OpenAPI document of our routes alone, as docs/openapi.json has it."""
    app = FastAPI(title="polyhelm", version=__version__)
    include_routes(app)
    return access.secured(app.openapi())


def guard(app: FastAPI, polyhelm: Polyhelm) -> None:
    """Put our middleware around the app, the innermost first, and watch over its engine and its connections."""
    settings, load = polyhelm.settings, polyhelm.load
    polyhelm.keys.accept(frontend.take_api_keys(app), with_admin=settings.admin_api_key is None)
    if not polyhelm.keys.configured:
        log.warning("no key is configured: whoever reaches this server may do everything (polyhelm key create)")
    app.add_middleware(JsonBodies, max_bytes=settings.max_body_bytes, load=load)
    app.add_middleware(EventStreams, interval=settings.keep_alive_seconds)
    app.add_middleware(Admission, load=load, seconds=settings.client_seconds)
    app.add_middleware(Authentication, keys=polyhelm.keys, open_metrics=settings.open_metrics)
    app.add_middleware(RequestLog, log=access_logger(settings.log_format))
    polyhelm.lifecycle.install(app, HeaderLimits(settings.header_seconds, settings.max_header_bytes))
