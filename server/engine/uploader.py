"""Brings operands into the banks of the engine cores, from an API process.

What was uploaded is believed to be there still, so that a request whose operands are known costs no call. Where a bank
gave the place away meanwhile, the engine refuses the request, and the client uploads again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from server import metrics
from server.engine.bank_directory import BankFull, BankTooSmall, Want
from server.engine.edits import Program
from server.engine.operands import Operand

MiB = 1 << 20
CHUNK_BYTES = 4 * MiB
"""Written between two steps of the engine."""
POLL_SECONDS = 0.05
"""Between two looks for room."""
REMEMBERED = 100_000
"""Operands of which the size is remembered."""

Loader = Callable[[], Awaitable[Operand]]
Call = Callable[..., Awaitable[Any]]
"""`await call(method, *arguments)` on one engine core."""


class HostCopies:
    """The operands used last, up to a number of bytes. Concurrent requests for one share a load."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._copies: OrderedDict[str, Operand] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Operand]] = {}

    async def get(self, key: str, load: Loader) -> Operand:
        """Raises whatever `load` raises."""
        if key in self._copies:
            self._copies.move_to_end(key)
            return self._copies[key]
        if key not in self._loading:
            task = self._loading[key] = asyncio.ensure_future(self._load(key, load))
            task.add_done_callback(lambda done: self._loading.pop(key))
            task.add_done_callback(_noticed)
        return await asyncio.shield(self._loading[key])

    async def _load(self, key: str, load: Loader) -> Operand:
        operand = await load()
        if operand.data.nbytes <= self._limit:
            self._copies[key] = operand
            self._bytes += operand.data.nbytes
            while self._bytes > self._limit:
                _, oldest = self._copies.popitem(last=False)
                self._bytes -= oldest.data.nbytes
        return operand


class _Waiting(NamedTuple):
    wants: Sequence[Want]
    answer: asyncio.Future[dict[str, Any]]
    deadline: float


class RemoteBank:
    """The bank of one engine core, as this process sees it."""

    def __init__(self, call: Call, wait_seconds: float) -> None:
        self.believed: set[str] = set()
        self._call = call
        self._wait_seconds = wait_seconds
        self._waiting: list[_Waiting] = []
        self._asking: asyncio.Task[None] | None = None
        self._uploads: dict[tuple[str, int], asyncio.Task[bool]] = {}
        self._writing = asyncio.Lock()

    async def provide(self, wants: Sequence[Want], load: Callable[[str], Awaitable[Operand]]) -> None:
        """Return once all of `wants` are in the bank. Raises BankFull, BankTooSmall, or whatever `load` raises."""
        deadline = asyncio.get_running_loop().time() + self._wait_seconds
        while True:
            promised = await self._reserve(wants, deadline)
            self.believed.difference_update(promised["evicted"])
            uploads = (self._upload(key, serial, load) for key, serial in promised["uploads"].items())
            if all(await asyncio.gather(*uploads)):
                self.believed.update(want.key for want in wants)
                return

    async def _reserve(self, wants: Sequence[Want], deadline: float) -> dict[str, Any]:
        """Ask until there is room. All that wait ask in one call."""
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(wants, answer, deadline))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await answer

    async def _ask(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                answers = await self._call("polyhelm_reserve", [waiting.wants for waiting in batch])
            except Exception as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            metrics.bank(answers)
            now = asyncio.get_running_loop().time()
            refused = [
                waiting
                for waiting, answer in zip(batch, answers, strict=True)
                if not waiting.answer.done() and not _settle(waiting, answer, now)
            ]
            if refused:
                # Before those that came meanwhile, so that nobody is overtaken for ever.
                self._waiting[:0] = refused
                await asyncio.sleep(POLL_SECONDS)

    async def _upload(self, key: str, serial: int, load: Callable[[str], Awaitable[Operand]]) -> bool:
        """Upload once for all that ask at the same time, to the end even when they leave. False if the place was lost
        to others meanwhile.
        """
        if (key, serial) not in self._uploads:
            task = self._uploads[key, serial] = asyncio.create_task(self._send(key, serial, load))
            task.add_done_callback(lambda done: self._uploads.pop((key, serial)))
            task.add_done_callback(_noticed)
        return await asyncio.shield(self._uploads[key, serial])

    async def _send(self, key: str, serial: int, load: Callable[[str], Awaitable[Operand]]) -> bool:
        operand = await load(key)
        state: Literal["written", "loaded", "lost"]
        for start in range(0, operand.data.size, CHUNK_BYTES // 4):
            chunk = operand.data[start : start + CHUNK_BYTES // 4].astype("<f4", copy=False).tobytes()
            async with self._writing:
                state = await self._call("polyhelm_write", key, serial, start, chunk)
            if state != "written":
                return state == "loaded"
            metrics.BANK_UPLOADED.inc(len(chunk))
        state = await self._call("polyhelm_bind", key, serial, operand.pieces)
        return state == "loaded"


class Uploader:
    """Keeps the operands of this process's requests in the banks of all engine cores. Belongs to one event loop.

    `engines` lists the cores of the moment; `call(engine, method, *arguments)` calls one.
    """

    def __init__(
        self, engines: Callable[[], Sequence[Hashable]], call: Call, *, host_bytes: int, wait_seconds: float
    ) -> None:
        self._engines = engines
        self._call = call
        self._wait_seconds = wait_seconds
        self._banks: dict[Hashable, RemoteBank] = {}
        self._copies = HostCopies(host_bytes)
        self._wants: OrderedDict[str, Want] = OrderedDict()

    async def ensure(self, program: Program, loaders: Mapping[str, Loader]) -> None:
        """Return once every operand of `program` is in every bank, calling `loaders[key]` for those that aren't.

        Raises BankFull where there is no room for `wait_seconds`, BankTooSmall where there never can be, KeyError for
        an operand without a loader, ValueError for one that is read at several points, or what a loader raises.
        """
        keys = program.operands
        lacking = [bank for bank in map(self._bank, self._engines()) if not bank.believed.issuperset(keys)]
        if not lacking:
            metrics.BANK_HITS.inc()
            return
        metrics.BANK_MISSES.inc()

        async def load(key: str) -> Operand:
            return await self._copies.get(key, loaders[key])

        points = dict.fromkeys((edit.operand, edit.point) for edit in program.edits if edit.operand is not None)
        if len(points) > len(keys):
            raise ValueError(f"an operand is read at one point only: {list(points)}")
        wants = []
        for key, point in points:
            if key not in self._wants:
                operand = await load(key)
                self._remember(Want(key, point, operand.width, operand.data.size))
            wants.append(self._wants[key])
        await asyncio.gather(*(bank.provide(wants, load) for bank in lacking))

    def forget(self, keys: Iterable[str]) -> None:
        """Believe no longer that those are in any bank."""
        gone = set(keys)
        for bank in self._banks.values():
            bank.believed -= gone

    def _bank(self, engine: Hashable) -> RemoteBank:
        if engine not in self._banks:
            call = self._call
            self._banks[engine] = RemoteBank(lambda *arguments: call(engine, *arguments), self._wait_seconds)
        return self._banks[engine]

    def _remember(self, want: Want) -> None:
        self._wants[want.key] = want
        while len(self._wants) > REMEMBERED:
            self._wants.popitem(last=False)


def _settle(waiting: _Waiting, answer: dict[str, Any], now: float) -> bool:
    """Whether the answer ends the wait."""
    if "error" in answer:
        waiting.answer.set_exception(ValueError(answer["error"]))
        return True
    if "uploads" in answer:
        waiting.answer.set_result(answer)
        return True
    needed, in_use, budget = answer["needed"], answer["in_use"], answer["budget"]
    if answer["never"]:
        waiting.answer.set_exception(
            BankTooSmall(
                f"the request's operands need {needed} bytes of the device, and its bank has {budget}: use fewer or "
                "smaller artifacts, or raise --bank-bytes"
            )
        )
        return True
    if now >= waiting.deadline:
        waiting.answer.set_exception(
            BankFull(
                f"the request's operands need {needed} bytes of the device, and of the {budget} of its bank {in_use} "
                "are in use by running requests: retry, or raise --bank-bytes"
            )
        )
        return True
    return False


def _noticed(task: asyncio.Task[Any]) -> None:
    """Nobody may be left to take an exception, and asyncio complains about one that nobody took."""
    if not task.cancelled():
        task.exception()
