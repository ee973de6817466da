"""Remote encoders, against a real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kb.encoders import EmbeddedE5, Encoder, EncoderUnavailable, load
from tests.kb.encoders.servers import MAX_BATCH, Behaviour, encoder_server

TEXTS = [f"Who wrote book number {number}?" for number in range(MAX_BATCH + 2)]


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def url(behaviour: Behaviour) -> Iterator[str]:
    with encoder_server(behaviour) as address:
        yield address


@pytest.fixture(params=["tei", "openai"])
def encoder(request: pytest.FixtureRequest, url: str) -> Encoder:
    return load(f"tei:{url}" if request.param == "tei" else f"openai:{url}/v1#e5", api_key="secret")


def test_the_vectors_are_those_of_the_server_in_the_order_of_the_texts(encoder: Encoder, behaviour: Behaviour) -> None:
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), EmbeddedE5().encode_queries(TEXTS), atol=1e-5)
    assert encoder.encode_documents(TEXTS).dtype == np.float32
    assert encoder.identity.dimension == 384
    assert behaviour.keys == {"Bearer secret"}


def test_tei_gets_no_larger_batch_than_it_takes(url: str, behaviour: Behaviour) -> None:
    load(f"tei:{url}").encode_queries(TEXTS)
    assert max(behaviour.batches) == MAX_BATCH


def test_other_weights_at_tei_are_another_identity(url: str, behaviour: Behaviour) -> None:
    before = load(f"tei:{url}").identity
    assert load(f"tei:{url}").identity == before
    behaviour.model_sha = "def"
    assert load(f"tei:{url}").identity != before


def test_a_busy_server_is_asked_again(encoder: Encoder, behaviour: Behaviour) -> None:
    behaviour.refusals = [429, 503]
    assert encoder.encode_queries(["again"]).shape == (1, 384)


@pytest.mark.parametrize("refusals", [[503] * 3, [413]])
def test_a_refusal_is_named(encoder: Encoder, behaviour: Behaviour, refusals: list[int]) -> None:
    behaviour.refusals = [*refusals]
    with pytest.raises(EncoderUnavailable, match=str(refusals[0])):
        encoder.encode_queries(["again"])
    assert behaviour.refusals == []


@pytest.mark.parametrize("vectors", [[[0.0, float("nan")]], [[1.0], [2.0]], [], "text", [["a"]], {}])
def test_anything_but_a_finite_vector_per_text_is_refused(
    encoder: Encoder, behaviour: Behaviour, vectors: object
) -> None:
    behaviour.vectors = vectors
    with pytest.raises(EncoderUnavailable, match="answered"):
        encoder.encode_queries(["one"])


def test_a_dimension_that_changes_is_refused(encoder: Encoder, behaviour: Behaviour) -> None:
    assert encoder.identity.dimension == 384
    behaviour.vectors = [[1.0, 2.0]]
    with pytest.raises(EncoderUnavailable, match="2 numbers"):
        encoder.encode_queries(["one"])


def test_an_answer_that_is_not_json_is_refused(encoder: Encoder, behaviour: Behaviour) -> None:
    behaviour.raw = b"<html>"
    with pytest.raises(EncoderUnavailable, match="JSON"):
        encoder.encode_queries(["one"])


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(EncoderUnavailable, match="127.0.0.1:9"):
        load("tei:http://127.0.0.1:9")
