"""Gates that are worked out from weights and residual streams are those of transformers' own modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from server.model_weights import Mlps, UnknownWeights
from tests.server.engine.hooks import activations

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
}
POINTS = ("resid_pre", "resid_post", "attn_out", "mlp_act")
IDS = [5, 9, 2, 33, 17, 60, 1]


def saved(family: str, folder: Path) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms as they are made have a weight of 1: then a forgotten one would not show.
            parameter.normal_(0.3 if "norm" in name else 0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    opened: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.act_fn.register_forward_hook(
            lambda module, args, output, number=number: opened.__setitem__(number, output[0])
        )
    seen = activations(model, POINTS, IDS)
    mlps = Mlps(str(tmp_path))
    assert mlps.gated and mlps.layers == 3
    for layer in range(3):
        stream = seen["resid_post", layer - 1] if layer else seen["resid_pre", 0]
        mlp = mlps.layer(layer)
        gates, written = mlp(stream.numpy(), seen["attn_out", layer].numpy())
        np.testing.assert_allclose(gates, opened[layer].detach().numpy(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(written, seen["mlp_act", layer].numpy(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_length_of_what_a_neuron_writes_is_that_of_its_share_in_the_stream(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    layer = model.model.layers[1]
    one = torch.eye(SHAPE["intermediate_size"])  # type: ignore[call-overload]
    with torch.no_grad():
        columns = layer.mlp.down_proj(one)
        if family == "gemma3":
            columns = columns * (1 + layer.post_feedforward_layernorm.weight)
    np.testing.assert_allclose(Mlps(str(tmp_path)).layer(1).writes, columns.norm(dim=1).numpy(), rtol=1e-4)


def test_effective_scores_need_the_columns_and_the_unembedding(tmp_path: Path) -> None:
    model, mlps = saved("llama", tmp_path), Mlps(str(tmp_path))
    np.testing.assert_array_equal(mlps.unembedding(), model.get_output_embeddings().weight.detach().numpy())
    np.testing.assert_array_equal(mlps.columns(2), model.model.layers[2].mlp.down_proj.weight.detach().numpy())
    with pytest.raises(UnknownWeights, match="layer 9 has no mlp.down_proj"):
        mlps.columns(9)


def test_a_model_without_gates_says_so(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert not Mlps(str(tmp_path)).gated


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"hidden_act": "relu"}, "activation is 'relu'"), ({}, "layer 7 has no mlp.gate_proj")],
)
def test_what_is_not_known_is_refused_with_the_reason(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(UnknownWeights, match=reason):
        Mlps(str(tmp_path)).layer(0 if change else 7)


def test_weights_that_are_not_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownWeights, match="on this machine"):
        Mlps("nobody/has-this-model")
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(UnknownWeights, match="no safetensors"):
        Mlps(str(tmp_path))
