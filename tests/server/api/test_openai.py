"""The wrapper around vLLM's handlers; a small handler of our own stands in for theirs."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from server.api.chunks import with_field
from server.api.errors import ApiError
from server.api.openai import SteeringHandler, refuse_error
from server.api.prepared import Prepared
from server.api.receipts import Applied, Receipt
from server.api.steering_schema import LAST_PROMPT_TOKEN, parse
from server.engine.bank_directory import BankFull, BankTooSmall
from server.engine.capture import CaptureSpec
from server.engine.edits import Edit, Program
from server.keys import SCOPES, Key
from server.request_context import RequestContext, enter

PROGRAM = Program((Edit("gate", "sha256:v", (1,)), Edit("add", "sha256:v", (1,), 1.0)))
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
        tokens_touched=touched,
    )
    return Receipt(fingerprint=PROGRAM.fingerprint, applied=[applied])


class Steerer:
    """Prepares the same program for everybody."""

    def __init__(self) -> None:
        self.lengths: list[int] | None = None

    async def vectors(self) -> Any:
        return "the operand"

    async def look_up_and_prepare(self, raw: object, prompts: Any = None) -> Prepared:
        return self.prepare(raw, prompts)

    def prepare(self, raw: object, prompts: Any = None) -> Prepared:
        if raw == "bad":
            raise ApiError(422, "steering: bad", "steering")
        fields = raw if isinstance(raw, dict) else {}
        settings = parse({"interventions": [{"artifact": "mood"}]} | fields)
        sites = (("resid_post", 0), ("resid_post", 1)) if settings.mode == "frozen" else ()
        operands: Any = {"sha256:v": self.vectors}
        return Prepared(PROGRAM, (0, 0), (0,), operands, [], (), frozenset(), settings, sites, receipt="r1")

    async def check(self, prepared: Prepared) -> None:
        if prepared.settings.max_relative_dose == 0:
            raise ApiError(400, "the dose is above 0", "steering.interventions.0.strength")

    async def refuse_conflicts(self, prepared: Prepared, prompt_lengths: list[int]) -> None:
        self.lengths = prompt_lengths

    def receipt(self, prepared: Prepared, touched: Any, cached: Any) -> Receipt:
        return receipt(touched)


class Engine:
    """Records what is brought onto the device and what is asked for, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.trouble: Exception | None = None
        self.captures: str | None = None
        self.loaded: Any = None
        self.programs: list[Program] = []
        self.spec: CaptureSpec | None = None

    def mark(self, request: Any, program: Program, receipt: str) -> None:
        self.programs.append(program)
        request.marked = receipt

    def mark_capture(self, request: Any, spec: CaptureSpec, receipt: str) -> None:
        self.spec = spec
        request.captured_under = receipt

    async def captured(self, receipt: str) -> dict[str, np.ndarray]:
        self.events.append("captured")
        return {f"resid_post.{layer}": np.full(4, layer, np.float32) for layer in range(2)}

    async def ensure(self, program: Program, operands: Mapping[str, Callable[[], Awaitable[Any]]]) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.loaded = {key: await load() for key, load in operands.items()}
        self.events.append("ensured")

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
        self.requests: list[Any] = []

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        self.seen = request
        self.requests.append(request)
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

    async def render_completion_request(self, request: Any) -> Any:
        request.rendered = True
        return self.rendered

    rendered: Any = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [1]}]

    def other(self) -> str:
        return "vLLM's"


class Request(BaseModel):
    """As vLLM's: unknown fields are kept as extras."""

    model_config = ConfigDict(extra="allow")

    prompt: str | list[Any] = "Hello"
    n: int = 1
    max_tokens: int = 16
    stream: bool = False
    request_id: str = "ours"
    vllm_xargs: dict[str, Any] | None = None
    use_beam_search: bool = False


def request(steering: Any = "mood", **fields: Any) -> Request:
    return Request(**fields) if steering is None else Request(**fields, steering=steering)


def handler(engine: Engine, **answer: Any) -> tuple[Any, Handler]:
    inner = Handler(engine, **answer)
    return SteeringHandler(inner, "create_completion", Steerer(), engine), inner  # type: ignore[arg-type]


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
    assert run(lambda: steered.create_completion(request(None))) is answer
    assert not hasattr(answer, "steering")
    assert not hasattr(inner.seen, "marked")
    assert (engine.events, steered.other()) == ([], "vLLM's")


def test_answer_carries_the_receipt() -> None:
    engine = Engine()
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    answer = run(lambda: steered.create_completion(request()))
    assert answer.steering == receipt(5).model_dump()
    assert inner.seen.marked == "r1"
    assert "steering" not in inner.seen.model_extra
    assert engine.loaded == {"sha256:v": "the operand"}
    assert engine.events == ["ensured", "receipt"]


def test_refusal_of_vllm_is_passed_on_without_a_receipt() -> None:
    engine = Engine()
    refusal = SimpleNamespace(error="too long")
    steered, _ = handler(engine, result=refusal)
    assert run(lambda: steered.create_completion(request())) is refusal
    assert not hasattr(refusal, "steering")
    assert engine.events == ["ensured"]


def test_exception_of_vllm_is_passed_on() -> None:
    engine = Engine()
    steered, _ = handler(engine, result=ValueError("from vLLM"))
    with pytest.raises(ValueError, match="from vLLM"):
        run(lambda: steered.create_completion(request()))
    assert engine.events == ["ensured"]


def test_missing_receipt_is_an_error_and_not_an_unsteered_answer() -> None:
    engine = Engine()

    async def none(name: str) -> Any:
        raise RuntimeError("nothing was steered")

    engine.receipt = none  # type: ignore[method-assign]
    steered, _ = handler(engine, result=SimpleNamespace(choices=[]))
    with pytest.raises(RuntimeError, match="nothing was steered"):
        run(lambda: steered.create_completion(request()))
    assert engine.events == ["ensured"]


def test_cancelled_request_cancels_vllms() -> None:
    engine = Engine()

    async def main() -> None:
        steered, inner = handler(engine, result=...)
        task = asyncio.create_task(steered.create_completion(request()))
        await inner.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert engine.events == ["ensured"]


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
        run(lambda: steered.create_completion(request(**fields)))
    assert (error.value.status, error.value.param) == (status, param)
    assert (engine.events, inner.seen) == ([], None)


@pytest.mark.parametrize("granted", [True, False])
def test_tensor_in_a_request_needs_its_own_scope(granted: bool) -> None:
    steered, inner = handler(Engine(), result=SimpleNamespace(choices=[]))
    sent = request(steering=None, prompt_embeds="aGk=")

    async def ask() -> None:
        enter(RequestContext(key=Key("1", "", SCOPES if granted else SCOPES - {"inline"})))
        await steered.create_completion(sent)

    if granted:
        run(ask)
        assert inner.seen is sent
    else:
        with pytest.raises(ApiError, match="scope 'inline'") as error:
            run(ask)
        assert (error.value.status, error.value.param, inner.seen) == (403, "prompt_embeds", None)


@pytest.mark.parametrize(("trouble", "status"), [(BankFull("in use: retry"), 503), (BankTooSmall("too large"), 400)])
def test_operands_without_room_are_refused(trouble: Exception, status: int) -> None:
    engine = Engine()
    engine.trouble = trouble
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    with pytest.raises(ApiError, match=str(trouble)) as error:
        run(lambda: steered.create_completion(request()))
    assert (error.value.status, error.value.param, inner.seen) == (status, "steering", None)


class Refused(ValueError):
    """As vLLM's: the field is in an attribute, and the engine counts edits."""

    parameter: str | None = "steering.interventions.1.apply"


def test_exception_of_the_engine_names_the_intervention_and_not_the_edit() -> None:
    steered, _ = handler(Engine(), result=Refused("empty span"))
    with pytest.raises(Refused) as error:
        run(lambda: steered.create_completion(request()))
    assert error.value.parameter == "steering.interventions.0.apply"
    chunk = REFUSED.replace('"steering"', '"steering.interventions.1.apply"')
    steered, _ = handler(Engine(), chunks=[chunk, CHUNKS[2]])
    with pytest.raises(ApiError) as refused:
        run(lambda: drain(steered))
    assert refused.value.param == "steering.interventions.0.apply"


def test_dose_is_checked_before_anything_runs() -> None:
    engine = Engine()
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    with pytest.raises(ApiError, match="the dose"):
        run(lambda: steered.create_completion(request({"max_relative_dose": 0.0, "mode": "frozen"})))
    assert (engine.events, inner.seen) == ([], None)


def test_conflicts_are_looked_for_with_the_prompts_as_vllm_renders_them() -> None:
    steered, inner = handler(Engine(), result=SimpleNamespace(choices=[]))
    run(lambda: steered.create_completion(request()))
    assert steered._steerer.lengths is None
    run(lambda: steered.create_completion(request({"conflict": "error"})))
    assert steered._steerer.lengths == [3, 1]
    assert not hasattr(inner.seen, "rendered")
    inner.rendered = ("the conversation", [{"prompt_token_ids": [1, 2]}])
    run(lambda: steered.create_completion(request({"conflict": "error"})))
    assert steered._steerer.lengths == [2]


FROZEN = {"mode": "frozen"}


def test_frozen_request_runs_twice_and_puts_back_what_the_first_run_had() -> None:
    engine = Engine()
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    sent = request(FROZEN, n=3, max_tokens=9, prompt=["Hello"], logit_bias={"5": 1.0})
    answer = run(lambda: steered.create_completion(sent))
    first, second = inner.requests
    assert (first.n, first.max_tokens, first.stream, first.prompt) == (1, 1, False, ["Hello"])
    assert first.request_id != "ours" and not hasattr(first, "marked")
    assert second is sent and (second.n, second.max_tokens, second.marked) == (3, 9, "r1")
    assert engine.spec == CaptureSpec((("resid_post", 0), ("resid_post", 1)), LAST_PROMPT_TOKEN)
    (program,) = engine.programs
    assert [edit.opcode for edit in program.edits] == ["set", "gate", "add"]
    assert engine.events == ["captured", "ensured", "receipt"]
    assert engine.loaded.keys() == set(program.operands)
    assert hasattr(answer, "steering")


def test_frozen_request_that_vllm_refuses_is_not_run_again() -> None:
    engine = Engine()
    refusal = SimpleNamespace(error="too long")
    steered, inner = handler(engine, result=refusal)
    assert run(lambda: steered.create_completion(request(FROZEN))) is refusal
    assert (len(inner.requests), engine.events) == (1, [])


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2, 3]]])
def test_frozen_request_with_several_prompts_is_refused(prompt: list[Any]) -> None:
    steered, inner = handler(Engine(), result=SimpleNamespace(choices=[]))
    with pytest.raises(ApiError, match="one prompt per request, not 2") as error:
        run(lambda: steered.create_completion(request(FROZEN, prompt=prompt)))
    assert (error.value.status, error.value.param, inner.requests) == (400, "steering.mode", [])


def test_frozen_request_with_one_prompt_of_tokens_runs() -> None:
    steered, inner = handler(Engine(), result=SimpleNamespace(choices=[]))
    run(lambda: steered.create_completion(request(FROZEN, prompt=[1, 2, 3])))
    assert len(inner.requests) == 2


def test_frozen_mode_needs_captures() -> None:
    engine = Engine()
    engine.captures = "start with --enforce-eager"
    steered, inner = handler(engine, result=SimpleNamespace(choices=[]))
    with pytest.raises(ApiError, match="--enforce-eager") as error:
        run(lambda: steered.create_completion(request(FROZEN)))
    assert (error.value.status, error.value.param, inner.requests) == (400, "steering.mode", [])


async def drain(steered: Any) -> list[str]:
    return [chunk async for chunk in await steered.create_completion(request())]


def test_stream_carries_the_receipt_in_its_last_chunk_only() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=CHUNKS)
    chunks = run(lambda: drain(steered))
    assert (chunks[0], chunks[2]) == (CHUNKS[0], CHUNKS[2])
    assert payload(chunks[1]) == payload(CHUNKS[1]) | {"steering": receipt(5).model_dump()}
    assert "ü" in chunks[1] and chunks[1].endswith("\n\n")
    assert engine.events == ["ensured", "receipt", "stream closed"]


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
    assert engine.events == ["ensured", "stream closed"]


def test_exception_before_the_first_chunk_closes_the_stream() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=[ValueError("from vLLM")])
    with pytest.raises(ValueError, match="from vLLM"):
        run(lambda: drain(steered))
    assert engine.events == ["ensured", "stream closed"]


def test_error_in_the_middle_of_a_stream_is_passed_on_without_a_receipt() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=[CHUNKS[0], REFUSED, CHUNKS[2]])
    assert run(lambda: drain(steered)) == [CHUNKS[0], REFUSED, CHUNKS[2]]
    assert engine.events.count("stream closed") == 1
    assert "receipt" not in engine.events, "an engine that has died has none, and the error would be lost with it"


def test_exception_in_the_middle_of_a_stream_is_passed_on() -> None:
    engine = Engine()
    steered, _ = handler(engine, chunks=[*CHUNKS[:2], ValueError("from vLLM")])
    with pytest.raises(ValueError, match="from vLLM"):
        run(lambda: drain(steered))
    assert engine.events == ["ensured", "stream closed"]


def test_stream_closed_in_the_middle_closes_vllms() -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        stream = await steered.create_completion(request())
        await anext(stream)
        assert "stream closed" not in engine.events
        await stream.aclose()

    run(main)
    assert engine.events == ["ensured", "stream closed"]


def test_stream_dropped_in_the_middle_closes_vllms() -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        stream = await steered.create_completion(request())
        await anext(stream)
        del stream
        gc.collect()
        await settle()
        assert engine.events == ["ensured", "stream closed"]

    run(main)
    assert engine.events.count("stream closed") == 1


@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_stream_abandoned_before_its_first_chunk_closes_vllms(how: str) -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        stream = await steered.create_completion(request())
        if how == "closed":
            await stream.aclose()
        del stream
        gc.collect()
        await settle()
        assert engine.events == ["ensured", "stream closed"]

    run(main)
    assert engine.events.count("stream closed") == 1


def test_request_cancelled_while_it_waits_for_the_first_chunk_closes_vllms_stream() -> None:
    engine = Engine()

    async def main() -> None:
        steered, inner = handler(engine, chunks=[...])
        task = asyncio.create_task(steered.create_completion(request()))
        await inner.started.wait()
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settle()
        assert engine.events == ["ensured", "stream closed"]

    run(main)
    assert engine.events.count("stream closed") == 1


def test_request_cancelled_in_the_middle_of_its_stream_closes_vllms() -> None:
    engine = Engine()

    async def main() -> None:
        steered, _ = handler(engine, chunks=[*CHUNKS[:2], ...])
        task = asyncio.create_task(drain(steered))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settle()
        assert engine.events == ["ensured", "stream closed"]

    run(main)
    assert engine.events.count("stream closed") == 1


@pytest.mark.parametrize("chunk", [CHUNKS[0], CHUNKS[2], ": ping\n\n", 'data: {"error": null}\n\n', "event: x\n\n"])
def test_chunk_without_an_error_is_no_refusal(chunk: str) -> None:
    refuse_error(chunk, Steerer().prepare("mood"))


def test_error_chunk_without_a_code_is_500() -> None:
    with pytest.raises(ApiError) as error:
        refuse_error('data: {"error": {"message": "broken"}}\n\n', Steerer().prepare("mood"))
    assert (error.value.status, error.value.message) == (500, "broken")


def test_receipt_leaves_the_chunk_otherwise_as_it_was() -> None:
    chunk = with_field(
        'data: {"id": "x", "usage": {"prompt_tokens": 3}, "choices": []}\n\n', "steering", receipt(2).model_dump()
    )
    body = payload(chunk)
    assert (body["id"], body["usage"], body["choices"]) == ("x", {"prompt_tokens": 3}, [])
    assert body["steering"]["applied"][0]["tokens_touched"] == 2
    assert with_field(REFUSED, "steering", receipt(2).model_dump()) == REFUSED
