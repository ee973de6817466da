"""The methods that fit: `FitSpec` is what `POST /v1/fits`, the command line and a job on disk hold."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter
from pydantic_core import ErrorDetails

from server.fit_methods.base import MethodSpec
from server.fit_methods.caa import CaaSpec
from server.fit_methods.direction import DirectionSpec
from server.fit_methods.expertsteer import ExpertSteerSpec
from server.fit_methods.incline import InclineSpec
from server.fit_methods.lf_steering import LfSteeringSpec
from server.fit_methods.sadi import SadiSpec
from server.fit_methods.sae import SaeSpec
from server.fit_methods.sae_examples import SaeExamplesSpec
from server.fit_methods.shared_neurons import SharedNeuronsSpec

Specs = (
    CaaSpec
    | DirectionSpec
    | ExpertSteerSpec
    | InclineSpec
    | LfSteeringSpec
    | SadiSpec
    | SaeSpec
    | SaeExamplesSpec
    | SharedNeuronsSpec
)
FitSpec = Annotated[Specs, Field(discriminator="method")]
"""Told apart by `method`."""

_ADAPTER: TypeAdapter[MethodSpec] = TypeAdapter(FitSpec)
METHODS: tuple[str, ...] = tuple(spec.model_fields["method"].default for spec in get_args(Specs))
"""Their names."""


def parse_spec(body: dict[str, Any]) -> MethodSpec:
    """The spec of the method that `body` names. Raises pydantic's ValidationError; see `untagged`."""
    return _ADAPTER.validate_python(body)


def untagged(error: ErrorDetails, depth: int = 0) -> ErrorDetails:
    """A validation error whose `loc` is the field in the body, as users write it: pydantic puts the method, which told
    the specs apart, behind the first `depth` parts.
    """
    place, path = error["loc"][:depth], error["loc"][depth:]
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return {**error, "loc": (*place, "method"), "msg": f"need one of {', '.join(METHODS)}"}
    return {**error, "loc": (*place, *path[1:])} if path and path[0] in METHODS else error
