"""`GET /v1/capabilities`: what this server can do with this model."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, Request
from pydantic import BaseModel

from server import __version__
from server.api.errors import EnvelopeRoute
from server.engine.edits import OPCODES, POINTS
from server.fits import Method
from steering_store.manifest import Kind

router = APIRouter(tags=["capabilities"], route_class=EnvelopeRoute)


class Capabilities(BaseModel):
    """The served model, where and how it can be edited, and the limits on requests."""

    polyhelm_version: str
    model: dict[str, Any]
    layers: int
    hidden_size: int
    points: list[str]
    opcodes: list[str]
    methods: list[str]
    artifact_kinds: list[str]
    prefix_cache: str
    runner: str
    limits: dict[str, int | float]


@router.get("/v1/capabilities")
async def get_capabilities(request: Request) -> Capabilities:
    polyhelm = request.app.state.polyhelm
    engine, settings = polyhelm.engine, polyhelm.settings
    return Capabilities(
        polyhelm_version=__version__,
        model={"id": polyhelm.model_name, **polyhelm.steerer.identity, "dtype": engine.dtype},
        layers=engine.layers,
        hidden_size=engine.hidden_size,
        points=list(POINTS),
        opcodes=list(OPCODES),
        methods=list(get_args(Method)),
        artifact_kinds=list(get_args(Kind)),
        prefix_cache=engine.prefix_cache,
        runner=engine.runner,
        limits={
            "max_model_len": engine.max_model_len,
            "max_interventions": engine.max_edits,
            "max_strength": settings.max_strength,
            "max_body_bytes": settings.max_body_bytes,
            "max_artifact_bytes": settings.max_artifact_bytes,
            "max_fit_pairs": settings.max_fit_pairs,
            "bank_slots": engine.bank.slots,
        },
    )
