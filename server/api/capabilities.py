"""`GET /v1/capabilities`: what this server can do with this model."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, Request
from pydantic import BaseModel

from methods import kinds
from server import __version__
from server.api.errors import EnvelopeRoute
from server.engine.edits import OPCODES
from server.fit_methods.registry import METHODS
from steering_store.manifest import Kind

router = APIRouter(tags=["capabilities"], route_class=EnvelopeRoute)


class PointCapabilities(BaseModel):
    """What can be done at one point, at all layers alike; `resid_pre` is at layer 0 only.

    `width` is that of an activation, null where the point can't be edited; `shards` is the number of tensor-parallel
    ranks that hold a part of it each; `reason` says why some opcodes, or all, are missing.
    """

    opcodes: list[str]
    width: int | None
    shards: int
    reason: str | None


class Capabilities(BaseModel):
    """The served model, where and how it can be edited, and the limits on requests.

    `opcodes` are those that polyhelm knows, `points` says which of them act where on this server. `artifact_kinds` has
    the `op`s of each kind. `captures` says why activations can't be captured, and so mode "frozen" not be used; null
    where they can. A null limit is none.
    """

    polyhelm_version: str
    model: dict[str, Any]
    layers: int
    hidden_size: int
    points: dict[str, PointCapabilities]
    opcodes: list[str]
    methods: list[str]
    artifact_kinds: dict[str, list[str]]
    captures: str | None
    encoders: list[dict[str, Any]]
    prefix_cache: str
    runner: str
    limits: dict[str, int | float | None]


@router.get("/v1/capabilities", operation_id="get_capabilities")
async def get_capabilities(request: Request) -> Capabilities:
    polyhelm = request.app.state.polyhelm
    engine, settings = polyhelm.engine, polyhelm.settings
    return Capabilities(
        polyhelm_version=__version__,
        model={"id": polyhelm.model_name, **polyhelm.steerer.model.identity, "dtype": engine.dtype},
        layers=engine.layers,
        hidden_size=engine.hidden_size,
        points={name: _point(point) for name, point in engine.points.items()},
        opcodes=list(OPCODES),
        methods=list(METHODS),
        artifact_kinds={
            kind: list(kinds.OPS[kind] or get_args(kinds.FeatureOp)) for kind in get_args(Kind) if kind in kinds.OPS
        },
        captures=engine.captures,
        encoders=[(await polyhelm.encoder.identity())._asdict()],
        prefix_cache=engine.prefix_cache,
        runner=engine.runner,
        limits={
            "max_model_len": engine.max_model_len,
            "max_edits": engine.max_edits,
            "max_strength": settings.max_strength,
            "max_relative_dose": settings.max_relative_dose,
            "max_body_bytes": settings.max_body_bytes,
            "max_artifact_bytes": settings.max_artifact_bytes,
            "max_fit_pairs": settings.max_fit_pairs,
            "max_fact_bytes": settings.max_fact_bytes,
            "bank_bytes": engine.bank_bytes,
            "max_capture_bytes": settings.max_capture_bytes,
        },
    )


def _point(point: dict[str, Any]) -> PointCapabilities:
    return PointCapabilities(
        opcodes=list(point["opcodes"]),
        width=point["width"] or None,
        shards=point["shards"],
        reason=point["reason"],
    )
