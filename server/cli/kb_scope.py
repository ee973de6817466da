"""`polyhelm kb train-scope`: fit what decides whether a question is about a fact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.artifact_output import AsJson, print_json
from server.progress import Reporter
from server.settings import Settings


def train_scope(
    questions: Annotated[
        Path,
        typer.Argument(
            help='JSON lines: {"questions": {"en": "...", "de": ["...", "..."]}}, all asking the same; and, if you have'
            ' them, {"out_of_scope": {"en": ["...", "..."]}}, which ask for nothing that is known.'
        ),
    ],
    output: Annotated[
        Path, typer.Option(envvar="POLYHELM_OUTPUT", help="The folder to write; POLYHELM_KB_SCOPE names it.")
    ],
    kind: Annotated[
        Literal["head", "threshold", "cross-encoder", "cascade"],
        typer.Option(
            envvar="POLYHELM_KIND",
            help="head (the default): a small network. threshold: on the cosine, per pair of languages. cross-encoder: "
            "the paper's, fine-tuned from --model. cascade: a head, and a cross-encoder where it is in doubt.",
        ),
    ] = "head",
    encoder: Annotated[
        str, typer.Option(envvar="POLYHELM_KB_ENCODER", help="What turns the questions into vectors.")
    ] = str(Settings.model_fields["kb_encoder"].default),
    model: Annotated[
        str,
        typer.Option(
            envvar="POLYHELM_MODEL",
            help="What a cross-encoder begins with: a folder, a hub id, or e5-small, the embedded encoder's weights.",
        ),
    ] = "e5-small",
    false_fires: Annotated[
        float,
        typer.Option(
            envvar="POLYHELM_FALSE_FIRES",
            min=0.0001,
            max=0.5,
            help="Share of near misses, questions whose own fact isn't there, that may be taken to be about another.",
        ),
    ] = 0.015,
    seed: Annotated[int, typer.Option(envvar="POLYHELM_SEED")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a scope decider on questions that ask for the same thing in different words or languages.

    The nearest other questions are the near misses that it learns to refuse. A tenth of the lines, and of the questions
    out of scope, is held out, and what the decider makes of it is printed.
    """
    import numpy as np

    from kb import encoders
    from kb.scope import ScopeError, pairs, storage, training

    report = Reporter()
    try:
        read = pairs.read_questions(questions)
        loaded = encoders.load(encoder)
        lines = len(read.groups)
        report.step(f"encoding the questions of {lines} lines")
        encoded = pairs.encode(read, loaded)
        order = np.random.default_rng(seed).permutation(lines)
        held = max(lines // 10, 10)
        fit = encoded.part(order[held:], [each for n, each in enumerate(encoded.out_of_scope) if n % 10])
        rest = encoded.part(order[:held], encoded.out_of_scope[::10])
        decider: storage.Storable
        if kind == "threshold":
            decider = training.fit_threshold(fit, loaded.identity, false_fires=false_fires, seed=seed)
        elif kind == "cross-encoder":
            decider = training.fit_reader(fit, model, report=report.step, seed=seed)
        else:
            head = training.fit_head(fit, loaded.identity, false_fires=false_fires, report=report.step, seed=seed)
            decider = head
            if kind == "cascade":
                learned, kept = training.split(fit, seed)
                reader = training.fit_reader(learned, model, report=report.step, seed=seed)
                report.step("weighing the two")
                decider = training.fit_cascade(kept, head, reader, false_fires=false_fires, seed=seed)
        measured = training.quality(decider, rest)._asdict()
        notes = {
            "questions": questions.name,
            "lines": lines,
            "out_of_scope": len(encoded.out_of_scope),
            "false_fires": false_fires,
            "held_out": measured,
        }
        storage.save(decider, output, notes)
    except (ScopeError, encoders.EncoderError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        print_json({"output": str(output), "kind": decider.name, "held_out": measured})
    else:
        fires = f"false fires {measured['false_fires']:.3f} where the fact isn't there"
        if rest.out_of_scope:
            fires += f" and {measured['out_of_scope']:.3f} on questions out of scope"
        typer.echo(f"{output}: of {held} lines held out, recall {measured['recall']:.3f}, {fires}")
