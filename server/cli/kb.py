"""`polyhelm kb`: import, query, export, and look after collections in a data folder, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from server.cli.artifact_output import DEFAULT_DATA_DIR, AsJson, DataDir, print_json, print_table
from server.settings import Settings

if TYPE_CHECKING:
    from kb.collection import Collection
    from kb.encoders import Encoder
    from kb.facts import Fact
    from kb.imports import LineOutcome, Summary
    from kb.knowledge_base import KnowledgeBase

app = typer.Typer(name="kb", help="Facts, and the collections that they are in.", no_args_is_help=True)

PIECE_BYTES = 1 << 20
Name = Annotated[str, typer.Argument(metavar="COLLECTION", help="The collection's name.")]
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="POLYHELM_KB_URL", help="Where the knowledge base is, if not in the data folder."),
]
EncoderName = Annotated[
    str, typer.Option("--encoder", envvar="POLYHELM_KB_ENCODER", help="What turns texts into vectors.")
]
DEFAULT_ENCODER = str(Settings.model_fields["kb_encoder"].default)


@app.command("import")
def import_(
    name: Name,
    file: Annotated[Path, typer.Argument(help="One fact a line, as JSON; - is standard input.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    create: Annotated[
        bool, typer.Option(envvar="POLYHELM_CREATE", help="Make the collection if there is none.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write the facts of a file. Sent again, it changes nothing; what was written before an error is kept."""
    from kb.imports import Importer

    with failures_named(), _source(file) as (stream, size), opened(data_dir, url, create=create) as base:
        collection, encode = _target(base, name, encoder, create)
        importer = Importer(collection, encode, Settings().max_fact_bytes)
        try:
            with _progress(f"{name}: facts", size) as show:
                while piece := stream.read(PIECE_BYTES):
                    importer.feed(piece)
                    show(len(piece))
                importer.finish()
        finally:
            importer.close()
            _print_summary(importer.summary, as_json)
    if importer.summary.failed:
        raise typer.Exit(1)


@app.command()
def query(
    name: Name,
    text: Annotated[str, typer.Argument(help="A question, in any language of the encoder.")],
    top_k: Annotated[int, typer.Option(envvar="POLYHELM_TOP_K", min=1, max=1000, help="How many facts.")] = 5,
    language: Annotated[str | None, typer.Option(envvar="POLYHELM_LANGUAGE", help="Only facts in this one.")] = None,
    at: Annotated[datetime | None, typer.Option(envvar="POLYHELM_AT", help="Only facts that hold then.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Find the facts nearest to a question. Scores are cosines."""
    from kb.filters import Filter

    where = Filter(language=[language]) if language else None
    with failures_named(), opened(data_dir, url) as base:
        collection = base.collection(name)
        vectors = _matching_encoder(collection, encoder).encode_queries([text])
        (hits,) = collection.search(vectors, top_k, where=where, at=at)
    if as_json:
        print_json([{"score": hit.score, "fact": fact_json(hit.fact)} for hit in hits])
    else:
        rows = [(f"{hit.score:.3f}", hit.fact.id, hit.fact.key, hit.fact.answer or "") for hit in hits]
        print_table(("score", "id", "question or text", "answer"), rows)


@app.command()
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="Where to; - is standard output.")] = Path("-"),
    embeddings: Annotated[
        bool, typer.Option(envvar="POLYHELM_EMBEDDINGS", help="With vectors, so that an import needs no encoder.")
    ] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
) -> None:
    """Write every fact of a collection as a line of JSON, as `import` takes it."""
    with failures_named(), opened(data_dir, url) as base:
        collection = base.collection(name)
        with _sink(file) as out, _progress(f"{name}: facts", collection.stats().facts) as show:
            for fact, vector in collection.each():
                line = draft_json(fact) | ({"embedding": vector.tolist()} if embeddings else {})
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                show(1)


@app.command()
def rebuild(name: Name, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, as_json: AsJson = False) -> None:
    """Make the index anew from the facts, and keep it on disk."""
    with failures_named(), opened(data_dir, url) as base:
        collection = base.collection(name)
        made = collection.rebuild() | {"snapshot": collection.snapshot()}
    _print_fields(made, as_json)


@app.command()
def stats(
    name: Annotated[str | None, typer.Argument(metavar="[COLLECTION]", help="Without it, all of them.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show how many facts collections have, and of which encoder they are."""
    with failures_named(), opened(data_dir, url) as base:
        infos = base.collections() if name is None else [base.collection(name).info]
        told = [
            {
                "collection": info.name,
                "facts": found.facts,
                "deleted": found.deleted,
                "last_seq": found.last_seq,
                "encoder": info.encoder._asdict(),
                "conflicts": info.conflicts,
            }
            for info in infos
            for found in [base.collection(info.name).stats()]
        ]
    if as_json:
        print_json(told)
    else:
        columns = ("collection", "facts", "deleted", "last_seq", "encoder", "conflicts")
        rows = [tuple(str(each[key]["name"] if key == "encoder" else each[key]) for key in columns) for each in told]
        print_table(columns, rows)


@contextmanager
def failures_named() -> Iterator[None]:
    """Turn an error of the knowledge base, an encoder or the disk into a line on standard error and exit code 1."""
    from kb.encoders import EncoderError
    from kb.errors import KbError

    try:
        yield
    except (KbError, EncoderError, OSError) as exc:
        typer.echo(f"error: {exc}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def opened(data_dir: Path, url: str | None, *, create: bool = False) -> Iterator[KnowledgeBase]:
    """The knowledge base that a command works on. Raises KbError."""
    from kb.errors import CollectionNotFound
    from kb.knowledge_base import KnowledgeBase

    # A mistyped folder must not look like an empty knowledge base.
    if url is None and not create and not (data_dir / "kb").is_dir():
        raise CollectionNotFound(f"no knowledge base in {str(data_dir)!r}: import facts first, or correct --data-dir")
    base = KnowledgeBase.open(url or data_dir / "kb")
    try:
        yield base
    finally:
        base.close()


def fact_json(fact: Fact) -> dict[str, Any]:
    """A fact with everything that is known of it, as JSON."""
    return {
        **draft_json(fact),
        "content_hash": fact.content_hash,
        "version": fact.version,
        "seq": fact.seq,
        "created_at": fact.created_at.isoformat(),
        "updated_at": fact.updated_at.isoformat(),
    }


def draft_json(fact: Fact) -> dict[str, Any]:
    """What makes the same fact again."""
    from kb.facts import FactDraft

    values = {name: getattr(fact, name) for name in FactDraft.model_fields if name != "embedding"}
    for name in ("valid_from", "valid_to"):
        values[name] = None if values[name] is None else values[name].isoformat()
    return {name: value for name, value in values.items() if value is not None and value != () and value != {}}


def _target(base: KnowledgeBase, name: str, encoder: str, create: bool) -> tuple[Collection, Any]:
    """The collection, and what makes vectors for it, asked for only when a fact comes without one."""
    from kb.encoders import load
    from kb.errors import CollectionNotFound

    try:
        collection = base.collection(name)
    except CollectionNotFound:
        if not create:
            raise
        collection, _ = base.create(name, load(encoder).identity)
    return collection, lambda texts: _matching_encoder(collection, encoder).encode_documents(texts)


def _matching_encoder(collection: Collection, name: str) -> Encoder:
    """Raises EncoderMismatch where the encoder isn't the collection's."""
    from kb.encoders import load
    from kb.errors import EncoderMismatch

    encoder = load(name)
    if encoder.identity != collection.encoder:
        raise EncoderMismatch(
            f"collection {collection.name!r} is of encoder {collection.encoder.name!r}, and {name!r} is another; name"
            " that one with --encoder, or give facts an 'embedding'",
            "encoder",
        )
    return encoder


@contextmanager
def _source(file: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    if str(file) == "-":
        yield sys.stdin.buffer, None
        return
    with file.open("rb") as stream:
        yield stream, file.stat().st_size


@contextmanager
def _sink(file: Path) -> Iterator[BinaryIO]:
    if str(file) == "-":
        yield sys.stdout.buffer
        return
    with file.open("wb") as stream:
        yield stream


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Any]:
    """A callback that takes how much was done since the last time; a bar, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _print_summary(summary: Summary, as_json: bool) -> None:
    counts = {
        name: getattr(summary, name) for name in ("lines", "created", "updated", "unchanged", "superseded", "failed")
    }
    if as_json:
        print_json(counts | {"errors": [_error_json(result) for result in summary.errors]})
        return
    typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
    for result in summary.errors:
        typer.echo(f"error: line {result.line}: {result.outcome.error}", err=True)


def _error_json(result: LineOutcome) -> dict[str, Any]:
    error = result.outcome.error
    return {
        "line": result.line,
        "id": result.outcome.id,
        "message": str(error),
        "param": None if error is None else error.param,
    }


def _print_fields(content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(content)
    else:
        print_table(("field", "value"), [(key, str(value)) for key, value in content.items()])
