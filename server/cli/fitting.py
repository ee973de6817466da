"""What all commands of `polyhelm fit` share: their common options, reading the data, and running the fit."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import httpx
import typer
from pydantic import ValidationError

from server.cli import tuning
from server.cli.reading import layers_named, read_rows
from server.cli.tuning import TuningOptions
from server.progress import Reporter

if TYPE_CHECKING:
    from server.fit_methods.base import MethodSpec
    from steering_store.tuning import Tuning


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
    app: typer.Typer, method: str, data: str, fields: str, **more: str
) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """Make a command of a function that turns a method's own options into the `options` of its spec.

    The data is read from the file of `--DATA`, JSON lines with such `fields`; `more` are further files of data that may
    be given. An option that is None isn't sent, so that defaults are told in one place, the spec.
    """

    def decorate(options: Callable[..., dict[str, Any]]) -> Callable[..., None]:
        own = inspect.signature(options, eval_str=True).parameters.values()
        common = inspect.signature(_common, eval_str=True).parameters.values()
        tune = inspect.signature(tuning.options, eval_str=True).parameters.values()

        def run(**given: Any) -> None:
            files = {name: given.pop(name) for name in (data, *more)}
            shared = _Common(**{name: given.pop(name) for name in _Common._fields})
            tuned = TuningOptions(**{name: given.pop(name) for name in TuningOptions._fields})
            _run(method, files, shared, tuned, options(**given))

        parameters = [_file(data, fields, required=True), *common]
        parameters += [_file(name, each, required=False) for name, each in more.items()]
        keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in [*parameters, *own, *tune]]
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in keyword_only}
        run.__doc__ = options.__doc__
        app.command(method)(run)
        return run

    return decorate


def _file(name: str, fields: str, *, required: bool) -> inspect.Parameter:
    """An option that names a file of JSON lines."""
    option = typer.Option(envvar=f"POLYHELM_{name.upper()}", exists=True, dir_okay=False, help=f"JSON lines {fields}.")
    if required:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[Path, option])
    kind = Annotated[Path | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)


def _run(
    method: str, files: dict[str, Path | None], common: _Common, tuned: TuningOptions, options: dict[str, Any]
) -> None:
    from server.api.errors import ApiError
    from server.fit_methods.registry import parse_spec, untagged
    from server.models import ModelError
    from steering_store.errors import StoreError

    given = {name: file for name, file in files.items() if file is not None}
    tune = tuning.spec_of(tuned, common.strength)
    options |= {
        "default_layers": None if common.layers is None else layers_named(common.layers),
        "default_strength": common.strength,
    }
    try:
        spec = parse_spec(
            {
                "method": method,
                "name": common.name,
                **{name: read_rows(file, f"--{name}") for name, file in given.items()},
                **({} if tune is None else {"tune": tune}),
                "options": {key: value for key, value in options.items() if value is not None},
                "data": {"name": next(iter(given.values())).name, "license": common.data_license},
                "description": common.description,
                "license": common.license,
            }
        )
    except ValidationError as error:
        first = untagged(error.errors()[0])
        fail(": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))), 2)
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
    told = [f"published {artifact['artifact']}"]
    if (found := artifact.pop("tuning", None)) is not None:
        told += _told(found)
        told += [f"wrote {path}" for path in tuning.write_curve(tuned, common.name, found)]
    typer.echo(json.dumps(artifact) if common.as_json else "\n".join(told))


def _told(found: Tuning) -> list[str]:
    """What tuning chose, and what it is worth."""
    best, baseline = found.best, found.baseline
    chosen = f"chose strength {best.strength:g} at layers {best.layers} {best.options or ''}".rstrip()
    worth = f"{found.objective} {best.effect:.4g}, without steering {baseline.effect:.4g}"
    return [f"{chosen}: {worth}"] + (["no point is better than no steering"] if best.effect <= baseline.effect else [])


def fail(message: str, code: int) -> Any:
    typer.echo(f"polyhelm: {message}", err=True)
    raise typer.Exit(code)


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
        return job | _tuning_of(client, job["artifact"]) if spec.tune is not None else job


def _tuning_of(client: httpx.Client, artifact: str) -> dict[str, Any]:
    from steering_store.tuning import Tuning

    name, _, version = artifact.partition("@")
    body = client.get(f"/v1/artifacts/{name}/versions/{version}").raise_for_status().json()
    return {"tuning": Tuning.model_validate(body["manifest"]["tuning"])}


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

    from server import experts
    from server.app import open_store
    from server.engine import frontend
    from server.fits import run_fit
    from server.models import model_identity, resolve_model
    from server.settings import Settings

    settings = Settings(model=model, data_dir=data_dir, port=0)
    # The same command finds there what it had done before it was interrupted.
    digest = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    resolved = resolve_model(model, data_dir, reporter.step)
    store = open_store(settings)
    args = frontend.parse_args(resolved, settings, [])
    reporter.step("starting the engine")
    try:
        async with frontend.open_engine(args, settings) as engine:
            publication = await run_fit(
                spec,
                engine,
                store,
                model_identity(resolved.path),
                datetime.now(UTC),
                reporter.progress(spec.name),
                work=data_dir / "fits" / f"{digest[:16]}.local",
                expert=lambda name: experts.found(name, data_dir),
            )
    except frontend.EngineStartError as error:
        fail(str(error), 1)
    version = publication.version
    found = {"artifact": version.ref, "digest": version.digest, "metrics": version.manifest.metrics}
    tuning_of = version.manifest.tuning
    return found if tuning_of is None else found | {"tuning": tuning_of}
