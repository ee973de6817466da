"""Reads the weights of a served model's feed-forward modules from its safetensors files, one layer at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast, get_args

from safetensors import safe_open

from methods.gated_mlp import Activation, Array, GatedMlp
from server.models import local_folder

_TENSOR = re.compile(r"(?P<before>(?:\w+\.)*)layers\.(?P<layer>\d+)\.(?P<name>[\w.]+)\.weight")
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
_FROM_ONE = ("gemma", "gemma2", "gemma3", "gemma3_text")
"""Families whose norms multiply by 1 + weight."""


class UnknownWeights(Exception):
    """The weights can't be read, or aren't those of a gated MLP of a kind that is known."""


class Mlps:
    """The gated MLPs of a model. `gated` is False where no layer has a gate: then what a neuron writes is its
    non-linearity's output.
    """

    def __init__(self, path: str) -> None:
        """Of a folder, or a hub id in the local cache. UnknownWeights where they can't be read."""
        folder = local_folder(path)
        if folder is None or not (folder / "config.json").is_file():
            raise UnknownWeights("the weights of the model aren't on this machine")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        self._text: dict[str, Any] = config.get("text_config") or config
        self._files: dict[tuple[int, str], tuple[Path, str]] = {}
        self._all: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                found = list(tensors.keys())
            self._index(file, found)
            self._all |= dict.fromkeys(found, file)
        if not self._all:
            raise UnknownWeights("the model's folder has no safetensors files")
        self.gated = any("gate" in name for name in self._all)
        self.layers = len({layer for layer, name in self._files if name == GATE})

    def _index(self, file: Path, names: list[str]) -> None:
        for name in names:
            match = _TENSOR.fullmatch(name)
            if match is None or "vision" in match["before"] or "audio" in match["before"]:
                continue
            key = int(match["layer"]), match["name"]
            if key in self._files:
                raise UnknownWeights(f"{self._files[key][1]} and {name} may both be of layer {key[0]}")
            self._files[key] = file, name

    def layer(self, number: int) -> GatedMlp:
        """UnknownWeights for one that isn't a gated MLP between norms of a known kind."""
        activation = self._text.get("hidden_activation") or self._text.get("hidden_act")
        activation = "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation
        if activation not in get_args(Activation):
            raise UnknownWeights(f"its MLP's activation is {activation!r}; known are {', '.join(get_args(Activation))}")
        gate, up, down = (self._tensor(number, name) for name in (GATE, UP, DOWN))
        if gate is None or up is None or down is None:
            raise UnknownWeights(f"layer {number} has no {GATE}, {UP} and {DOWN} in its files")
        after_attention = self._norm(number, "post_attention_layernorm")
        before_mlp = self._norm(number, "pre_feedforward_layernorm")
        after_mlp = self._norm(number, "post_feedforward_layernorm")
        if before_mlp is None and after_mlp is None:
            # Llama's and most others': the norm that is named for its place behind the attention is the MLP's.
            after_attention, before_mlp = None, after_attention
        columns = down if after_mlp is None else after_mlp[:, None] * down
        return GatedMlp(
            gate=gate,
            up=up,
            writes=((columns**2).sum(axis=0) ** 0.5),
            attention_norm=after_attention,
            norm=before_mlp,
            epsilon=float(self._text.get("rms_norm_eps", 1e-6)),
            activation=cast(Activation, activation),
        )

    def columns(self, number: int) -> Array:
        """[hidden, neurons]: what each neuron of a layer adds to the MLP's output when it is 1."""
        down = self._tensor(number, DOWN)
        if down is None:
            raise UnknownWeights(f"layer {number} has no {DOWN} in its files")
        return down

    def unembedding(self) -> Array:
        """[vocabulary, hidden]: the embedding where it is the unembedding, too."""
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            if name in self._all:
                return _read(self._all[name], name)
        raise UnknownWeights("its files have no lm_head and no model.embed_tokens")

    def _norm(self, layer: int, name: str) -> Array | None:
        weight = self._tensor(layer, name)
        return weight + 1 if weight is not None and self._text.get("model_type") in _FROM_ONE else weight

    def _tensor(self, layer: int, name: str) -> Array | None:
        if (layer, name) not in self._files:
            return None
        return _read(*self._files[layer, name])


def _read(file: Path, name: str) -> Array:
    with safe_open(file, "pt") as tensors:
        found: Array = tensors.get_tensor(name).float().numpy()
    return found
