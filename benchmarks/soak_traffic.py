"""The requests of soak.py: each kind makes its calls, and compares what comes back with what it must be."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

PROMPTS = ("I watched the film last night and", "The weather today is", "My new neighbours", "In the morning we")
STRENGTHS = (None, None, 1.0, -1.0, 2.0)
TOKENS = 12
PAIRS = [{"positive": f"a lovely day {n}", "negative": f"an awful day {n}"} for n in range(4)]
COLLECTION, CHURN = "/v1/kb/collections/soak", "/v1/kb/collections/soak-churn"
FACTS = [
    {"id": "evry", "question": "Who designed Évry Cathedral?", "answer": "Mario Gariazzo", "language": "en"},
    {"id": "flames", "question": "What is the final year of Atlanta Flames?", "answer": "1931", "language": "en"},
]
QUESTIONS = {"Who designed the Évry Cathedral?": ["evry"], "How long should I boil an egg?": []}
"""Prompts, and which facts must be in them."""


class Asked(NamedTuple):
    """A greedy completion. `steered` is the strength, if it is."""

    prompt: str
    steered: float | None
    informed: bool = False


class Answer(NamedTuple):
    text: str
    tokens: int
    """How many ran through the model: all but the last one that was generated."""


@dataclass
class Tally:
    """What happened, and when (in seconds from the start)."""

    asked: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    """Statuses that the call doesn't give when all is well, by the call."""
    broken: Counter[str] = field(default_factory=Counter)
    """Connections and streams that ended early, and whatever a kind tripped over, by kind."""
    wrong_receipts: int = 0
    leaks: int = 0
    lost_facts: int = 0
    seconds: list[tuple[float, float]] = field(default_factory=list)


class Traffic:
    def __init__(self, url: str, model: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=limits)
        self.model = model
        self.tally = Tally()
        self.started = time.monotonic()
        self._alone: dict[Asked, Answer] = {}
        self._made = 0

    def kinds(self) -> dict[Callable[[], Awaitable[None]], float]:
        """What there is, and how often it comes."""
        generating = {self.completion: 45.0, self.stream: 22.0, self.leave: 5.0, self.informed: 12.0}
        return generating | {self.facts: 10.0, self.capture: 4.0, self.upload: 1.0, self.fit: 1.0}

    async def learn(self) -> None:
        """Make what the requests need; and ask each question while nothing else runs."""
        await self.client.delete(CHURN)  # what a run left that was broken off
        for url in (COLLECTION, CHURN):
            (await self.client.put(url)).raise_for_status()
        (await self.client.put(f"{COLLECTION}/facts", json=FACTS)).raise_for_status()
        plain = [Asked(prompt, strength) for prompt in PROMPTS for strength in STRENGTHS]
        for asked in {*plain, *(Asked(each, strength, True) for each in QUESTIONS for strength in STRENGTHS)}:
            answer = await self.client.post("/v1/completions", json=self._body(asked))
            answer.raise_for_status()
            told = answer.json()
            self._alone[asked] = Answer(told["choices"][0]["text"], told["usage"]["total_tokens"] - 1)
            self._compare(asked, told["choices"][0]["text"], told)

    async def lengths(self, longest: int) -> None:
        """Prompts of every length, one at a time and in no order, so that each is a step's number of tokens."""
        for length in random.sample(range(1, longest + 1), longest):
            prompt = random.choices(range(1000, 20000), k=length)
            body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
            self._count(await self.client.post("/v1/completions", json=body), 200)

    async def any(self) -> None:
        """One request of a kind drawn by its weight."""
        kinds = self.kinds()
        (kind,) = random.choices(list(kinds), list(kinds.values()))
        name, began = getattr(kind, "__name__", ""), time.monotonic()
        self.tally.asked[name] += 1
        try:
            await kind()
        except httpx.HTTPError as error:
            self.tally.broken[f"{name}: {type(error).__name__}"] += 1
        except Exception as error:
            # Whatever a kind trips over fails the run, and isn't lost with its task.
            self.tally.broken[f"{name}: {error!r}"[:200]] += 1
        if name in ("completion", "stream"):
            self.tally.seconds.append((began - self.started, time.monotonic() - began))

    async def completion(self) -> None:
        await self._asked(Asked(random.choice(PROMPTS), random.choice(STRENGTHS)))

    async def informed(self) -> None:
        """A question to the knowledge base, steered or not."""
        await self._asked(Asked(random.choice(list(QUESTIONS)), random.choice(STRENGTHS), True))

    async def stream(self) -> None:
        asked = Asked(random.choice(PROMPTS), random.choice(STRENGTHS))
        text, receipts, ended = "", {}, False
        body = self._body(asked) | {"stream": True}
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            self._count(answer, 200)
            async for line in answer.aiter_lines():
                ended |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    text += chunk["choices"][0]["text"] if chunk.get("choices") else ""
                    receipts |= {key: chunk[key] for key in ("steering", "knowledge") if key in chunk}
        if ended:
            self._compare(asked, text, receipts)
        elif answer.status_code == 200:
            self.tally.broken["stream: without its end"] += 1

    async def leave(self) -> None:
        """A client that goes in the middle of its answer."""
        sent = self._body(Asked(PROMPTS[0], 1.0)) | {"stream": True, "max_tokens": 200}
        async with self.client.stream("POST", "/v1/completions", json=sent) as answer:
            self._count(answer, 200)
            async for _ in answer.aiter_lines():
                break

    async def facts(self) -> None:
        """A fact is written, found, changed, found as changed, deleted, and not found."""
        name, place = self._name("fact"), f"Where is the house of {random.randrange(10**9)}?"
        for version in (1, 2):
            fact = {"id": name, "question": place, "answer": f"in street {version}", "language": "en"}
            self._count(await self.client.put(f"{CHURN}/facts", json=[fact]), 200)
            found = await self._query(place)
            self.tally.lost_facts += (name, version) not in found
        self._count(await self.client.delete(f"{CHURN}/facts/{name}"), 204)
        self.tally.lost_facts += name in {found for found, _ in await self._query(place)}

    async def upload(self) -> None:
        """A published artifact is fetched, published anew under another name, aliased, used, and deleted."""
        version = (await self.client.get("/v1/artifacts/sentiment/versions/latest")).json()
        name, files = self._name("soak"), []
        for entry in version["manifest"]["files"]:
            file = await self.client.get(f"/v1/artifacts/sentiment/versions/latest/files/{entry['path']}")
            self._count(file, 200)
            files.append(("files", (entry["path"], file.content)))
        url = f"/v1/artifacts/{name}"
        manifest = {"manifest": json.dumps(version["manifest"])}
        self._count(await self.client.post(f"{url}/versions", data=manifest, files=files), 201)
        self._count(await self.client.put(f"{url}/aliases/live", json={"version": 1}), 200)
        asked = Asked(PROMPTS[1], 1.0)
        answer = await self.client.post("/v1/completions", json=self._body(asked, f"{name}@live"))
        self._count(answer, 200)
        self._compare(asked, answer.json()["choices"][0]["text"], answer.json())
        self._count(await self.client.delete(f"{url}/aliases/live"), 204)
        # 409 while the request's lease runs on.
        self._count(await self.client.delete(f"{url}/versions/1"), 204, 409)

    async def capture(self) -> None:
        sent = {"prompts": list(PROMPTS), "sites": {"points": ["resid_post"], "layers": [3, 12]}, "positions": "all"}
        self._count(await self.client.post("/v1/activations", json=sent), 200)

    async def fit(self) -> None:
        """A fit; every other one is cancelled, if it isn't over by then."""
        accepted = await self.client.post("/v1/fits", json={"method": "caa", "name": "soak-fit", "pairs": PAIRS})
        self._count(accepted, 202)
        if random.random() < 0.5:
            self._count(await self.client.delete(accepted.headers["location"]), 200, 409)

    async def fits(self) -> Counter[str]:
        """How all fits of this server stand."""
        return Counter(job["status"] for job in (await self.client.get("/v1/fits")).json()["data"])

    async def wait_for_fits(self) -> None:
        while (await self.fits()).keys() & {"queued", "running"}:
            await asyncio.sleep(0.2)

    async def metric(self, name: str) -> float:
        """A metric's sum over its labels."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    async def _asked(self, asked: Asked) -> None:
        answer = await self.client.post("/v1/completions", json=self._body(asked))
        self._count(answer, 200)
        if answer.status_code == 200:
            self._compare(asked, answer.json()["choices"][0]["text"], answer.json())

    async def _query(self, question: str) -> list[tuple[str, int]]:
        """Ids and versions of the nearest facts."""
        answer = await self.client.post(f"{CHURN}/facts/query", json={"query": question, "top_k": 50})
        self._count(answer, 200)
        return [(each["fact"]["id"], each["fact"]["version"]) for each in answer.json()["data"]]

    def _name(self, kind: str) -> str:
        """One that this server hasn't seen, in this run or an earlier one."""
        self._made += 1
        return f"{kind}-{time.time_ns()}-{self._made}"

    def _body(self, asked: Asked, artifact: str = "sentiment") -> dict[str, Any]:
        body = {"model": self.model, "prompt": asked.prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        if asked.steered is not None:
            body["steering"] = {"interventions": [{"artifact": artifact, "strength": asked.steered}]}
        if asked.informed:
            body["knowledge"] = {"collection": COLLECTION.rpartition("/")[2]}
        return body

    def _count(self, answer: httpx.Response, *expected: int) -> None:
        self.tally.statuses[str(answer.status_code)] += 1
        if answer.status_code not in expected:
            route = re.sub(r"[^/]*\d{6,}[^/]*", "*", answer.request.url.path)
            self.tally.unexpected[f"{answer.request.method} {route}: {answer.status_code}"] += 1

    def _compare(self, asked: Asked, text: str, receipts: dict[str, Any]) -> None:
        expected = self._alone[asked]
        self.tally.leaks += text != expected.text
        self.tally.wrong_receipts += not (
            steering_right(asked, expected, receipts) and knowledge_right(asked, receipts)
        )


def steering_right(asked: Asked, expected: Answer, receipts: dict[str, Any]) -> bool:
    """Whether the receipt counts each token of the request once; none where it isn't steered."""
    receipt = receipts.get("steering")
    if asked.steered is None or receipt is None:
        return asked.steered is None and receipt is None
    counts = [each["tokens_touched"] + each["tokens_from_cache"] for each in receipt["applied"]]
    return counts == [expected.tokens]


def knowledge_right(asked: Asked, receipts: dict[str, Any]) -> bool:
    """Whether the receipt names the very facts that the question is about; none where none were asked for."""
    receipt = receipts.get("knowledge")
    if not asked.informed or receipt is None:
        return not asked.informed and receipt is None
    return [each["id"] for each in receipt["facts"]] == QUESTIONS[asked.prompt]
