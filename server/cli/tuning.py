"""`--tune` of `polyhelm fit`: what to sweep, on what, and where the curve goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from server.cli.reading import layers_named, read_rows


class TuningOptions(NamedTuple):
    """The options of every command that are about tuning."""

    tune: Path | None
    tune_strengths: str | None
    tune_layers: list[str] | None
    tune_option: list[str] | None
    tune_mode: str | None
    tune_objective: str | None
    tune_intervention: str | None
    tune_perplexity: float | None
    test: Path | None
    curve: Path | None


def options(
    tune: Annotated[
        Path | None,
        typer.Option(
            envvar="POLYHELM_TUNE",
            exists=True,
            dir_okay=False,
            help="Choose strength and layers on this task: JSON lines of validation items.",
        ),
    ] = None,
    tune_strengths: Annotated[
        str | None, typer.Option(envvar="POLYHELM_TUNE_STRENGTHS", help="Strengths to sweep, such as 0.5,1,2,4.")
    ] = None,
    tune_layers: Annotated[
        list[str] | None,
        typer.Option(
            envvar="POLYHELM_TUNE_LAYERS", help="A set of layers to sweep, such as 8-12; repeat it for others."
        ),
    ] = None,
    tune_option: Annotated[
        list[str] | None,
        typer.Option(envvar="POLYHELM_TUNE_OPTION", help="Values of a fit's option, such as top_k=2,4,8; repeatable."),
    ] = None,
    tune_mode: Annotated[
        str | None, typer.Option(envvar="POLYHELM_TUNE_MODE", help="live (the default) or frozen.")
    ] = None,
    tune_objective: Annotated[
        str | None, typer.Option(envvar="POLYHELM_TUNE_OBJECTIVE", help="Of choices: accuracy (the default) or margin.")
    ] = None,
    tune_intervention: Annotated[
        str | None,
        typer.Option(
            envvar="POLYHELM_TUNE_INTERVENTION", help='Further fields, as JSON: {"apply": {"prompt": "all"}}.'
        ),
    ] = None,
    tune_perplexity: Annotated[
        float | None,
        typer.Option(envvar="POLYHELM_TUNE_PERPLEXITY", help="At most so many times the unsteered one's; 2."),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            envvar="POLYHELM_TEST_SET",
            exists=True,
            dir_okay=False,
            help="The test set, in the same form: refuse to tune on any item of it.",
        ),
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option(
            envvar="POLYHELM_CURVE", help="Where the curve goes, NAME.tuning.jsonl unless given; PNG beside it."
        ),
    ] = None,
) -> None:
    """Never called: its parameters become those of the commands."""


def spec_of(given: TuningOptions, default_strength: float | None) -> dict[str, Any] | None:
    """The `tune` of a spec; None without --tune. BadParameter for what can't be read."""
    if given.tune is None:
        named = [name for name, value in given._asdict().items() if value]
        if named:
            raise typer.BadParameter("is about tuning: give --tune, too", param_hint=f"--{named[0].replace('_', '-')}")
        return None
    fields: dict[str, Any] = {
        "items": read_rows(given.tune, "--tune"),
        "strengths": _strengths(given.tune_strengths, default_strength),
        "layers": [layers_named(each, "--tune-layers") for each in given.tune_layers or []] or None,
        "options": dict(_option(each) for each in given.tune_option or []),
        "mode": given.tune_mode,
        "objective": given.tune_objective,
        "intervention": _json(given.tune_intervention, "--tune-intervention"),
        "max_perplexity_ratio": given.tune_perplexity,
        "test": None if given.test is None else _digests(given.test),
        "data": {"name": given.tune.name},
    }
    return {name: value for name, value in fields.items() if value is not None}


def write_curve(given: TuningOptions, name: str, tuning: Any) -> list[Path]:
    """The curve as JSON lines, and drawn where matplotlib is installed. The files that were written."""
    from server.tuning.plot import draw, write_jsonl

    file = given.curve or Path(f"{name}.tuning.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(tuning, file)
    picture = file.with_suffix(".png")
    return [file, picture] if draw(tuning, name, picture) else [file]


def _strengths(text: str | None, default: float | None) -> list[float]:
    if text is None:
        unit = default or 1.0
        return [unit * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} aren't numbers: write them as 0.5,1,2", param_hint="--tune-strengths"
        ) from None


def _option(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    if not name or not values:
        raise typer.BadParameter(f"{text!r}: write it as top_k=2,4,8", param_hint="--tune-option")
    return name, [_value(each) for each in values.split(",")]


def _value(text: str) -> Any:
    """As JSON where it is some: 4 and true, but also mean."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(text: str | None, option: str) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"is not JSON: {error}", param_hint=option) from None


def _digests(file: Path) -> list[str]:
    from pydantic import ValidationError

    from server.tuning.task import Item

    digests = []
    for number, row in enumerate(read_rows(file, "--test")):
        try:
            # A test set's own split is what its items are refused by; here only their content counts.
            digests.append(Item.model_validate({**row, "split": "validation"}).digest)
        except (ValidationError, TypeError) as error:
            raise typer.BadParameter(f"{file}, item {number}: {error}", param_hint="--test") from None
    return digests
