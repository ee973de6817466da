"""`POST /v1/activations`: activations at sites for prompts and generations, as one safetensors file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from server.api.errors import ApiError, EnvelopeRoute
from server.api.prepared import Prepared
from server.engine.bank_directory import BankFull, BankTooSmall
from server.engine.capture import DTYPES, CaptureSpec, Dtype
from server.engine.capture_plan import CapturePlan, NotInstalled, PlanError, chosen_positions, chosen_sites
from server.engine.spans import SpanError
from server.engine.spool import ITEM_BYTES, CaptureFailed, FailureKind, Stored, safetensors_file

if TYPE_CHECKING:
    from server.app import Polyhelm
    from server.engine.client import CaptureRun

router = APIRouter(prefix="/v1/activations", tags=["activations"], route_class=EnvelopeRoute)

MAX_PROMPTS = 256
MEDIA_TYPE = "application/safetensors"
FAILURES: dict[FailureKind, tuple[int, str | None]] = {
    "dtype": (400, "dtype"),
    "disk": (507, None),
    "lost": (500, None),
}
T = TypeVar("T")


class ActivationsRequest(BaseModel):
    """What to run, and what to capture of it.

    `prompts`: texts, lists of token ids, or {"messages": [...]} for the model's chat template. `sites`: names such as
    `resid_post.14`, or {"points": [...], "layers": [...]}, where null layers are all. `positions`: "last" and "all" of
    the prompt, "mean" over it, or a list, negative from the prompt's end; with `generation` the generated tokens as
    well, but the last one, which never runs through the model. `steering` is that of chat completions.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: Annotated[list[Any], Field(min_length=1, max_length=MAX_PROMPTS)]
    sites: Any
    positions: Any = "last"
    generation: bool = False
    max_tokens: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    steering: Any = None
    dtype: Dtype = "float32"


@router.post(
    "",
    operation_id="capture_activations",
    response_class=Response,
    responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def capture_activations(body: ActivationsRequest, request: Request) -> Response:
    """Run the prompts and answer `<prompt>.<site>`, `<prompt>.token_ids` and `<prompt>.positions` of each."""
    capture = _Capture(request.app.state.polyhelm, body)
    folder = capture.polyhelm.captures.new()
    try:
        answer = await unless_gone(request, capture.run(request.app.state.openai_serving_chat, folder.name))
    except BaseException:
        folder.cleanup()
        raise
    if answer is None:
        folder.cleanup()
        return Response(status_code=499)  # nobody reads it
    return Download(folder, *answer)


class Download(StreamingResponse):
    """A file whose pieces lie in a folder; that goes with the answer, however it ends."""

    def __init__(self, folder: TemporaryDirectory[str], size: int, blocks: Iterator[bytes]) -> None:
        super().__init__(blocks, media_type=MEDIA_TYPE, headers={"Content-Length": str(size)})
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._folder.cleanup()


class _Capture:
    """One request on its way. Each step raises ApiError, naming the field."""

    def __init__(self, polyhelm: Polyhelm, body: ActivationsRequest) -> None:
        self.polyhelm = polyhelm
        self.engine = polyhelm.engine
        self.body = body
        if self.engine.captures is not None:
            raise ApiError(400, self.engine.captures)
        try:
            sites = chosen_sites(body.sites, self.engine.layers, self.engine.points)
            self.plan = CapturePlan(sites, chosen_positions(body.positions), body.generation)
        except PlanError as error:
            raise _refusal(error) from error

    async def run(self, chat: Any, folder: str) -> tuple[int, Iterator[bytes]]:
        """The size of the answer and its blocks."""
        prompts = [await self._token_ids(chat, prompt, index) for index, prompt in enumerate(self.body.prompts)]
        self._check_size(prompts)
        if self.body.steering is None:
            return await self._captured(prompts, folder, None)
        prepared = await self.polyhelm.steerer.look_up_and_prepare(self.body.steering)
        try:
            await self._check(prepared, [len(ids) for ids in prompts])
            return await self._captured(prompts, folder, prepared)
        finally:
            prepared.life.end()

    async def _captured(
        self, prompts: Sequence[list[int]], folder: str, prepared: Prepared | None
    ) -> tuple[int, Iterator[bytes]]:
        spec = CaptureSpec(
            self.plan.sites,
            self.plan.span,
            self.plan.keep,
            self.body.dtype,
            folder,
            self.polyhelm.settings.capture_memory_bytes // len(prompts),
        )
        try:
            if prepared is not None:
                await self.engine.ensure(prepared.program, prepared.operands)
            runs = await self._run_all(prompts, spec, prepared)
        except BankTooSmall as error:
            raise ApiError(400, str(error), "steering") from error
        except BankFull as error:
            raise ApiError(503, str(error), "steering") from error
        except CaptureFailed as error:
            status, field = FAILURES[error.kind]
            raise ApiError(status, str(error), field) from error
        return safetensors_file(self._tensors(prompts, runs), self._metadata(runs, prepared))

    async def _token_ids(self, chat: Any, prompt: object, index: int) -> list[int]:
        where = f"prompts.{index}"
        if isinstance(prompt, str):
            ids = await self.engine.tokenize(prompt)
        elif isinstance(prompt, dict) and prompt.keys() == {"messages"}:
            try:
                ids = await self.engine.chat_tokens(chat, prompt["messages"])
            except ValueError as error:
                raise ApiError(422, f"{where}.messages: {error}", f"{where}.messages") from error
        elif isinstance(prompt, list):
            ids = prompt
            for position, token in enumerate(ids):
                if type(token) is not int or not 0 <= token < self.engine.vocab_size:
                    field = f"{where}.{position}"
                    raise ApiError(422, f"{field}: need a token id below {self.engine.vocab_size}", field)
        else:
            raise ApiError(422, f'{where}: need a text, a list of token ids, or {{"messages": [...]}}', where)
        most = self.engine.max_model_len - self.body.max_tokens
        if not 1 <= len(ids) <= most:
            raise ApiError(
                422,
                f"{where}: {len(ids)} tokens; with max_tokens {self.body.max_tokens} this server takes 1 to {most}",
                where,
            )
        try:
            self.plan.check_positions(len(ids))
        except PlanError as error:
            raise _refusal(error) from error
        return ids

    def _check_size(self, prompts: Sequence[Sequence[int]]) -> None:
        item, points = ITEM_BYTES[DTYPES[self.body.dtype][1]], self.engine.points
        size = sum(self.plan.nbytes(len(ids), self.body.max_tokens, points, item) for ids in prompts)
        if size > (most := self.polyhelm.settings.max_capture_bytes):
            raise ApiError(
                413,
                f"the activations can take {size} bytes, and this server allows {most} (POLYHELM_MAX_CAPTURE_BYTES); "
                "ask for fewer prompts, sites or positions, or a smaller dtype",
                "prompts",
            )

    async def _check(self, prepared: Prepared, lengths: Sequence[int]) -> None:
        """Raise ApiError where the edits can't act on prompts of these lengths, in tokens."""
        if prepared.settings.mode == "frozen":
            raise ApiError(400, 'activations are captured in one pass: leave out mode "frozen"', "steering.mode")
        await self.polyhelm.steerer.check(prepared)
        if prepared.settings.conflict == "error":
            await self.polyhelm.steerer.refuse_conflicts(prepared, lengths)
        # The engine would refuse it as well, but one prompt after another.
        for index, edit in enumerate(prepared.program.edits):
            for length in lengths:
                try:
                    edit.span.check(length, self.body.max_tokens)
                except SpanError as error:
                    field = prepared.field_at_fault(f"steering.interventions.{index}.apply")
                    raise ApiError(400, str(error), field) from error

    async def _run_all(
        self, prompts: Sequence[list[int]], spec: CaptureSpec, prepared: Prepared | None
    ) -> list[CaptureRun]:
        """All at once; where one fails the others are aborted."""
        program = None if prepared is None else prepared.program
        fields = {"max_tokens": self.body.max_tokens, "temperature": self.body.temperature, "seed": self.body.seed}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.engine.run_capture(ids, spec, program=program, **fields)) for ids in prompts
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return [task.result() for task in tasks]

    def _tensors(self, prompts: Sequence[list[int]], runs: Sequence[CaptureRun]) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        for index, (ids, run) in enumerate(zip(prompts, runs, strict=True)):
            generated = list(run.output.outputs[0].token_ids)
            tensors[f"{index}.token_ids"] = Stored.of(np.array(ids + generated))
            tensors[f"{index}.positions"] = Stored.of(self.plan.ran(len(ids), len(generated)))
            for point, layer in self.plan.sites:
                tensors[f"{index}.{point}.{layer}"] = run.tensors[f"{point}.{layer}"]
        return tensors

    def _metadata(self, runs: Sequence[CaptureRun], prepared: Prepared | None) -> dict[str, str]:
        metadata = {
            "model": self.polyhelm.model_name,
            "weights_digest": self.polyhelm.steerer.model.identity["weights_digest"] or "",
        }
        for index, run in enumerate(runs):
            choice = run.output.outputs[0]
            metadata[f"{index}.text"] = choice.text
            metadata[f"{index}.finish_reason"] = choice.finish_reason or ""
        if prepared is not None:
            counts = [run.counts for run in runs if run.counts is not None]
            touched = [np.sum(edits, axis=0).tolist() for edits in zip(*(each.touched for each in counts), strict=True)]
            cached = np.sum([each.cached for each in counts], axis=0).tolist()
            receipt = self.polyhelm.steerer.receipt(prepared, touched, cached)
            metadata["steering"] = json.dumps(receipt.model_dump(), ensure_ascii=False)
        return metadata


def _refusal(error: PlanError) -> ApiError:
    return ApiError(400 if isinstance(error, NotInstalled) else 422, str(error), error.field)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the client has left, which cancels it."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        return None if task.cancelled() else task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
