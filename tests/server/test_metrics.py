"""What isn't counted where it happens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from server import metrics
from tests.kb.ngrams import Ngrams

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_facts_of_all_collections_are_counted_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "FACTS_SECONDS", 0.01)
    base, encoder = KnowledgeBase.open(tmp_path), Ngrams()
    for name in ("one", "two"):
        collection, _ = base.create(name, encoder.identity)
        collection.upsert([FactDraft(id="f", text=name)], encoder.encode_documents([name]))
    task = asyncio.create_task(metrics.follow_facts(base))
    await wait_for(2)
    collection.upsert([FactDraft(id="g", text="more")], np.asarray(encoder.encode_documents(["more"])))
    await wait_for(3)
    base.drop("one")
    await wait_for(2)
    task.cancel()
    base.close()


async def wait_for(facts: int) -> None:
    async with asyncio.timeout(20):
        while metrics.KB_FACTS.collect()[0].samples[0].value != facts:
            await asyncio.sleep(0.01)
