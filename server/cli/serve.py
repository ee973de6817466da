"""`polyhelm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

PrefixCache = Literal["auto", "cache_salt"]
CONTEXT: dict[str, Any] = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(envvar="POLYHELM_MODEL", help="Folder, hub id, or an embedded model.")
    ] = "smollm2",
    host: Annotated[str, typer.Option(envvar="POLYHELM_HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="POLYHELM_PORT", min=0, max=65535)] = 8000,
    data_dir: Annotated[
        Path, typer.Option(envvar="POLYHELM_DATA_DIR", help="The folder that holds artifacts/, models/ and fits/.")
    ] = Path("polyhelm-data"),
    store: Annotated[
        str | None,
        typer.Option(
            envvar="POLYHELM_STORE", help="Where the artifacts are, if not there, such as s3://bucket/prefix."
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option(envvar="POLYHELM_DEMO", help="Fit the demo artifacts if they are missing.")
    ] = False,
    bank_bytes: Annotated[
        int, typer.Option(envvar="POLYHELM_BANK_BYTES", min=4096, help="What artifacts may take of the device.")
    ] = 256 << 20,
    prefix_cache: Annotated[
        PrefixCache,
        typer.Option(
            envvar="POLYHELM_PREFIX_CACHE",
            help="Keep programs apart by tagged blocks where that works, or always by salt.",
        ),
    ] = "auto",
) -> None:
    """Serve a model. Every other option is vLLM's own and goes to it unchanged, such as --dtype or --max-model-len."""
    from kb.encoders import EncoderError
    from kb.errors import KbError
    from server.app import serve as serve_app
    from server.engine.frontend import EngineDied, EngineStartError
    from server.models import ModelError
    from server.progress import Reporter
    from server.settings import Settings
    from steering_store.errors import StoreError

    settings = Settings(
        model=model,
        host=host,
        port=port,
        data_dir=data_dir,
        store=store,
        demo=demo,
        bank_bytes=bank_bytes,
        prefix_cache=prefix_cache,
    )
    try:
        serve_app(settings, context.args, Reporter())
    except (ModelError, EngineStartError, EngineDied, StoreError, KbError, EncoderError, OSError) as error:
        typer.echo(f"polyhelm: {error}", err=True)
        raise typer.Exit(1) from error
