"""The uploads of one or several API processes, against real directories and banks; only the way between is made up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from server.engine import uploader as uploader_module
from server.engine.bank_directory import BankDirectory, BankFull, BankTooSmall, OperandsMissing, Want
from server.engine.banks import Bank
from server.engine.edits import Edit, Point, Program
from server.engine.operands import Operand, Piece, pack
from server.engine.seams import core as core_seam
from server.engine.uploader import Uploader

WIDTH = 8
ROWS = 4
NUMBERS = ROWS * (WIDTH + 1)
"""Of one operand: a vector and the inverse of its norm at each of four layers."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Core:
    """An engine core with a directory and the banks of two tensor-parallel ranks. Counts what it is told."""

    def __init__(self, operands: int) -> None:
        self.clock = Clock()
        # Each operand starts at a whole row, so it takes some numbers more than it has.
        self.polyhelm_bank = BankDirectory(operands * 40, self.clock)
        self.banks = [Bank(operands * 40) for _ in range(2)]
        self.model_executor = SimpleNamespace(collective_rpc=self.rpc)
        self.told: list[str] = []

    def rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.told.append(method)
        for rank, bank in enumerate(self.banks):
            if method == "polyhelm_write":
                bank.write(*args)
            elif method == "polyhelm_drop":
                for key in args[0]:
                    bank.drop(key)
            elif method == "polyhelm_bind":
                key, start, width, pieces, point = args
                shard = (rank, 2) if point == "mlp_act" else (0, 1)
                places = [Piece(layer, role, first, tuple(shape)) for layer, role, first, shape in pieces]
                bank.bind(key, start, width, places, shard)

    def holds(self, key: str) -> bool:
        """Whether every rank would read what `operand(key)` is."""
        expected = vectors(key)
        point = point_of(key)
        for rank, bank in enumerate(self.banks):
            resident = bank.resident(key)
            for layer in range(ROWS):
                found = bank.tensor(*resident.pieces[layer, "vector"])
                part = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2) if point == "mlp_act" else slice(None)
                if found[: len(expected[layer][part])].tolist() != expected[layer][part].tolist():
                    return False
        return True

    def run(self, key: str) -> None:
        """A request that takes its operand, runs and ends."""
        self.polyhelm_bank.take([key])
        assert self.holds(key)
        self.polyhelm_bank.release([key])


def point_of(key: str) -> Point:
    return "mlp_act" if key.startswith("split") else "resid_post"


def vectors(key: str) -> np.ndarray:
    return np.random.default_rng(list(key.encode())).standard_normal((ROWS, WIDTH)).astype(np.float32)


def operand(key: str) -> Operand:
    return pack({layer: {"vector": vector} for layer, vector in enumerate(vectors(key))})


def program(*keys: str) -> Program:
    return Program(tuple(Edit("add", key, (0,), point=point_of(key)) for key in keys))


class Process:
    """An API process: an uploader, and a store that counts what is read from it."""

    def __init__(self, *cores: Core, wait: float = 0, host_bytes: int = 1 << 20) -> None:
        self.reads: list[str] = []
        self.fails: Exception | None = None
        self.writing: list[Core] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.uploader = Uploader(lambda: cores, self.call, host_bytes=host_bytes, wait_seconds=wait)

    async def call(self, core: Core, method: str, *arguments: Any) -> Any:
        # As over vLLM's sockets: everything is copied, and others get a turn.
        arguments = tuple(msgspec.msgpack.decode(msgspec.msgpack.encode(arguments)))
        if method == "polyhelm_write":
            assert core not in self.writing, "an engine is given one chunk between two steps"
            self.writing.append(core)
        await asyncio.sleep(0)
        if method != "polyhelm_reserve":
            await self.gate.wait()
        if method == "polyhelm_write":
            self.writing.remove(core)
        return getattr(core_seam, method)(core, *arguments)

    async def ensure(self, *keys: str) -> None:
        async def load(key: str) -> Operand:
            await asyncio.sleep(0)
            self.reads.append(key)
            if self.fails is not None:
                raise self.fails
            return operand(key)

        await self.uploader.ensure(program(*keys), {key: lambda key=key: load(key) for key in keys})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader_module, "CHUNK_BYTES", 40)
    monkeypatch.setattr(uploader_module, "POLL_SECONDS", 0.001)


CHUNKS = -(-4 * NUMBERS // 40)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run, and fail when anything was reported to the event loop's exception handler."""
    reports: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
        await asyncio.wait_for(main(), 20)

    asyncio.run(watched())
    assert reports == []


async def settle(turns: int = 200) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


def test_operands_arrive_in_chunks_at_every_engine() -> None:
    async def main() -> None:
        cores = Core(2), Core(2)
        await Process(*cores).ensure("a", "split")
        for core in cores:
            assert core.told.count("polyhelm_write") == 2 * CHUNKS
            assert core.told.count("polyhelm_bind") == 2
            core.run("a")
            core.run("split")

    run(main)


def test_what_was_uploaded_costs_no_call() -> None:
    async def main() -> None:
        core = Core(2)
        process = Process(core)
        await process.ensure("a")
        told, reads = len(core.told), len(process.reads)
        process.gate.clear()
        await process.ensure("a")
        assert (len(core.told), len(process.reads)) == (told, reads)

    run(main)


def test_requests_that_come_together_share_one_read_and_one_upload() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core)
        await asyncio.gather(*(process.ensure("a") for _ in range(20)))
        assert process.reads == ["a"]
        assert core.told.count("polyhelm_write") == CHUNKS

    run(main)


@pytest.mark.parametrize("head_start", range(0, 40, 3))
def test_two_processes_may_upload_one_operand_at_once(head_start: int) -> None:
    """Late writes must not undo the split that binding does in place."""

    async def main() -> None:
        core = Core(1)
        first = asyncio.create_task(Process(core).ensure("split"))
        await settle(head_start)
        await asyncio.gather(first, Process(core).ensure("split"))
        assert core.told.count("polyhelm_bind") == 1
        core.run("split")

    run(main)


def test_request_waits_until_there_is_room() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core, wait=10)
        await process.ensure("a")
        core.polyhelm_bank.take(["a"])
        waiting = asyncio.create_task(process.ensure("b"))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        core.polyhelm_bank.release(["a"])
        await waiting
        core.run("b")
        with pytest.raises(OperandsMissing):
            core.polyhelm_bank.take(["a"])
        with pytest.raises(RuntimeError, match="bank has no 'a'"):
            core.banks[0].resident("a")
        await process.ensure("a")
        core.run("a")

    run(main)


def test_wait_for_room_ends() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core, wait=0.05)
        await process.ensure("a")
        core.polyhelm_bank.take(["a"])
        with pytest.raises(BankFull, match=r"need 144 bytes .* of the 160 .* 144 are in use .*--bank-bytes"):
            await process.ensure("b")

    run(main)


def test_what_can_never_fit_is_told_at_once_with_both_numbers() -> None:
    async def main() -> None:
        with pytest.raises(BankTooSmall, match=r"need 288 bytes of the device, and its bank has 160.*--bank-bytes"):
            await Process(Core(1), wait=1000).ensure("a", "b")

    run(main)


def test_more_requests_than_fit_take_turns() -> None:
    """Pairs of operands in a bank for three: holding one while waiting for the other would block them for ever."""

    async def main() -> None:
        core = Core(3)
        process = Process(core, wait=10)
        ended = []

        async def request(number: int) -> None:
            keys = [f"{(number + offset) % 8}" for offset in (0, 3)]
            await process.ensure(*keys)
            while True:
                try:
                    core.polyhelm_bank.take(keys)
                    break
                except OperandsMissing:
                    process.uploader.forget(keys)
                    await process.ensure(*keys)
            await asyncio.sleep(0.001)
            assert all(core.holds(key) for key in keys)
            core.polyhelm_bank.release(keys)
            ended.append(number)

        await asyncio.gather(*(request(number) for number in range(40)))
        assert sorted(ended) == list(range(40))

    run(main)


def test_upload_of_a_process_that_died_gives_its_place_back() -> None:
    async def main() -> None:
        core = Core(1)
        dead, alive = Process(core), Process(core, wait=0)
        dead.gate.clear()
        upload = asyncio.create_task(dead.ensure("a"))
        await settle()
        with pytest.raises(BankFull):
            await alive.ensure("b")
        core.clock.now += 11
        await alive.ensure("b")
        core.run("b")
        upload.cancel()

    run(main)


def test_uploader_that_lost_its_place_begins_again_and_harms_nobody() -> None:
    async def main() -> None:
        core = Core(1)
        slow, other = Process(core, wait=10), Process(core)
        slow.gate.clear()
        upload = asyncio.create_task(slow.ensure("a"))
        await settle()
        core.clock.now += 11
        await other.ensure("b")
        core.polyhelm_bank.take(["b"])
        slow.gate.set()
        await asyncio.sleep(0.02)
        assert core.holds("b") and not upload.done()
        core.polyhelm_bank.release(["b"])
        await upload
        core.run("a")

    run(main)


def test_upload_ends_even_when_the_request_leaves() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core)
        process.gate.clear()
        request = asyncio.create_task(process.ensure("a"))
        await settle()
        request.cancel()
        process.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await request
        await settle()
        core.run("a")

    run(main)


def test_request_that_leaves_while_it_waits_takes_no_room() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core, wait=10)
        await process.ensure("a")
        core.polyhelm_bank.take(["a"])
        request = asyncio.create_task(process.ensure("b"))
        await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.sleep(0.01)
        core.polyhelm_bank.release(["a"])
        await process.ensure("c")
        core.run("c")

    run(main)


def test_what_had_to_go_comes_back_from_host_memory() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core, host_bytes=2 * 4 * NUMBERS)
        for key in ("a", "b", "a"):
            await process.ensure(key)
            core.run(key)
        assert process.reads == ["a", "b"]
        for key in ("c", "a", "b"):
            await process.ensure(key)
            core.run(key)
        assert process.reads == ["a", "b", "c", "b"]

    run(main)


def test_operand_larger_than_the_host_memory_given_is_read_each_time() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core, host_bytes=0)
        await process.ensure("a")
        core.run("a")
        assert process.reads == ["a", "a"], "once for its size, once for its content"

    run(main)


def test_failing_read_is_told_to_all_that_asked_and_holds_nothing() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core)
        process.fails = OSError("disk")
        errors = await asyncio.gather(*(process.ensure("a") for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in errors] == ["disk"] * 3
        process.fails = None
        await process.ensure("b")
        core.run("b")
        await process.ensure("a")
        core.run("a")

    run(main)


def test_failing_engine_is_told_to_all_that_asked() -> None:
    async def main() -> None:
        core = Core(1)
        process = Process(core)
        core.model_executor.collective_rpc = None
        errors = await asyncio.gather(*(process.ensure("a") for _ in range(2)), return_exceptions=True)
        assert [type(error) for error in errors] == [TypeError] * 2
        core.model_executor.collective_rpc = core.rpc
        await process.ensure("a")
        core.run("a")

    run(main)


def test_operand_that_another_process_knows_otherwise_is_an_error_of_its_request_only() -> None:
    async def main() -> None:
        core = Core(3)
        core.polyhelm_bank.reserve([[Want("a", "mlp_act", WIDTH, NUMBERS)]])
        process = Process(core)
        wrong, right = await asyncio.gather(process.ensure("a"), process.ensure("b"), return_exceptions=True)
        assert isinstance(wrong, ValueError) and right is None
        core.run("b")

    run(main)


def test_operand_that_is_read_at_two_points_is_an_error() -> None:
    both = Program(tuple(Edit("add", "a", (0,), point=point) for point in ("resid_post", "head_out")))

    async def main() -> None:
        with pytest.raises(ValueError, match="read at one point only"):
            await Process(Core(1)).uploader.ensure(both, {})

    run(main)


def test_eviction_by_another_process_is_seen_once_it_is_told() -> None:
    async def main() -> None:
        core = Core(1)
        mine, theirs = Process(core), Process(core)
        await mine.ensure("a")
        core.run("a")
        await theirs.ensure("b")
        core.run("b")
        await mine.ensure("a")
        with pytest.raises(OperandsMissing):
            core.polyhelm_bank.take(["a"])
        mine.uploader.forget(["a"])
        await mine.ensure("a")
        core.run("a")

    run(main)
