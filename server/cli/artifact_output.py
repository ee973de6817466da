"""What the artifact commands share: options, opening the store, failures, and printing."""

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

from server.remote_sources import check_allowed
from server.settings import Settings
from steering_store import ArtifactVersion, Store, parse_reference
from steering_store.errors import StoreError
from steering_store.remote_replica import open_store

DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="POLYHELM_DATA_DIR", help="The folder that holds artifacts/, kb/, models/.")
]
StoreUrl = Annotated[
    str | None,
    typer.Option("--store", envvar="POLYHELM_STORE", help="A store elsewhere, such as s3://bucket/prefix."),
]
AsJson = Annotated[bool, typer.Option("--json", envvar="POLYHELM_JSON", help="Print JSON, for programs.")]
By = Annotated[str | None, typer.Option(envvar=["POLYHELM_BY", "USER"], help="Who does it, for the history.")]
Reason = Annotated[str | None, typer.Option(envvar="POLYHELM_REASON", help="Why, for the history.")]
Ref = Annotated[str, typer.Argument(help="name, name@3, name@production or name@sha256:...")]
DEFAULT_DATA_DIR = Path("polyhelm-data")


@contextmanager
def failures_named() -> Iterator[None]:
    """Turn an error of the store or the disk into a line on standard error and exit code 1."""
    try:
        yield
    except (StoreError, OSError) as exc:
        typer.echo(f"error: {exc}", err=True)
        raise typer.Exit(1) from None


def opened(data_dir: Path, url: str | None, *, create: bool = False) -> Store:
    """The store that a command works on. Raises StoreError."""
    # A mistyped folder must not verify as "nothing is damaged".
    if url is None and not create and not (data_dir / "artifacts").is_dir():
        raise StoreError(f"no artifacts in {str(data_dir)!r}: publish one first, or correct --data-dir")
    settings = Settings()
    check_allowed(url, settings.allowed_remotes)
    return open_store(
        data_dir,
        url,
        cache_bytes=settings.store_cache_bytes,
        max_files=settings.max_artifact_files,
        max_bytes=settings.max_artifact_bytes,
    )


def one_version(store: Store, ref: str) -> ArtifactVersion:
    """The version that a change is about; the reference must name it, so that none is changed by accident."""
    if str(parse_reference(ref)) == parse_reference(ref).name:
        raise typer.BadParameter(f"name the version, as in {ref}@3", param_hint="REF")
    return store.resolve(ref)


def summary(version: ArtifactVersion) -> dict[str, Any]:
    """A version without its manifest."""
    return {
        "ref": version.ref,
        "name": version.name,
        "version": version.version,
        "kind": version.manifest.kind,
        "digest": version.digest,
        "created_at": version.created_at.isoformat(),
        "yanked": version.yanked,
    }


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table on a terminal, and lines with tabs elsewhere."""
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


def print_published(version: ArtifactVersion, created: bool, as_json: bool) -> None:
    """What a publication led to."""
    if as_json:
        print_json(summary(version) | {"created": created})
    else:
        typer.echo(f"{version.ref} {version.digest} {'published' if created else 'was published before'}")
