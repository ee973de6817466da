"""Mixed traffic on a running server at 80% of what it can do: errors, receipts, leaks between requests, memory, tail.

Start a server with the demo artifacts, in float32, and then this, with the process id of `polyhelm serve`:

    .venv/bin/polyhelm serve --demo --dtype float32 --data-dir FOLDER
    .venv/bin/python benchmarks/soak.py --pid PID --minutes 60

First come prompts of every length, because vLLM's matrix products on a CPU keep a oneDNN primitive for each number of
tokens that a step has had, the last 128 of each layer: memory that grows by what has been met, and no further. For the
same reason come bursts of the mix, more at once than the hour should have. Then it is measured how many requests of the
mix a number of clients get done that never pause; then requests of the same mix begin at 80% of that rate, at random
times, whether or not earlier ones have ended. The mix: completions and streams, steered or not; clients that leave in
the middle; questions to the knowledge base; facts that are written, found, changed and deleted; uploads; captures;
fits, half of them cancelled.

A wrong receipt is one that counts other tokens than the request had, or names other facts. A leak is an answer that
isn't, word for word, the one that the same request got alone; in float32, because in bfloat16 the text of a greedy
answer may depend on what else is in its batch. Memory is what the server and all its children hold for themselves,
once a second: not the pages of files, which the system takes away and gives back. Its slope is fitted over the last two
thirds, and growth.py says how. Exits with 1, and says why, where a bound is broken. Writes results/soak.json, and with
it the section of docs/operations.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from environment import describe, environment
from growth import slope
from soak_traffic import Tally, Traffic
from stalls import LONG, Stalls

RESULTS = Path(__file__).parent / "results" / "soak.json"
PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
BEGIN, END = "<!-- soak -->\n", "<!-- end of soak -->\n"
CONCURRENT = 16
BURSTS = (128, 128, 128)
"""Requests of the mix that begin at once."""
CAPACITY_SECONDS = 60
SHARE = 0.8
STABLE = 1.5
"""Of the 99th percentiles of the three thirds of the run, how often the least fits into the largest at most."""
GROWTH = 0.05
"""What may come to the memory in an hour at most, as a share, by the interval: a slope that is merely vague fails."""


class Memory:
    """What a process and all its children hold, once a second, by the names of the processes."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.samples: list[tuple[float, dict[str, int]]] = []

    def now(self) -> dict[str, int]:
        """Bytes by name. A child may end while it is looked at; the server may not: RuntimeError."""
        held: Counter[str] = Counter()
        for each in [self._process, *self._process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                memory = each.memory_info()
                held[each.name()] += memory.rss - memory.shared
        if not held or not self._process.is_running():
            raise RuntimeError("the server has ended")
        return dict(held)

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            self.samples.append((time.monotonic(), self.now()))
            await asyncio.sleep(1)

    def totals(self, begin: float) -> np.ndarray:
        """[samples, 2]: seconds since `begin`, and bytes; without those from before."""
        return np.array([(at - begin, sum(held.values())) for at, held in self.samples if at >= begin])

    def by_name(self, begin: float, end: float) -> dict[str, float]:
        """MiB of each process, on average, in that time."""
        rows = [held for at, held in self.samples if begin <= at < end]
        names = sorted({name for row in rows for name in row})
        return {name: round(float(np.mean([row.get(name, 0) for row in rows])) / 2**20, 1) for name in names}


async def capacity(traffic: Traffic, seconds: float) -> float:
    """Requests of the mix per second that `CONCURRENT` clients get done which never pause, their fits included."""
    begin = time.monotonic()

    async def client() -> int:
        done = 0
        while time.monotonic() < begin + seconds:
            await traffic.any()
            done += 1
        return done

    done = sum(await asyncio.gather(*(client() for _ in range(CONCURRENT))))
    await traffic.wait_for_fits()
    return done / (time.monotonic() - begin)


async def offer(traffic: Traffic, seconds: float, rate: float) -> None:
    """Begin requests at a rate, at random times, and wait until the last one has ended."""
    tasks: set[asyncio.Task[None]] = set()
    begin, next_at = traffic.started, 0.0
    while (next_at := next_at + random.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, begin + next_at - time.monotonic()))
        task = asyncio.create_task(traffic.any())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=arguments.url, trust_env=False, timeout=60) as client:
        model = (await client.get("/v1/models")).json()["data"][0]
    traffic = Traffic(arguments.url, model["id"])
    await traffic.learn()
    memory = Memory(arguments.pid)
    before = memory.now()
    await traffic.lengths(model["max_model_len"] - 1)
    for size in BURSTS:
        await asyncio.gather(*(traffic.any() for _ in range(size)))
    await traffic.wait_for_fits()
    after = memory.now()
    most = await capacity(traffic, CAPACITY_SECONDS)
    warming = traffic.tally
    traffic.tally, traffic.started = Tally(), time.monotonic()
    seconds, begin = 60 * arguments.minutes, traffic.started
    fitted = await traffic.fits()
    stalls = Stalls(arguments.url, arguments.pid)
    stalls.start()
    watcher = asyncio.create_task(memory.watch())
    traffic_task = asyncio.create_task(offer(traffic, seconds, SHARE * most))
    # Whichever fails first fails the run.
    await asyncio.wait([watcher, traffic_task], return_when=asyncio.FIRST_COMPLETED)
    if watcher.done():
        traffic_task.cancel()
        watcher.result()
    watcher.cancel()
    traffic_task.result()
    ended = time.monotonic() - begin
    stalls.stop()
    await traffic.wait_for_fits()
    await asyncio.sleep(5)
    tally = traffic.tally
    thirds = np.array_split(np.array([took for _, took in sorted(tally.seconds)]), 3)
    return {
        "environment": environment(),
        "minutes": arguments.minutes,
        "seconds_until_all_had_ended": round(ended, 1),
        "capacity_requests_per_second": round(most, 2),
        "offered_requests_per_second": round(SHARE * most, 2),
        "done_requests_per_second": round(tally.asked.total() / ended, 2),
        "asked": dict(tally.asked),
        "statuses": dict(tally.statuses),
        "unexpected": dict(warming.unexpected + tally.unexpected),
        "broken": dict(warming.broken + tally.broken),
        "wrong_receipts": warming.wrong_receipts + tally.wrong_receipts,
        "leaks": warming.leaks + tally.leaks,
        "lost_facts": warming.lost_facts + tally.lost_facts,
        "fits": dict(await traffic.fits() - fitted),
        "left_running": await traffic.metric("vllm:num_requests_running"),
        "p50_seconds_by_thirds": [round(float(np.quantile(each, 0.5)), 3) for each in thirds],
        "p99_seconds_by_thirds": [round(float(np.quantile(each, 0.99)), 3) for each in thirds],
        "held_up": stalls.held_up(begin, begin + seconds),
        "mib_before_and_after_warming_up": [round(sum(each.values()) / 2**20, 1) for each in (before, after)],
        "memory": slope(memory.totals(begin + seconds / 3))._asdict(),
        "mib_by_process": {
            "first_third": memory.by_name(begin, begin + seconds / 3),
            "last_third": memory.by_name(begin + 2 * seconds / 3, begin + seconds),
        },
    }


def faults(result: dict[str, Any]) -> list[str]:
    """Which bounds are broken."""
    broken = [f"{name}: {result[name]}" for name in ("unexpected", "broken") if result[name]]
    broken += [f"{name}: {result[name]}" for name in ("wrong_receipts", "leaks", "lost_facts") if result[name]]
    broken += [f"statuses: {each}" for each in result["statuses"] if each.startswith("5")]
    broken += ["fits have failed"] if result["fits"].get("failed") else []
    broken += ["requests run on at the end"] if result["left_running"] else []
    tail = result["p99_seconds_by_thirds"]
    broken += [f"the tail isn't stable: {tail}"] if max(tail) > STABLE * min(tail) else []
    memory = result["memory"]
    if memory["lowest"] > 0:
        broken.append(f"memory grows by {memory['mib_per_hour']:.0f} MiB an hour")
    elif memory["highest"] > GROWTH * memory["mib"]:
        broken.append(f"memory may grow by {memory['highest']:.0f} MiB an hour: run it for longer")
    return broken


def section(result: dict[str, Any]) -> str:
    """What the page says of a run."""
    memory, tail = result["memory"], result["p99_seconds_by_thirds"]
    held = result["held_up"]
    faulted = sum(each["major_faults"] for each in held)
    fives = sum(count for status, count in result["statuses"].items() if status.startswith("5"))
    rows = {
        "requests": f"{sum(result['statuses'].values()):,} in {result['minutes']:g} minutes; of the mix, "
        f"{result['offered_requests_per_second']} began each second, and "
        f"{result['capacity_requests_per_second']} is the most that was done",
        "answers of 500 or more": str(fives),
        "other answers that were not expected, broken streams": str(
            sum(result["unexpected"].values()) + sum(result["broken"].values())
        ),
        "wrong receipts; texts that differ; facts lost": f"{result['wrong_receipts']}; {result['leaks']}; "
        f"{result['lost_facts']}",
        "99th percentile of completions, by thirds": ", ".join(f"{each:.2f} s" for each in tail),
        f"times that the machine, or /livez, was over {LONG} s late, and major faults then": f"{len(held)}; {faulted}",
        "memory before and after every length and the bursts": " and ".join(
            f"{each:,.0f} MiB" for each in result["mib_before_and_after_warming_up"]
        ),
        "memory of the last two thirds": f"{memory['mib']:,.0f} MiB; slope {memory['mib_per_hour']:+.1f} MiB an hour, "
        f"95% interval {memory['lowest']:+.1f} to {memory['highest']:+.1f}",
        "bounds broken": "; ".join(result["faults"]) or "none",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"{describe(result['environment'])}:\n\n| | |\n|---|---|\n{table}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, required=True, help="of polyhelm serve")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    result["faults"] = faults(result)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.output == RESULTS:
        text = PAGE.read_text("utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}{section(result)}\n{END}{after}", "utf-8")
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["faults"] else 0)
