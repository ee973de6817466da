"""`polyhelm artifact push | pull | export | import | convert`: artifacts on their way to and from elsewhere."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from server.cli.artifact_output import (
    DEFAULT_DATA_DIR,
    AsJson,
    By,
    DataDir,
    Ref,
    StoreUrl,
    failures_named,
    opened,
    print_json,
    print_published,
)
from server.cli.convert import convert as convert_pickle
from server.cli.foreign import ForeignOptions, draft_of
from server.remote_sources import check_allowed
from server.settings import Settings
from steering_store import Publication, Store, hub
from steering_store.archive import export_archive, import_archive
from steering_store.errors import StoreError
from steering_store.formats import export_gguf, export_saelens
from steering_store.manifest import parse_manifest
from steering_store.remote import RemoteStore
from steering_store.transfer import pull as pull_version
from steering_store.transfer import push as push_version

MANIFEST = "manifest.json"


def remote(url: str) -> RemoteStore:
    check_allowed(url, Settings().allowed_remotes)
    return RemoteStore(url)


def push(
    ref: Ref,
    to: Annotated[str, typer.Option("--to", envvar="POLYHELM_PUSH_TO", help="The store, such as s3://bucket/prefix.")],
    by: By = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Copy a version into a store elsewhere; what is there already is left alone."""
    with failures_named():
        pushed = push_version(opened(data_dir, store), ref, remote(to), by=by)
    if as_json:
        print_json(pushed._asdict() | {"ref": pushed.ref, "store": to})
    else:
        typer.echo(f"{pushed.ref} {pushed.digest} {'pushed' if pushed.created else 'was there before'}")


def pull(
    ref: Ref,
    source: Annotated[
        str, typer.Option("--from", envvar="POLYHELM_PULL_FROM", help="The store, such as s3://bucket/prefix.")
    ],
    by: By = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Copy a version from a store elsewhere; `ref` is what it is called there."""
    with failures_named():
        version, created = pull_version(remote(source), ref, opened(data_dir, store, create=True), by=by)
    print_published(version, created, as_json)


def export(
    ref: Ref,
    target: Annotated[Path, typer.Argument(help="A new file (.tar, .gguf), or a new folder for SAELens.")],
    format: Annotated[
        str | None, typer.Option(envvar="POLYHELM_EXPORT_FORMAT", help="archive, gguf or saelens; else by the name.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(envvar="POLYHELM_LAYERS", help="For gguf: only these, such as 1,2,3.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write one version as one file, to be imported elsewhere, or in a format of another project."""
    wanted = format or {".tar": "archive", ".gguf": "gguf", "": "saelens"}.get(target.suffix)
    if wanted not in ("archive", "gguf", "saelens"):
        raise typer.BadParameter("archive, gguf or saelens", param_hint="--format")
    if target.exists():
        raise typer.BadParameter(f"{str(target)!r} exists: choose another name", param_hint="TARGET")
    try:
        chosen = None if layers is None else [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise typer.BadParameter("numbers with commas between them", param_hint="--layers") from None
    with failures_named():
        source = opened(data_dir, store)
        version = source.resolve(ref)
        with _whole_or_nothing(target):
            if wanted == "archive":
                with target.open("xb") as stream:
                    export_archive(source, version, stream)
            elif wanted == "gguf":
                export_gguf(version.manifest, source.load_tensors(version), target, chosen)
            else:
                export_saelens(version.manifest, source.load_tensors(version), target)
    if as_json:
        print_json({"ref": version.ref, "digest": version.digest, "path": str(target), "format": wanted})
    else:
        typer.echo(f"{version.ref} {version.digest} written to {target}")


def import_(
    name: Annotated[str, typer.Argument(help="The name to publish under.")],
    source: Annotated[
        str,
        typer.Argument(
            help="An archive of `export`, a file or folder of another project, or hf://org/repo@revision/path."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(envvar="POLYHELM_MODEL", help="Of another project: the model that it is for.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(envvar="POLYHELM_IMPORT_FORMAT", help="Of another project: its format, if not clear.")
    ] = None,
    point: Annotated[
        str | None, typer.Option(envvar="POLYHELM_POINT", help="Where it belongs, if the file doesn't say.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(envvar="POLYHELM_LAYER", min=0, help="Where it belongs, if the file doesn't say.")
    ] = None,
    norm_factor: Annotated[
        float | None, typer.Option(envvar="POLYHELM_NORM_FACTOR", help="What the SAE's inputs are multiplied by.")
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(
            envvar="POLYHELM_ACTIVATIONS",
            exists=True,
            dir_okay=False,
            help="An answer of POST /v1/activations with positions all: to measure an SAE on, and for h_norm.",
        ),
    ] = None,
    description: Annotated[str, typer.Option(envvar="POLYHELM_DESCRIPTION")] = "",
    license: Annotated[str | None, typer.Option(envvar="POLYHELM_LICENSE", help="Licence of the artifact.")] = None,
    strength: Annotated[float, typer.Option(envvar="POLYHELM_STRENGTH", help="Default strength.")] = 1.0,
    language: Annotated[
        list[str] | None, typer.Option(envvar="POLYHELM_LANGUAGE", help="Of another project: a language, such as sw.")
    ] = None,
    by: By = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Publish an archive, a file of another project, or what a repository of the Hugging Face hub holds."""
    with failures_named():
        target = opened(data_dir, store, create=True)
        options = ForeignOptions(
            model, data_dir, format, point, layer, norm_factor, activations, description, license, strength,
            tuple(language or ()), target.max_bytes,
        )  # fmt: skip
        version, created = _import(target, name, source, options, by)
    print_published(version, created, as_json)


def convert(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A pickle of tensors: .pt, .pth, .bin.")],
    target: Annotated[Path, typer.Argument(file_okay=False, help="The folder to write safetensors into.")],
    as_json: AsJson = False,
) -> None:
    """Turn a pickle into safetensors, without running what it may contain; then `import` the result."""
    with failures_named():
        paths = convert_pickle(source, target, Settings().max_artifact_bytes)
    if as_json:
        print_json([str(path) for path in paths])
    else:
        for path in paths:
            typer.echo(str(path))


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[None]:
    """Remove what was written to a target that wasn't there before, where that failed on the way."""
    try:
        yield
    except BaseException:
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        raise


def _import(store: Store, name: str, source: str, options: ForeignOptions, by: str | None) -> Publication:
    if not source.startswith(hub.SCHEME):
        return _import_path(store, name, Path(source), options, by)
    check_allowed(source, Settings().allowed_remotes)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = hub.download(hub.parse_source(source), Path(folder), max_bytes=store.max_bytes)
        return _import_path(store, name, snapshot.location, options, by, str(snapshot.source))


def _import_path(
    store: Store, name: str, path: Path, options: ForeignOptions, by: str | None, origin: str | None = None
) -> Publication:
    if not path.exists():
        raise StoreError(f"{str(path)!r} does not exist", "source")
    if path.suffix == ".tar":
        return import_archive(store, name, path, by=by)
    if (path / MANIFEST).is_file():
        return _publish_folder(store, name, path, by)
    draft = draft_of(path, options, origin)
    with tempfile.TemporaryDirectory() as folder:
        return store.publish(name, draft.manifest, draft.write(Path(folder)), by=by)


def _publish_folder(store: Store, name: str, folder: Path, by: str | None) -> Publication:
    """A folder in our own layout: a manifest, and the files that it names, beside it."""
    text = (folder / MANIFEST).read_bytes()
    manifest = parse_manifest(text)
    names = {site.file for site in manifest.sites} | ({manifest.labels} if manifest.labels else set())
    return store.publish(name, text, {each: folder / each for each in names}, by=by)
