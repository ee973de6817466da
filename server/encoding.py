"""Encodes queries for all requests, off the event loop and together where they come together."""

from __future__ import annotations

import asyncio
from typing import Final

import numpy as np
from starlette.concurrency import run_in_threadpool

from kb.encoders import Encoder, EncoderIdentity
from kb.encoders.base import check_texts
from server import metrics, tracing

MAX_BATCH: Final = 32


class BatchedEncoder:
    """Belongs to one event loop. While the encoder works, what arrives waits, and is its next batch."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._waiting: list[tuple[str, asyncio.Future[np.ndarray]]] = []
        self._work: asyncio.Task[None] | None = None

    async def identity(self) -> EncoderIdentity:
        """Asked for the first time, it hashes the weights."""
        return await run_in_threadpool(lambda: self.encoder.identity)

    async def encode_query(self, text: str) -> np.ndarray:
        """float32 [dimension], of length 1. Raises EncoderError."""
        # Here, so that one that can't be encoded doesn't fail the others of its batch.
        check_texts([text])
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if self._work is None:
            self._work = asyncio.create_task(self._drain())
        with metrics.KB_ENCODE.time(), tracing.span("kb.encode"):
            return await future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._encode([each for each in batch if not each[1].done()])
        finally:
            self._work = None

    async def _encode(self, batch: list[tuple[str, asyncio.Future[np.ndarray]]]) -> None:
        """Whatever goes wrong is the answer to everybody who waits for it."""
        try:
            rows = await run_in_threadpool(self.encoder.encode_queries, [text for text, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), row in zip(batch, rows, strict=True):
            if not future.done():
                future.set_result(row)
