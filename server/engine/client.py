"""The API process's view of the engine: vLLM's client, plus what steering needs of the workers."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.banks import BankDirectory
from server.engine.capture import Pooling
from server.engine.edits import Program
from server.engine.seams import CAPTURE, PROGRAM, RECEIPT

PrefixCache = Literal["tagged", "cache_salt", "off"]


class Vectors(NamedTuple):
    """An operand: one float32 vector [hidden] for each of `layers`, stacked [layers, hidden]."""

    layers: list[int]
    data: np.ndarray


class Counts(NamedTuple):
    """Tokens that the op edited, and tokens of each edit's span that the prefix cache held already."""

    touched: list[list[int]]
    """[edits][sites]."""
    cached: list[int]


Loader = Callable[[], Awaitable[Vectors]]


class Captured(NamedTuple):
    """Mean activation over the captured tokens of one text."""

    mean: np.ndarray
    """float32 [sites, hidden]."""
    norm: np.ndarray
    """Mean L2 norm, float32 [sites]."""


@dataclass
class Engine:
    """A running vLLM engine that can steer. Belongs to one event loop."""

    client: AsyncLLM
    bank: BankDirectory
    max_edits: int
    layers: int = 0
    hidden_size: int = 0
    runner: str = ""
    prefix_cache: PrefixCache = "off"
    _receipts: list[tuple[str, asyncio.Future[Counts]]] = field(default_factory=list)
    _collector: asyncio.Task[None] | None = None

    async def describe(self) -> None:
        """Ask the worker what it installed."""
        (described,) = await self.client.collective_rpc("polyhelm_describe")
        self.layers, self.hidden_size, self.runner = (
            described["layers"],
            described["hidden_size"],
            described["runner"],
        )

    @property
    def alive(self) -> bool:
        return not self.client.errored

    @property
    def architecture(self) -> str:
        return self.client.model_config.architectures[0]

    @property
    def model_name(self) -> str:
        return self.client.model_config.served_model_name

    @property
    def tokenizer(self) -> Any:
        return self.client.get_tokenizer()

    @property
    def max_model_len(self) -> int:
        return self.client.model_config.max_model_len

    @property
    def dtype(self) -> str:
        return str(self.client.model_config.dtype).removeprefix("torch.")

    @asynccontextmanager
    async def holding(self, operands: Mapping[str, Loader]) -> AsyncIterator[None]:
        """Keep a request's operands on the device while it runs, uploading those that are missing. Raises BankFull."""
        held: list[str] = []
        try:
            for key, load in operands.items():
                await self.bank.acquire(key, lambda slot, key=key, load=load: self._upload(key, slot, load))
                held.append(key)
            yield
        finally:
            for key in held:
                self.bank.release(key)

    async def _upload(self, key: str, slot: int, load: Loader) -> None:
        layers, data = await load()
        payload = np.ascontiguousarray(data, "<f4").tobytes()
        await self.client.collective_rpc("polyhelm_load", args=(key, slot, layers, payload))

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
                (counts,) = await self.client.collective_rpc(
                    "polyhelm_receipts", args=([receipt for receipt, _ in batch],)
                )
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (receipt, future), count in zip(batch, counts, strict=True):
                if future.done():
                    continue
                if count is None:
                    future.set_exception(RuntimeError(f"the engine has no receipt {receipt}: nothing was steered"))
                else:
                    future.set_result(Counts(**count))

    def mark(self, request: Any, program: Program, receipt: str) -> None:
        """Put a program into one of vLLM's own request models, from where it reaches the sampling parameters."""
        request.vllm_xargs = {**(request.vllm_xargs or {}), PROGRAM: program.wire, RECEIPT: receipt.encode()}
        if self.prefix_cache == "cache_salt":
            # Without tagged blocks, a salt keeps every block of the request to its program; correct, but shares less.
            salt = f"{request.cache_salt or ''}\0{program.fingerprint}"
            request.cache_salt = hashlib.sha256(salt.encode()).hexdigest()

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

    async def capture(self, token_ids: Sequence[int], pooling: Pooling) -> Captured:
        """The activation at every site for one text, averaged over its tokens or at its last one."""
        receipt = uuid.uuid4().hex
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            skip_reading_prefix_cache=True,
            detokenize=False,
            extra_args={CAPTURE: pooling.encode()},
        )
        await self.generate(token_ids, params, receipt=receipt)
        ((captured,),) = await self.client.collective_rpc("polyhelm_captures", args=([receipt],))
        if 0 in captured["tokens"]:
            raise RuntimeError("a site captured nothing")
        return Captured(
            np.frombuffer(captured["mean"], np.float32).reshape(self.layers, self.hidden_size),
            np.frombuffer(captured["norm"], np.float32),
        )
