"""`/v1/saes`: find the features of an SAE by what they are called."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from server.api.artifact_models import StoreDep
from server.api.errors import ApiError, EnvelopeRoute
from steering_store.labels import Example, Label

router = APIRouter(prefix="/v1/saes", tags=["saes"], route_class=EnvelopeRoute)


class Feature(BaseModel):
    """A feature by its index in the SAE, what it is called, and the texts on which it fires most, strongest first."""

    object: Literal["sae.feature"] = "sae.feature"
    index: int
    label: str | None
    examples: list[Example]

    @classmethod
    def of(cls, label: Label) -> Feature:
        return cls(index=label.index, label=label.label, examples=label.examples)


class FeatureList(BaseModel):
    """A page of features by rising index; pass `last_id` as `after` for the next. `artifact` is `name@version`."""

    object: Literal["list"] = "list"
    artifact: str
    data: list[Feature]
    first_id: int | None
    last_id: int | None
    has_more: bool


@router.get("/{ref}/features", operation_id="find_sae_features")
def find_sae_features(
    store: StoreDep,
    ref: str,
    q: Annotated[str, Query(max_length=1000)] = "",
    after: Annotated[int | None, Query(ge=0)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> FeatureList:
    """The features whose label has all words of `q`, in any order and case; without it, all that the labels name.

    `ref` is that of an intervention: `name`, `name@3`, `name@production` or `name@sha256:HEX64`.
    """
    version = store.resolve(ref)
    if version.manifest.kind != "sae":
        raise ApiError(400, f"{version.ref} is a {version.manifest.kind}, and only a sae has features", "ref")
    page = store.find_features(version, q, after=after, limit=limit)
    data = [Feature.of(each) for each in page.items]
    return FeatureList(
        artifact=version.ref,
        data=data,
        first_id=data[0].index if data else None,
        last_id=data[-1].index if data else None,
        has_more=page.has_more,
    )
