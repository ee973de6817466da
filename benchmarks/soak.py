"""Mixed traffic on a running server at 80% of what it can do: errors, receipts, leaks between requests, memory, tail.

Start a server with the demo artifacts (`make serve`), then, with the process id of `polyhelm serve`:

    .venv/bin/python benchmarks/soak.py --pid PID --minutes 60

A wrong receipt is one that counts other tokens than the request had. A leak is an answer that isn't, word for word, the
one that the same request got alone. Memory is the resident set of the server and all its children, once a second; its
slope is fitted over the last two thirds, with the standard error of the fit of ten-second means.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from environment import environment

RESULTS = Path(__file__).parent / "results" / "soak.json"
PROMPTS = ("I watched the film last night and", "The weather today is", "My new neighbours", "In the morning we")
STRENGTHS = (None, None, 1.0, -1.0, 2.0)
TOKENS = 12
CONCURRENT = 16
SHARE = 0.8
PAIRS = [{"positive": f"a lovely day {n}", "negative": f"an awful day {n}"} for n in range(4)]


@dataclass
class Tally:
    """What happened, and when (in seconds from the start)."""

    asked: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong_receipts: int = 0
    leaks: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)


class Soak:
    def __init__(self, url: str, model: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits)
        self.model = model
        self.tally = Tally()
        self.started = time.monotonic()
        self._alone: dict[tuple[str, float | None], tuple[str, int]] = {}
        self._versions = 0

    async def learn(self) -> None:
        """What each request is answered when nothing else runs, and how many tokens its receipt counts."""
        for prompt in PROMPTS:
            for strength in set(STRENGTHS):
                answer = (await self._ask(prompt, strength)).json()
                # The last generated token never runs through the model.
                self._alone[prompt, strength] = (answer["choices"][0]["text"], answer["usage"]["total_tokens"] - 1)

    async def capacity(self, seconds: float = 30) -> float:
        """Completions per second of `CONCURRENT` clients that never pause."""
        done, end = 0, time.monotonic() + seconds

        async def client() -> None:
            nonlocal done
            while time.monotonic() < end:
                await self.completion()
                done += 1

        await asyncio.gather(*(client() for _ in range(CONCURRENT)))
        return done / seconds

    async def completion(self) -> None:
        prompt, strength = random.choice(PROMPTS), random.choice(STRENGTHS)
        answer = await self._ask(prompt, strength)
        if answer.status_code == 200:
            self._compare(prompt, strength, answer.json()["choices"][0]["text"], answer.json().get("steering"))

    async def stream(self) -> None:
        prompt, strength = random.choice(PROMPTS), random.choice(STRENGTHS)
        text, receipt, ended = "", None, False
        async with self.client.stream(
            "POST", "/v1/completions", json=self._body(prompt, strength) | {"stream": True}
        ) as answer:
            self._count(answer)
            async for line in answer.aiter_lines():
                ended = line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    text += chunk["choices"][0]["text"] if chunk.get("choices") else ""
                    receipt = chunk.get("steering", receipt)
        if ended:
            self._compare(prompt, strength, text, receipt)
        else:
            self.tally.broken["stream"] += 1

    async def leave(self) -> None:
        """A client that goes in the middle of its answer."""
        sent = self._body(PROMPTS[0], 1.0) | {"stream": True, "max_tokens": 200}
        async with self.client.stream("POST", "/v1/completions", json=sent) as answer:
            self._count(answer)
            async for _ in answer.aiter_lines():
                break

    async def upload(self) -> None:
        """A published artifact is fetched, published anew under another name, aliased, and deleted."""
        version = (await self.client.get("/v1/artifacts/sentiment/versions/latest")).json()
        self._versions += 1
        name = f"soak-{self._versions}"
        files = []
        for entry in version["manifest"]["files"]:
            file = await self.client.get(f"/v1/artifacts/sentiment/versions/latest/files/{entry['path']}")
            files.append(("files", (entry["path"], file.content)))
        url = f"/v1/artifacts/{name}"
        manifest = {"manifest": json.dumps(version["manifest"])}
        self._count(await self.client.post(f"{url}/versions", data=manifest, files=files))
        self._count(await self.client.put(f"{url}/aliases/live", json={"version": 1}))
        steering = {"interventions": [{"artifact": f"{name}@live", "strength": 1.0}]}
        self._count(
            await self.client.post("/v1/completions", json=self._body(PROMPTS[1], None) | {"steering": steering})
        )
        self._count(await self.client.delete(f"{url}/aliases/live"))
        await self.client.delete(f"{url}/versions/1")  # 409 where its lease runs on

    async def capture(self) -> None:
        sent = {"prompts": list(PROMPTS), "sites": {"points": ["resid_post"], "layers": [3, 12]}, "positions": "all"}
        self._count(await self.client.post("/v1/activations", json=sent))

    async def fit(self) -> None:
        """A fit; every other one is cancelled."""
        accepted = await self.client.post("/v1/fits", json={"method": "caa", "name": "soak-fit", "pairs": PAIRS})
        self._count(accepted)
        if random.random() < 0.5 and accepted.status_code == 202:
            await self.client.delete(accepted.headers["location"])  # 409 where it is over

    async def run(self, seconds: float, rate: float, kinds: list[tuple[Callable[[], Awaitable[None]], float]]) -> None:
        """Begin requests at a rate, at random times, whether or not earlier ones have ended."""
        tasks: set[asyncio.Task[None]] = set()
        while time.monotonic() - self.started < seconds:
            kind = random.choices([each for each, _ in kinds], [weight for _, weight in kinds])[0]
            task = asyncio.create_task(self._timed(kind))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(random.expovariate(rate))
        await asyncio.gather(*tasks)

    async def _timed(self, kind: Callable[[], Awaitable[None]]) -> None:
        name, began = getattr(kind, "__name__", ""), time.monotonic()
        self.tally.asked[name] += 1
        try:
            await kind()
        except httpx.HTTPError as error:
            self.tally.broken[type(error).__name__] += 1
        if name in ("completion", "stream"):
            self.tally.seconds.append((began - self.started, time.monotonic() - began))

    async def _ask(self, prompt: str, strength: float | None) -> httpx.Response:
        answer = await self.client.post("/v1/completions", json=self._body(prompt, strength))
        self._count(answer)
        return answer

    def _body(self, prompt: str, strength: float | None) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        if strength is not None:
            body["steering"] = {"interventions": [{"artifact": "sentiment", "strength": strength}]}
        return body

    def _count(self, answer: httpx.Response) -> None:
        self.tally.statuses[f"{answer.status_code // 100}xx"] += 1

    def _compare(self, prompt: str, strength: float | None, text: str, receipt: Any) -> None:
        expected, tokens = self._alone[prompt, strength]
        self.tally.leaks += text != expected
        if strength is None:
            self.tally.wrong_receipts += receipt is not None
        else:
            (applied,) = receipt["applied"] if receipt else ({"tokens_touched": -1, "tokens_from_cache": 0},)
            self.tally.wrong_receipts += applied["tokens_touched"] + applied["tokens_from_cache"] != tokens


async def watch(soak: Soak, pid: int) -> None:
    process = psutil.Process(pid)
    while True:
        family = [process, *process.children(recursive=True)]
        soak.tally.resident.append((time.monotonic() - soak.started, sum(each.memory_info().rss for each in family)))
        await asyncio.sleep(1)


def slope(samples: list[tuple[float, int]], begin: float) -> dict[str, float]:
    """MiB per hour, of a straight line through the ten-second means behind `begin`, and its standard error."""
    late = np.array([each for each in samples if each[0] >= begin])
    means = np.array([late[start : start + 10].mean(axis=0) for start in range(0, len(late) - 9, 10)])
    x, y = means[:, 0] / 3600, means[:, 1] / 2**20
    (rate, _), covariance = np.polyfit(x, y, 1, cov=True)
    return {"mib_per_hour": float(rate), "standard_error": float(np.sqrt(covariance[0, 0])), "mib": float(y.mean())}


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=arguments.url, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
    soak = Soak(arguments.url, model)
    await soak.learn()
    capacity = await soak.capacity()
    soak.tally, soak.started = Tally(), time.monotonic()
    watcher = asyncio.create_task(watch(soak, arguments.pid))
    kinds = [(soak.completion, 60.0), (soak.stream, 25.0), (soak.leave, 5.0), (soak.capture, 4.0)]
    kinds += [(soak.upload, 1.0), (soak.fit, 1.0)]
    seconds = 60 * arguments.minutes
    await soak.run(seconds, SHARE * capacity, kinds)
    watcher.cancel()
    tally = soak.tally
    thirds = np.array_split(np.array([took for _, took in sorted(tally.seconds)]), 3)
    return {
        "environment": environment(),
        "minutes": arguments.minutes,
        "capacity_requests_per_second": capacity,
        "asked": dict(tally.asked),
        "statuses": dict(tally.statuses),
        "broken": dict(tally.broken),
        "wrong_receipts": tally.wrong_receipts,
        "leaks": tally.leaks,
        "p50_seconds_by_thirds": [float(np.quantile(each, 0.5)) for each in thirds],
        "p99_seconds_by_thirds": [float(np.quantile(each, 0.99)) for each in thirds],
        "memory": slope(tally.resident, seconds / 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, required=True, help="of polyhelm serve")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = asyncio.run(main(arguments))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
