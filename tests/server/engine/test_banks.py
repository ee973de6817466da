from __future__ import annotations

import asyncio

import pytest
import torch

from server.engine.banks import Bank, BankDirectory, BankFull


def test_loading_a_slot_forgets_what_was_there() -> None:
    bank = Bank(sites=2, slots=2, hidden_size=4)
    bank.load("a", 1, [0, 1], torch.ones(2, 4).numpy().tobytes())
    bank.load("b", 1, [0], torch.full((1, 4), 2.0).numpy().tobytes())
    assert bank.slot("b", [0]) == 1
    assert bank.vectors[1, 1].tolist() == [0.0] * 4
    assert bank.inverse_norms[:, 1].tolist() == [0.25, 0.0]
    with pytest.raises(RuntimeError, match="bank has no 'a'"):
        bank.slot("a", [0])


@pytest.mark.parametrize(("slot", "layers"), [(2, [0]), (-1, [0]), (0, [2]), (0, [])])
def test_loading_outside_the_bank_is_refused(slot: int, layers: list[int]) -> None:
    bank = Bank(sites=2, slots=2, hidden_size=4)
    with pytest.raises(ValueError, match="outside the bank"):
        bank.load("a", slot, layers, torch.ones(max(len(layers), 1), 4).numpy().tobytes())


class Uploads:
    """Counts uploads; each takes a turn of the loop, and fails while `failing` is set."""

    def __init__(self) -> None:
        self.slots: list[tuple[str, int]] = []
        self.failing = False

    def of(self, key: str):
        async def upload(slot: int) -> None:
            await asyncio.sleep(0)
            if self.failing:
                raise OSError("disk")
            self.slots.append((key, slot))

        return upload


def test_concurrent_requests_share_one_upload() -> None:
    async def run() -> None:
        directory, uploads = BankDirectory(2), Uploads()
        await asyncio.gather(*(directory.acquire("a", uploads.of("a")) for _ in range(5)))
        assert len(uploads.slots) == 1
        for _ in range(5):
            directory.release("a")
        await directory.acquire("a", uploads.of("a"))
        assert len(uploads.slots) == 1

    asyncio.run(run())


def test_the_least_recently_used_idle_vector_is_evicted_and_a_used_one_never() -> None:
    async def run() -> None:
        directory, uploads = BankDirectory(2), Uploads()
        await directory.acquire("a", uploads.of("a"))
        await directory.acquire("b", uploads.of("b"))
        with pytest.raises(BankFull, match="all 2 bank slots"):
            await directory.acquire("c", uploads.of("c"))
        directory.release("a")
        directory.release("b")
        await directory.acquire("a", uploads.of("a"))
        directory.release("a")
        await directory.acquire("c", uploads.of("c"))
        assert directory.resident == ["a", "c"]
        assert uploads.slots[-1] == ("c", uploads.slots[1][1])

    asyncio.run(run())


def test_a_failed_upload_frees_its_slot_and_every_waiter_learns_of_it() -> None:
    async def run() -> None:
        directory, uploads = BankDirectory(1), Uploads()
        uploads.failing = True
        results = await asyncio.gather(
            *(directory.acquire("a", uploads.of("a")) for _ in range(3)), return_exceptions=True
        )
        assert all(isinstance(result, OSError) for result in results)
        uploads.failing = False
        await directory.acquire("b", uploads.of("b"))
        assert directory.resident == ["b"]

    asyncio.run(run())


def test_a_cancelled_waiter_does_not_keep_the_vector() -> None:
    async def run() -> None:
        directory, gate = BankDirectory(1), asyncio.Event()

        async def slow(slot: int) -> None:
            await gate.wait()

        owner = asyncio.create_task(directory.acquire("a", slow))
        waiter = asyncio.create_task(directory.acquire("a", slow))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        gate.set()
        await owner
        directory.release("a")
        await directory.acquire("b", Uploads().of("b"))
        assert directory.resident == ["b"]

    asyncio.run(run())
