"""Builds the FastAPI app (vLLM's OpenAI routes, ours, middleware) and runs it."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI

from kb import encoders
from kb.index import IndexOptions
from kb.knowledge_base import KnowledgeBase
from kb.scope import storage as scope
from server import experts
from server.api import (
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
from server.api.admin import admin_scope, admit
from server.api.doses import Doses
from server.api.knowledge import KnowledgeHandler
from server.api.leases import Leases
from server.api.middleware import JsonBodies
from server.api.openai import SteeringHandler
from server.api.served import ServedModel
from server.api.steering import Steerer
from server.demo import ensure_demo
from server.encoding import BatchedEncoder
from server.engine import frontend
from server.engine.spool import Spools
from server.fit_jobs import FitJobs
from server.knowledge import Adviser
from server.locks import holding
from server.models import ResolvedModel, model_identity, resolve_model
from server.progress import Reporter
from server.replays import Replays
from server.settings import Settings
from steering_store import Store, remote_replica

if TYPE_CHECKING:
    from server.engine.client import Engine


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


def serve(settings: Settings, engine_args: Sequence[str], report: Reporter) -> None:
    """Convert the model if needed, start and check the engine, fit the demo if asked for, and serve until told to."""
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


def open_store(settings: Settings) -> Store:
    """The store that the settings name; one at a URL learns in the background what other machines publish."""
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
    return Polyhelm(settings, model.name, engine, store, steerer, jobs, captures, leases, kb, encoder, adviser, replays)


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
    for module in (
        activations,
        aliases,
        artifact_files,
        artifacts,
        capabilities,
        health,
        kb_collections,
        kb_facts,
        saes,
    ):
        app.include_router(module.router)
    app.include_router(kb_facts.changes)
    app.include_router(kb_import.router)
    # A fit publishes what it fitted.
    app.include_router(fits.router, dependencies=[Depends(admin_scope)])
    if (key := polyhelm.settings.admin_api_key) is not None:
        admit(app, key)
    errors.install(app)
    app.add_middleware(JsonBodies, max_bytes=polyhelm.settings.max_body_bytes)
    polyhelm.fits.start()
    polyhelm.leases.start()
    return app
