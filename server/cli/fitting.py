"""What all commands of `polyhelm fit` share: their common options, reading the data, and running the fit."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import httpx
import typer
from pydantic import ValidationError

from server.progress import Reporter

if TYPE_CHECKING:
    from server.fit_methods.base import MethodSpec


class _Common(NamedTuple):
    """The options of every command, but those of its method and the file with its data."""

    name: str
    url: str | None
    model: str
    data_dir: Path
    layers: str | None
    strength: float | None
    description: str
    license: str | None
    data_license: str | None
    as_json: bool


def _common(
    name: Annotated[str, typer.Option(envvar="POLYHELM_NAME", help="The name to publish under.")],
    url: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_URL", help="Fit on this running server; else an engine is started here."),
    ] = None,
    model: Annotated[str, typer.Option(envvar="POLYHELM_MODEL", help="Without --url: the model.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(envvar="POLYHELM_DATA_DIR", help="Without --url: the data folder.")] = Path(
        "polyhelm-data"
    ),
    layers: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_LAYERS", help="Default layers of the artifact, such as 10-19 or 12,13."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(envvar="POLYHELM_STRENGTH", help="Default strength of the artifact.")
    ] = None,
    description: Annotated[str, typer.Option(envvar="POLYHELM_DESCRIPTION")] = "",
    license: Annotated[str | None, typer.Option(envvar="POLYHELM_LICENSE", help="Licence of the artifact.")] = None,
    data_license: Annotated[
        str | None, typer.Option(envvar="POLYHELM_DATA_LICENSE", help="Licence of the data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", envvar="POLYHELM_JSON", help="Print JSON, for programs.")] = False,
) -> None:
    """Never called: its parameters become those of the commands."""


def command(
    app: typer.Typer, method: str, data: str, fields: str
) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """Make a command of a function that turns a method's own options into the `options` of its spec.

    The data is read from the file of `--DATA`, JSON lines with such `fields`. An option that is None isn't sent, so
    that defaults are told in one place, the spec.
    """

    def decorate(options: Callable[..., dict[str, Any]]) -> Callable[..., None]:
        own = inspect.signature(options, eval_str=True).parameters.values()
        common = inspect.signature(_common, eval_str=True).parameters.values()

        def run(**given: Any) -> None:
            file: Path = given.pop(data)
            shared = _Common(**{name: given.pop(name) for name in _Common._fields})
            _run(method, data, file, shared, options(**given))

        help_text = f"JSON lines {fields}."
        variable = f"POLYHELM_{data.upper()}"
        rows = Annotated[Path, typer.Option(envvar=variable, exists=True, dir_okay=False, help=help_text)]
        parameters = [inspect.Parameter(data, inspect.Parameter.KEYWORD_ONLY, annotation=rows), *common, *own]
        keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in keyword_only}
        run.__doc__ = options.__doc__
        app.command(method)(run)
        return run

    return decorate


def _run(method: str, data: str, file: Path, common: _Common, options: dict[str, Any]) -> None:
    from server.api.errors import ApiError
    from server.fit_methods.registry import parse_spec, untagged
    from server.models import ModelError
    from steering_store.errors import StoreError

    options |= {
        "default_layers": None if common.layers is None else layers_named(common.layers),
        "default_strength": common.strength,
    }
    try:
        spec = parse_spec(
            {
                "method": method,
                "name": common.name,
                data: _read_rows(file, f"--{data}"),
                "options": {key: value for key, value in options.items() if value is not None},
                "data": {"name": file.name, "license": common.data_license},
                "description": common.description,
                "license": common.license,
            }
        )
    except ValidationError as error:
        first = untagged(error.errors()[0])
        fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 2)
    reporter = Reporter()
    try:
        if common.url:
            artifact = _remote(common.url, spec, reporter)
        else:
            artifact = asyncio.run(_local(spec, common.model, common.data_dir, reporter))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"{common.url}: {error}; start a server there, or correct --url", 1)
    except (ApiError, StoreError, ModelError) as error:
        fail(str(error), 1)
    typer.echo(json.dumps(artifact) if common.as_json else f"published {artifact['artifact']}")


def fail(message: str, code: int) -> Any:
    typer.echo(f"polyhelm: {message}", err=True)
    raise typer.Exit(code)


def layers_named(text: str) -> list[int]:
    """`10-12,20` is [10, 11, 12, 20]."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        layers = []
    if not layers:
        raise typer.BadParameter(f"{text!r} names no layers: write them as 10-19 or 12,13", param_hint="--layers")
    return layers


def _read_rows(file: Path, option: str) -> list[Any]:
    rows = []
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8: {error.reason}", param_hint=option) from None
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise typer.BadParameter(f"{file}, line {number}, is not JSON: {error}", param_hint=option) from None
    return rows


def _remote(url: str, spec: MethodSpec, reporter: Reporter) -> dict[str, Any]:
    from server.api.errors import ApiError

    show = reporter.progress(spec.name)
    with httpx.Client(base_url=url, timeout=60) as client:
        job = _checked(client.post("/v1/fits", json=spec.model_dump(mode="json")))
        shown = -1
        while job["status"] in ("queued", "running"):
            time.sleep(0.5)
            job = _checked(client.get(f"/v1/fits/{job['id']}"))
            done, total = job["progress"]["done"], job["progress"]["total"]
            if total and done != shown:
                if shown < 0 < done:
                    show(0, total)
                show(done, total)
                shown = done
    if job["status"] != "succeeded":
        raise ApiError(500, f"fit {job['id']} {job['status']}: {job['error']}")
    return job


def _checked(response: httpx.Response) -> dict[str, Any]:
    from server.api.errors import ApiError

    try:
        body: dict[str, Any] = response.json()
        if response.is_success and body["object"] == "fit":
            return body
        error = body["error"]
        refusal = ApiError(response.status_code, str(error["message"]), error.get("param"))
    except (ValueError, KeyError, TypeError, AttributeError):
        told = f"{response.url} answered {response.status_code}, and not as polyhelm does: {response.text[:200]}"
        refusal = ApiError(response.status_code, told)
    raise refusal


async def _local(spec: MethodSpec, model: str, data_dir: Path, reporter: Reporter) -> dict[str, Any]:
    from datetime import UTC, datetime

    from server.app import open_store
    from server.engine import frontend
    from server.fits import run_fit
    from server.models import model_identity, resolve_model
    from server.settings import Settings

    settings = Settings(model=model, data_dir=data_dir, port=0)
    resolved = resolve_model(model, data_dir, reporter.step)
    store = open_store(settings)
    args = frontend.parse_args(resolved, settings, [])
    reporter.step("starting the engine")
    try:
        async with frontend.open_engine(args, settings) as engine:
            publication = await run_fit(
                spec, engine, store, model_identity(resolved.path), datetime.now(UTC), reporter.progress(spec.name)
            )
    except frontend.EngineStartError as error:
        fail(str(error), 1)
    version = publication.version
    return {"artifact": version.ref, "digest": version.digest, "metrics": version.manifest.metrics}
