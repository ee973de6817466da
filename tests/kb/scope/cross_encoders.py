"""A tiny cross-encoder, made here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def untrained(folder: Path, words: Iterable[str]) -> Path:
    """A BERT of one layer that knows these words, as a folder."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    vocabulary = [*SPECIAL, *dict.fromkeys(words)]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, num_labels=1, **size)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
