"""Does SADI make the model answer better than no steering, a random mask of the same size, and a fixed vector?

Fits masks on one part of a task's questions, chooses top_k and strength on a second part, each arm for itself, and
reports accuracy on the third, with paired bootstrap intervals: the released code takes the best on the test set. An
answer is the likelier of two words after the prompt. Acts on the prompt's last token, as in the paper. Writes
results/sadi_effect.json and a section of docs/results.md.

--boolq is a file with JSON lines of BoolQ (CC-BY-SA-3.0); --sentiment a TSV of counterfactually augmented film reviews
(Kaushik et al. 2020, Apache-2.0) with the columns Sentiment and Text.

    make serve                                                                             # in another terminal
    .venv/bin/python benchmarks/sadi_effect.py --boolq FILE --sentiment FILE
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from environment import describe, environment
from results_page import publish
from safetensors.numpy import load, save

ARMS = ("none", "sadi", "random", "fixed")
TOP_K = (2, 6, 10)
STRENGTHS = (1.0, 4.0, 9.0)
RESAMPLES, IN_FLIGHT, MAX_WORDS, SEED = 10_000, 16, 120, 0
LAST_TOKEN = {"prompt_positions": [-1]}


class Question(NamedTuple):
    prompt: str
    right: str
    wrong: str


class Setting(NamedTuple):
    """One way to steer: nothing to choose for `none`."""

    arm: str
    top_k: int = 0
    strength: float = 0.0


@dataclass(frozen=True)
class Task:
    name: str
    fit: list[Question]
    tune: list[Question]
    test: list[Question]


def boolq(file: Path) -> list[Question]:
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    found = []
    for row in rows:
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        right, wrong = ("yes", "no") if row["answer"] else ("no", "yes")
        found.append(Question(prompt, right, wrong))
    return found


def sentiment(file: Path) -> list[Question]:
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    other = {"Positive": ("positive", "negative"), "Negative": ("negative", "positive")}
    return [Question(f"Review: {row['Text']}\nSentiment:", *other[row["Sentiment"]]) for row in rows]


def split(name: str, questions: list[Question], size: int) -> Task:
    """Short ones only, shuffled once; a third of `size` each to fit, to tune and to test."""
    short = [each for each in questions if len(each.prompt.split()) <= MAX_WORDS]
    random.Random(SEED).shuffle(short)
    third = min(size, len(short)) // 3
    return Task(name, short[:third], short[third : 2 * third], short[2 * third : 3 * third])


class Server:
    def __init__(self, client: httpx.AsyncClient, capabilities: dict[str, Any], mode: str) -> None:
        self.client, self.capabilities, self.mode = client, capabilities, mode
        self.slots = asyncio.Semaphore(IN_FLIGHT)

    async def ok(self, method: str, path: str, **arguments: Any) -> Any:
        response = await self.client.request(method, path, **arguments)
        if response.is_error:
            raise RuntimeError(f"{path} answered {response.status_code}: {response.text}")
        return response

    async def fit(self, name: str, task: Task, top_k: int, form: str) -> str:
        """The number of the version that was published."""
        pairs = [{"prompt": q.prompt, "positive": q.right, "negative": q.wrong} for q in task.fit]
        body = {"method": "sadi", "name": name, "pairs": pairs, "options": {"top_k": top_k, "form": form}}
        job = (await self.ok("POST", "/v1/fits", json=body)).json()
        while job["status"] in ("queued", "running"):
            await asyncio.sleep(0.3)
            job = (await self.ok("GET", f"/v1/fits/{job['id']}")).json()
        if job["status"] != "succeeded":
            raise RuntimeError(job["error"])
        return str(job["artifact"]).rpartition("@")[2]

    async def randomised(self, source: str, number: str, name: str, seed: int) -> None:
        """Publish as many heads of the same model as version `number` of `source` has, drawn at random."""
        path = f"/v1/artifacts/{source}/versions/{number}"
        manifest = (await self.ok("GET", path)).json()["manifest"]
        (file,) = {site["file"] for site in manifest["sites"]}
        content = (await self.ok("GET", f"{path}/files/{file}")).content
        top_k = manifest["provenance"]["config"]["top_k"]
        block = sum(len(indices) for indices in load(content).values()) // top_k
        heads = self.capabilities["points"]["head_out"]["width"] // block
        places = random.Random(seed).sample(range(self.capabilities["layers"] * heads), top_k)
        indices: dict[int, list[int]] = {}
        for layer, head in sorted(divmod(place, heads) for place in places):
            indices.setdefault(layer, []).extend(range(head * block, (head + 1) * block))
        tensors = {f"head_out.{layer}": np.array(each, np.int64) for layer, each in indices.items()}
        place = {"point": "head_out", "file": file, "dtype": "I64"}
        manifest["sites"] = [
            {**place, "layer": layer, "tensor": f"head_out.{layer}", "shape": [len(each)]}
            for layer, each in indices.items()
        ]
        manifest |= {"default_layers": sorted(indices), "files": [], "metrics": {}, "annotations": {}}
        manifest["provenance"] = {"method": "random mask", "seed": seed, "config": {"top_k": top_k}}
        files = [("files", (file, save(tensors)))]
        await self.ok("POST", f"/v1/artifacts/{name}/versions", data={"manifest": json.dumps(manifest)}, files=files)

    async def tokens(self, words: tuple[str, ...]) -> dict[str, int]:
        """The first token of each word behind a prompt."""
        found = {}
        for word in words:
            body = {"model": self.capabilities["model"]["id"], "prompt": f" {word}", "add_special_tokens": False}
            found[word] = (await self.ok("POST", "/tokenize", json=body)).json()["tokens"][0]
        return found

    async def right(self, question: Question, setting: Setting, prefix: str, tokens: dict[str, int]) -> bool:
        body: dict[str, Any] = {"model": self.capabilities["model"]["id"], "prompt": question.prompt}
        ids = [tokens[question.right], tokens[question.wrong]]
        body |= {"max_tokens": 1, "temperature": 0, "logprobs": 0, "logprob_token_ids": ids}
        body |= {"return_tokens_as_token_ids": True}
        if setting.arm != "none":
            artifact = f"{prefix}-{setting.arm}-{setting.top_k}"
            intervention = {"artifact": artifact, "strength": setting.strength, "apply": LAST_TOKEN}
            body["steering"] = {"mode": self.mode, "interventions": [intervention]}
        async with self.slots:
            answer = (await self.ok("POST", "/v1/completions", json=body)).json()
        if setting.arm != "none" and answer["steering"]["applied"][0]["tokens_touched"] < 1:
            raise RuntimeError(f"nothing was steered: {answer['steering']}")
        (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        right, wrong = (top[f"token_id:{token}"] for token in ids)
        return bool(right > wrong)


def settings() -> list[Setting]:
    steered = [Setting(arm, top_k, s) for arm in ARMS[1:] for top_k in TOP_K for s in STRENGTHS]
    return [Setting("none"), *steered]


async def answers(
    server: Server, questions: list[Question], wanted: list[Setting], prefix: str, tokens: dict[str, int]
) -> dict[Setting, np.ndarray]:
    """Whether each question is answered right, in each setting. A prompt's settings follow each other, so that the
    prefix cache holds it.
    """
    rows = []
    for question in questions:
        rows.append(await asyncio.gather(*(server.right(question, each, prefix, tokens) for each in wanted)))
    return {setting: np.array([row[index] for row in rows]) for index, setting in enumerate(wanted)}


async def run_task(server: Server, task: Task) -> dict[str, Any]:
    started = time.monotonic()
    prefix = f"sadi-bench-{task.name}"
    for top_k in TOP_K:
        number = await server.fit(f"{prefix}-sadi-{top_k}", task, top_k, "adaptive")
        await server.fit(f"{prefix}-fixed-{top_k}", task, top_k, "fixed")
        await server.randomised(f"{prefix}-sadi-{top_k}", number, f"{prefix}-random-{top_k}", SEED + top_k)
    fit_seconds = (time.monotonic() - started) / (2 * len(TOP_K))
    tokens = await server.tokens(tuple({task.fit[0].right, task.fit[0].wrong}))
    tuned = await answers(server, task.tune, settings(), prefix, tokens)
    best = {arm: max((s for s in tuned if s.arm == arm), key=lambda s: float(tuned[s].mean())) for arm in ARMS}
    reported = await answers(server, task.test, list(best.values()), prefix, tokens)
    found = {arm: reported[best[arm]] for arm in ARMS}
    return {
        "questions": {"fit": len(task.fit), "tune": len(task.tune), "test": len(task.test)},
        "majority": max(float(np.mean([q.right == word for q in task.test])) for word in tokens),
        "fit_seconds": fit_seconds,
        "tune": [{**each._asdict(), "accuracy": float(right.mean())} for each, right in tuned.items()],
        "arms": {
            arm: best[arm]._asdict() | {"tuned": float(tuned[best[arm]].mean()), "accuracy": float(right.mean())}
            for arm, right in found.items()
        },
        "sadi_minus": {arm: paired(found["sadi"], found[arm]) for arm in ARMS if arm != "sadi"},
        "seconds": time.monotonic() - started,
    }


def paired(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """The difference of accuracies, with its 95% interval over resampled questions."""
    differences = first.astype(float) - second
    draws = np.random.default_rng(SEED).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high)}


async def measure(tasks: list[Task], url: str, mode: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        capabilities = (await client.get("/v1/capabilities")).raise_for_status().json()
        server = Server(client, capabilities, mode)
        found = {}
        for task in tasks:
            found[task.name] = await run_task(server, task)
            print(
                task.name, json.dumps({k: v for k, v in found[task.name].items() if k != "tune"}, indent=1), flush=True
            )
    return {"model": capabilities["model"]["id"], "mode": mode, "tasks": found, "environment": environment()}


def section(results: dict[str, Any]) -> str:
    parts = []
    for name, task in results["tasks"].items():
        table = []
        for arm, row in task["arms"].items():
            chosen = "" if arm == "none" else f"{row['top_k']}, {row['strength']:g}"
            line = f"| {arm} | {chosen} | {row['tuned']:.1%} | {row['accuracy']:.1%} |"
            if arm == "sadi":
                table.append(f"{line} |")
                continue
            minus = task["sadi_minus"][arm]
            table.append(f"{line} {minus['difference']:+.1%} ({minus['low']:+.1%} to {minus['high']:+.1%}) |")
        clear = [arm for arm, minus in task["sadi_minus"].items() if minus["low"] > 0]
        worse = [arm for arm, minus in task["sadi_minus"].items() if minus["high"] < 0]
        counts = task["questions"]
        broken = sum(row["accuracy"] < task["arms"]["none"]["tuned"] for row in task["tune"] if row["arm"] == "sadi")
        settings_tried = sum(row["arm"] == "sadi" for row in task["tune"])
        parts.append(f"""### {name}

{counts["fit"]} questions to fit, {counts["tune"]} to tune, {counts["test"]} to test; the commoner answer is right for
{task["majority"]:.1%} of these.

| arm | heads, strength δ | accuracy, tuning | accuracy, test | SADI minus it (95% interval) |
|---|---|---:|---:|---:|
{chr(10).join(table)}

SADI is better than {", ".join(clear) or "none of them"} and worse than {", ".join(worse) or "none of them"} beyond the
interval. {broken} of SADI's {settings_tried} settings are worse than no steering on the tuning questions.""")
    return f"""## SADI: heads, against a random mask and a fixed vector

`benchmarks/sadi_effect.py`: {results["model"]}, mode {results["mode"]}, the prompt's last token. Each arm's number of
heads and strength were chosen on the tuning questions and used once on the test questions.

{chr(10).join(parts)}

Measured {describe(results["environment"])}.
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--boolq", type=Path, help="JSON lines with question, answer and passage")
    arguments.add_argument("--sentiment", type=Path, help="TSV with Sentiment and Text")
    arguments.add_argument("--url", default="http://127.0.0.1:8000", help="a running server")
    arguments.add_argument("--mode", choices=("live", "frozen"), default="live")
    arguments.add_argument("--size", type=int, default=600, help="questions per task, over the three parts")
    options = arguments.parse_args()
    loaders = {"boolq": boolq, "sentiment": sentiment}
    tasks = [
        split(name, loaders[name](file), options.size)
        for name in loaders
        if (file := getattr(options, name)) is not None
    ]
    if not tasks:
        arguments.error("name a file with --boolq, --sentiment or both")
    results = asyncio.run(measure(tasks, options.url, options.mode))
    publish("sadi_effect", results, section(results))


if __name__ == "__main__":
    main()
