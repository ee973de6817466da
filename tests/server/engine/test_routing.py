"""The router and the op together, against a naive reference that edits token by token."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from server.engine.banks import Bank
from server.engine.capture import Capture
from server.engine.edits import Edit, Program, Span
from server.engine.ops.apply import apply
from server.engine.routing import BatchView, Router

SITES, HIDDEN, SLOTS = 3, 8, 5


@dataclass
class Request:
    id: str
    prompt_len: int
    program: Program | None
    computed: int = 0


@pytest.fixture
def bank() -> Bank:
    bank = Bank(SITES, SLOTS, HIDDEN)
    generator = torch.Generator().manual_seed(1)
    for slot in range(SLOTS):
        data = torch.randn(SITES, HIDDEN, generator=generator).numpy().tobytes()
        bank.load(f"v{slot}", slot, range(SITES), data)
    return bank


def router_for(bank: Bank, max_requests: int = 4) -> Router:
    return Router(bank, SITES, max_requests=max_requests, max_edits=4)


def random_program(rng: random.Random) -> Program:
    spans = [
        Span(),
        Span(prompt=False),
        Span(generation=False),
        Span(prompt=False, generation=False, prompt_positions=(-1,)),
        Span(prompt_window=(1, 4), prompt=False, generation_window=(2, 4), generation=False),
        Span(exclude_prompt_positions=(0,)),
    ]
    return Program(
        tuple(
            Edit(
                rng.choice(["add", "add_norm"]),
                f"v{rng.randrange(SLOTS)}",
                tuple(sorted(rng.sample(range(SITES), rng.randint(1, SITES)))),
                rng.uniform(-2, 2),
                rng.choice(spans),
            )
            for _ in range(rng.randint(1, 4))
        )
    )


def edited_by_definition(x: torch.Tensor, bank: Bank, site: int, program: Program, hits: list[bool]) -> torch.Tensor:
    """One token's activation [hidden] after the program's edits at one site."""
    for edit, hit in zip(program.edits, hits, strict=True):
        if hit and site in edit.layers:
            v = bank.vectors[site, int(edit.operand[1:])]
            x = x + edit.strength * (v if edit.opcode == "add" else x.norm() * v / v.norm())
    return x


def step(router: Router, batch: list[tuple[Request, int]], dtype: torch.dtype, pair: bool) -> None:
    """Run one step of random activations through every site and compare each row with the reference."""
    ids = [request.id for request, _ in batch]
    router.route(BatchView(ids, [tokens for _, tokens in batch], [request.computed for request, _ in batch]))
    rows = sum(tokens for _, tokens in batch)
    for site in range(SITES):
        hidden = torch.randn(rows, HIDDEN).to(dtype) if pair else None
        residual = torch.randn(rows, HIDDEN).to(dtype)
        before = residual.float() + (0 if hidden is None else hidden.float())
        work = router.works[site]
        if work is not None:
            apply(
                site,
                work,
                router.bank.vectors[site],
                router.bank.inverse_norms[site],
                hidden,
                residual,
                router.touched[site],
            )
        after = residual.float() + (0 if hidden is None else hidden.float())
        row = 0
        for request, tokens in batch:
            for position in range(request.computed, request.computed + tokens):
                expected = before[row]
                if request.program is not None:
                    intervals = request.program.intervals(request.prompt_len)
                    hits = [any(a <= position < b for a, b in each) for each in intervals]
                    expected = edited_by_definition(expected, router.bank, site, request.program, hits)
                tolerance = 1e-5 if dtype == torch.float32 else 0.06
                torch.testing.assert_close(after[row], expected, atol=tolerance, rtol=tolerance)
                row += 1
    for request, tokens in batch:
        request.computed += tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_mixed_batches_get_what_the_formulas_say(bank: Bank, seed: int, pair: bool, dtype: torch.dtype) -> None:
    """Chunked prompts, decodes, unsteered requests and many programs in one batch; then steady decode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    router = router_for(bank)
    requests = [
        Request(f"r{index}", rng.randint(1, 9), None if index % 3 == 2 else random_program(rng)) for index in range(9)
    ]
    for request in requests:
        if request.program is not None:
            router.admit(request.id, request.program, request.id, None, request.prompt_len)
    for _ in range(12):
        chosen = rng.sample(requests, rng.randint(1, len(requests)))
        batch = [
            (each, rng.randint(1, each.prompt_len - each.computed) if each.computed < each.prompt_len else 1)
            for each in chosen
        ]
        step(router, batch, dtype, pair)
    for request in requests:
        step(router, [(request, max(1, request.prompt_len - request.computed))], dtype, pair)
    for _ in range(3):
        step(router, [(request, 1) for request in requests], dtype, pair)
    for request in requests:
        if request.program is not None:
            assert_counts(router, request)


def assert_counts(router: Router, request: Request) -> None:
    assert request.program is not None
    counts = router.receipt(request.id)
    assert counts is not None
    for index, (edit, intervals) in enumerate(
        zip(request.program.edits, request.program.intervals(request.prompt_len), strict=True)
    ):
        touched = sum(any(a <= p < b for a, b in intervals) for p in range(request.computed))
        assert counts.touched[:, index].tolist() == [touched if site in edit.layers else 0 for site in range(SITES)]


def test_a_recomputed_token_is_edited_again_but_counted_once(bank: Bank) -> None:
    router = router_for(bank)
    request = Request("r", 6, Program((Edit("add", "v0", (0, 1, 2), 1.0),)))
    router.admit("r", request.program, "receipt", None, 6)
    step(router, [(request, 6)], torch.float32, True)
    step(router, [(request, 1)], torch.float32, True)
    request.computed = 0  # preempted: everything runs again
    step(router, [(request, 8)], torch.float32, True)
    counts = router.receipt("receipt")
    assert counts is not None and counts.touched.tolist() == [[8]] * SITES


def test_tokens_that_the_prefix_cache_held_are_reported_apart(bank: Bank) -> None:
    router = router_for(bank)
    program = Program((Edit("add", "v0", (0,), 1.0), Edit("add", "v1", (0,), 1.0, Span(prompt=False))))
    request = Request("r", 6, program, computed=4)
    router.admit("r", program, "receipt", None, 6)
    step(router, [(request, 3)], torch.float32, True)
    counts = router.receipt("receipt")
    assert counts is not None
    assert counts.cached.tolist() == [4, 0] and counts.touched[0].tolist() == [3, 1]


def test_counts_of_finished_requests_add_up_under_one_receipt(bank: Bank) -> None:
    router = router_for(bank)
    program = Program((Edit("add", "v0", (0,), 1.0),))
    requests = [Request(f"r{index}", 2, program) for index in range(3)]
    for request in requests:
        router.admit(request.id, program, "shared", None, 2)
    step(router, [(request, 2) for request in requests], torch.float32, True)
    router.release("r0")
    counts = router.receipt("shared")
    assert counts is not None and counts.touched[0].tolist() == [6]
    assert router.receipt("shared") is None


def test_a_row_that_is_used_again_starts_from_zero(bank: Bank) -> None:
    router = router_for(bank, max_requests=1)
    for name in ("a", "b"):
        request = Request(name, 2, Program((Edit("add", "v0", (0,), 1.0),)))
        router.admit(name, request.program, name, None, 2)
        step(router, [(request, 2)], torch.float32, True)
        counts = router.receipt(name)
        assert counts is not None and counts.touched[0].tolist() == [2]
        router.release(name)


def test_more_requests_can_be_known_than_run_at_once(bank: Bank) -> None:
    router = router_for(bank, max_requests=2)
    requests = [Request(f"r{index}", 2, Program((Edit("add", "v0", (0,), float(index)),))) for index in range(7)]
    for request in requests:
        router.admit(request.id, request.program, request.id, None, 2)
    step(router, [(request, 2) for request in requests], torch.float32, True)
    for request in requests:
        assert_counts(router, request)


def test_a_new_request_with_the_layout_of_a_finished_one_gets_its_own_edits(bank: Bank) -> None:
    router = router_for(bank, max_requests=1)
    for strength in (1.0, -1.0):
        request = Request("r", 1, Program((Edit("add", "v0", (0,), strength),)))
        router.admit("r", request.program, "r", None, 1)
        step(router, [(request, 1)], torch.float32, True)
        router.release("r")


def test_nothing_is_done_for_unsteered_batches_and_after_clear(bank: Bank) -> None:
    router = router_for(bank)
    request = Request("r", 2, Program((Edit("add", "v0", (1,), 1.0),)))
    router.admit("r", request.program, "r", None, 2)
    router.route(BatchView(["r"], [2], [0]))
    assert [work is not None for work in router.works] == [False, True, False]
    router.route(BatchView(["other"], [1], [0]))
    assert router.works == [None] * SITES
    router.route(BatchView(["r"], [1], [2]))
    router.clear()
    assert router.works == [None] * SITES
    router.route(BatchView(["r"], [1], [3]))
    router.release("r")
    router.route(BatchView(["other"], [1], [0]))
    assert router.works == [None] * SITES


def test_a_request_whose_vector_is_not_resident_is_never_admitted(bank: Bank) -> None:
    router = router_for(bank)
    with pytest.raises(RuntimeError, match="bank has no"):
        router.admit("r", Program((Edit("add", "absent", (0,), 1.0),)), "r", None, 1)
    bank.load("partial", 0, [1], torch.ones(1, HIDDEN).numpy().tobytes())
    with pytest.raises(RuntimeError, match=r"no layers \[0\]"):
        router.admit("r", Program((Edit("add", "partial", (0, 1), 1.0),)), "r", None, 1)


@pytest.mark.parametrize("chunks", [[7], [3, 3, 1], [1] * 7])
def test_captures_sum_over_chunks(bank: Bank, chunks: list[int]) -> None:
    router = router_for(bank)
    capture = Capture(SITES, HIDDEN, ((1, 7),))
    router.admit("r", None, "r", capture, 7)
    hidden, residual = torch.randn(SITES, 7, HIDDEN), torch.randn(SITES, 7, HIDDEN)
    position = 0
    for tokens in chunks:
        router.route(BatchView(["other", "r"], [2, tokens], [0, position]))
        for site in range(SITES):
            work = router.works[site]
            if work is not None:
                rows = slice(position, position + tokens)
                padding = torch.full((2, HIDDEN), 99.0)
                apply(
                    site,
                    work,
                    bank.vectors[site],
                    bank.inverse_norms[site],
                    torch.cat([padding, hidden[site, rows]]),
                    torch.cat([padding, residual[site, rows]]),
                    router.touched[site],
                )
        position += tokens
    x = (hidden + residual)[:, 1:]
    captured = router.captured("r")
    torch.testing.assert_close(captured.total, x.sum(1))
    torch.testing.assert_close(captured.norm_total, x.norm(dim=2).sum(1))
    assert captured.tokens.tolist() == [6] * SITES
