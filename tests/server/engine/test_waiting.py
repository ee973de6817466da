"""How the engine's processes wait for each other on CPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.utils.network_utils import get_open_zmq_ipc_path

from server.engine.seams import waiting


@pytest.fixture
def ends() -> Iterator[tuple[Any, Any]]:
    """A reader that read something just now, and its writer."""
    waiting.patch()
    context = zmq.Context()
    address = get_open_zmq_ipc_path()
    writer = SpinCondition(is_reader=False, context=context, notify_address=address)
    reader = SpinCondition(is_reader=True, context=context, notify_address=address)
    yield reader, writer
    context.destroy(linger=0)


def test_a_reader_that_was_busy_sleeps_between_two_looks(ends: tuple[Any, Any]) -> None:
    reader, _ = ends
    reader.record_read()
    begin, looks = time.monotonic(), 0
    while time.monotonic() < begin + 0.2:
        reader.wait()
        looks += 1
    # One that spins looks a hundred times as often.
    assert 0 < looks <= 0.2 / waiting.PAUSE + 1


def test_a_reader_that_has_long_been_idle_waits_to_be_told(ends: tuple[Any, Any]) -> None:
    reader, writer = ends
    reader.last_read = time.monotonic() - reader.busy_loop_s - 1
    begin = time.monotonic()
    reader.wait(timeout_ms=100)
    assert time.monotonic() - begin > 0.09, "nothing was written"
    while not reader.poller.poll(0):
        writer.notify()
        time.sleep(0.01)
    begin = time.monotonic()
    reader.wait(timeout_ms=60_000)
    assert time.monotonic() - begin < 30
