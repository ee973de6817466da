"""More artifacts than the device has room for, on a server whose bank holds four; and its limit of doses."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

LAYERS, WIDTH = 30, 576
OPERAND = LAYERS * (WIDTH + 1)
"""Numbers of an artifact's operand: a vector and the inverse of its norm for every layer."""
ROOM = 4
BANK_BYTES = 4 * ((ROOM - 1) * (LAYERS + 1) * WIDTH + OPERAND)
"""Each operand begins at a whole row."""
WAIT_SECONDS = 20
MAX_DOSE = 1.0
"""At strength 2.5 a vector's is about 0.75 here."""
NAMES = [f"bank-{index}" for index in range(10)]


@pytest.fixture(scope="module")
def tiny(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny") / "data"
    # In float32 a batch gives the text that each request gives alone.
    options = ("--bank-bytes", str(BANK_BYTES), "--dtype", "float32", "--max-num-seqs", "8")
    limits = {"POLYHELM_BANK_WAIT_SECONDS": str(WAIT_SECONDS), "POLYHELM_MAX_RELATIVE_DOSE": str(MAX_DOSE)}
    with start_server(folder, *options, **limits) as server:
        for seed, name in enumerate(NAMES):
            publish(server, name, seed)
        yield server


@pytest.fixture(scope="module")
def alone(tiny: Server) -> dict[str, str]:
    """The text that each artifact gives when nobody else asks for anything."""
    return {name: tiny.text(steering(name), max_tokens=12) for name in NAMES}


def publish(server: Server, name: str, seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((LAYERS, WIDTH)).astype(np.float32)
    file = save({f"layer.{layer}": vector for layer, vector in enumerate(vectors)})
    place = {"point": "resid_post", "file": "vectors.safetensors", "shape": [WIDTH], "dtype": "F32"}
    sites = [{**place, "layer": layer, "tensor": f"layer.{layer}"} for layer in range(LAYERS)]
    manifest = server.manifest(sites=sites, default_layers=[10, 11])
    assert server.send_artifact(name, manifest, {"vectors.safetensors": file}).status_code == 201


def steering(name: str) -> dict[str, Any]:
    return {"artifact": name, "strength": 2.5}


def together(count: int, ask: Callable[[int], Any]) -> list[Any]:
    """`ask(0)`, `ask(1)` … all at once."""
    barrier = threading.Barrier(count)

    def run(index: int) -> Any:
        barrier.wait()
        return ask(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def assert_nothing_is_held(server: Server) -> None:
    """A request that takes the whole bank runs."""
    for first in (0, ROOM):
        server.complete(*({"artifact": name, "strength": 0.1} for name in NAMES[first : first + ROOM]))


def test_what_had_to_make_room_comes_back_as_it_was(tiny: Server, alone: dict[str, str]) -> None:
    assert len(set(alone.values())) == len(NAMES)
    assert {name: tiny.text(steering(name), max_tokens=12) for name in reversed(NAMES)} == alone


def test_more_requests_than_fit_wait_and_each_gets_its_own_text(tiny: Server, alone: dict[str, str]) -> None:
    names = NAMES * 2
    texts = together(len(names), lambda index: tiny.text(steering(names[index]), max_tokens=12))
    assert texts == [alone[name] for name in names]


def test_operands_that_go_missing_on_the_way_are_sent_again(tiny: Server, alone: dict[str, str]) -> None:
    """Many short requests for some artifacts more than fit: what one still believes to be there, another replaces."""
    names = [NAMES[index % (ROOM + 2)] for index in range(24)]
    sent_back = tiny.log.read_text("utf-8", "replace").count("request sent back")
    for _ in range(10):
        texts = together(len(names), lambda index: tiny.text(steering(names[index]), max_tokens=3))
        assert all(alone[name].startswith(text) for name, text in zip(names, texts, strict=True))
        if tiny.log.read_text("utf-8", "replace").count("request sent back") > sent_back:
            return
    raise AssertionError("no request was ever sent back: this test shows nothing")


def test_several_choices_and_prompts_hold_what_they_need(tiny: Server) -> None:
    def ask(index: int) -> dict[str, Any]:
        return tiny.complete(steering(NAMES[index]), prompt=["A cat", "A dog"], n=2, temperature=1.0, max_tokens=4)

    answers = together(ROOM + 2, ask)
    assert [len(answer["choices"]) for answer in answers] == [4] * (ROOM + 2)
    assert_nothing_is_held(tiny)


def test_the_servers_own_limit_of_doses_holds_for_every_request(tiny: Server) -> None:
    assert tiny.capabilities["limits"]["max_relative_dose"] == MAX_DOSE
    for interventions, words in [
        ([{"artifact": NAMES[0], "strength": 5.0}], "above max_relative_dose, 1;"),
        ([{"artifact": name, "strength": 2.0} for name in NAMES[:2]], "in all at resid_post.1"),
        ([{"artifact": NAMES[0], "op": "clamp", "value": 200.0, "strength": 1.0}], "above max_relative_dose, 1;"),
    ]:
        response = tiny.ask(*interventions)
        error = response.json()["error"]
        assert (response.status_code, error["param"].split(".")[-1]) == (400, "strength")
        assert words in error["message"]
    raised = tiny.client.post(
        "/v1/completions",
        json={
            "model": tiny.model,
            "prompt": "A",
            "steering": {"interventions": [steering(NAMES[0])], "max_relative_dose": MAX_DOSE + 1},
        },
    )
    assert (raised.status_code, raised.json()["error"]["param"]) == (422, "steering.max_relative_dose")


def test_request_that_never_fits_is_400_with_both_numbers(tiny: Server) -> None:
    started = time.monotonic()
    response = tiny.ask(*({"artifact": name, "strength": 0.1} for name in NAMES[: ROOM + 1]))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "steering")
    assert str(4 * OPERAND * (ROOM + 1)) in error["message"] and str(BANK_BYTES) in error["message"]
    assert "--bank-bytes" in error["message"]
    assert time.monotonic() - started < WAIT_SECONDS


def test_full_bank_is_503_after_a_wait_and_free_once_the_others_have_left(tiny: Server, alone: dict[str, str]) -> None:
    with ExitStack() as clients:
        # Only some of them run at a time; those that the scheduler lets wait need what they need as well.
        for index in range(8 * ROOM):
            clients.enter_context(asking(tiny, NAMES[index % ROOM]))
        deadline = time.monotonic() + 60
        while tiny.metric("vllm:num_requests_running") + tiny.metric("vllm:num_requests_waiting") < 8 * ROOM:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = time.monotonic()
        full = together(2, lambda index: tiny.ask(steering(NAMES[ROOM + index])))
        waited = time.monotonic() - started
        assert tiny.metric("vllm:num_requests_running"), "the others ended too soon to show anything"
    for response in full:
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["type"] == "ServiceUnavailableError"
        assert "--bank-bytes" in response.json()["error"]["message"]
    assert waited >= WAIT_SECONDS
    assert tiny.text(steering(NAMES[ROOM]), max_tokens=12) == alone[NAMES[ROOM]]
    assert_nothing_is_held(tiny)


@contextmanager
def asking(server: Server, name: str) -> Iterator[None]:
    """Ask for a long text and read nothing of it; in the end, leave."""
    body = json.dumps(
        {
            "model": server.model,
            "prompt": "The weather",
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
            "steering": {"interventions": [steering(name)]},
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    url = httpx.URL(server.base_url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        yield


def test_clients_that_leave_hold_nothing(tiny: Server) -> None:
    def leave(index: int) -> None:
        """Whatever the request is at: waiting for room, being uploaded, on its way, running."""
        with asking(tiny, NAMES[index % len(NAMES)]):
            time.sleep(0.1 * index)

    together(16, leave)
    tiny.wait_until_idle()
    assert_nothing_is_held(tiny)
