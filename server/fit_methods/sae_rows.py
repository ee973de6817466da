"""Activations of passages as the rows that an SAE is trained on, and its features' strongest places among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from methods import sae as saes
from methods import sae_training
from methods.sae import Sae
from methods.sae_examples import TopExamples
from server.fit_methods.base import Activations, Array, Part, Progress, Text
from steering_store.labels import Example, Label, write_features

BEFORE, AFTER = 24, 8
"""Tokens around an example."""
HELD_OUT = 10
"""Every tenth passage is held out."""
CALIBRATION_ROWS = 20_000


class Passage(Part):
    """A piece of running text."""

    text: Text


class SaeTraining(Part):
    """How to train an SAE; `methods/sae_training.py: Config`. `k` is the number of features that fire on a token."""

    features: Annotated[int, Field(ge=2, le=1 << 20)] = 4096
    k: Annotated[int, Field(ge=1)] = 56
    architecture: sae_training.Architecture = "topk"
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 1500
    batch: Annotated[int, Field(ge=2)] = 1024
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1e-3
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    seed: int = 0


class Rows(NamedTuple):
    """The activations [tokens, width] of all passages behind one another but each first token's, an attention sink.

    `ends` has where each passage's rows end, `ids` the token ids of each passage, the first one too.
    """

    values: Array
    ends: list[int]
    ids: list[list[int]]

    def of(self, passage: int) -> Array:
        """[tokens, width]; row n is of token n + 1."""
        return self.values[self.ends[passage - 1] if passage else 0 : self.ends[passage]]

    def split(self, folder: Path) -> tuple[Array, Array]:
        """Those to train on, and those held out, without attention sinks: mapped from files in the folder, so that they
        take no memory beside those that there are.
        """
        norms, passage = saes.lengths(self.values), np.repeat(np.arange(len(self.ends)), np.diff([0, *self.ends]))
        held_out = passage % HELD_OUT == HELD_OUT - 1
        parts = []
        for name, part in (("train", ~held_out), ("held-out", held_out)):
            chosen = np.flatnonzero(part)
            if len(chosen):
                chosen = chosen[saes.within(norms[chosen])]
            parts.append(_copied(self.values, chosen, folder / f"{name}.npy"))
        return parts[0], parts[1]


def _copied(rows: Array, chosen: npt.NDArray[np.int64], file: Path) -> Array:
    """Some of the rows, in a file of their own, mapped. Files can't be mapped without rows."""
    if not len(chosen):
        return np.empty((0, rows.shape[1]), np.float32)
    target = np.lib.format.open_memmap(file, "w+", np.float32, (len(chosen), rows.shape[1]))
    for start in range(0, len(chosen), saes.CHUNK):
        target[start : start + saes.CHUNK] = rows[chosen[start : start + saes.CHUNK]]
    target.flush()
    mapped: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    return mapped


class Trained(NamedTuple):
    """An SAE that can be served, and what it is worth on held-out rows, before and after it got its threshold."""

    sae: Sae
    metrics: dict[str, float]


def rows_of(activations: Activations) -> Rows:
    """From what was captured at one layer of the residual stream."""
    each = [rows[0, 1:] for rows in activations.rows["resid_post"]]
    ends = np.cumsum([len(rows) for rows in each]).tolist()
    return Rows(np.concatenate(each), ends, [list(ids) for ids in activations.token_ids])


def kept(folder: Path, layer: int) -> Rows | None:
    """The rows of a layer that an earlier attempt kept, if there are any. They are mapped, not read."""
    meta = folder / f"rows-{layer}.json"
    if not meta.exists():
        return None
    fields = json.loads(meta.read_text("utf-8"))
    return Rows(np.load(meta.with_suffix(".npy"), mmap_mode="r", allow_pickle=False), fields["ends"], fields["ids"])


def keep(folder: Path, layer: int, rows: Rows) -> Rows:
    """Keep them for another attempt: a checkpoint of a training belongs to the very rows. Those of the file, mapped."""
    meta = folder / f"rows-{layer}.json"
    np.save(meta.with_suffix(".npy"), rows.values, allow_pickle=False)
    part = meta.with_suffix(".part")
    part.write_text(json.dumps({"ends": rows.ends, "ids": rows.ids}), "utf-8")
    part.rename(meta)
    return rows._replace(values=np.load(meta.with_suffix(".npy"), mmap_mode="r", allow_pickle=False))


def train(rows: Rows, training: SaeTraining, folder: Path, layer: int, progress: Progress) -> Trained:
    """Train on nine tenths of the passages and measure on the others. ValueError where that can't be done.

    A checkpoint is kept in the folder, from where another attempt at the same training goes on.
    """
    config = sae_training.Config(**training.model_dump())
    train_rows, held_out = rows.split(folder)
    if len(held_out) < 2:
        raise ValueError(f"need at least {HELD_OUT} passages: every tenth is held out to measure the SAE")
    digest = hashlib.sha256(training.model_dump_json().encode()).hexdigest()[:16]
    checkpoint = folder / f"sae-{layer}-{digest}.safetensors"
    trained = sae_training.train(train_rows, config, checkpoint=checkpoint, progress=progress)
    served = saes.calibrated(trained.sae, train_rows[:: max(1, len(train_rows) // CALIBRATION_ROWS)])
    before, after = saes.quality(trained.sae, held_out), saes.quality(served, held_out)
    metrics = {"fvu": after.fvu, "l0": after.l0, "dead": after.dead}
    if training.architecture == "topk":
        metrics |= {"fvu_top_k": before.fvu, "l0_top_k": before.l0}
    metrics |= {"train_rows": float(len(train_rows)), "heldout_rows": float(len(held_out))}
    return Trained(served, metrics)


def examples(
    sae: Sae,
    rows: Rows,
    count: int,
    decode: Callable[[Sequence[int]], str],
    labels: Mapping[int, str],
    progress: Progress,
) -> bytes:
    """The labels file: the strongest places of each feature that fires, and the labels that there are."""
    top = TopExamples(sae, count)
    for number in range(len(rows.ends)):
        top.add(rows.of(number))
        progress(number + 1, len(rows.ends))
    lines = []
    for index in range(len(sae.encoder)):
        found = [_example(rows.ids[text], token + 1, value, decode) for text, token, value in top.of(index)]
        if found or index in labels:
            lines.append(Label(index=index, label=labels.get(index), examples=found))
    return write_features(lines)


def _example(ids: Sequence[int], place: int, activation: float, decode: Callable[[Sequence[int]], str]) -> Example:
    around = decode(ids[max(place - BEFORE, 0) : place + AFTER])
    return Example(text=around[:1024], token=decode([ids[place]])[:256], activation=activation)
