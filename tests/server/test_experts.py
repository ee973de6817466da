"""The expert's states by transformers, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import experts
from server.fit_methods.base import FitError


def test_states_are_the_residual_stream_after_each_layer_at_the_last_token(models: Path) -> None:
    folder = str(models / "smollm2")
    texts, progress = ["The weather is nice", "No"], []
    states = experts.last_states(folder, texts, lambda done, total: progress.append((done, total)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert states.shape == (2, len(model.model.layers), model.config.hidden_size) and states.dtype == np.float32
    for text, found in zip(texts, states, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        # transformers puts the final norm into the last of its hidden states.
        expected = torch.stack([each[0, -1] for each in hidden[1:-1]]).float().numpy()
        np.testing.assert_allclose(found[:-1], expected, rtol=1e-2, atol=1e-2)
    assert progress == [(0, 2), (1, 2), (2, 2)]


def test_only_listed_models_are_loaded(tmp_path: Path) -> None:
    find = experts.listed([str(tmp_path)], tmp_path)
    with pytest.raises(FitError, match="POLYHELM_EXPERT_MODELS") as refused:
        find("someone/else")
    assert refused.value.field == "options.expert"
    with pytest.raises(FitError, match=r"no config\.json"):
        find(str(tmp_path))


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FitError, match="can't be loaded"):
        experts.last_states(str(tmp_path), ["x"], lambda done, total: None)
