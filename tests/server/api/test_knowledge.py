"""The `knowledge` field: a real collection, the real encoder, and a handler that shows what reaches vLLM."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from kb.encoders import DEFAULT, load
from kb.errors import CollectionNotFound, EncoderMismatch
from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from kb.scope.threshold import ThresholdDecider
from server.api.errors import ApiError
from server.api.knowledge import KnowledgeHandler
from server.encoding import BatchedEncoder
from server.knowledge import Adviser

pytestmark = pytest.mark.anyio

ENCODER = load(DEFAULT)
ASKED = "Wer entwarf die Kathedrale von Évry?"
ELSEWHERE = "How do I boil an egg?"
FACT = FactDraft(id="evry", question="Who designed Évry Cathedral?", answer="Mario Gariazzo", language="en")
FRENCH = FactDraft(id="fr", question="Qui a dessiné la cathédrale d'Évry ?", answer="Botta", language="fr")
POOL = [
    FactDraft(
        id=f"pool-{number}",
        question=f"Who designed bridge {number}?",
        answer=f"Architect {number}",
        language="en",
        metadata={
            "translations": {"de": {"question": f"Wer entwarf Brücke {number}?", "answer": f"Architekt {number}"}}
        },
    )
    for number in range(4)
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Request(BaseModel):
    """As vLLM's: unknown fields are kept as extras."""

    model_config = ConfigDict(extra="allow")


class Handler:
    """Answers with what it was asked."""

    def __init__(self, chunks: list[str] | None = None) -> None:
        self.chunks = chunks
        self.seen: Any = None

    async def create(self, request: Any, raw_request: Any = None) -> Any:
        self.seen = request
        return self.stream() if self.chunks is not None else SimpleNamespace(choices=[])

    async def stream(self) -> AsyncIterator[str]:
        for chunk in self.chunks or ():
            yield chunk

    def other(self) -> str:
        return "vLLM's"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBase:
    made = KnowledgeBase.open(tmp_path_factory.mktemp("kb"))
    for name, facts in (("facts", [FACT, FRENCH]), ("pool", POOL)):
        made.create(name, ENCODER.identity)[0].upsert(facts, encode=ENCODER.encode_documents)
    made.create("empty", ENCODER.identity)
    made.create("foreign", ENCODER.identity._replace(digest="sha256:other"))
    return made


def handler(base: KnowledgeBase, inner: Handler, threshold: float = 0.86) -> Any:
    decider = ThresholdDecider(threshold, encoder=ENCODER.identity)
    return KnowledgeHandler(inner, "create", Adviser(base, BatchedEncoder(ENCODER), decider))


def completion(prompt: Any = ASKED, **knowledge: Any) -> Request:
    return Request(prompt=prompt, knowledge={"collection": "facts"} | knowledge)


def chat(*messages: dict[str, Any], **knowledge: Any) -> Request:
    return Request(messages=list(messages), knowledge={"collection": "facts"} | knowledge)


async def test_a_request_without_the_field_passes_untouched(base: KnowledgeBase) -> None:
    inner = Handler()
    request = Request(prompt=ASKED)
    result = await handler(base, inner).create(request)
    assert inner.seen is request and not hasattr(result, "knowledge")
    assert handler(base, inner).other() == "vLLM's"


async def test_a_question_about_a_fact_gets_the_papers_prompt_and_a_receipt(base: KnowledgeBase) -> None:
    inner = Handler()
    request = completion(edit_language="en")
    result = await handler(base, inner).create(request)
    assert inner.seen.prompt == (
        f"Question: Who designed Évry Cathedral? Answer: Mario Gariazzo\nQuestion: {ASKED} Answer:"
    )
    assert request.prompt == ASKED
    assert "knowledge" not in inner.seen.model_extra
    receipt = result.knowledge
    assert (receipt["collection"], receipt["decision"], receipt["decider"]) == ("facts", "in_scope", "threshold")
    assert (receipt["mode"], receipt["encoder"], receipt["language"]) == ("remake", "e5-small", "de")
    (used,) = receipt["facts"]
    assert (used["id"], used["version"], used["language"]) == ("evry", 1, "en")
    assert 0.5 <= used["score"] <= 1 and 0.86 <= used["similarity"] <= 1


@pytest.mark.parametrize("prompt", [f" \n{ELSEWHERE}\t", f"Question: {ELSEWHERE} Answer:", "\u0000 odd"])
async def test_out_of_scope_the_very_request_goes_on_and_the_receipt_says_so(base: KnowledgeBase, prompt: str) -> None:
    inner = Handler()
    request = completion(prompt)
    result = await handler(base, inner).create(request)
    assert inner.seen is request and inner.seen.prompt == prompt
    assert (result.knowledge["decision"], result.knowledge["facts"]) == ("out_of_scope", [])
    assert result.knowledge["nearest"]["score"] < 0.5


async def test_an_empty_collection_is_out_of_scope(base: KnowledgeBase) -> None:
    result = await handler(base, Handler()).create(completion(collection="empty"))
    assert (result.knowledge["decision"], result.knowledge["nearest"]) == ("out_of_scope", None)


async def test_only_the_last_user_message_is_looked_up_and_written_anew(base: KnowledgeBase) -> None:
    inner = Handler()
    before = {"role": "user", "content": ELSEWHERE}
    after = {"role": "assistant", "content": "Sure:"}
    parts = [{"type": "text", "text": ASKED}]
    await handler(base, inner).create(chat(before, {"role": "user", "content": parts, "name": "me"}, after))
    assert inner.seen.messages[0] == before and inner.seen.messages[2] == after
    assert inner.seen.messages[1]["content"].endswith(f"Question: {ASKED} Answer:")
    assert inner.seen.messages[1]["name"] == "me"


async def test_context_puts_facts_before_the_whole_prompt(base: KnowledgeBase) -> None:
    inner = Handler()
    result = await handler(base, inner).create(completion(mode="context", max_facts=2, min_score=0.1))
    assert inner.seen.prompt.endswith(f"\n\n{ASKED}")
    assert "Mario Gariazzo\n" in inner.seen.prompt and "Botta\n" in inner.seen.prompt
    assert [each["id"] for each in result.knowledge["facts"]] in (["evry", "fr"], ["fr", "evry"])
    scores = [each["score"] for each in result.knowledge["facts"]]
    assert scores == sorted(scores, reverse=True)


async def test_min_score_is_a_probability(base: KnowledgeBase) -> None:
    strict, lax = [await handler(base, Handler()).create(completion(min_score=score)) for score in (1.0, 0.0)]
    assert (strict.knowledge["decision"], lax.knowledge["decision"]) == ("out_of_scope", "in_scope")


@pytest.mark.parametrize(("form", "lines"), [("bilingual", 2), ("monolingual", 1)])
async def test_examples_come_from_the_pool_in_the_languages_of_fact_and_question(
    base: KnowledgeBase, form: str, lines: int
) -> None:
    inner = Handler()
    examples = {"collection": "pool", "count": 3, "form": form}
    result = await handler(base, inner).create(completion(edit_language="en", examples=examples))
    *shots, last = inner.seen.prompt.split("\n\n")
    assert len(shots) == result.knowledge["examples"] == 3
    assert all(len(shot.split("\n")) == lines for shot in shots)
    assert all(shot.startswith("Question: Who designed bridge ") for shot in shots)
    assert all(("Wer entwarf Brücke" in shot) == (form == "bilingual") for shot in shots)
    assert last.startswith("Question: Who designed Évry")


async def test_the_language_of_the_examples_can_be_named(base: KnowledgeBase) -> None:
    examples = {"collection": "pool", "language": "cs"}
    result = await handler(base, Handler()).create(completion(edit_language="en", examples=examples))
    assert (result.knowledge["language"], result.knowledge["examples"]) == ("cs", 0)


async def test_the_receipt_is_in_the_last_chunk_of_a_stream(base: KnowledgeBase) -> None:
    chunks = ['data: {"id": "1"}\n\n', 'data: {"id": "2", "steering": {}}\n\n', "data: [DONE]\n\n"]
    inner = Handler(chunks)
    stream = await handler(base, inner).create(completion())
    received = [chunk async for chunk in stream]
    assert (received[0], received[2]) == (chunks[0], chunks[2])
    last = json.loads(received[1].removeprefix("data: "))
    assert (last["id"], last["steering"], last["knowledge"]["decision"]) == ("2", {}, "in_scope")


async def test_a_stream_that_breaks_off_has_no_receipt(base: KnowledgeBase) -> None:
    chunks = ['data: {"error": {"message": "broken"}}\n\n', "data: [DONE]\n\n"]
    stream = await handler(base, Handler(chunks)).create(completion())
    assert [chunk async for chunk in stream] == chunks


@pytest.mark.parametrize(
    ("knowledge", "param"),
    [
        ("facts", "knowledge"),
        ({}, "knowledge.collection"),
        ({"collection": 1}, "knowledge.collection"),
        ({"collection": "facts", "top_k": 1}, "knowledge.top_k"),
        ({"collection": "facts", "mode": "rag"}, "knowledge.mode"),
        ({"collection": "facts", "min_score": 1.5}, "knowledge.min_score"),
        ({"collection": "facts", "min_score": "0.5"}, "knowledge.min_score"),
        ({"collection": "facts", "max_facts": 0}, "knowledge.max_facts"),
        ({"collection": "facts", "max_facts": True}, "knowledge.max_facts"),
        ({"collection": "facts", "edit_language": "e n"}, "knowledge.edit_language"),
        ({"collection": "facts", "examples": 16}, "knowledge.examples"),
        ({"collection": "facts", "examples": {"count": 1}}, "knowledge.examples.collection"),
        ({"collection": "facts", "examples": {"collection": "pool", "count": 65}}, "knowledge.examples.count"),
        ({"collection": "facts", "examples": {"collection": "pool", "form": "few-bi"}}, "knowledge.examples.form"),
    ],
)
async def test_a_bad_field_is_422_and_named(base: KnowledgeBase, knowledge: Any, param: str) -> None:
    inner = Handler()
    with pytest.raises(ApiError) as error:
        await handler(base, inner).create(Request(prompt=ASKED, knowledge=knowledge))
    assert (error.value.status, error.value.param) == (422, param)
    assert inner.seen is None


@pytest.mark.parametrize(
    "request_",
    [
        completion([1, 2, 3]),
        completion([ASKED, ASKED]),
        completion(None),
        completion("  \n"),
        chat({"role": "system", "content": ASKED}),
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}),
        chat({"role": "user", "content": None}),
        chat(),
    ],
)
async def test_what_holds_no_question_as_text_is_400(base: KnowledgeBase, request_: Request) -> None:
    with pytest.raises(ApiError) as error:
        await handler(base, Handler()).create(request_)
    assert error.value.status == 400


async def test_a_collection_that_is_not_there_or_not_of_this_encoder_is_named(base: KnowledgeBase) -> None:
    with pytest.raises(CollectionNotFound) as missing:
        await handler(base, Handler()).create(completion(collection="nothing"))
    assert missing.value.param == "knowledge.collection"
    with pytest.raises(CollectionNotFound) as missing:
        await handler(base, Handler()).create(completion(examples={"collection": "nothing"}))
    assert missing.value.param == "knowledge.examples.collection"
    with pytest.raises(EncoderMismatch):
        await handler(base, Handler()).create(completion(collection="foreign"))


async def test_a_decider_of_another_encoder_is_refused(base: KnowledgeBase) -> None:
    decider = ThresholdDecider(0.5, encoder=ENCODER.identity._replace(digest="sha256:other"))
    adviser = Adviser(base, BatchedEncoder(ENCODER), decider)
    with pytest.raises(EncoderMismatch, match="train-scope"):
        await KnowledgeHandler(Handler(), "create", adviser).create(completion())
