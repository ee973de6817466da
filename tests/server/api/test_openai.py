"""The wrapper around vLLM's handlers; a small handler of our own stands in for theirs."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.openai import SteeringHandler, refuse_error, with_receipt
from server.api.steering import Applied, Prepared, Receipt
from server.engine.banks import BankFull
from server.engine.edits import Edit, Program

PROGRAM = Program((Edit("add", "sha256:v", (1,), 1.0),))
CHUNKS = ['data: {"choices": [{"text": "a"}]}\n\n', 'data: {"choices": [{"text": "ü"}]}\n\n', "data: [DONE]\n\n"]
REFUSED = 'data: {"error": {"message": "empty span", "type": "BadRequestError", "param": "steering", "code": 400}}\n\n'


def receipt(touched: int = 0) -> Receipt:
    applied = Applied(
        artifact="mood",
        version=1,
        digest="sha256:v",
        kind="steering_vector",
        op="add",
        sites=["resid_post.1"],
        strength=1.0,
        relative_dose=None,
        tokens_touched=touched,
    )
    return Receipt(fingerprint=PROGRAM.fingerprint, applied=[applied])


class Steerer:
    """Prepares the same program for everybody."""

    async def vectors(self, version: Any) -> Any:
        return [1], version

    def prepare(self, raw: object) -> Prepared:
        if raw == "bad":
            raise ApiError(422, "steering: bad", "steering")
        return Prepared(PROGRAM, {"sha256:v": "the version"}, [], receipt="r1")  # type: ignore[dict-item]

    def receipt(self, prepared: Prepared, touched: Any, cached: Any) -> Receipt:
        return receipt(touched)


class Engine:
    """Records what is held and what is asked for, in order."""

    def __init__(self, slots: int = 2) -> None:
        self.bank = SimpleNamespace(slots=slots)
        self.events: list[str] = []
        self.full = False
        self.loaded: Any = None

    def mark(self, request: Any, program: Program, receipt: str) -> None:
        assert program is PROGRAM
        request.marked = receipt

    @asynccontextmanager
    async def holding(self, vectors: Mapping[str, Callable[[], Awaitable[Any]]]) -> AsyncIterator[None]:
        if self.full:
            raise BankFull("all 2 bank slots are in use; retry")
        self.loaded = {key: await load() for key, load in vectors.items()}
        self.events.append("held")
        try:
            yield
        finally:
            self.events.append("released")

    async def receipt(self, name: str) -> Any:
        assert name == "r1"
        self.events.append("receipt")
        return SimpleNamespace(touched=5, cached=0)


class Handler:
    """Answers with a result, an exception or a stream; knows when its stream was closed."""

    def __init__(self, engine: Engine, result: Any = None, chunks: list[Any] | None = None) -> None:
        self.engine, self.result, self.chunks = engine, result, chunks
        self.started = asyncio.Event()
        self.seen: Any = None

    async def create(self, request: Any, raw_request: Any = None) -> Any:
        self.seen = request
        self.started.set()
        if self.chunks is not None:
            return self.stream()
        if isinstance(self.result, BaseException):
            raise self.result
        if self.result is ...:
            await asyncio.sleep(60)
        return self.result

    async def stream(self) -> AsyncIterator[str]:
        try:
            for chunk in self.chunks or ():
                if isinstance(chunk, BaseException):
                    raise chunk
                if chunk is ...:
                    await asyncio.sleep(60)
                yield chunk
        finally:
            self.engine.events.append("stream closed")

    def other(self) -> str:
        return "vLLM's"


def request(steering: Any = "mood", **fields: Any) -> SimpleNamespace:
    extras = {} if steering is None else {"steering": steering}
    return SimpleNamespace(model_extra=extras, **({"vllm_xargs": None, "use_beam_search": False} | fields))


def handler(engine: Engine, **answer: Any) -> tuple[Any, Handler]:
    inner = Handler(engine, **answer)
    return SteeringHandler(inner, "create", Steerer(), engine), inner  # type: ignore[arg-type]


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """Run to the end, and fail when anything was reported to the event loop's exception handler."""
    reports: list[Any] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
        result = await main()
        gc.collect()
        await settle()
        return result

    result = asyncio.run(watched())
    assert reports == []
    return result


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def payload(chunk: str) -> dict[str, Any]:
    return dict(json.loads(chunk.removeprefix("data: ")))


def test_unsteered_requests_pass_untouched() -> None:
    engine = Engine()
    answer = SimpleNamespace(choices=[])
    steered, inner = handler(engine, result=answer)
    assert run(lambda: steered.create(request(None))) is answer
    assert not hasattr(answer, "steering")
    assert not hasattr(inner.seen, "marked")
    assert (engine.events, steered.other()) == ([], "vLLM's")


def test_answer_carries_the_receipt_and_the_hold_ends() -> None:
    engine = Engine()
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    answer = run(lambda: steered.create(request()))
    assert answer.steering == receipt(5).model_dump()
    assert inner.seen.marked == "r1"
    assert "steering" not in inner.seen.model_extra
    assert engine.loaded == {"sha256:v": ([1], "the version")}
    assert engine.events == ["held", "receipt", "released"]


def test_refusal_of_vllm_is_passed_on_without_a_receipt() -> None:
    engine = Engine()
    refusal = SimpleNamespace(error="too long")
    steered, _ = handler(engine, result=refusal)
    assert run(lambda: steered.create(request())) is refusal
    assert not hasattr(refusal, "steering")
    assert engine.events == ["held", "released"]


def test_exception_of_vllm_is_passed_on_and_the_hold_ends() -> None:
    engine = Engine()
    steered, _ = handler(engine, result=ValueError("from vLLM"))
    with pytest.raises(ValueError, match="from vLLM"):
        run(lambda: steered.create(request()))
    assert engine.events == ["held", "released"]


def test_missing_receipt_is_an_error_and_not_an_unsteered_answer() -> None:
    engine = Engine()

    async def none(name: str) -> Any:
        raise RuntimeError("nothing was steered")

    engine.receipt = none  # type: ignore[method-assign]
    steered, _ = handler(engine, result=SimpleNamespace(choices=[]))
    with pytest.raises(RuntimeError, match="nothing was steered"):
        run(lambda: steered.create(request()))
    assert engine.events == ["held", "released"]


def test_cancelled_request_ends_its_hold() -> None:
    engine = Engine()

    async def main() -> None:
        steered, inner = handler(engine, result=...)
        task = asyncio.create_task(steered.create(request()))
        await inner.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert engine.events == ["held", "released"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"steering": "bad"}, 422, "steering"),
        ({"use_beam_search": True}, 400, "steering"),
        ({"vllm_xargs": {"polyhelm_program": "[]"}}, 400, "vllm_xargs"),
        ({"steering": None, "vllm_xargs": {"x": 1, "polyhelm": 1}}, 400, "vllm_xargs"),
    ],
)
def test_refused_request_never_reaches_vllm(fields: dict[str, Any], status: int, param: str) -> None:
    engine = Engine()
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    with pytest.raises(ApiError) as error:
        run(lambda: steered.create(request(**fields)))
    assert (error.value.status, error.value.param) == (status, param)
    assert (engine.events, inner.seen) == ([], None)


def test_full_bank_is_503_and_more_artifacts_than_slots_422() -> None:
    engine = Engine()
    engine.full = True
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    with pytest.raises(ApiError, match="bank slots") as error:
        run(lambda: steered.create(request()))
    assert error.value.status == 503
    engine.bank.slots = 0
    with pytest.raises(ApiError, match="--bank-slots") as error:
        run(lambda: steered.create(request()))
    assert (error.value.status, inner.seen) == (422, None)


async def drain(steered: Any) -> list[str]:
    return [chunk async for chunk in await steered.create(request())]


def test_stream_carries_the_receipt_in_its_last_chunk_only() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=CHUNKS)
    chunks = run(lambda: drain(steered))
    assert (chunks[0], chunks[2]) == (CHUNKS[0], CHUNKS[2])
    assert payload(chunks[1]) == payload(CHUNKS[1]) | {"steering": receipt(5).model_dump()}
    assert "ü" in chunks[1] and chunks[1].endswith("\n\n")
    assert engine.events == ["held", "receipt", "stream closed", "released"]


def test_stream_of_one_chunk_carries_the_receipt() -> None:
    steered, _ = handler(Engine(), chunks=[CHUNKS[0], CHUNKS[2]])
    chunks = run(lambda: drain(steered))
    assert ["steering" in chunk for chunk in chunks] == [True, False]


def test_error_in_the_first_chunk_becomes_a_status() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=[REFUSED, CHUNKS[2]])
    with pytest.raises(ApiError, match="empty span") as error:
        run(lambda: drain(steered))
    assert (error.value.status, error.value.param) == (400, "steering")
    assert engine.events == ["held", "stream closed", "released"]


def test_exception_before_the_first_chunk_ends_the_hold() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=[ValueError("from vLLM")])
    with pytest.raises(ValueError, match="from vLLM"):
        run(lambda: drain(steered))
    assert engine.events == ["held", "stream closed", "released"]


def test_error_in_the_middle_of_a_stream_is_passed_on_without_a_receipt() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=[CHUNKS[0], REFUSED, CHUNKS[2]])
    assert run(lambda: drain(steered)) == [CHUNKS[0], REFUSED, CHUNKS[2]]
    assert engine.events.count("released") == 1
    assert "receipt" not in engine.events, "an engine that has died has none, and the error would be lost with it"


def test_exception_in_the_middle_of_a_stream_ends_the_hold() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=[*CHUNKS[:2], ValueError("from vLLM")])
    with pytest.raises(ValueError, match="from vLLM"):
        run(lambda: drain(steered))
    assert engine.events == ["held", "stream closed", "released"]


def test_stream_closed_in_the_middle_ends_the_hold_after_the_engine_stopped() -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        stream = await steered.create(request())
        await anext(stream)
        assert "released" not in engine.events
        await stream.aclose()

    run(main)
    assert engine.events == ["held", "stream closed", "released"]


def test_stream_dropped_in_the_middle_ends_the_hold() -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        stream = await steered.create(request())
        await anext(stream)
        del stream
        gc.collect()
        await settle()
        assert engine.events == ["held", "stream closed", "released"]

    run(main)
    assert engine.events.count("released") == 1


@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_stream_abandoned_before_its_first_chunk_ends_the_hold(how: str) -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        stream = await steered.create(request())
        if how == "closed":
            await stream.aclose()
        del stream
        gc.collect()
        await settle()
        assert engine.events == ["held", "stream closed", "released"]

    run(main)
    assert engine.events.count("released") == 1


def test_request_cancelled_while_it_waits_for_the_first_chunk_ends_its_hold() -> None:
    engine = Engine()

    async def main() -> None:
        steered, inner = handler(engine, chunks=[...])
        task = asyncio.create_task(steered.create(request()))
        await inner.started.wait()
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settle()
        assert engine.events == ["held", "stream closed", "released"]

    run(main)
    assert engine.events.count("released") == 1


def test_request_cancelled_in_the_middle_of_its_stream_ends_its_hold() -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        task = asyncio.create_task(drain(steered))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settle()
        assert engine.events == ["held", "stream closed", "released"]

    run(main)
    assert engine.events.count("released") == 1


@pytest.mark.parametrize("chunk", [CHUNKS[0], CHUNKS[2], ": ping\n\n", 'data: {"error": null}\n\n', "event: x\n\n"])
def test_chunk_without_an_error_is_no_refusal(chunk: str) -> None:
    refuse_error(chunk)


def test_error_chunk_without_a_code_is_500() -> None:
    with pytest.raises(ApiError) as error:
        refuse_error('data: {"error": {"message": "broken"}}\n\n')
    assert (error.value.status, error.value.message) == (500, "broken")


def test_receipt_leaves_the_chunk_otherwise_as_it_was() -> None:
    chunk = with_receipt('data: {"id": "x", "usage": {"prompt_tokens": 3}, "choices": []}\n\n', receipt(2))
    body = payload(chunk)
    assert (body["id"], body["usage"], body["choices"]) == ("x", {"prompt_tokens": 3}, [])
    assert body["steering"]["applied"][0]["tokens_touched"] == 2
    assert with_receipt(REFUSED, receipt(2)) == REFUSED
