"""Any sentence-transformers model: a tiny real one is made here, with prompts of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kb.encoders import UnknownEncoder, load

sentence_transformers = pytest.importorskip("sentence_transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", ":", "passage", "who", "wrote", "hamlet", "faust"]


def make_model(folder: Path, seed: int) -> str:
    import torch
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    base = folder / "base"
    base.mkdir(parents=True)
    vocabulary = base / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizerFast(str(vocabulary)).save_pretrained(base)
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **size)).save_pretrained(base)
    words = Transformer(str(base))
    model = sentence_transformers.SentenceTransformer(
        modules=[words, Pooling(16, "mean")], prompts={"query": "query : ", "document": "passage : "}
    )
    model.save(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("st"), seed=0)


def test_the_models_own_prompts_are_used(model: str) -> None:
    encoder = load(f"st:{model}")
    reference = sentence_transformers.SentenceTransformer(model)
    query, document = encoder.encode_queries(["who wrote hamlet"]), encoder.encode_documents(["who wrote hamlet"])
    expected = reference.encode(["query : who wrote hamlet"], prompt="", normalize_embeddings=True)
    np.testing.assert_allclose(query, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(document, axis=1), 1, atol=1e-5)
    assert not np.allclose(query, document, atol=1e-4)
    assert encoder.encode_queries([]).shape == (0, 16)


def test_the_identity_is_that_of_the_weights(model: str, tmp_path: Path) -> None:
    identity = load(f"st:{model}").identity
    assert identity == load(f"st:{model}").identity
    assert (identity.name, identity.dimension) == ("st:model", 16)
    assert load(f"st:{make_model(tmp_path, seed=1)}").identity.digest != identity.digest


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownEncoder, match="can't be loaded"):
        load(f"st:{tmp_path / 'nothing'}")
