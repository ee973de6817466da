"""Deciders as folders: `scope.json`, and beside it `scope.safetensors` (a head), `model/` (a cross-encoder) or both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kb.encoders.base import EncoderIdentity
from kb.scope.base import Decider, ScopeError
from kb.scope.cascade import CascadeDecider, Weights
from kb.scope.cross_encoder import CrossEncoderDecider
from kb.scope.head import HeadDecider
from kb.scope.threshold import ThresholdDecider

SETTINGS: Final = "scope.json"
TENSORS: Final = "scope.safetensors"
MODEL: Final = "model"
FORMAT: Final = 1


Storable = ThresholdDecider | HeadDecider | CrossEncoderDecider | CascadeDecider


def save(decider: Storable, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write it; `notes` say where it comes from. ScopeError where there is a decider already."""
    if (folder / SETTINGS).exists():
        raise ScopeError(f"{folder} holds a decider already: name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"format": FORMAT, "kind": decider.name, "notes": dict(notes or {})}
    if decider.encoder is not None:
        settings["encoder"] = decider.encoder._asdict()
    if isinstance(decider, ThresholdDecider):
        settings |= decider.settings()
    head = decider.head if isinstance(decider, CascadeDecider) else decider
    reader = decider.reader if isinstance(decider, CascadeDecider) else decider
    if isinstance(head, HeadDecider):
        settings |= {"texts": head.rarity.texts, "languages": list(head.space.languages)}
        save_file(head.tensors(), folder / TENSORS)
    if isinstance(reader, CrossEncoderDecider):
        reader.save(folder / MODEL)
    if isinstance(decider, CascadeDecider):
        settings["weights"] = decider.weights._asdict()
    # Last, as a folder without it is no decider.
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def default() -> Decider:
    """The one that comes with polyhelm, for the encoder `e5-small`."""
    return load(Path(__file__).with_name("default"))


def load(folder: Path) -> Decider:
    """Raises ScopeError, which says what is wrong with the folder."""
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        if settings["format"] != FORMAT:
            raise ScopeError(f"{folder} is of format {settings['format']}, and this version reads {FORMAT}")
        encoder = EncoderIdentity(**settings["encoder"]) if "encoder" in settings else None
        kind = settings["kind"]
        if kind == "threshold":
            fallback, same = float(settings["fallback"]), settings["same_language"]
            return ThresholdDecider(
                fallback, dict(settings["thresholds"]), encoder, None if same is None else float(same)
            )
        if kind == "cross_encoder":
            return CrossEncoderDecider(str(folder / MODEL), short=True)
        if kind in ("head", "cascade") and encoder is not None:
            texts, languages = int(settings["texts"]), list(settings["languages"])
            head = HeadDecider.from_tensors(encoder, texts, languages, load_file(folder / TENSORS))
            if kind == "head":
                return head
            weights = Weights(**{name: float(weight) for name, weight in dict(settings["weights"]).items()})
            return CascadeDecider(head, CrossEncoderDecider(str(folder / MODEL), short=True), weights)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ScopeError(f"{folder} holds no decider that can be read: {error}") from error
    raise ScopeError(f"{folder} holds a decider of an unknown kind, {kind!r}")
