"""`polyhelm key create | list | revoke`: who may call the server. A running one follows at once."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.artifact_output import DEFAULT_DATA_DIR, AsJson, DataDir, print_json, print_table
from server.keys import FILE, SCOPES, InvalidKey, Key, KeyStore, Limits

app = typer.Typer(name="key", help="API keys, their scopes, tenants and limits.", no_args_is_help=True)

ScopeName = StrEnum("ScopeName", [(scope, scope) for scope in sorted(SCOPES)])
"""The scopes, as typer takes a choice that may be repeated."""


@contextmanager
def opened(data_dir: Path, *, create: bool = False) -> Iterator[KeyStore]:
    """The keys of a data directory; an error of theirs is a line on standard error and exit code 1."""
    try:
        # A mistyped folder must not list as "no keys".
        if not create and not (data_dir / FILE).is_file():
            raise InvalidKey(f"no keys in {str(data_dir)!r}: create one first, or correct --data-dir")
        store = KeyStore(data_dir)
        try:
            yield store
        finally:
            store.close()
    except (InvalidKey, OSError, sqlite3.Error) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for the list.")],
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(
            "--scope",
            envvar="POLYHELM_KEY_SCOPE",
            help="What for; may be repeated. By default generate and read.",
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_KEY_TENANT", help="Whose artifacts it sees, TENANT--NAME, beside everybody's."),
    ] = None,
    days: Annotated[
        float | None, typer.Option(envvar="POLYHELM_KEY_DAYS", min=0, help="How long it is good; for ever by default.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(envvar="POLYHELM_KEY_REQUESTS_PER_MINUTE", min=1, help="By default any number.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(envvar="POLYHELM_KEY_TOKENS_PER_MINUTE", min=1, help="Of prompts and answers; any by default."),
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(envvar="POLYHELM_KEY_MAX_CONCURRENT", min=1, help="Requests at a time; any by default."),
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is told only now: what is kept can't be turned back into it."""
    limits = Limits(requests_per_minute, tokens_per_minute, max_concurrent)
    expires_at = None if days is None else time.time() + 86400 * days
    with opened(data_dir, create=True) as keys:
        key, token = keys.create(
            name,
            [each.value for each in scope] if scope else ["generate", "read"],
            tenant=tenant,
            limits=limits,
            expires_at=expires_at,
        )
    if as_json:
        print_json(_facts(key) | {"key": token})
    else:
        typer.echo(token)


@app.command("list")
def list_(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    with opened(data_dir) as keys:
        found = [_facts(key) for key in keys.list()]
    if as_json:
        print_json(found)
    else:
        columns = ("id", "name", "scopes", "tenant", "created", "expires", "state")
        print_table(columns, [tuple(_text(each[column]) for column in columns) for each in found])


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, from the list.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """End a key for good. Requests that run with it go on."""
    with opened(data_dir) as keys:
        key = keys.revoke(key_id)
    if as_json:
        print_json(_facts(key))
    else:
        typer.echo(f"{key.id} ({key.name}) is revoked")


def _facts(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "tenant": key.tenant,
        "requests_per_minute": key.limits.requests_per_minute,
        "tokens_per_minute": key.limits.tokens_per_minute,
        "max_concurrent": key.limits.max_concurrent,
        "created": _time(key.created_at),
        "expires": _time(key.expires_at),
        "state": key.problem() or "good",
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _text(value: object) -> str:
    return "" if value is None else ", ".join(value) if isinstance(value, list) else str(value)
