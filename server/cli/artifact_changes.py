"""`polyhelm artifact alias | history | yank | unyank | delete | gc`: what changes which versions there are."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.artifact_output import (
    DEFAULT_DATA_DIR,
    AsJson,
    By,
    DataDir,
    Reason,
    StoreUrl,
    failures_named,
    one_version,
    opened,
    print_json,
    print_table,
    summary,
)
from steering_store import ABSENT, Alias
from steering_store.garbage import GRACE_SECONDS

alias_app = typer.Typer(help="Names of versions that move.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The artifact's name.")]
AliasName = Annotated[str, typer.Argument(help="Such as production.")]
OneVersion = Annotated[str, typer.Argument(help="name@3 or name@sha256:...")]


@alias_app.command("list")
def list_aliases(
    name: Name, data_dir: DataDir = DEFAULT_DATA_DIR, store: StoreUrl = None, as_json: AsJson = False
) -> None:
    """List the aliases of an artifact."""
    with failures_named():
        aliases = opened(data_dir, store).aliases(name)
    if as_json:
        print_json([_alias(alias) for alias in aliases])
    else:
        columns = ("alias", "version", "moved", "by", "reason", "etag")
        print_table(columns, [_cells(alias) for alias in aliases])


@alias_app.command("set")
def set_alias(
    name: Name,
    alias: AliasName,
    version: Annotated[int, typer.Argument(min=1, help="The version that it shall point at.")],
    if_match: Annotated[
        str | None, typer.Option(envvar="POLYHELM_IF_MATCH", help="Only where the alias has this etag.")
    ] = None,
    new: Annotated[bool, typer.Option("--new", envvar="POLYHELM_NEW", help="Only where there is no alias.")] = False,
    by: By = None,
    reason: Reason = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Create or move an alias."""
    if new and if_match is not None:
        raise typer.BadParameter("give --new or --if-match, not both", param_hint="--new")
    with failures_named():
        moved = opened(data_dir, store).set_alias(
            name, alias, version, expected=ABSENT if new else if_match, by=by, reason=reason
        )
    if as_json:
        print_json(_alias(moved))
    else:
        typer.echo(f"{name}@{alias} is version {moved.version}, etag {moved.etag}")


@alias_app.command("delete")
def delete_alias(
    name: Name,
    alias: AliasName,
    if_match: Annotated[
        str | None, typer.Option(envvar="POLYHELM_IF_MATCH", help="Only where the alias has this etag.")
    ] = None,
    by: By = None,
    reason: Reason = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
) -> None:
    """Delete an alias."""
    with failures_named():
        opened(data_dir, store).delete_alias(name, alias, expected=if_match, by=by, reason=reason)
    typer.echo(f"{name}@{alias} is deleted")


def history(
    name: Name,
    alias: Annotated[str | None, typer.Option(envvar="POLYHELM_ALIAS", help="Of this alias only.")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show who published, moved aliases, yanked and deleted, when and why."""
    with failures_named():
        entries = opened(data_dir, store).history(name, alias)
    if as_json:
        print_json([vars(entry) | {"at": entry.at.isoformat()} for entry in entries])
    else:
        columns = ("at", "action", "alias", "from", "to", "by", "note", "reason")
        fields = ("action", "alias", "from_version", "to_version", "by", "note", "reason")
        rows = [(entry.at.strftime("%Y-%m-%d %H:%M"), *(_cell(getattr(entry, f)) for f in fields)) for entry in entries]
        print_table(columns, rows)


def yank(
    ref: OneVersion,
    by: By = None,
    reason: Reason = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Hide a version from lists and from names without a version."""
    with failures_named():
        target = opened(data_dir, store)
        found = one_version(target, ref)
        yanked = target.yank(found.name, found.version, by=by, reason=reason)
    if as_json:
        print_json(summary(yanked))
    else:
        typer.echo(f"{yanked.ref} is yanked")


def unyank(
    ref: OneVersion,
    by: By = None,
    reason: Reason = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show a yanked version again."""
    with failures_named():
        target = opened(data_dir, store)
        found = one_version(target, ref)
        shown = target.unyank(found.name, found.version, by=by, reason=reason)
    if as_json:
        print_json(summary(shown))
    else:
        typer.echo(f"{shown.ref} is shown again")


def delete(
    ref: OneVersion,
    by: By = None,
    reason: Reason = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
) -> None:
    """Delete a version for good; refused while an alias, a preset or a running request needs it."""
    with failures_named():
        target = opened(data_dir, store)
        found = one_version(target, ref)
        target.delete_version(found.name, found.version, by=by, reason=reason)
    typer.echo(f"{found.ref} is deleted; `polyhelm artifact gc --delete` frees its disk space after the grace period")


def gc(
    delete: Annotated[
        bool, typer.Option("--delete", envvar="POLYHELM_GC_DELETE", help="Remove them; else they are only listed.")
    ] = False,
    grace_hours: Annotated[
        float, typer.Option(envvar="POLYHELM_GC_GRACE_HOURS", min=0, help="Leave what is younger.")
    ] = GRACE_SECONDS / 3600,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Find the files on this machine that no version needs, and with --delete remove them."""
    with failures_named():
        garbage = opened(data_dir, store).collect_garbage(grace_seconds=grace_hours * 3600, dry_run=not delete)
    if as_json:
        print_json(vars(garbage))
    else:
        what = "would be removed" if garbage.dry_run else "were removed"
        typer.echo(f"{len(garbage.blobs)} files of artifacts and {len(garbage.tmp)} unfinished ones {what}, "
                   f"{garbage.size} bytes")  # fmt: skip


def _alias(alias: Alias) -> dict[str, object]:
    return vars(alias) | {"moved_at": alias.moved_at.isoformat()}


def _cells(alias: Alias) -> tuple[str, ...]:
    moved = alias.moved_at.strftime("%Y-%m-%d %H:%M")
    return alias.alias, str(alias.version), moved, _cell(alias.by), _cell(alias.reason), alias.etag


def _cell(value: object) -> str:
    return "" if value is None else str(value)
