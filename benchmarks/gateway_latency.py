"""What a gateway adds to the time to the first byte of a streamed, steered answer: nginx and Envoy as they are shipped.

Streams are opened STREAMS at a time, directly and through each gateway in turn, ROUNDS times, and then one at a time. A
gateway's figure is the difference of medians to the direct streams of the same rounds. Exits with 1 where it is more
than 50 ms, or where answers come in fewer pieces than directly, by a fifth. Start a server first:

    make serve    # in another terminal; then
    make test PYTEST_ARGS=--version && .venv/bin/python benchmarks/gateway_latency.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from environment import environment
from spread import spread

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.e2e.gateways import NAMES, gateway

STREAMS, ROUNDS, SINGLE, TOKENS = 50, 8, 40, 16
BOUND_MS = 50
RESULTS = Path(__file__).parent / "results" / "gateway_latency.json"
Client = Callable[[], httpx.AsyncClient]


async def first_byte(client: httpx.AsyncClient, model: str, number: int) -> tuple[float, int]:
    """Seconds to the first byte of the answer's body, and the number of reads that brought the answer."""
    body: dict[str, Any] = {"model": model, "prompt": f"{number} is", "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"stream": True, "steering": {"interventions": [{"artifact": "sentiment", "strength": 1}]}}
    started, first, reads = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_raw():
            first = first or time.perf_counter() - started
            reads += 1
    return first, reads


def rotated(names: list[str], by: int) -> list[str]:
    """So that none is always the first after a pause."""
    by %= len(names)
    return names[by:] + names[:by]


async def rounds(
    clients: dict[str, Client], model: str, streams: int, count: int
) -> dict[str, list[tuple[float, int]]]:
    """By name of the way to the server: what `first_byte` found, `streams` at once."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in clients}
    for turn in range(count):
        for name in rotated(list(clients), turn):
            async with clients[name]() as client:
                # Connections, and TLS with them, are there before the clock starts, as in a client that lives on.
                await asyncio.gather(*(client.get("/livez") for _ in range(streams)))
                found[name] += await asyncio.gather(*(first_byte(client, model, n) for n in range(streams)))
    return found


def summary(found: dict[str, list[tuple[float, int]]]) -> dict[str, Any]:
    direct = statistics.median(first for first, _ in found["direct"])
    return {
        name: {
            "first_byte_ms": spread([1e3 * first for first, _ in values]),
            "over_direct_ms": 1e3 * (statistics.median(first for first, _ in values) - direct),
            "reads_per_answer": statistics.median(reads for _, reads in values),
        }
        for name, values in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    url = httpx.URL(arguments.url)
    limits = httpx.Limits(max_connections=STREAMS)
    options: dict[str, Any] = {"limits": limits, "timeout": 300, "trust_env": False}
    model = httpx.get(url.join("/v1/models"), trust_env=False).json()["data"][0]["id"]
    clients: dict[str, Client] = {"direct": lambda: httpx.AsyncClient(base_url=url, **options)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in NAMES:
            running = stack.enter_context(gateway(name, url.port or 80, Path(folder) / name))
            clients[name] = lambda running=running: httpx.AsyncClient(
                base_url=running.url, verify=running.verify, **options
            )
        asyncio.run(rounds(clients, model, STREAMS, 1))  # compiles and fills caches
        many = asyncio.run(rounds(clients, model, STREAMS, ROUNDS))
        single = asyncio.run(rounds(clients, model, 1, SINGLE))
    results: dict[str, Any] = {
        "environment": environment(),
        "tokens": TOKENS,
        "concurrent": {"streams": STREAMS, "rounds": ROUNDS, **summary(many)},
        "one_at_a_time": {"streams": SINGLE, **summary(single)},
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    wrong = []
    for way in ("concurrent", "one_at_a_time"):
        pieces = results[way]["direct"]["reads_per_answer"]
        for name in NAMES:
            found = results[way][name]
            if found["over_direct_ms"] > BOUND_MS or found["reads_per_answer"] < 0.8 * pieces:
                wrong.append(f"{name}, {way}")
    print(f"beyond the bounds: {wrong or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
