"""The edit kernels against the reference on the device at hand, with every opcode, before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from server.engine.banks import Bank, Resident
from server.engine.edits import Condition, Edit, Function, Program
from server.engine.operands import Role, pack
from server.engine.ops.kernel import launch
from server.engine.ops.reference import apply_reference
from server.engine.ops.tables import OPEN, Tables

RANK = 5
TOKENS = 5
WIDEST_MATRIX = 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def one(opcode: Any, operand: str | None = None, strength: float = 0.5, **fields: Any) -> Edit:
    return Edit(opcode, None if opcode == "renorm" else operand or opcode, (0, 1), strength, **fields)


def gate(readout: Any, threshold: float, above: bool = True) -> Edit:
    return one("gate", condition=Condition(readout, threshold, above))


def programs() -> list[Program]:
    sequence = Edit("gate", "gate", (0,), condition=Condition("dot", 0.0, scope="sequence"))
    functions = [
        Function(),
        Function("relu"),
        Function("jumprelu", high=(1.0,)),
        Function(low=(-0.1,) * RANK, high=tuple(0.2 * k for k in range(RANK))),
    ]
    edits: list[tuple[Edit, ...]] = [
        (one("add"),),
        (one("add_norm"), one("scale", strength=-1.0)),
        (one("set"), one("add")),
        (one("add", strength=0.0),),
        *[(one("rank", function=function), one("renorm")) for function in functions],
        (one("map", "dense"), one("add")),
        (one("map", "factored"),),
        (one("set"), one("map", "factored")),
        (one("add"), one("map", "dense"), one("renorm")),
        (gate("dot", 0.0), one("add", gate=0)),
        (gate("cosine", 0.0, above=False), one("set", gate=0), one("map", "factored", gate=0)),
        (sequence, one("add", gate=0), one("rank", gate=0)),
    ]
    return [Program(each) for each in edits]


def operands(rng: np.random.Generator, width: int) -> dict[str, Mapping[Role, np.ndarray]]:
    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32)

    vectors: dict[str, Mapping[Role, np.ndarray]] = {
        name: {"vector": normal(width)} for name in ("add", "add_norm", "set", "gate")
    }
    return {
        **vectors,
        "scale": {"mask": (rng.random(width) < 0.1).astype(np.float32)},
        "rank": {"encoder": normal(RANK, width), "decoder": normal(RANK, width) / width, "bias": normal(RANK)},
        **({"dense": {"matrix": normal(width, width) / width**0.5}} if width <= WIDEST_MATRIX else {}),
        "factored": {"right": normal(RANK, width) / width**0.5, "left": normal(width, RANK)},
    }


def check_kernels(device: torch.device, widths: tuple[int, ...]) -> str:
    """Raises AssertionError at the first difference. Returns what was compared."""
    compared = 0
    for width in widths:
        packed = {key: pack({0: roles, 1: roles}) for key, roles in operands(np.random.default_rng(1), width).items()}
        sizes = {key: -(-len(operand.data) // width) * width for key, operand in packed.items()}
        bank, start = Bank(sum(sizes.values())), 0
        for key, operand in packed.items():
            bank.write(start, operand.data.tobytes())
            bank.bind(key, start, width, operand.pieces)
            start += sizes[key]
        for dtype in DTYPES:
            for pair in (True, False):
                for map_sites in (frozenset[int](), frozenset({0, 1})):
                    compared += check(bank, device, width, dtype, pair, map_sites)
    return f"{compared} activations, widths {', '.join(map(str, widths))}"


def check(
    bank: Bank, device: torch.device, width: int, dtype: torch.dtype, pair: bool, map_sites: frozenset[int]
) -> int:
    """All programs together, as many requests of one batch, at two layers one after the other."""
    rng = np.random.default_rng(width)
    requests = [each for each in programs() if width <= WIDEST_MATRIX or "dense" not in each.operands]
    there = Bank(1, device)
    there.data = bank.data.to(device)
    count = len(requests) * TOKENS
    tables = Tables(there, 10, {0: width, 1: width}, max_rows=len(requests), max_tokens=count, map_sites=map_sites)
    residents: list[list[Resident | None]] = [
        [None if edit.operand is None else bank.resident(edit.operand) for edit in program.edits]
        for program in requests
    ]
    active = [rng.random((TOKENS, len(program.edits))) < 0.8 for program in requests]
    # A gate for the sequence decides at the last token, and the edits behind it act from there on.
    active[-1][:-1] = False
    active[-1][-1] = True
    bits = np.zeros(count, np.int32)
    for index, (program, mask) in enumerate(zip(requests, active, strict=True)):
        tables.set_row(index + 1, program, residents[index], 2)
        bits[index * TOKENS : (index + 1) * TOKENS] = (mask << np.arange(mask.shape[1])).sum(1)
    rows = np.repeat(np.arange(1, len(requests) + 1, dtype=np.int32), TOKENS)
    tables.stage(rows, bits, np.ones(count, np.bool_))
    decisions: list[list[bool | None]] = [[None] * len(program.edits) for program in requests]
    for layer in range(2):
        residual, hidden = torch.from_numpy(rng.standard_normal((2, count, width), np.float32)).to(dtype)
        x = residual.float() + (hidden.float() if pair else 0)
        edited = residual.clone().to(device)
        site = torch.tensor([layer], dtype=torch.int32, device=device)
        launch(tables, site, edited, hidden.to(device) if pair else None)
        for index, program in enumerate(requests):
            tokens = slice(index * TOKENS, (index + 1) * TOKENS)
            mask = torch.from_numpy(active[index])
            point, own = "resid_post", decisions[index]
            applied = apply_reference(x[tokens], program, mask, bank, residents[index], point, layer, own)  # type: ignore[arg-type]
            expected = residual[tokens].float() + applied.x - x[tokens] if pair else applied.x
            size = torch.maximum(expected.abs().amax(1, keepdim=True), x[tokens].abs().amax(1, keepdim=True))
            allowed = 1e-5 * size * width**0.5 + torch.finfo(dtype).eps * expected.abs() + 1e-6
            got = edited[tokens].cpu().float()
            difference = (got - expected).abs()
            name = "-".join(edit.opcode for edit in program.edits)
            assert (difference <= allowed).all(), f"{name}, {dtype}, width {width}: off by {difference.max()}"
            same = (applied.x == x[tokens]).all(1)
            assert torch.equal(got[same], residual[tokens].float()[same]), f"{name}: an untouched token changed"
            counts = tables.counts(index + 1)[layer, : len(program.edits)]
            assert (counts == applied.acted.sum(0).numpy()).all(), f"{name}: {counts} counted"
            decided = tables.decisions[index + 1, : len(own)].tolist()
            assert decided == [0 if each is None else OPEN if each else OPEN - 1 for each in own], name
    return 2 * count
