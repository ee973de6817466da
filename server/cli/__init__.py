"""The `polyhelm` command. One module per noun."""

from __future__ import annotations

import os

import typer

from server import __version__
from server.cli import artifact, doctor, fit, kb, kb_scope, key, serve

# Standard output is for results. Read by vLLM when it is imported, in this process and in the engine's.
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
# vLLM would send usage statistics and keep a file of them in the home folder.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

app = typer.Typer(name="polyhelm", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(artifact.app, name="artifact")
app.add_typer(fit.app, name="fit")
app.add_typer(kb.app, name="kb")
kb.app.command("train-scope")(kb_scope.train_scope)
app.add_typer(key.app, name="key")
app.command(**serve.CONTEXT)(serve.serve)
app.command()(doctor.doctor)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Serve a language model in which every request chooses its own activation interventions."""
