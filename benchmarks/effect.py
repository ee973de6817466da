"""What a steering strength does to text, measured over HTTP on a running server: shared by the *_effect.py scripts.

Every prompt is continued at every strength; each continuation is then given back, unsteered, as a prompt whose
log-probabilities say how likely the unsteered model finds it. Every receipt is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import matplotlib
import numpy as np
from environment import describe, environment

matplotlib.use("Agg")

BENCHMARKS = Path(__file__).parent
DOCS = BENCHMARKS.parent / "docs"
TEMPERATURE = 0.7
RESAMPLES = 10_000
OPENINGS = BENCHMARKS / "data" / "openings.jsonl"


def openings() -> list[str]:
    """Neutral openings of film reviews, the same for every script."""
    return [json.loads(line)["prompt"] for line in OPENINGS.read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt at one strength."""

    text: str
    perplexity: float | None
    """Of the continuation given the prompt under the unsteered model; None for an empty continuation."""
    relative_dose: float


@dataclass(frozen=True)
class Sampler:
    """How to ask the server: `in_flight` requests at a time, at most `tokens` tokens each."""

    url: str
    artifact: str
    tokens: int
    in_flight: int

    def run(self, prompts: Sequence[str], strengths: Sequence[float]) -> dict[float, list[Continuation]]:
        """Continuations [prompts] for each strength. RuntimeError where the server refuses or a receipt is wrong."""
        return asyncio.run(self._run(prompts, strengths))

    async def _run(self, prompts: Sequence[str], strengths: Sequence[float]) -> dict[float, list[Continuation]]:
        slots = asyncio.Semaphore(self.in_flight)
        found = {}
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as client:
            model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]

            async def limited(index: int, strength: float) -> Continuation:
                async with slots:
                    return await self._continue(client, model, prompts[index], index, strength)

            for strength in strengths:
                tasks = [limited(index, strength) for index in range(len(prompts))]
                found[strength] = list(await asyncio.gather(*tasks))
                print(f"strength {strength:+g}: {len(prompts)} continuations", flush=True)
        return found

    async def _continue(
        self, client: httpx.AsyncClient, model: str, prompt: str, seed: int, strength: float
    ) -> Continuation:
        request: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": self.tokens}
        request |= {"temperature": TEMPERATURE, "seed": seed, "return_token_ids": True}
        if strength:
            request["steering"] = {"interventions": [{"artifact": self.artifact, "strength": strength}]}
        body = await _post(client, request)
        choice = body["choices"][0]
        dose = check_receipt(body, self.artifact, strength) if strength else 0.0
        start, ids = choice["prompt_token_ids"], choice["token_ids"]
        return Continuation(choice["text"], await _perplexity(client, model, start, ids), dose)


def check_receipt(body: dict[str, Any], artifact: str, strength: float) -> float:
    """The relative dose. RuntimeError unless the one intervention touched every token that the model read: the prompt
    and all generated tokens but the last, which is never fed back.
    """
    (applied,) = body["steering"]["applied"]
    usage = body["usage"]
    expected = usage["prompt_tokens"] + usage["completion_tokens"] - 1
    touched, cached = applied["tokens_touched"], applied["tokens_from_cache"]
    name = artifact.partition("@")[0]
    if touched <= 0 or touched + cached != expected or (applied["artifact"], applied["strength"]) != (name, strength):
        raise RuntimeError(f"wrong receipt, {expected} tokens expected at strength {strength}: {applied}")
    return float(applied["relative_dose"])


async def _perplexity(client: httpx.AsyncClient, model: str, start: Sequence[int], ids: Sequence[int]) -> float | None:
    if not ids:
        return None
    request = {"model": model, "prompt": [*start, *ids], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    table = (await _post(client, request))["choices"][0]["prompt_logprobs"][len(start) :]
    return math.exp(-statistics.fmean(row[str(token)]["logprob"] for row, token in zip(table, ids, strict=True)))


async def _post(client: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=request)
    if response.is_error:
        raise RuntimeError(f"{response.status_code}: {response.text}")
    body: dict[str, Any] = response.json()
    return body


def distinct_2(text: str) -> float | None:
    """Distinct pairs of neighbouring words as a share of all (Li et al. 2016); None below two words."""
    words = text.lower().split()
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean over prompts."""
    data = np.asarray(values)
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarise(found: dict[float, list[Continuation]], score: Callable[[str], float]) -> list[dict[str, Any]]:
    """One row per strength, lowest first: the mean score with its interval, and where the text breaks."""
    rows = []
    for strength in sorted(found):
        each = found[strength]
        scores = [score(continuation.text) for continuation in each]
        low, high = interval(scores)
        rows.append(
            {
                "strength": strength,
                "relative_dose": max(continuation.relative_dose for continuation in each),
                "mean_score": statistics.fmean(scores),
                "interval_95": [low, high],
                "distinct_2": statistics.fmean(d for c in each if (d := distinct_2(c.text)) is not None),
                "median_perplexity": statistics.median(c.perplexity for c in each if c.perplexity is not None),
            }
        )
    return rows


def examples(
    prompts: Sequence[str], found: dict[float, list[Continuation]], strengths: Sequence[float], count: int
) -> list[dict[str, Any]]:
    """The first `count` prompts with their continuations: not picked."""
    return [
        {"prompt": prompt, "continuations": {f"{strength:+g}": found[strength][index].text for strength in strengths}}
        for index, prompt in enumerate(prompts[:count])
    ]


def examples_table(shown: Sequence[dict[str, Any]]) -> str:
    """Markdown: a small table per prompt."""
    parts = []
    for example in shown:
        lines = [f"| {strength} | {_cell(text)} |" for strength, text in example["continuations"].items()]
        parts.append(f'"{_cell(example["prompt"])} ..."\n\n| strength | |\n|---:|---|\n' + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def measured(results: dict[str, Any]) -> str:
    """Machine, versions, date, model and artifact as the last lines of a page."""
    server, artifact = results["server"], results["artifact"]
    return f"""Measured: {describe(results["environment"])};
served by polyhelm {server["polyhelm"]}, vLLM {server["vllm"]}.
Model `{server["model"]["id"]}`, {server["model"]["dtype"]}, weights `{server["model"]["weights_digest"]}`.
Artifact `{artifact["ref"]}`, `{artifact["digest"]}`.
"""


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return results


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results, and print their rows."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    DOCS.mkdir(exist_ok=True)
    for row in results["rows"]:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


def monotone(rows: Sequence[dict[str, Any]], strengths: Sequence[float]) -> bool:
    """Whether the mean score rises strictly from each of `strengths` to the next."""
    means = [row["mean_score"] for row in rows if row["strength"] in strengths]
    return all(below < above for below, above in zip(means, means[1:], strict=False))


def conditions(url: str, artifact: str) -> dict[str, Any]:
    """What was measured, on what: the machine and its packages here, the model and the artifact as the server names
    them.
    """
    with httpx.Client(base_url=url, timeout=60) as client:
        capabilities = client.get("/v1/capabilities").raise_for_status().json()
        name, _, ref = artifact.partition("@")
        version = client.get(f"/v1/artifacts/{name}/versions/{ref or 'latest'}").raise_for_status().json()
        engine = client.get("/version").raise_for_status().json()["version"]
    manifest = version["manifest"]
    return {
        "environment": environment(),
        "server": {"polyhelm": capabilities["polyhelm_version"], "vllm": engine, "model": capabilities["model"]},
        "artifact": {
            "ref": f"{version['name']}@{version['version']}",
            "digest": version["digest"],
            "default_layers": manifest["default_layers"],
            "default_strength": manifest["default_strength"],
            "provenance": manifest["provenance"],
        },
    }


def parser(description: str, artifact: str, strengths: Sequence[float]) -> argparse.ArgumentParser:
    """The options that the scripts share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--url", default="http://127.0.0.1:8000", help="a server started with --demo")
    made.add_argument("--artifact", default=artifact)
    made.add_argument("--strengths", type=float, nargs="+", default=list(strengths))
    made.add_argument("--tokens", type=int, default=40, help="at most so many per continuation")
    made.add_argument("--redraw", action="store_true", help="only make the page again, from the results file")
    made.add_argument("--in-flight", type=int, default=32, help="requests at a time")
    return made
