"""polyhelm's metrics, on the same page as vLLM's. Labels have few values: never an artifact, a key or a tenant."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram

from kb.errors import CollectionNotFound, KbError
from server.request_context import current

if TYPE_CHECKING:
    from kb.knowledge_base import KnowledgeBase
    from server.api.receipts import Receipt

log = logging.getLogger(__name__)

INTERVENTIONS = Counter("polyhelm_interventions", "Edits that were applied to requests.", ["opcode"])
TOKENS_TOUCHED = Counter("polyhelm_tokens_touched", "Tokens that the op edited, each edit by itself.", ["opcode"])
REJECTED = Counter("polyhelm_rejected", "Requests that polyhelm refused.", ["reason"])
BANK_RESIDENT = Gauge(
    "polyhelm_bank_resident_bytes", "Operands on the device, at the last upload.", multiprocess_mode="mostrecent"
)
BANK_BUDGET = Gauge("polyhelm_bank_budget_bytes", "Room for operands on the device.", multiprocess_mode="mostrecent")
BANK_HITS = Counter("polyhelm_bank_hits", "Steered requests whose operands all lay on the device.")
BANK_MISSES = Counter("polyhelm_bank_misses", "Steered requests that had to upload operands, or wait for them.")
BANK_UPLOADED = Counter("polyhelm_bank_uploaded_bytes", "Bytes of operands written to the device.")
FITS = Counter("polyhelm_fits", "Fits that ended.", ["method", "status"])
IN_FLIGHT = Gauge("polyhelm_requests_in_flight", "Requests being answered.", multiprocess_mode="livesum")
IN_FLIGHT_BYTES = Gauge("polyhelm_body_bytes_in_flight", "Bytes of their bodies.", multiprocess_mode="livesum")
DRAINING = Gauge(
    "polyhelm_draining", "1 while the server ends what runs and takes nothing new.", multiprocess_mode="max"
)
KB_ENCODE = Histogram("polyhelm_kb_encode_seconds", "Until a question is a vector, waiting for others included.")
KB_SEARCH = Histogram("polyhelm_kb_search_seconds", "Looking for the facts that a question or a vector is about.")
KB_FACTS = Gauge(
    "polyhelm_kb_facts",
    "Facts that can be found, in all collections; counted now and then.",
    multiprocess_mode="mostrecent",
)
KB_LOOKUPS = Counter("polyhelm_kb_lookups", "Requests with the knowledge field, by what was decided.", ["decision"])
FIRST_BYTE = Histogram(
    "polyhelm_time_to_first_byte_seconds",
    "From the request's head to the first byte of its answer's body.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)


FACTS_SECONDS = 15.0


async def follow_facts(kb: KnowledgeBase) -> None:
    """Count the facts now, and again every FACTS_SECONDS."""
    while True:
        try:
            KB_FACTS.set(await asyncio.to_thread(_facts, kb))
        except KbError as error:
            log.warning("the facts can't be counted: %s", error)
        await asyncio.sleep(FACTS_SECONDS)


def _facts(kb: KnowledgeBase) -> int:
    found = 0
    for info in kb.collections():
        # It may have been dropped since.
        with suppress(CollectionNotFound):
            found += kb.collection(info.name).stats().facts
    return found


def applied(receipt: Receipt) -> None:
    """Count the edits of a request, by what its receipt says."""
    current().fingerprint = receipt.fingerprint
    for edit in (edit for each in receipt.applied for edit in each.edits):
        INTERVENTIONS.labels(edit.opcode).inc()
        TOKENS_TOUCHED.labels(edit.opcode).inc(edit.tokens_touched)


def bank(answers: Sequence[Mapping[str, Any]]) -> None:
    """What an engine core told about its bank, with its answers to requests for room."""
    for answer in answers:
        if "resident_bytes" in answer:
            BANK_RESIDENT.set(answer["resident_bytes"])
            BANK_BUDGET.set(answer["budget_bytes"])


def rejected(reason: str) -> None:
    """Count a refusal, and keep its reason for the log."""
    current().reject = reason
    REJECTED.labels(reason).inc()
