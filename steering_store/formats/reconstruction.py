"""Whether an SAE reconstructs the activations of the model that it is said to be for.

An SAE of another model, layer or scale loads without complaint and steers wrongly. On activations x of the right one
the fraction of variance unexplained (FVU) is about 0.05 to 0.5, and L0, the count of active features, tens to hundreds:

    FVU = sum |x - x^|^2 / sum |x - mean x|^2,  x^ = features(x) @ decoder + decoder_bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from steering_store.errors import InvalidTensor
from steering_store.formats.draft import Draft, with_sae
from steering_store.formats.sae import Sae
from steering_store.manifest import Point
from steering_store.tensors import Float32

MIN_TOKENS = 64
CHUNK_VALUES = 1 << 24
"""Features times tokens that are in memory at once."""

Capture = Callable[[Point, int], Float32]
"""Activations [tokens, width] of the served model at a point and layer.

Leave out the first token of each text: SAEs are trained without it, and its activation, often a hundred times longer
than any other, would be most of the variance.
"""


class Reconstruction(NamedTuple):
    """FVU, the mean number of active features per token, and the tokens that both were measured on."""

    fvu: float
    l0: float
    tokens: int


def features(sae: Sae, x: Float32) -> Float32:
    """The feature activations [tokens, features] for x [tokens, width]; of top-k SAEs, the k largest, if positive."""
    pre = x @ sae.encoder.T + sae.encoder_bias
    if sae.top_k is not None:
        smallest = np.partition(pre, -sae.top_k, axis=1)[:, -sae.top_k, None]
        return np.where((pre >= smallest) & (pre > 0), pre, np.float32(0))
    if sae.activation == "identity":
        return pre
    return np.where(pre > (0 if sae.threshold is None else sae.threshold), pre, np.float32(0))


def reconstruction(sae: Sae, activations: Float32) -> Reconstruction:
    """Measure an SAE on activations [tokens, width]. Raises InvalidTensor for too few, or where they don't vary."""
    _check_activations(sae, activations)
    mean = activations.mean(axis=0, dtype=np.float64)
    left = total = 0.0
    active = 0
    for x in _chunks(sae, activations):
        acts = features(sae, x)
        active += int(np.count_nonzero(acts))
        error = x - (acts @ sae.decoder + sae.decoder_bias)
        with np.errstate(over="ignore", invalid="ignore"):
            left += float(np.square(error, dtype=np.float64).sum())
        total += float(np.square(x - mean).sum())
    if total == 0:
        raise InvalidTensor("activations: they don't vary, so nothing can be measured; capture more texts")
    return Reconstruction(left / total, active / len(activations), len(activations))


def check_reconstruction(measured: Reconstruction, sae: Sae) -> None:
    """Raise InvalidTensor where an SAE can't be for the model and site that the activations came from.

    FVU above 1 is worse than always answering with the mean, which needs no SAE; NaN means that values overflow. With
    no active feature there is nothing to steer by. With more than half of them active the code isn't sparse: that is
    what a wrong scale, a lost threshold or an encoder laid out the other way gives.
    """
    count = len(sae.encoder)
    if not measured.fvu <= 1 or not 0 < measured.l0 <= count / 2:
        raise InvalidTensor(
            f"the SAE doesn't fit the model at this site: it leaves {measured.fvu:.3g} of the variance unexplained (at "
            f"most 1 is accepted) with {measured.l0:.1f} of {count} features active (more than 0 and at most half); "
            "check model, layer, point and norm_factor"
        )


def calibrated(sae: Sae, activations: Float32) -> tuple[Sae, float]:
    """A top-k SAE as a jumprelu with one threshold for all features, and that threshold.

    Top-k compares all features of a token, which steering by a few of them can't. The threshold is the one with which k
    features per token are active on average on these activations [tokens, width], as in BatchTopK (Bussmann et al.
    2024, arXiv:2412.06410). Which features are active can differ from top-k in each single token.
    """
    assert sae.top_k is not None
    _check_activations(sae, activations)
    kept = np.empty(0, np.float32)
    wanted = sae.top_k * len(activations) + 1
    for x in _chunks(sae, activations):
        pre = (x @ sae.encoder.T + sae.encoder_bias).ravel()
        kept = np.concatenate([kept, pre[pre > 0]])
        if len(kept) > wanted:
            kept = np.partition(kept, -wanted)[-wanted:]
    # Active is what lies above the threshold, so it is the largest value that must not be active.
    threshold = float(kept.min()) if len(kept) == wanted else 0.0
    thresholds = np.full(len(sae.encoder), threshold, np.float32)
    return replace(sae, activation="jumprelu", threshold=thresholds, top_k=None), threshold


def gated(draft: Draft, capture: Capture) -> Draft:
    """The draft of an SAE with its measured FVU and L0 in `metrics`; one with a top_k is calibrated before.

    Raises InvalidTensor where the SAE can't be for the model that `capture` reads. Other drafts come back unchanged.
    """
    if draft.sae is None:
        return draft
    site = draft.manifest["sites"][0]
    activations = capture(site["point"], site["layer"])
    metrics = dict(draft.manifest.get("metrics", {}))
    if draft.sae.top_k is not None:
        exact = reconstruction(draft.sae, activations)
        metrics["fvu_top_k"] = exact.fvu
        sae, threshold = calibrated(draft.sae, activations)
        config = {"top_k": draft.sae.top_k, "calibrated_threshold": threshold, "calibration_tokens": len(activations)}
        draft = with_sae(draft, sae, config)
    assert draft.sae is not None
    measured = reconstruction(draft.sae, activations)
    check_reconstruction(measured, draft.sae)
    metrics |= {"fvu": measured.fvu, "l0": measured.l0, "reconstruction_tokens": float(measured.tokens)}
    return replace(draft, manifest={**draft.manifest, "metrics": metrics})


def with_norms(draft: Draft, capture: Capture) -> Draft:
    """The draft with the mean length of the activation at each of its sites as `h_norm`. Raises InvalidTensor."""
    sites = sorted({(site["layer"], site["point"]) for site in draft.manifest["sites"]})
    norms = {}
    for layer, point in sites:
        norm = float(np.linalg.norm(capture(point, layer).astype(np.float64), axis=1).mean())
        if not 0 < norm < np.inf:
            raise InvalidTensor(f"activations: those of {point}.{layer} have the mean length {norm}; capture others")
        norms[str(layer)] = norm
    return replace(draft, manifest={**draft.manifest, "h_norm": norms})


def _check_activations(sae: Sae, activations: Float32) -> None:
    width = sae.encoder.shape[1]
    if activations.ndim != 2 or activations.shape[1] != width or len(activations) < MIN_TOKENS:
        raise InvalidTensor(
            f"activations: their shape is {activations.shape}, and must be [at least {MIN_TOKENS}, {width}] for this "
            "SAE; capture more tokens at its site"
        )
    if not np.isfinite(activations).all():
        raise InvalidTensor("activations: they hold NaN or infinity, so nothing can be measured; check the model")


def _chunks(sae: Sae, activations: Float32) -> Iterator[Float32]:
    step = max(1, CHUNK_VALUES // len(sae.encoder))
    for start in range(0, len(activations), step):
        yield activations[start : start + step].astype(np.float32, copy=False)
