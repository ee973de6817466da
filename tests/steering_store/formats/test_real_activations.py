"""The gate on a real model: SmolLM2's residual stream, and an SAE that was made for one of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering_store import Store
from steering_store.errors import InvalidTensor
from steering_store.formats import ImportOptions, gated, import_artifact
from steering_store.formats.reconstruction import Reconstruction, reconstruction
from steering_store.manifest import ModelSpec
from tests.steering_store.formats.layouts import Array, write_saelens

LAYER, COMPONENTS = 14, 256
TEXTS = [
    "The harbour was quiet after the storm, and the fishermen mended their nets in the pale morning light.",
    "In mathematics, a prime number is a natural number greater than one that has no smaller divisors but one.",
    "def total(prices):\n    return sum(price for price in prices if price is not None)\n",
    "She wrote to the council about the broken street lamp, but nobody answered for several weeks.",
    "Water boils at a lower temperature on high mountains because the air pressure is lower there.",
    "Il pleut depuis ce matin, et les enfants jouent dans la maison en attendant le soleil.",
    "The committee will meet on Thursday to discuss next year's budget and elect a new chair.",
    "Mix the flour with butter and sugar, add two eggs, and bake the dough for thirty minutes.",
]


@pytest.fixture(scope="module")
def captured(models: Path) -> dict[int, Array]:
    """Activations [tokens, 576] by layer, the first token of each text left out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(models / "smollm2", dtype=torch.float32)
    rows: dict[int, list[Any]] = {}
    for text in TEXTS:
        with torch.no_grad():
            states = model.model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        # The last one has the final norm behind it, and isn't the output of layer 29.
        for layer, state in enumerate(states[1:-1]):
            rows.setdefault(layer, []).append(state[0, 1:].numpy())
    return {layer: np.concatenate(each) for layer, each in rows.items()}


@pytest.fixture
def folder(captured: dict[int, Array], tmp_path: Path) -> Path:
    """An SAE whose features are the principal components of layer 14, in either sign, above a small threshold."""
    x = captured[LAYER]
    mean = x.mean(axis=0)
    rows = np.linalg.svd(x - mean, full_matrices=False)[2][:COMPONENTS]
    directions = np.concatenate([rows, -rows]).astype(np.float32)
    tensors = {
        "W_enc": np.ascontiguousarray(directions.T),
        "b_enc": np.zeros(len(directions), np.float32),
        "W_dec": directions,
        "b_dec": mean,
        "threshold": np.full(len(directions), 0.05 * float(np.abs((x - mean) @ rows.T).mean()), np.float32),
    }
    metadata = {"sae_lens_version": "6.0.0", "hook_name": f"blocks.{LAYER}.hook_resid_post"}
    fields = {"architecture": "jumprelu", "d_in": 576, "d_sae": len(directions), "metadata": metadata}
    return write_saelens(tmp_path / "sae", fields, tensors)


OPTIONS = ImportOptions(model=ModelSpec(architecture="LlamaForCausalLM", hidden_size=576, num_layers=30))


def test_sae_of_the_model_passes_and_is_published_with_its_numbers(
    captured: dict[int, Array], folder: Path, store: Store, tmp_path: Path
) -> None:
    draft = gated(import_artifact(folder, OPTIONS), lambda point, layer: captured[layer])
    metrics = store.publish("sae", draft.manifest, draft.write(tmp_path)).version.manifest.metrics
    assert metrics["fvu"] < 0.05 and 0 < metrics["l0"] <= COMPONENTS
    assert metrics["reconstruction_tokens"] == len(captured[LAYER])


@pytest.mark.parametrize(
    "wrong",
    ["an early layer's activations", "scaled by 20", "another basis"],
)
def test_sae_is_refused_on_what_it_was_not_made_for(wrong: str, captured: dict[int, Array], folder: Path) -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(576, 576)))[0].astype(np.float32)
    x = {
        "an early layer's activations": captured[0],
        "scaled by 20": captured[LAYER] / 20,
        "another basis": captured[LAYER] @ basis,
    }[wrong]
    with pytest.raises(InvalidTensor, match="doesn't fit the model"):
        gated(import_artifact(folder, OPTIONS), lambda point, layer: x)


def test_what_is_measured_is_worse_the_farther_the_layer(captured: dict[int, Array], folder: Path) -> None:
    sae = import_artifact(folder, OPTIONS).sae
    assert sae is not None
    measured: dict[int, Reconstruction] = {layer: reconstruction(sae, captured[layer]) for layer in (14, 15, 20, 28)}
    assert measured[14].fvu < measured[15].fvu < measured[20].fvu < measured[28].fvu
