"""Another model, the expert, loaded by transformers beside the served one: its states of some texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from server.fit_methods.base import Array, FitError, Progress
from server.models import ModelError, resolve_model

if TYPE_CHECKING:
    import torch

FindExpert = Callable[[str], str]
"""From the name of a model to the folder or hub id to load. FitError where it may not be loaded."""

FIELD = "options.expert"


def no_expert(name: str) -> str:
    """For servers that load no other model."""
    raise FitError(FIELD, f"this server may not load {name!r}: list it in POLYHELM_EXPERT_MODELS")


def listed(names: Sequence[str], data_dir: Path) -> FindExpert:
    """For a server: only the models that its operator listed."""

    def find(name: str) -> str:
        return found(name, data_dir) if name in names else no_expert(name)

    return find


def found(name: str, data_dir: Path) -> str:
    """Any embedded model, folder or hub id: for whoever has the machine."""
    try:
        return resolve_model(name, data_dir, lambda step: None).path
    except ModelError as error:
        raise FitError(FIELD, str(error)) from error


def last_states(path: str, texts: Sequence[str], progress: Progress) -> Array:
    """The residual stream after each layer at the last token of each text: [texts, layers, width], float32.

    The model is loaded from safetensors, in its own precision, runs no code of its repository, and is let go of at the
    end. FitError where it can't be loaded, or has no decoder layers at the usual place.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The operator has named it in the settings.
        tokenizer = AutoTokenizer.from_pretrained(path)  # nosec B615
        expert = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True)  # nosec B615
        model = expert.eval()
    except (OSError, ValueError, KeyError) as error:
        raise FitError(FIELD, f"{path} can't be loaded: {error}") from error
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise FitError(FIELD, f"{path}: {type(model).__name__} has no list of decoder layers")
    rows: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows.append(hidden[0, -1].float())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    states = np.empty((len(texts), len(layers), model.config.get_text_config().hidden_size), np.float32)
    try:
        progress(0, len(texts))
        with torch.inference_mode():
            for index, text in enumerate(texts):
                rows.clear()
                ids = tokenizer(text, return_tensors="pt").input_ids
                model.get_decoder()(input_ids=ids, use_cache=False)
                states[index] = torch.stack(rows).numpy()
                progress(index + 1, len(texts))
    finally:
        for hook in hooks:
            hook.remove()
    return states
