"""The API process's view of the engine: vLLM's client, plus what steering needs of the workers."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

import numpy as np
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import GenerationError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.utils.async_utils import cancel_task_threadsafe
from vllm.v1.engine.async_llm import AsyncLLM

from server import tracing
from server.engine.bank_directory import BankFull
from server.engine.capture import CaptureSpec
from server.engine.edits import Program
from server.engine.scoring import as_prompt, check_touched
from server.engine.seams import CAPTURE, PROGRAM, RECEIPT, program_of
from server.engine.seams.core import MISSING
from server.engine.spans import clip
from server.engine.spool import Stored, joined
from server.engine.uploader import Loader, Uploader
from server.request_context import current
from server.tenants import cache_salt

log = logging.getLogger(__name__)

DROP_SECONDS = 10.0

PrefixCache = Literal["tagged", "cache_salt", "off"]


ATTEMPTS = 4
"""How often a request is sent whose operands go missing between their upload and its arrival."""


class Counts(NamedTuple):
    """Tokens that the op edited, and tokens of each edit's span that the prefix cache held already."""

    touched: list[list[int]]
    """[edits][layers of the edit]."""
    cached: list[int]


_loaders: ContextVar[Mapping[str, Loader] | None] = ContextVar("polyhelm_loaders", default=None)
"""Of the operands that the task ensured last. vLLM's handlers, which the same task calls, know nothing of them."""


class Unavailable(GenerationError, BankFull):
    """A request that vLLM's handlers run couldn't be steered now. They answer it as 503."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.status_code = HTTPStatus.SERVICE_UNAVAILABLE


class CaptureRun(NamedTuple):
    """A prompt that ran, what was captured of it by site, and what the op counted where it was steered."""

    output: RequestOutput
    tensors: dict[str, Stored]
    counts: Counts | None


@dataclass
class Engine:
    """A running vLLM engine that can steer. Belongs to one event loop.

    `bank_bytes` is what each engine core has for operands, `bank_host_bytes` what this process keeps copies in.
    """

    client: AsyncLLM
    max_edits: int
    bank_bytes: int
    bank_host_bytes: int
    bank_wait_seconds: float
    layers: int = 0
    hidden_size: int = 0
    runner: str = ""
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By point: width, opcodes (none where it can't be edited), shards, and the reason for what is missing."""
    captures: str | None = None
    """Why activations can't be captured, or None if they can."""
    prefix_cache: PrefixCache = "off"
    closed: bool = False
    """Whether it is being closed: it then refuses what is new, and aborts what it doesn't end."""
    _receipts: list[tuple[str, asyncio.Future[Counts]]] = field(default_factory=list)
    _collector: asyncio.Task[None] | None = None
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._uploader = Uploader(
            lambda: self.client.engine_core.core_engines,
            self._call,
            host_bytes=self.bank_host_bytes,
            wait_seconds=self.bank_wait_seconds,
        )
        # vLLM's own handlers call it as well.
        self._generate = self.client.generate
        self.client.generate = self._accounted  # type: ignore[method-assign]

    async def describe(self) -> None:
        """Ask the workers what they installed."""
        described, *_ = (await self._ask_workers("polyhelm_describe"))[0]
        self.layers, self.hidden_size, self.runner = (
            described["layers"],
            described["hidden_size"],
            described["runner"],
        )
        self.points, self.captures = described["points"], described["captures"]

    async def _call(self, engine: Any, method: str, *arguments: Any) -> Any:
        """Call a method of one engine core."""
        return await self.client.engine_core._call_utility_async(method, *arguments, engine=engine)

    async def _ask_workers(self, method: str, *arguments: Any) -> list[list[Any]]:
        """The answers of all workers [engine cores][workers]."""
        engines = self.client.engine_core.core_engines
        calls = (self._call(engine, "collective_rpc", method, None, arguments) for engine in engines)
        return await asyncio.gather(*calls)

    @property
    def alive(self) -> bool:
        return not (self.closed or self.client.errored)

    def stop_reading(self) -> None:
        """Read nothing more from the engine cores: for when nothing runs, before they are closed."""
        if (reader := self.client.output_handler) is not None:
            # vLLM ends it only after them, whose end it then takes for a death, and logs with a traceback.
            cancel_task_threadsafe(reader)

    @property
    def shutdown_seconds(self) -> int:
        """vLLM's `--shutdown-timeout`."""
        seconds: int = self.client.vllm_config.shutdown_timeout
        return seconds

    @property
    def architecture(self) -> str:
        return self.client.model_config.architectures[0]

    @property
    def model_name(self) -> str:
        return self.client.model_config.served_model_name

    @property
    def model_path(self) -> str:
        """The folder or hub id that the weights were loaded from."""
        return self.client.model_config.model

    @property
    def tokenizer(self) -> Any:
        return self.client.get_tokenizer()

    async def tokenize(self, texts: str | list[str]) -> Any:
        """Token ids of a text, or of each text, as vLLM makes them of a prompt.

        One call at a time: for each call beside another one vLLM copies the tokenizer, and keeps the copy, some MiB.
        """

        def run() -> Any:
            with self._tokenizing:
                return self.tokenizer(texts)["input_ids"]

        return await run_in_threadpool(run)

    @property
    def max_model_len(self) -> int:
        return self.client.model_config.max_model_len

    @property
    def heads(self) -> int:
        """Attention heads of a layer: contexts side by side in `head_out`."""
        heads: int = self.client.model_config.hf_text_config.num_attention_heads
        return heads

    @property
    def vocab_size(self) -> int:
        return self.client.model_config.get_vocab_size()

    @property
    def dtype(self) -> str:
        return str(self.client.model_config.dtype).removeprefix("torch.")

    async def ensure(self, program: Program, loaders: Mapping[str, Loader]) -> None:
        """Bring the operands of `program` onto the device, from `loaders` by bank key, before this task runs it.

        They stay while a request with the program runs. Raises BankFull, BankTooSmall, or whatever a loader raises.
        """
        await self._uploader.ensure(program, loaders)
        _loaders.set(loaders)

    async def _accounted(
        self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[RequestOutput]:
        """Generate for the current request: apart from other tenants in the prefix cache, counted, and in a span."""
        context = current()
        # A prompt that can't carry a tenant's salt is refused by the next line.
        if (salt := cache_salt(prompt.get("cache_salt") if isinstance(prompt, dict) else None)) is not None:
            prompt = {**prompt, "cache_salt": salt}
        deltas = sampling_params.output_kind == RequestOutputKind.DELTA
        prompt_tokens, counted, generated = 0, 0, Counter[int]()
        span = tracing.begin("engine.generate", **{"gen_ai.request.model": self.model_name})
        try:
            async with aclosing(self._with_operands(prompt, sampling_params, *args, **kwargs)) as outputs:
                async for output in outputs:
                    if not prompt_tokens:
                        prompt_tokens = len(output.prompt_token_ids or ())
                        context.prompt_tokens += prompt_tokens
                    for choice in output.outputs:
                        known = generated[choice.index] if deltas else 0
                        generated[choice.index] = known + len(choice.token_ids)
                    context.completion_tokens += generated.total() - counted
                    counted = generated.total()
                    yield output
        finally:
            tracing.end(
                span,
                **{"gen_ai.usage.input_tokens": prompt_tokens, "gen_ai.usage.output_tokens": generated.total()},
            )

    def _with_operands(
        self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput]:
        # A forged program is no bytes; vLLM's input processor is about to refuse it.
        if isinstance((sampling_params.extra_args or {}).get(PROGRAM), bytes):
            program = program_of(sampling_params)
            return self._resending(program, _loaders.get(), prompt, sampling_params, *args, **kwargs)
        return self._generate(prompt, sampling_params, *args, **kwargs)

    async def _resending(
        self, program: Program, loaders: Mapping[str, Loader] | None, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput]:
        """Generate, and where the engine sends the request back for want of an operand, upload it and send it again.

        Raises Unavailable where that is of no use, or where some of several choices were under way already.
        """
        for _ in range(ATTEMPTS):
            started = sent_back = False
            async with aclosing(self._generate(*args, **kwargs)) as outputs:
                async for output in outputs:
                    missing = [choice.stop_reason == MISSING for choice in output.outputs]
                    sent_back = sent_back or any(missing)
                    if sent_back and (started or not all(missing)):
                        raise Unavailable("the bank changed while the request was on its way: retry")
                    if not sent_back:
                        started = True
                        yield output
            if not sent_back:
                return
            if loaders is None:
                raise RuntimeError("a program was run before its operands were ensured")
            self._uploader.forget(program.operands)
            try:
                await self._uploader.ensure(program, loaders)
            except BankFull as error:
                raise Unavailable(str(error)) from error
        raise Unavailable(f"the bank gave the request's operands away {ATTEMPTS} times: retry, or raise --bank-bytes")

    async def receipt(self, receipt: str) -> Counts:
        """What the op counted for the requests that carried `receipt`. RuntimeError if none ran. Closes the receipt.

        Receipts asked for while a call is under way share the next one.
        """
        future: asyncio.Future[Counts] = asyncio.get_running_loop().create_future()
        self._receipts.append((receipt, future))
        if self._collector is None or self._collector.done():
            self._collector = asyncio.create_task(self._collect())
        return await future

    async def _collect(self) -> None:
        while self._receipts:
            batch, self._receipts = self._receipts, []
            try:
                answers = await self._ask_workers("polyhelm_receipts", [receipt for receipt, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for index, (receipt, future) in enumerate(batch):
                counts = merged([[worker[index] for worker in workers] for workers in answers])
                if future.done():
                    continue
                if counts is None:
                    future.set_exception(RuntimeError(f"the engine has no receipt {receipt}: nothing was steered"))
                else:
                    future.set_result(counts)

    def mark(self, request: Any, program: Program, receipt: str) -> None:
        """Put a program into one of vLLM's own request models, from where it reaches the sampling parameters."""
        request.vllm_xargs = {**(request.vllm_xargs or {}), PROGRAM: program.wire, RECEIPT: receipt.encode()}
        if self.prefix_cache == "cache_salt":
            request.cache_salt = salted(request.cache_salt, program)

    def mark_capture(self, request: Any, spec: CaptureSpec, receipt: str) -> None:
        """Have one of vLLM's own request models leave behind what `captured(receipt)` returns."""
        request.vllm_xargs = {**(request.vllm_xargs or {}), CAPTURE: spec.wire, RECEIPT: receipt.encode()}

    async def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        program: Program | None = None,
        receipt: str | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """Run one prompt of tokens to its end."""
        extra = dict(params.extra_args or {})
        if program is not None:
            extra[PROGRAM] = program.wire
        if receipt is not None:
            extra[RECEIPT] = receipt.encode()
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.extra_args = extra or None
        prompt = tokens_input(list(token_ids), cache_salt=cache_salt)
        outputs = [each async for each in self.client.generate(prompt, params, f"polyhelm-{uuid.uuid4().hex}")]
        return outputs[-1]

    async def log_probs(
        self,
        token_ids: Sequence[int],
        start: int,
        program: Program | None = None,
        prompt_length: int | None = None,
    ) -> list[float]:
        """Of the tokens from `start` on, given those before, in nats.

        A program, whose operands must have been ensured, acts as if the tokens behind the first `prompt_length` were
        generated. RuntimeError where the op didn't act at every token that it should.
        """
        if program is not None:
            program = as_prompt(program, prompt_length or len(token_ids), len(token_ids))
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        table = (await self._counted(token_ids, params, program)).prompt_logprobs
        assert table is not None
        rows = zip(token_ids[start:], table[start:], strict=True)
        return [float(row[token].logprob) for token, row in rows if row is not None]

    async def continuation(
        self, token_ids: Sequence[int], max_tokens: int, program: Program | None = None
    ) -> list[int]:
        """The at most so many tokens that follow greedily. Operands and RuntimeError as above."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, detokenize=False)
        return list((await self._counted(token_ids, params, program)).outputs[0].token_ids)

    async def _counted(
        self, token_ids: Sequence[int], params: SamplingParams, program: Program | None
    ) -> RequestOutput:
        if program is None:
            return await self.generate(token_ids, params)
        receipt = uuid.uuid4().hex
        salt = salted(None, program) if self.prefix_cache == "cache_salt" else None
        output = await self.generate(token_ids, params, program, receipt, salt)
        counts = await self.receipt(receipt)
        check_touched(program, counts.touched, counts.cached, len(token_ids), len(output.outputs[0].token_ids))
        return output

    async def one_token(self) -> None:
        """Generate a token, for whoever wants to know whether the engine still does."""
        params = SamplingParams(max_tokens=1, temperature=0, skip_reading_prefix_cache=True, detokenize=False)
        await self.generate([0], params)

    async def run_capture(
        self,
        token_ids: Sequence[int],
        spec: CaptureSpec,
        *,
        max_tokens: int = 1,
        temperature: float = 0,
        seed: int | None = None,
        detokenize: bool = True,
        program: Program | None = None,
    ) -> CaptureRun:
        """Run one prompt, of which the prefix cache saves nothing, and collect what was captured.

        A program's operands must have been ensured. Raises CaptureFailed where the activations couldn't be kept. When
        it is cancelled, the request is aborted and the workers let go of everything.
        """
        receipt = uuid.uuid4().hex
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            skip_reading_prefix_cache=True,
            detokenize=detokenize,
            extra_args={CAPTURE: spec.wire},
        )
        salt = salted(None, program) if program is not None and self.prefix_cache == "cache_salt" else None
        try:
            output = await self.generate(token_ids, params, program, receipt, salt)
            (choice,) = output.outputs
            if choice.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"the engine ended the request: {choice.finish_reason}")
            ran = clip(spec.span.intervals(len(token_ids)), 0, len(token_ids) + len(choice.token_ids) - 1)
            tensors = await self._collected(receipt, sum(end - start for start, end in ran))
            if missing := {f"{point}.{layer}" for point, layer in spec.sites} - tensors.keys():
                raise RuntimeError(f"nothing was captured at {', '.join(sorted(missing))}")
            return CaptureRun(output, tensors, None if program is None else await self.receipt(receipt))
        except BaseException:
            await self._drop_captured(receipt)
            raise

    async def _drop_captured(self, receipt: str) -> None:
        try:
            async with asyncio.timeout(DROP_SECONDS):
                await self._ask_workers("polyhelm_drop_captured", receipt)
        except TimeoutError:
            # An engine that is gone or shutting down answers nobody, and would keep this process from ending.
            log.warning("the workers didn't answer whether they let go of the activations of %s", receipt)

    async def chat_tokens(self, handler: Any, messages: Any) -> list[int]:
        """The prompt that vLLM's chat handler makes of messages. ValueError with vLLM's reason where it makes none."""
        try:
            rendered = await handler.render_chat_request(ChatCompletionRequest(messages=messages))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        if not isinstance(rendered, tuple):
            raise ValueError(rendered.error.message)
        (prompt,) = rendered[1]
        return list(prompt["prompt_token_ids"])

    async def captured(self, receipt: str) -> dict[str, np.ndarray]:
        """What the requests with a capture and this receipt left behind, by site (`Capture.tensors`).

        RuntimeError where none did.
        """
        return {name: tensor.numpy() for name, tensor in (await self._collected(receipt)).items()}

    async def _collected(self, receipt: str, tokens: int | None = None) -> dict[str, Stored]:
        """Of the first `tokens` captured tokens, or of all."""
        if self.captures is not None:
            raise RuntimeError(self.captures)
        answers = [
            answer for workers in await self._ask_workers("polyhelm_captured", receipt, tokens) for answer in workers
        ]
        found = joined(answers, self.points)
        if not found:
            raise RuntimeError(f"nothing was captured for {receipt}")
        return found


def salted(salt: str | None, program: Program) -> str:
    """A cache salt that keeps every block of a request to its program, beside the user's own salt: for engines that
    can't tag blocks. Correct, but shares less.
    """
    return hashlib.sha256(f"{salt or ''}\0{program.fingerprint}".encode()).hexdigest()


def merged(answers: Sequence[Sequence[Mapping[str, Any] | None]]) -> Counts | None:
    """One receipt from those of all workers [engine cores][workers]; None if nobody ran it.

    Workers of one core ran the same requests, at sites that are the same (tensor parallel) or others (pipeline
    parallel), so the largest number holds. Cores ran different requests of one receipt, so their numbers add up.
    """
    cores = [[counts for counts in workers if counts is not None] for workers in answers]
    ran = [counts for counts in cores if counts]
    if not ran:
        return None
    largest = [
        ([np.max(each, axis=0) for each in zip(*(counts["touched"] for counts in core), strict=True)], core)
        for core in ran
    ]
    touched = [np.sum(each, axis=0).tolist() for each in zip(*(edits for edits, _ in largest), strict=True)]
    cached = np.sum([np.max([counts["cached"] for counts in core], axis=0) for _, core in largest], axis=0)
    return Counts(touched, cached.tolist())
