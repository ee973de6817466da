"""`polyhelm fit`: fit an artifact, on a running server or on an engine started for it. A command per method; what they
share is in fitting.py.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli.fitting import command

app = typer.Typer(help="Fit an artifact from data.", no_args_is_help=True)

Pooling = Annotated[str | None, typer.Option(envvar="POLYHELM_POOLING", help="last (the default) or mean.")]


@app.callback()
def _group() -> None:
    """Fit an artifact from data."""


@command(app, "caa", "pairs", '{"positive": ..., "negative": ...}')
def caa(
    variant: Annotated[
        str | None, typer.Option(envvar="POLYHELM_VARIANT", help="mean_difference (the default) or pca.")
    ] = None,
    pooling: Pooling = None,
) -> dict[str, Any]:
    """Contrastive activation addition: the mean difference, or the first principal component, of pairs of texts."""
    return {"variant": variant, "pooling": pooling}


@command(app, "sadi", "pairs", '{"prompt": ..., "positive": ..., "negative": ...}')
def sadi(
    component: Annotated[
        str | None, typer.Option(envvar="POLYHELM_COMPONENT", help="heads (the default), neurons, hidden or mlp.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(envvar="POLYHELM_TOP_K", help="Elements over all layers; 6 heads, 100 neurons, else 10."),
    ] = None,
    selection: Annotated[
        str | None, typer.Option(envvar="POLYHELM_SELECTION", help="signed_top (the default) or abs_top.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            envvar="POLYHELM_FORM", help="adaptive (the default), or fixed: the paper's ablation, a steering vector."
        ),
    ] = None,
) -> dict[str, Any]:
    """SADI: scale the heads, neurons or dimensions that tell right answers from wrong ones."""
    return {"component": component, "top_k": top_k, "selection": selection, "form": form}


@command(app, "incline", "pairs", '{"source": ..., "target": ...}')
def incline(
    source_language: Annotated[
        str, typer.Option(envvar="POLYHELM_SOURCE_LANGUAGE", help="Of the sources, as a tag such as sw.")
    ],
    target_language: Annotated[
        str | None, typer.Option(envvar="POLYHELM_TARGET_LANGUAGE", help="Of the targets; en unless given.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(envvar="POLYHELM_COMPONENT", help="hidden (the default), attention or ffn.")
    ] = None,
    pooling: Pooling = None,
    solver: Annotated[
        str | None, typer.Option(envvar="POLYHELM_SOLVER", help="ridge (the default), or min_norm, the paper's.")
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            envvar="POLYHELM_RIDGE",
            help="In units of the mean squared length of a state; by held-out error unless given.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(envvar="POLYHELM_RANK", help="Store the best map of this rank; the whole map unless given."),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            envvar="POLYHELM_MIX",
            help="none (the default), source_first or target_first: join every second pair, as the released code.",
        ),
    ] = None,
) -> dict[str, Any]:
    """INCLINE: a linear map per layer from a language's states to another's, from aligned translations."""
    return {
        "source_language": source_language,
        "target_language": target_language,
        "component": component,
        "pooling": pooling,
        "solver": solver,
        "ridge": ridge,
        "rank": rank,
        "mix": mix,
    }


@command(app, "direction", "pairs", '{"positive": ..., "negative": ...}')
def direction(
    extractor: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_EXTRACTOR", help="mean_difference (the default), pca, logistic or rfm."),
    ] = None,
    pooling: Pooling = None,
    penalty: Annotated[
        float | None, typer.Option(envvar="POLYHELM_PENALTY", help="Of the logistic probe; 0.01 unless given.")
    ] = None,
    everywhere: Annotated[
        int | None,
        typer.Option(envvar="POLYHELM_EVERYWHERE", help="Use this layer's vector at all layers, for ablation."),
    ] = None,
) -> dict[str, Any]:
    """A direction by any extractor, to steer along, to ablate, or to read a condition from."""
    return {"extractor": extractor, "pooling": pooling, "penalty": penalty, "everywhere": everywhere}


@command(app, "shared_neurons", "inputs", '{"texts": {"en": ..., "de": ...}}')
def shared_neurons(
    form: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_FORM", help="category (the default), or clas: more partial, less specific."),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(
            envvar="POLYHELM_CATEGORY",
            help="all_shared (the default), partial_shared, specific or non_activated.",
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(envvar="POLYHELM_SHARE", help="Of the inputs in which a neuron must belong to it; 0.5."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(envvar="POLYHELM_THRESHOLD", help="Above it a neuron is active; 0.")
    ] = None,
    beta: Annotated[float | None, typer.Option(envvar="POLYHELM_BETA", help="CLAS; 0.2.")] = None,
    gamma: Annotated[float | None, typer.Option(envvar="POLYHELM_GAMMA", help="CLAS; 0.2.")] = None,
    control: Annotated[
        int | None,
        typer.Option(envvar="POLYHELM_CONTROL", help="A seed: as many random neurons of each layer instead."),
    ] = None,
) -> dict[str, Any]:
    """The neurons that languages share, or don't, to deactivate or to scale."""
    return {
        "form": form,
        "category": category,
        "share": share,
        "threshold": threshold,
        "beta": beta,
        "gamma": gamma,
        "control": control,
    }
