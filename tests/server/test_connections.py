"""Raw sockets against a real uvicorn with our connections: what a client may do before its request has a head."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from server import connections
from server.connections import HeaderLimits

SECONDS = 0.4
BYTES = 4096
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d bytes" % size})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", http="httptools", timeout_keep_alive=5)
    config.load()
    connections.limit(config, HeaderLimits(SECONDS, BYTES))
    before = config.http_protocol_class
    connections.limit(config, HeaderLimits(1, 1))
    assert config.http_protocol_class is before
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def peer(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
        yield peer


def answer(peer: socket.socket) -> bytes:
    """All until the server closes the connection."""
    parts = []
    while True:
        try:
            part = peer.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def test_ordinary_requests_pass_several_on_a_connection(peer: socket.socket) -> None:
    for _ in range(3):
        peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde")
        time.sleep(0.05)
        assert b"5 bytes" in peer.recv(65536)
    peer.sendall(REQUEST + b"Connection: close\r\n\r\n")
    assert b"200 OK" in answer(peer)


def test_body_may_take_longer_than_the_head(peer: socket.socket) -> None:
    peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\nab")
    time.sleep(2 * SECONDS)
    peer.sendall(b"cde")
    assert answer(peer).endswith(b"5 bytes\r\n0\r\n\r\n")


def test_large_body_behind_a_small_head_passes(peer: socket.socket) -> None:
    body = b"x" * (50 * BYTES)
    peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert b"%d bytes" % len(body) in answer(peer)


def test_connection_that_says_nothing_is_closed(peer: socket.socket) -> None:
    started = time.monotonic()
    assert answer(peer) == b""
    assert 0.5 * SECONDS < time.monotonic() - started < SECONDS + 10


@pytest.mark.parametrize("first", [b"", REQUEST + b"Content-Length: 0\r\n\r\n"], ids=["first", "second"])
def test_head_that_drips_is_408(peer: socket.socket, first: bytes) -> None:
    peer.sendall(first)
    time.sleep(0.1)
    started = time.monotonic()
    try:
        for byte in REQUEST + b"X: y\r\n" * 50:
            peer.sendall(bytes([byte]))
            time.sleep(0.02)
            if time.monotonic() - started > SECONDS + 10:
                raise AssertionError("it may drip for ever")
    except (BrokenPipeError, ConnectionResetError):
        pass
    else:
        raise AssertionError("it may drip for ever")
    assert time.monotonic() - started > 0.5 * SECONDS


def test_silence_in_the_middle_of_a_head_is_408(peer: socket.socket) -> None:
    peer.sendall(REQUEST)
    head, _, body = answer(peer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "head",
    [
        REQUEST + b"X: " + b"a" * 2 * BYTES + b"\r\n\r\n",
        REQUEST + b"".join(b"X-%d: a\r\n" % i for i in range(BYTES)) + b"\r\n",
        b"GET /" + b"a" * 2 * BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        REQUEST + b"X: " + b"a" * 50 * BYTES,
    ],
    ids=["one", "many", "path", "endless"],
)
def test_head_that_is_too_long_is_431(peer: socket.socket, head: bytes) -> None:
    peer.sendall(head)
    assert answer(peer).startswith(b"HTTP/1.1 431 ")


def test_endless_head_is_read_no_further_than_the_limit(peer: socket.socket) -> None:
    sent = 0
    try:
        for _ in range(1000):
            peer.sendall(b"X: " + b"a" * 65000 + b"\r\n" if sent else REQUEST)
            sent += 65000
            time.sleep(0.001)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert sent < 20_000_000


def test_head_of_just_the_limit_passes(peer: socket.socket) -> None:
    head = REQUEST + b"Connection: close\r\nX: "
    peer.sendall(head + b"a" * (BYTES - len(head) - 100) + b"\r\n\r\n")
    assert b"200 OK" in answer(peer)
