"""Presets in a request: one word in place of the interventions that it stands for."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from methods.kinds import OptionError
from server.api.source_language import SourceLanguage
from server.api.steering_schema import Intervention
from steering_store import ArtifactVersion


class Part(NamedTuple):
    """An intervention of a preset, and what its strength is multiplied by. `preset` is None for one of the request's
    own, which has the scale 1.
    """

    intervention: Intervention
    scale: float = 1.0
    preset: str | None = None


def expand(intervention: Intervention, version: ArtifactVersion, language: SourceLanguage) -> list[Part]:
    """What an intervention that names this version stands for: itself, unless the version is a preset.

    Of a preset's interventions for a source language, only those for the request's count. A preset's strengths are
    multiplied by the intervention's strength, or else by the preset's default. OptionError where the intervention has
    any other option, or the preset one that this server doesn't know; ApiError 422 where the request's language is none
    of the preset's.
    """
    items = version.manifest.interventions
    if items is None:
        return [Part(intervention)]
    if other := sorted(intervention.model_fields_set - {"artifact", "strength"}):
        raise OptionError(
            other[0], f"{version.ref} is a preset, which brings its own; leave it out, or name its artifacts one by one"
        )
    scale = version.manifest.default_strength if intervention.strength is None else intervention.strength
    languages = list(dict.fromkeys(item.source_language for item in items if item.source_language is not None))
    spoken = language.of(languages, version.ref) if languages else None
    return [
        Part(_parse(item.as_intervention(), f"{version.ref}: interventions.{number}"), scale, version.ref)
        for number, item in enumerate(items)
        if item.source_language in (None, spoken)
    ]


def _parse(fields: object, where: str) -> Intervention:
    try:
        return Intervention.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, (where, *first["loc"])))
        raise OptionError("artifact", f"{name}: {first['msg']}; publish the preset anew, without it") from None
