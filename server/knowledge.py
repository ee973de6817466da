"""From a question to a prompt with facts, or to none: what the `knowledge` field of a request asks for."""

from __future__ import annotations

from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from kb import remake
from kb.collection import Collection
from kb.errors import EncoderMismatch, KbError
from kb.filters import Filter
from kb.knowledge_base import KnowledgeBase
from kb.languages import identified
from kb.lookup import Found, find
from kb.scope import Decider, Text
from server import metrics, tracing
from server.api.errors import ApiError
from server.api.knowledge_schema import Examples, Knowledge, KnowledgeReceipt, Nearest, UsedFact
from server.encoding import BatchedEncoder
from server.tenant_kb import TenantKb

POOL_FACTOR = 4
"""Examples that are looked at for each that is wanted: some may not be translated into the question's language."""


class Advice(NamedTuple):
    """The prompt to use instead, None for the one that was sent, and the receipt."""

    prompt: str | None
    receipt: KnowledgeReceipt


class Adviser:
    """Looks questions up and writes prompts."""

    def __init__(self, knowledge: KnowledgeBase, encoder: BatchedEncoder, decider: Decider) -> None:
        self._knowledge = knowledge
        self._encoder = encoder
        self._decider = decider

    async def advise(self, settings: Knowledge, prompt: str) -> Advice:
        """What the prompt becomes. Raises ApiError, KbError, EncoderError or ScopeError."""
        question = remake.question_of(prompt)
        if not question:
            raise ApiError(400, "knowledge needs a question, and the prompt is empty", "knowledge")
        collection = await self._collection(settings.collection, "knowledge.collection")
        pool = settings.examples and await self._collection(
            settings.examples.collection, "knowledge.examples.collection"
        )
        text = Text(question, identified(question).language, await self._encoder.encode_query(question))
        where = Filter(language=[settings.edit_language]) if settings.edit_language else None
        with metrics.KB_SEARCH.time(), tracing.span("kb.search"):
            found = await run_in_threadpool(find, collection, self._decider, text, where=where)
        used = [each for each in found if each.probability >= settings.min_score][: settings.max_facts]
        receipt = KnowledgeReceipt(
            collection=settings.collection,
            mode=settings.mode,
            decision="in_scope" if used else "out_of_scope",
            min_score=settings.min_score,
            decider=self._decider.name,
            encoder=collection.encoder.name,
            language=text.language,
            facts=[UsedFact(**_scores(each), language=each.fact.language) for each in used],
            nearest=Nearest(**_scores(found[0])) if found and not used else None,
        )
        metrics.KB_LOOKUPS.labels(receipt.decision).inc()
        if not used:
            return Advice(None, receipt)
        facts = [each.fact for each in used]
        if settings.mode == "context":
            return Advice(remake.context_prompt(prompt, facts), receipt)
        examples = []
        if pool and settings.examples:
            receipt.language = (settings.examples.language or text.language or "").lower()
            examples = await run_in_threadpool(_examples, pool, settings.examples, used[0], receipt.language)
            receipt.examples = len(examples)
        return Advice(remake.remake_prompt(question, facts, examples), receipt)

    async def _collection(self, name: str, param: str) -> Collection:
        """Raises CollectionNotFound, and EncoderMismatch where this server can't make vectors like its."""
        try:
            collection = await run_in_threadpool(TenantKb(self._knowledge).collection, name)
        except KbError as error:
            error.param = param
            raise
        ours = await self._encoder.identity()
        fitted = self._decider.encoder
        if fitted is not None and fitted != ours:
            raise EncoderMismatch(
                f"the scope decider was fitted on encoder {fitted.name!r}, and this server has {ours.name!r}: fit one"
                " with polyhelm kb train-scope, and set POLYHELM_KB_SCOPE",
                "knowledge",
            )
        if collection.encoder != ours:
            raise EncoderMismatch(
                f"collection {name!r} was made with encoder {collection.encoder.name!r}, and this server has"
                f" {ours.name!r}: serve with POLYHELM_KB_ENCODER set to it",
                param,
            )
        return collection


def _scores(found: Found) -> dict[str, object]:
    return {
        "id": found.fact.id,
        "version": found.fact.version,
        "score": found.probability,
        "similarity": found.similarity,
    }


def _examples(pool: Collection, wanted: Examples, used: Found, language: str) -> list[remake.Example]:
    """The examples most like the fact's own question, as in the paper, and not the fact itself."""
    where = Filter(language=[used.fact.language]) if used.fact.language else None
    hits = pool.search(used.vector[None], wanted.count * POOL_FACTOR, where=where)[0]
    others = [hit.fact for hit in hits if hit.fact.key != used.fact.key]
    made = (remake.example(each, wanted.form, language) for each in others)
    return [each for each in made if each is not None][: wanted.count]
