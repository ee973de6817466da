"""What edits cost on a GPU: a decode step of Llama-3-8B's shape as a CUDA graph, with and without them.

Needs one CUDA GPU, torch, triton and numpy, and no vLLM. The kernels are first checked against the reference, with all
opcodes. Then the conditions take turns in one run: each measurement is divided by the mean of the plain ones just
before and after it, and the median ratio is reported with its quartiles. What changes between conditions is only what
the kernels read: all of them replay the same two graphs, one with the `map` kernels and one without.

    python benchmarks/gpu_overhead.py

`--toy` runs it at a toy size on the CPU, in Triton's interpreter, and writes nothing: it shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
if "--toy" in sys.argv:
    # Triton reads it once, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
from decoder_stack import LLAMA_3_8B, TOY, Shape, Stack
from environment import environment
from kernel_check import check_kernels
from spread import spread

from server.engine.banks import Bank, Resident
from server.engine.edits import POINTS, Edit, Program
from server.engine.operands import pack
from server.engine.ops.kernel import launch
from server.engine.ops.tables import Tables

RESULTS = Path(__file__).parent / "results" / "gpu_overhead.json"
BATCHES = (1, 8, 32, 128, 256)
RANK, MAP_RANK = 16, 256
STRENGTH = 1e-3
"""Small, so that the activations, and with them the work, stay those of the stack."""
GOALS = {"idle": 1.005, "add": 1.02, "add, a vector each": 1.03, "rank": 1.02, "idle, map sites": 1.01}
WITHOUT_MAPS = ("idle", "add", "add, a vector each", "rank")
WITH_MAPS = ("idle, map sites", "map, one token", "map, all tokens")


class Steering:
    """The bank, and tables in which each condition has rows of its own."""

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        self.shape, self.batch, self.device = shape, batch, device
        sites = len(POINTS) * shape.layers
        layers, few = tuple(range(shape.layers)), tuple(range(0, shape.layers, max(shape.layers // 4, 1)))[:4]
        self.rank_layers = few
        self.bank, residents = fill_bank(shape, batch, few, device)
        widths = dict.fromkeys(range(shape.layers), shape.hidden)
        self.tables, self.map_tables = (
            Tables(self.bank, sites, widths, max_rows=3 * batch, max_tokens=batch, map_sites=frozenset(map_sites))
            for map_sites in ((), range(shape.layers))
        )
        self.sites = [torch.tensor([layer], dtype=torch.int32, device=device) for layer in layers]

        def set_rows(tables: Tables, first: int, operands: list[str], edit: Edit) -> None:
            for index in range(batch):
                operand = operands[index % len(operands)]
                program = Program((Edit(edit.opcode, operand, edit.layers, STRENGTH),))
                tables.set_row(first + index, program, [residents[operand]], shape.layers)

        self.residents = residents
        set_rows(self.tables, 1, ["v0"], Edit("add", None, layers))
        set_rows(self.tables, 1 + batch, [f"v{index}" for index in range(batch)], Edit("add", None, layers))
        set_rows(self.tables, 1 + 2 * batch, ["rank"], Edit("rank", None, few))
        set_rows(self.map_tables, 1, ["map"], Edit("map", None, layers))

    def stage(self, condition: str) -> None:
        tables = self.map_tables if condition in WITH_MAPS else self.tables
        if condition.startswith("idle"):
            tables.idle()
            return
        first = {"add": 1, "add, a vector each": 1 + self.batch, "rank": 1 + 2 * self.batch}.get(condition, 1)
        rows = np.arange(first, first + self.batch, dtype=np.int32)
        if condition == "map, one token":
            rows[1:] = 0
        tables.stage(rows, np.ones(self.batch, np.int32), np.ones(self.batch, np.bool_))

    def counted(self, condition: str) -> int:
        """Tokens on which the edits of the condition's first row acted so far, at one of their sites."""
        row = {"add": 1, "add, a vector each": 1 + self.batch, "rank": 1 + 2 * self.batch}.get(condition, 1)
        return int((self.map_tables if condition in WITH_MAPS else self.tables).counts(row)[0, 0])

    def site(self, maps: bool) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
        tables = self.map_tables if maps else self.tables
        return lambda layer, residual, hidden: launch(tables, self.sites[layer], residual, hidden, maps=maps)


def fill_bank(
    shape: Shape, batch: int, rank_layers: tuple[int, ...], device: torch.device
) -> tuple[Bank, dict[str, Resident]]:
    rng = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32)

    width, layers = shape.hidden, range(shape.layers)
    operands = {f"v{index}": pack({layer: {"vector": normal(width)} for layer in layers}) for index in range(batch)}
    operands["rank"] = pack(
        {layer: {"encoder": normal(RANK, width), "decoder": normal(RANK, width)} for layer in rank_layers}
    )
    map_rank = min(MAP_RANK, width)
    factors = [{"left": normal(width, map_rank), "right": normal(map_rank, width)} for _ in layers]
    operands["map"] = pack(dict(enumerate(factors)))  # type: ignore[arg-type]
    # Numbers per row make operands end off the grid of rows.
    sizes = {key: -(-len(operand.data) // width) * width for key, operand in operands.items()}
    bank, residents, start = Bank(sum(sizes.values()), device), {}, 0
    for key, operand in operands.items():
        bank.write(start, operand.data.tobytes())
        bank.bind(key, start, width, operand.pieces)
        residents[key] = bank.resident(key)
        start += sizes[key]
    return bank, residents


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as a CUDA graph; on the CPU the function itself."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def milliseconds(replay: Callable[[], Any], runs: int, device: torch.device) -> float:
    """Mean time of one replay, on the device's own clock."""
    if device.type != "cuda":
        start_time = time.perf_counter()
        for _ in range(runs):
            replay()
        return (time.perf_counter() - start_time) * 1e3 / runs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    for _ in range(runs):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / runs


def overheads(stack: Stack, steering: Steering, rounds: int, runs: int) -> dict[str, Any]:
    """Time of a step by condition, and its ratio to the plain step."""
    device, batch = stack.device, steering.batch
    start = torch.randn(batch, stack.shape.hidden, dtype=torch.bfloat16, device=device)
    caches = stack.caches(batch)
    graphs = {
        name: captured(lambda site=site: stack.step(start, caches, site), device)
        for name, site in (("plain", None), ("sites", steering.site(False)), ("map sites", steering.site(True)))
    }
    conditions = WITHOUT_MAPS + WITH_MAPS
    seen: dict[str, list[float]] = {name: [] for name in ("plain", *conditions)}
    ratios: dict[str, list[float]] = {name: [] for name in conditions}
    before = milliseconds(graphs["plain"], runs, device)
    for number in range(rounds):
        # Each round in another order, so that no condition always follows the same one.
        turn = number % len(conditions)
        for condition in conditions[turn:] + conditions[:turn]:
            steering.stage(condition)
            counted = steering.counted(condition)
            seen[condition].append(
                milliseconds(graphs["map sites" if condition in WITH_MAPS else "sites"], runs, device)
            )
            acted = steering.counted(condition) - counted
            # A fast run that steered nothing would be worth nothing.
            expected = 0 if condition.startswith("idle") else runs + (device.type == "cuda")
            assert acted == expected, f"{condition}: {acted} edits were counted, not {expected}"
            after = milliseconds(graphs["plain"], runs, device)
            ratios[condition].append(seen[condition][-1] / ((before + after) / 2))
            seen["plain"].append(after)
            before = after
    medians = {name: statistics.median(values) for name, values in seen.items()}
    return {
        "step_ms": {name: spread(values) for name, values in seen.items()},
        "ratio_to_plain": {name: spread(values) for name, values in ratios.items()},
        "ratio_of_medians": {name: medians[name] / medians["plain"] for name in conditions},
    }


def kernels(steering: Steering, bandwidth: float, runs: int) -> dict[str, Any]:
    """Each condition's launches at the sites where it acts, alone: microseconds per site, and bytes as a share of the
    copy bandwidth. Every site has activations of its own, so that they come from memory.
    """
    shape, batch, device = steering.shape, steering.batch, steering.device
    size = (shape.layers, 2, batch, shape.hidden)
    activations = torch.randn(size, dtype=torch.bfloat16, device=device)
    results = {}
    for condition in WITHOUT_MAPS + WITH_MAPS:
        layers = steering.rank_layers if condition == "rank" else range(shape.layers)
        site = steering.site(condition in WITH_MAPS)
        replay = captured(lambda layers=layers, site=site: [site(each, *activations[each]) for each in layers], device)
        steering.stage(condition)
        times = [milliseconds(replay, runs, device) * 1e3 / len(layers) for _ in range(5)]
        moved = traffic(condition, batch, shape)
        share = moved / (statistics.median(times) * 1e-6) / bandwidth
        results[condition] = {"microseconds": spread(times), "bytes": moved, "share_of_copy_bandwidth": share}
    return results


def traffic(condition: str, batch: int, shape: Shape) -> int:
    """The fewest bytes that a site has to move: the pair read, the residual written, each operand read once."""
    if condition.startswith("idle"):
        return batch * 4
    tokens = 1 if condition == "map, one token" else batch
    rows = {"add": 1, "add, a vector each": batch, "rank": 2 * RANK}.get(condition, 2 * min(MAP_RANK, shape.hidden))
    return tokens * shape.hidden * 3 * 2 + rows * shape.hidden * 4


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a large copy."""
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device).random_()
    times = [milliseconds(lambda: target.copy_(source), 10, device) for _ in range(5)]
    return 2 * size / (statistics.median(times) * 1e-3)


def host_times(steering: Steering, runs: int) -> dict[str, Any]:
    """Milliseconds that the host spends to admit a request and to lay out a step, beside those that run already."""
    program = Program((Edit("add", "v0", tuple(range(steering.shape.layers)), STRENGTH),))
    residents: list[Resident | None] = [steering.residents["v0"]]
    turns = iter(range(1 << 30))

    def stage() -> None:
        steering.stage(("add", "add, a vector each")[next(turns) % 2])

    parts = {
        "set_row": timed(lambda: steering.tables.set_row(1, program, residents, steering.shape.layers), runs),
        "clear_row": timed(lambda: steering.tables.clear_row(3 * steering.batch), runs),
        "stage, another batch": timed(stage, runs),
        "stage, the same batch": timed(lambda: steering.stage("add"), runs),
    }
    return parts


def timed(call: Callable[[], Any], runs: int) -> dict[str, float]:
    times = []
    for _ in range(runs):
        start_time = time.perf_counter()
        call()
        times.append((time.perf_counter() - start_time) * 1e3)
    return spread(times)


def gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": "none: Triton's interpreter"}
    properties = torch.cuda.get_device_properties(device)
    memory = round(properties.total_memory / 2**30)
    return {"gpu": properties.name, "gpu_memory_gib": memory, "multiprocessors": properties.multi_processor_count}


def table(results: dict[str, Any]) -> str:
    lines = []
    for batch, speed in results["steps"].items():
        lines.append(f"batch {batch}: plain step {speed['step_ms']['plain']['median']:.3f} ms")
        for name, ratio in speed["ratio_to_plain"].items():
            goal = f", goal {GOALS[name]:.3f}" if name in GOALS else ""
            lines.append(f"  {name}: {ratio['median']:.4f} ({ratio['quartile_1']:.4f}–{ratio['quartile_3']:.4f}){goal}")
        for name, each in speed["kernels"].items():
            share = each["share_of_copy_bandwidth"]
            lines.append(f"  {name}: {each['microseconds']['median']:.2f} µs a site, {share:.0%} of a copy's bandwidth")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--toy", action="store_true", help="A toy size on the CPU, in Triton's interpreter; no results."
    )
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        sys.exit("No CUDA device here. This benchmark needs one; --toy runs the script on the CPU at a toy size.")
    torch.manual_seed(0)
    device = torch.device("cpu" if args.toy else "cuda")
    shape, batches, rounds, runs = (TOY, (1, 3), 2, 1) if args.toy else (LLAMA_3_8B, args.batches, args.rounds, 20)
    block = environment()
    versions = {**block["versions"], "torch": torch.__version__, "triton": triton.__version__}
    results: dict[str, Any] = {"environment": {**block, **gpu(device), "versions": versions}, "shape": vars(shape)}
    results["checked"] = check_kernels(device, (37,) if args.toy else (4096, 576, 1000, 14336))
    print(f"kernels equal the reference: {results['checked']}", flush=True)
    bandwidth = copy_bandwidth(device, 1 << 20 if args.toy else 1 << 31)
    results["copy_bytes_per_second"] = bandwidth
    stack = Stack(shape, device)
    results["steps"] = {}
    for batch in batches:
        steering = Steering(shape, batch, device)
        speed = overheads(stack, steering, rounds, runs)
        speed["kernels"] = kernels(steering, bandwidth, 1 if args.toy else 50)
        speed["host_ms"] = host_times(steering, 5 if args.toy else 500)
        results["steps"][str(batch)] = speed
        print(table({"steps": {str(batch): speed}}), flush=True)
    if not args.toy:
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
