"""`PUT /v1/kb/collections/{collection}/facts`: write facts, as one JSON body or as a stream of lines of any length.

A JSON body is one transaction, all or nothing. Lines are written some hundred to a transaction, each for itself. In
both, what the answer says is written is durable, and found by the next search of any process.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic_core import from_json, to_json
from starlette.requests import ClientDisconnect

from kb.collection import Collection, Encode
from kb.encoders import EncoderError
from kb.errors import FactTooLarge, InvalidFact, KbError
from kb.facts import FactDraft, parse_draft
from kb.imports import Importer, LineOutcome, Summary
from kb.upserts import Outcome
from server.api.errors import ApiError, EnvelopeRoute, error_body
from server.api.kb_facts import PREFIX
from server.api.kb_models import EncoderDep, KbDep
from server.encoding import BatchedEncoder
from server.replays import Replays

NDJSON = "application/x-ndjson"
KEY = "Idempotency-Key"
SPOOL_BYTES = 1 << 20
router = APIRouter(prefix=PREFIX, tags=["knowledge"], route_class=EnvelopeRoute)

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "array", "items": {"type": "object"}}},
            NDJSON: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@router.put("", operation_id="put_kb_facts", response_model=None, openapi_extra=_BODY)
async def put_facts(kb: KbDep, encoder: EncoderDep, collection: str, request: Request) -> Response:
    """Write facts: a JSON array, or NDJSON. With `Accept: application/x-ndjson`, lines are answered one by one."""
    target = await run_in_threadpool(kb.changing, collection)
    encode = await _encode(target, encoder)
    polyhelm = request.app.state.polyhelm
    most = polyhelm.settings.max_fact_bytes
    key = request.headers.get(KEY)
    if key is not None and not 1 <= len(key) <= 255:
        raise ApiError(422, f"{KEY}: use 1 to 255 characters", KEY)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("application/json", NDJSON):
        raise ApiError(415, f"send application/json or {NDJSON}, not {kind}", "Content-Type")
    once = Once(polyhelm.replays, target.info.uid, key)
    if kind == NDJSON:
        return await _stream(request, target, encode, most, once)
    body = await request.body()
    return await run_in_threadpool(_whole, body, target, encode, most, once)


class Once:
    """An import under an Idempotency-Key, or under none."""

    def __init__(self, replays: Replays, collection: str, key: str | None) -> None:
        self._replays, self._collection, self._key = replays, collection, key
        self._hash = hashlib.sha256()

    def hash(self, piece: bytes) -> None:
        if self._key is not None:
            self._hash.update(piece)

    @property
    def known(self) -> bool:
        return self._key is not None and self._replays.get(self._collection, self._key) is not None

    def answer(self) -> Response | None:
        """What the same request was answered with. Raises KeyReused for another one under its key."""
        if self._key is None:
            return None
        known = self._replays.find(self._collection, self._key, self._hash.hexdigest())
        if known is None:
            return None
        return Response(known.body, known.status, {"Idempotency-Replayed": "true"}, media_type="application/json")

    def remember(self, response: JSONResponse) -> JSONResponse:
        # What may go better the next time must be done again then.
        if self._key is not None and response.status_code < 500:
            body = bytes(response.body)
            self._replays.put(self._collection, self._key, self._hash.hexdigest(), response.status_code, body)
        return response


def _whole(body: bytes, collection: Collection, encode: Encode | None, most: int, once: Once) -> Response:
    once.hash(body)
    if (answer := once.answer()) is not None:
        return answer
    outcomes = collection.upsert(_drafts(body, most), encode=encode)
    content = {
        "object": "kb.upsert",
        "collection": collection.name,
        "data": [_outcome_json(outcome) for outcome in outcomes],
    }
    return once.remember(JSONResponse(content))


async def _stream(request: Request, collection: Collection, encode: Encode | None, most: int, once: Once) -> Response:
    if await run_in_threadpool(lambda: once.known):
        async for piece in request.stream():
            once.hash(piece)
        answer = await run_in_threadpool(once.answer)
        assert answer is not None, "kept for a day"
        return answer
    # The answers wait on the disk until the whole body is there: a client that sends all before it reads would
    # otherwise wait for us, while we wait for it.
    wanted = NDJSON in request.headers.get("accept", "")
    spool: IO[bytes] | None = tempfile.SpooledTemporaryFile(SPOOL_BYTES) if wanted else None
    importer = Importer(collection, encode, most)
    stopped: Exception | None = None
    try:
        async for piece in request.stream():
            await run_in_threadpool(_feed, importer, piece, spool, once)
        await run_in_threadpool(_feed, importer, None, spool, once)
    except ClientDisconnect:
        stopped = ApiError(400, "the client left before the end of the stream")
    except (KbError, EncoderError) as exc:
        stopped = exc
    finally:
        importer.close()
    status, content = _summary_json(collection, importer.summary, stopped)
    answer = JSONResponse(content, status)
    if stopped is None:
        # The whole body was read: only then does the hash say which request this was.
        await run_in_threadpool(once.remember, answer)
    if spool is None:
        return answer
    spool.write(bytes(answer.body) + b"\n")
    spool.seek(0)
    return StreamingResponse(_lines(spool), status, media_type=NDJSON)


def _feed(importer: Importer, piece: bytes | None, spool: IO[bytes] | None, once: Once) -> None:
    if piece is None:
        results = importer.finish()
    else:
        once.hash(piece)
        results = importer.feed(piece)
    if spool is not None:
        for result in results:
            spool.write(json.dumps(_line_json(result), ensure_ascii=False).encode() + b"\n")


def _lines(spool: IO[bytes]) -> Iterator[bytes]:
    with spool:
        while piece := spool.read(1 << 16):
            yield piece


def _drafts(body: bytes, most: int) -> list[FactDraft]:
    """The facts of a JSON body. Raises InvalidFact or FactTooLarge, naming the first that is at fault."""
    try:
        content = from_json(body)
    except ValueError as exc:
        raise InvalidFact(f"the body is not JSON in UTF-8 ({exc}); send an array of facts", "body") from None
    if isinstance(content, dict) and content.keys() == {"facts"}:
        content = content["facts"]
    if not isinstance(content, list) or not content:
        raise InvalidFact('send an array of facts, or {"facts": [...]}, with at least one', "body")
    drafts = []
    for index, item in enumerate(content):
        raw = to_json(item)
        if len(raw) > most:
            raise FactTooLarge(f"fact {index} has more than {most} bytes; make it shorter, or split it", str(index))
        try:
            drafts.append(parse_draft(raw))
        except InvalidFact as exc:
            raise InvalidFact(
                f"fact {index}: {exc.message}", f"{index}.{exc.param}" if exc.param else str(index)
            ) from None
    return drafts


async def _encode(collection: Collection, encoder: BatchedEncoder) -> Encode | None:
    """What makes vectors for the collection; None where this server can't, and facts need embeddings."""
    if collection.encoder != await encoder.identity():
        return None
    return encoder.encoder.encode_documents


def _summary_json(collection: Collection, summary: Summary, stopped: Exception | None) -> tuple[int, dict[str, Any]]:
    """The status and the body: that of the first error where there is one, and always what was written."""
    content: dict[str, Any] = {
        "object": "kb.import",
        "collection": collection.name,
        "lines": summary.lines,
        **{name: getattr(summary, name) for name in ("created", "updated", "unchanged", "superseded", "failed")},
        "errors": [_line_json(result) for result in summary.errors],
    }
    if stopped is None and not summary.errors:
        return 200, content
    if stopped is not None:
        error = error_body(stopped)
    else:
        error = error_body(summary.errors[0].outcome.error)
        error["message"] = f"line {summary.errors[0].line}: {error['message']}"
    return error["code"], {"error": error, **content}


def _line_json(result: LineOutcome) -> dict[str, Any]:
    return {"line": result.line, **_outcome_json(result.outcome)}


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    if outcome.error is not None:
        return {"id": outcome.id, "status": "error", "error": error_body(outcome.error)}
    content = {"id": outcome.id, "status": outcome.status, "version": outcome.version, "seq": outcome.seq}
    return content | ({"supersedes": list(outcome.supersedes)} if outcome.supersedes else {})
