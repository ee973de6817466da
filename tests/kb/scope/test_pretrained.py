"""The embedded encoder's weights as a model of transformers: it must compute what the encoder does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kb.encoders import load
from kb.scope import ScopeError, pretrained

TEXTS = [
    "Who designed Évry Cathedral?",
    "叶绿素小子是哪个虚构宇宙的一部分？",
    "เชโคแวกตั้งอยู่ในรัฐใด",
    "Кто играет\nв фильме «В полночь»?",
    "Ｆｕｌｌ  width, ﬁne ligatures and ¼ …",
    "",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("e5")
    pretrained.write(folder)
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_it_makes_the_encoders_vectors(written: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = written
    expected = load("e5-small").encode_queries(TEXTS)
    for text, vector in zip(TEXTS, expected, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(f"query: {text}", return_tensors="pt")).last_hidden_state
        mean = hidden[0].mean(0).numpy()
        # The encoder rounds activations to 8 bits.
        assert vector @ mean / np.linalg.norm(mean) > 0.999, text


def test_a_pair_is_marked_off_as_xlm_roberta_does(written: tuple[Any, Any]) -> None:
    _, tokenizer = written
    pair = tokenizer.convert_ids_to_tokens(tokenizer("a", "b")["input_ids"])
    assert pair == ["<s>", "▁a", "</s>", "</s>", "▁b", "</s>"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ScopeError, match=r"weights\.bin"):
        pretrained.read(tmp_path / "weights.bin")
