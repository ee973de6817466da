"""`polyhelm artifact`: list, show, publish and verify artifacts in a data directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steering_store import ArtifactVersion, Store
from steering_store.errors import StoreError

app = typer.Typer(name="artifact", help="Versioned steering artifacts.", no_args_is_help=True)

DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="POLYHELM_DATA_DIR", help="The folder that holds artifacts/, kb/, models/.")
]
AsJson = Annotated[bool, typer.Option("--json", envvar="POLYHELM_JSON", help="Print JSON, for programs.")]
DEFAULT_DATA_DIR = Path("polyhelm-data")


@app.command("list")
def list_(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    kind: Annotated[str | None, typer.Option(envvar="POLYHELM_KIND", help="Only artifacts of this kind.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the artifacts, each as of its highest version."""
    with _failures_named():
        versions = list(_all(_open(data_dir), kind))
    rows = [_summary(version) for version in versions]
    if as_json:
        _print_json(rows)
    else:
        _print_table(("artifact", "kind", "layers", "model", "digest", "published"), [_cells(v) for v in versions])


@app.command()
def show(
    ref: Annotated[str, typer.Argument(help="name, name@3 or name@sha256:...")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Show one version with its manifest."""
    with _failures_named():
        version = _open(data_dir).resolve(ref)
    content = _summary(version) | {"manifest": version.manifest.model_dump(mode="json", exclude_none=True)}
    if as_json:
        _print_json(content)
    else:
        _print_table(("field", "value"), [(key, _text(value)) for key, value in _flat(content)])


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="The artifact's name.")],
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Its .safetensors files.")],
    manifest: Annotated[
        Path, typer.Option(envvar="POLYHELM_MANIFEST", exists=True, dir_okay=False, help="Its manifest, as JSON.")
    ],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Publish files as the next version of an artifact; the same bytes again change nothing."""
    by_name = {path.name: path for path in files}
    if len(by_name) < len(files):
        raise typer.BadParameter("two files have the same name", param_hint="FILES")
    with _failures_named():
        version, created = _open(data_dir, create=True).publish(name, manifest.read_bytes(), by_name)
    if as_json:
        _print_json(_summary(version) | {"created": created})
    else:
        typer.echo(f"{version.ref} {version.digest} {'published' if created else 'was published before'}")


@app.command()
def verify(
    ref: Annotated[str | None, typer.Argument(help="One version; without it, all of them.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Hash what was published, and fail if a byte of it has changed."""
    with _failures_named():
        problems = _open(data_dir).verify(ref)
    if as_json:
        _print_json({"ok": not problems, "problems": [problem._asdict() for problem in problems]})
    for problem in problems:
        typer.echo(f"{problem.ref}: {problem.message}", err=True)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        typer.echo("nothing is damaged")


@contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except (StoreError, OSError) as exc:
        typer.echo(f"error: {exc}", err=True)
        raise typer.Exit(1) from None


def _open(data_dir: Path, *, create: bool = False) -> Store:
    root = data_dir / "artifacts"
    # A mistyped folder must not verify as "nothing is damaged".
    if not create and not root.is_dir():
        raise StoreError(f"no artifacts in {str(data_dir)!r}: publish one first, or correct --data-dir")
    return Store(root)


def _all(store: Store, kind: str | None) -> Iterator[ArtifactVersion]:
    after, has_more = None, True
    while has_more:
        items, has_more = store.list_artifacts(kind=kind, after=after)
        yield from items
        after = items[-1].name if items else None


def _summary(version: ArtifactVersion) -> dict[str, Any]:
    return {
        "ref": version.ref,
        "name": version.name,
        "version": version.version,
        "kind": version.manifest.kind,
        "digest": version.digest,
        "created_at": version.created_at.isoformat(),
    }


def _cells(version: ArtifactVersion) -> tuple[str, ...]:
    manifest = version.manifest
    layers = _ranges(manifest.layers)
    model = manifest.model.name or manifest.model.architecture
    published = version.created_at.strftime("%Y-%m-%d %H:%M")
    return version.ref, manifest.kind, layers, model, version.digest[:19], published


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


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    console = Console()
    if not console.is_terminal:
        # A pipe gets tab-separated lines, whole: a table would be cut to a width that nobody chose.
        for row in rows:
            typer.echo("\t".join(row))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
