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
    by: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_BY", help="Choose neurons by their gate (the default), or by what is written."),
    ] = None,
) -> dict[str, Any]:
    """SADI: scale the heads, neurons or dimensions that tell right answers from wrong ones."""
    return {"component": component, "top_k": top_k, "selection": selection, "form": form, "by": by}


@command(app, "incline", "pairs", '{"source": ..., "target": ...}')
def incline(
    source_language: Annotated[
        str, typer.Option(envvar="POLYHELM_SOURCE_LANGUAGE", help="Of the sources, as a tag such as sw.")
    ],
    target_language: Annotated[
        str | None, typer.Option(envvar="POLYHELM_TARGET_LANGUAGE", help="Of the targets; en unless given.")
    ] = None,
    component: Annotated[
        str | None, typer.Option(envvar="POLYHELM_COMPONENT", help="hidden (the default), attention, ffn or embedding.")
    ] = None,
    pooling: Pooling = None,
    solver: Annotated[
        str | None, typer.Option(envvar="POLYHELM_SOLVER", help="ridge (the default), or min_norm, the paper's.")
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            envvar="POLYHELM_RIDGE",
            help="In units of the mean squared deviation of a state; by held-out error unless given.",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            envvar="POLYHELM_PRIOR",
            help="What ridge shrinks to: mean or identity; by held-out error unless given.",
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
        "prior": prior,
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
    active: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_ACTIVE", help="By the sign of its gate (the default), or of what is written."),
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
        "active": active,
        "category": category,
        "share": share,
        "threshold": threshold,
        "beta": beta,
        "gamma": gamma,
        "control": control,
    }


Layer = Annotated[int, typer.Option(envvar="POLYHELM_LAYER", help="The layer whose residual stream it reads.")]
Features = Annotated[int | None, typer.Option(envvar="POLYHELM_FEATURES", help="Features of the SAE; 4096.")]
K = Annotated[int | None, typer.Option(envvar="POLYHELM_K", help="Features that fire on a token; 56.")]
Architecture = Annotated[
    str | None, typer.Option(envvar="POLYHELM_ARCHITECTURE", help="topk (the default) or jumprelu.")
]
Steps = Annotated[int | None, typer.Option(envvar="POLYHELM_STEPS", help="Of the training; 1500.")]
Batch = Annotated[int | None, typer.Option(envvar="POLYHELM_BATCH", help="Tokens of a step; 1024.")]
Rate = Annotated[float | None, typer.Option(envvar="POLYHELM_LEARNING_RATE", help="0.001 unless given.")]
Device = Annotated[str | None, typer.Option(envvar="POLYHELM_DEVICE", help="To train on: cpu (the default) or cuda.")]
Seed = Annotated[int | None, typer.Option(envvar="POLYHELM_SEED", help="0 unless given.")]
Examples = Annotated[
    int | None, typer.Option(envvar="POLYHELM_EXAMPLES", help="Texts for each feature on which it fires most; 5.")
]


@command(app, "sae", "texts", '{"text": ...}')
def sae(
    layer: Layer,
    features: Features = None,
    k: K = None,
    architecture: Architecture = None,
    steps: Steps = None,
    batch: Batch = None,
    learning_rate: Rate = None,
    device: Device = None,
    seed: Seed = None,
    examples: Examples = None,
) -> dict[str, Any]:
    """A sparse auto-encoder of one layer, with the texts on which each feature fires most."""
    return dict(locals())


@command(app, "sae_examples", "texts", '{"text": ...}')
def sae_examples(
    sae: Annotated[str, typer.Option(envvar="POLYHELM_SAE", help="The SAE, as name or name@3.")],
    examples: Examples = None,
) -> dict[str, Any]:
    """An SAE of the store anew, with the texts on which each feature fires most; its labels stay."""
    return dict(locals())


@command(
    app,
    "lf_steering",
    "pairs",
    '{"right": ..., "wrong": ...}',
    paraphrases='{"first": ..., "second": ..., "consistent": true}, to find the layer by',
    texts='{"text": ...}, to train an SAE from',
)
def lf_steering(
    sae: Annotated[
        str | None, typer.Option(envvar="POLYHELM_SAE", help="An SAE of the store, in place of --texts.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(envvar="POLYHELM_LAYER", help="Where to train, in place of --paraphrases.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_FORM", help="delta (the default), or literal: the paper's decode-and-replace."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(envvar="POLYHELM_ALPHA", help="Of the literal form; 20, the paper's.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(envvar="POLYHELM_THRESHOLD", help="Least mean change of a key feature; 0.1.")
    ] = None,
    most: Annotated[int | None, typer.Option(envvar="POLYHELM_MOST", help="Key features at most; 128.")] = None,
    features: Features = None,
    k: K = None,
    architecture: Architecture = None,
    steps: Steps = None,
    batch: Batch = None,
    learning_rate: Rate = None,
    device: Device = None,
    seed: Seed = None,
) -> dict[str, Any]:
    """LF-Steering: amplify the features in which right answers and wrong ones to a rephrasing differ."""
    return dict(locals())


@command(app, "expertsteer", "texts", '{"text": ..., "label": "positive" or "negative"}')
def expertsteer(
    expert: Annotated[
        str | None,
        typer.Option(envvar="POLYHELM_EXPERT", help="The other model: embedded, a folder or a hub id."),
    ] = None,
    pairs: Annotated[int | None, typer.Option(envvar="POLYHELM_LAYER_PAIRS", help="Pairs of layers, P; 3.")] = None,
    affine: Annotated[
        bool | None, typer.Option(envvar="POLYHELM_AFFINE", help="With the auto-encoder's bias, as printed.")
    ] = None,
    neighbours: Annotated[
        int | None, typer.Option(envvar="POLYHELM_NEIGHBOURS", help="Of the mutual information's estimator; 3.")
    ] = None,
    mutual_information_texts: Annotated[
        int | None, typer.Option(envvar="POLYHELM_MUTUAL_INFORMATION_TEXTS", help="Texts that it is estimated on; 500.")
    ] = None,
    ridge: Annotated[
        float | None, typer.Option(envvar="POLYHELM_RIDGE", help="Of the least-squares control; 0.1.")
    ] = None,
    seed: Seed = None,
    control: Annotated[
        str | None, typer.Option(envvar="POLYHELM_CONTROL", help="random, least_squares or self_expert instead.")
    ] = None,
) -> dict[str, Any]:
    """ExpertSteer: steer along a direction of another model that knows more."""
    return dict(locals())
