"""`polyhelm fit`: fit an artifact, on a running server or on an engine started for it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
from pydantic import ValidationError

from server.progress import Reporter

if TYPE_CHECKING:
    from server.fits import FitSpec

app = typer.Typer(help="Fit an artifact from data.", no_args_is_help=True)

Pairs = Annotated[
    Path,
    typer.Option(
        envvar="POLYHELM_PAIRS", exists=True, dir_okay=False, help='JSON lines {"positive": ..., "negative": ...}.'
    ),
]


@app.callback()
def _group() -> None:
    """Fit an artifact from data."""


@app.command()
def caa(
    pairs: Pairs,
    name: Annotated[str, typer.Option(envvar="POLYHELM_NAME", help="The name to publish under.")],
    url: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_URL", help="Fit on this running server; else an engine is started here."),
    ] = None,
    model: Annotated[str, typer.Option(envvar="POLYHELM_MODEL", help="Without --url: the model.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(envvar="POLYHELM_DATA_DIR", help="Without --url: the data folder.")] = Path(
        "polyhelm-data"
    ),
    variant: Annotated[
        str, typer.Option(envvar="POLYHELM_VARIANT", help="mean_difference or pca.")
    ] = "mean_difference",
    pooling: Annotated[str, typer.Option(envvar="POLYHELM_POOLING", help="last or mean.")] = "last",
    layers: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_LAYERS", help="Default layers of the artifact, such as 10-19 or 12,13."),
    ] = None,
    strength: Annotated[
        float, typer.Option(envvar="POLYHELM_STRENGTH", help="Default strength of the artifact.")
    ] = 1.0,
    description: Annotated[str, typer.Option(envvar="POLYHELM_DESCRIPTION")] = "",
    license: Annotated[str | None, typer.Option(envvar="POLYHELM_LICENSE", help="Licence of the artifact.")] = None,
    data_license: Annotated[
        str | None, typer.Option(envvar="POLYHELM_DATA_LICENSE", help="Licence of the pairs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", envvar="POLYHELM_JSON", help="Print JSON, for programs.")] = False,
) -> None:
    """Contrastive activation addition: the mean difference, or the first principal component, of pairs of texts."""
    from server.api.errors import ApiError
    from server.fits import FitSpec
    from server.models import ModelError
    from steering_store.errors import StoreError

    try:
        body = {
            "method": "caa",
            "name": name,
            "pairs": _read_pairs(pairs),
            "options": {
                "variant": variant,
                "pooling": pooling,
                "default_layers": None if layers is None else _layers(layers),
                "default_strength": strength,
            },
            "data": {"name": pairs.name, "license": data_license},
            "description": description,
            "license": license,
        }
        spec = FitSpec.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 2)
    reporter = Reporter()
    try:
        artifact = _remote(url, spec, reporter) if url else asyncio.run(_local(spec, model, data_dir, reporter))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _fail(f"{url}: {error}; start a server there, or correct --url", 1)
    except (ApiError, StoreError, ModelError) as error:
        _fail(str(error), 1)
    typer.echo(json.dumps(artifact) if as_json else f"published {artifact['artifact']}")


def _fail(message: str, code: int) -> Any:
    typer.echo(f"polyhelm: {message}", err=True)
    raise typer.Exit(code)


def _layers(text: str) -> list[int]:
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


def _read_pairs(file: Path) -> list[Any]:
    rows = []
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8: {error.reason}", param_hint="--pairs") from None
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise typer.BadParameter(f"{file}, line {number}, is not JSON: {error}", param_hint="--pairs") from None
    return rows


def _remote(url: str, spec: FitSpec, reporter: Reporter) -> dict[str, Any]:
    from server.api.errors import ApiError

    show = reporter.progress(spec.name)
    with httpx.Client(base_url=url, timeout=60) as client:
        job = _checked(client.post("/v1/fits", json=spec.model_dump()))
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


async def _local(spec: FitSpec, model: str, data_dir: Path, reporter: Reporter) -> dict[str, Any]:
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
        _fail(str(error), 1)
    version = publication.version
    return {"artifact": version.ref, "digest": version.digest, "metrics": version.manifest.metrics}
