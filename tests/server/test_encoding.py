"""Queries that arrive together are encoded together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from kb.encoders import EncoderIdentity, InvalidText
from server.encoding import MAX_BATCH, BatchedEncoder

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Lengths:
    """An encoder of the lengths of texts, which says what it was asked together and waits to be let go on."""

    identity = EncoderIdentity("lengths", 1, "sha256:0")

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Semaphore(0)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(list(texts))
        assert self.go.acquire(timeout=10)
        if "broken" in texts:
            raise RuntimeError("broken")
        return np.array([[len(text)] for text in texts], np.float32)

    encode_documents = encode_queries


async def waiting(encoder: Lengths, number: int) -> None:
    while len(encoder.batches) < number:
        await asyncio.sleep(0.001)


async def test_what_arrives_meanwhile_is_one_batch_and_everyone_gets_their_own() -> None:
    encoder = Lengths()
    batched = BatchedEncoder(encoder)
    tasks = [asyncio.create_task(batched.encode_query("a"))]
    await waiting(encoder, 1)
    tasks += [asyncio.create_task(batched.encode_query("b" * n)) for n in range(1, MAX_BATCH + 3)]
    await asyncio.sleep(0)
    encoder.go.release(10)
    assert [float(row[0]) for row in await asyncio.gather(*tasks)] == [1, *range(1, MAX_BATCH + 3)]
    assert [len(batch) for batch in encoder.batches] == [1, MAX_BATCH, 2]


async def test_a_text_that_cannot_be_encoded_fails_alone() -> None:
    encoder = Lengths()
    batched = BatchedEncoder(encoder)
    encoder.go.release(10)
    good, bad = asyncio.create_task(batched.encode_query("a")), batched.encode_query("\ud800")
    with pytest.raises(InvalidText):
        await bad
    assert float((await good)[0]) == 1


async def test_a_failure_is_everyones_answer_and_the_next_query_works() -> None:
    encoder = Lengths()
    batched = BatchedEncoder(encoder)
    encoder.go.release(10)
    with pytest.raises(RuntimeError, match="broken"):
        await batched.encode_query("broken")
    assert float((await batched.encode_query("fine"))[0]) == 4


async def test_one_that_gave_up_does_not_disturb_the_others() -> None:
    encoder = Lengths()
    batched = BatchedEncoder(encoder)
    first = asyncio.create_task(batched.encode_query("a"))
    await waiting(encoder, 1)
    gone, stays = (asyncio.create_task(batched.encode_query(text)) for text in ("gone", "stays"))
    await asyncio.sleep(0)
    gone.cancel()
    encoder.go.release(10)
    await asyncio.gather(first, stays)
    assert encoder.batches == [["a"], ["stays"]]
