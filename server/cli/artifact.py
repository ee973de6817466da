"""`polyhelm artifact`: list, show, publish and verify artifacts in a store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli import artifact_changes, artifact_transfer
from server.cli.artifact_output import (
    DEFAULT_DATA_DIR,
    AsJson,
    By,
    DataDir,
    Reason,
    Ref,
    StoreUrl,
    failures_named,
    opened,
    print_json,
    print_published,
    print_table,
    summary,
)
from steering_store import ArtifactVersion, Problem, Store
from steering_store.labels import Label
from steering_store.manifest import json_schema

app = typer.Typer(name="artifact", help="Versioned steering artifacts.", no_args_is_help=True)


@app.command("list")
def list_(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    kind: Annotated[str | None, typer.Option(envvar="POLYHELM_KIND", help="Only artifacts of this kind.")] = None,
    model: Annotated[
        str | None, typer.Option(envvar="POLYHELM_MODEL_FILTER", help="Only for this model or architecture.")
    ] = None,
    prefix: Annotated[str, typer.Option(envvar="POLYHELM_PREFIX", help="Only names that begin so.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the artifacts, each as of its highest version that isn't yanked."""
    with failures_named():
        rows = [row for row in _all(opened(data_dir, store), kind=kind, model=model) if row.ref.startswith(prefix)]
    versions = [row for row in rows if isinstance(row, ArtifactVersion)]
    for row in rows:
        if isinstance(row, Problem):
            typer.echo(f"damaged: {row.message}", err=True)
    if as_json:
        print_json([summary(version) for version in versions])
    else:
        print_table(("artifact", "kind", "layers", "model", "digest", "published"), [_cells(v) for v in versions])


@app.command()
def show(
    ref: Ref,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show one version with its aliases and its manifest."""
    with failures_named():
        source = opened(data_dir, store)
        version = source.resolve(ref)
        aliases = [alias.alias for alias in source.aliases(version.name) if alias.version == version.version]
    content = summary(version) | {"aliases": aliases}
    content |= {"manifest": version.manifest.model_dump(mode="json", exclude_none=True)}
    if as_json:
        print_json(content)
    else:
        print_table(("field", "value"), [(key, _text(value)) for key, value in _flat(content)])


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="The artifact's name.")],
    manifest: Annotated[
        Path, typer.Option(envvar="POLYHELM_MANIFEST", exists=True, dir_okay=False, help="Its manifest, as JSON.")
    ],
    files: Annotated[
        list[Path] | None, typer.Argument(exists=True, dir_okay=False, help="Its files; a preset has none.")
    ] = None,
    by: By = None,
    reason: Reason = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Publish files as the next version of an artifact; the same bytes again change nothing."""
    by_name = {path.name: path for path in files or ()}
    if len(by_name) < len(files or ()):
        raise typer.BadParameter("two files have the same name", param_hint="FILES")
    with failures_named():
        target = opened(data_dir, store, create=True)
        version, created = target.publish(name, manifest.read_bytes(), by_name, by=by, reason=reason)
    print_published(version, created, as_json)


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="One version; without it, all of them.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Hash what was published, and fail if a byte of it has changed."""
    with failures_named():
        problems = opened(data_dir, store).verify(ref)
    if as_json:
        print_json({"ok": not problems, "problems": [problem._asdict() for problem in problems]})
    for problem in problems:
        typer.echo(f"{problem.ref}: {problem.message}", err=True)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        typer.echo("nothing is damaged")


@app.command()
def features(
    ref: Ref,
    query: Annotated[str, typer.Argument(help="Words of the label; without them, all features that it names.")] = "",
    limit: Annotated[int, typer.Option(envvar="POLYHELM_LIMIT", min=1, help="At most so many.")] = 20,
    after: Annotated[int | None, typer.Option(envvar="POLYHELM_AFTER", help="Only features behind this index.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Find features of a sae by their labels, each with the text on which it fires most."""
    with failures_named():
        source = opened(data_dir, store)
        page = source.find_features(source.resolve(ref), query, after=after, limit=limit)
    if as_json:
        print_json({"features": [each.model_dump() for each in page.items], "has_more": page.has_more})
        return
    print_table(("index", "label", "activation", "fires most in"), [_feature_cells(each) for each in page.items])
    if page.has_more:
        typer.echo(f"there are more: --after {page.items[-1].index}", err=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a manifest."""
    print_json(json_schema())


app.add_typer(artifact_changes.alias_app, name="alias")
for command in (artifact_changes.history, artifact_changes.yank, artifact_changes.unyank, artifact_changes.delete):
    app.command()(command)
app.command()(artifact_changes.gc)
for command in (artifact_transfer.push, artifact_transfer.pull, artifact_transfer.export, artifact_transfer.convert):
    app.command()(command)
app.command("import")(artifact_transfer.import_)


def _all(store: Store, **filters: str | None) -> Iterator[ArtifactVersion | Problem]:
    after, has_more = None, True
    while has_more:
        rows, has_more = store.list_artifacts(after=after, **filters)
        yield from rows
        after = rows[-1].ref.partition("@")[0] if rows else None


def _cells(version: ArtifactVersion) -> tuple[str, ...]:
    manifest = version.manifest
    layers = _ranges(manifest.layers)
    model = manifest.model.name or manifest.model.architecture
    published = version.created_at.strftime("%Y-%m-%d %H:%M")
    return version.ref, manifest.kind, layers, model, version.digest[:19], published


def _feature_cells(feature: Label) -> tuple[str, ...]:
    top = next(iter(feature.examples), None)
    shown = ("", "") if top is None else (f"{top.activation:.3g}", " ".join(top.text.split()))
    return str(feature.index), feature.label or "", *shown


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] is `0-2,5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
