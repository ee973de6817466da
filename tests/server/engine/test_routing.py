"""The router and the op together, against a naive reference that edits token by token."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.banks import Bank
from server.engine.capture import Capture, CaptureSpec
from server.engine.edits import POINTS, Condition, Edit, Program, site_index
from server.engine.operands import Piece, pack
from server.engine.ops.cpu_kernel import CpuKernel
from server.engine.ops.reference import apply_reference
from server.engine.ops.tables import Tables
from server.engine.routing import BatchView, Router
from server.engine.spans import Span
from tests.server.engine.programs import operands, random_program

LAYERS, WIDTH = 3, 8
OPERAND_OF = {"add": "vector-0", "add_norm": "vector-0", "scale": "mask-0", "rank": "rank-0", "map": "matrix-0"}
SITES = [(point, layer) for point in POINTS for layer in range(LAYERS)]


@dataclass
class Request:
    id: str
    prompt_len: int
    program: Program | None
    computed: int = 0
    seen: int = 0
    """Tokens below this ran already; after a preemption they run again, and aren't counted again."""
    decisions: list[bool | None] = field(default_factory=lambda: [None] * 8)
    acted: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    """By site: (position, edit)."""


@pytest.fixture(scope="module")
def bank() -> Bank:
    packed = operands(LAYERS, WIDTH)
    bank = Bank(sum(len(each.data) + WIDTH for each in packed.values()))
    start = 0
    for key, operand in packed.items():
        bank.write(start, operand.data.tobytes())
        bank.bind(key, start, operand.width, operand.pieces)
        start += -(-len(operand.data) // WIDTH) * WIDTH
    return bank


def router_for(bank: Bank, max_requests: int = 9) -> Router:
    sites = range(len(SITES))
    tables = Tables(
        bank,
        len(SITES),
        dict.fromkeys(sites, WIDTH),
        max_rows=max_requests,
        max_tokens=128,
        max_edits=8,
        map_sites=frozenset(sites),
        max_mapped=8,
    )
    return Router(tables, LAYERS)


def run(router: Router, site: int, hidden: torch.Tensor | None, residual: torch.Tensor) -> None:
    """What an executor does at a site."""
    work = router.works[site]
    if work is not None:
        CpuKernel(router.tables).launch(site, residual, hidden)
        for capture in work:
            capture.add(hidden, residual)


def add(operand: str, layers: tuple[int, ...] = (0, 1, 2), strength: float = 1.0, span: Span | None = None) -> Edit:
    return Edit("add", operand, layers, strength, span or Span())


def step(router: Router, batch: list[tuple[Request, int]], dtype: torch.dtype, pair: bool) -> None:
    """Run one step of random activations through every site and compare each row with the reference."""
    ids = [request.id for request, _ in batch]
    router.route(BatchView(ids, [tokens for _, tokens in batch], [request.computed for request, _ in batch]))
    rows = sum(tokens for _, tokens in batch)
    for layer in range(LAYERS):
        for point in reversed(POINTS):  # a layer's stream comes after what goes into it
            site = site_index(point, layer, LAYERS)
            hidden = torch.randn(rows, WIDTH).to(dtype) if pair else None
            residual = torch.randn(rows, WIDTH).to(dtype)
            before = residual.float() + (0 if hidden is None else hidden.float())
            run(router, site, hidden, residual)
            after = residual.float() + (0 if hidden is None else hidden.float())
            tolerance = 2e-4 if dtype == torch.float32 else 0.15
            expected = torch.cat([by_definition(router.bank, each, (point, layer), before, batch) for each in batch])
            torch.testing.assert_close(after, expected, atol=tolerance, rtol=tolerance)
    for request, tokens in batch:
        request.computed += tokens
        request.seen = max(request.seen, request.computed)


def by_definition(bank, each, where, before, batch) -> torch.Tensor:
    """The reference's activations of one request's rows."""
    (request, tokens), (point, layer) = each, where
    start = sum(count for other, count in batch[: [other for other, _ in batch].index(request)])
    x = before[start : start + tokens]
    if request.program is None:
        return x
    positions = range(request.computed, request.computed + tokens)
    intervals = request.program.intervals(request.prompt_len)
    active = torch.tensor([[any(a <= p < b for a, b in each) for each in intervals] for p in positions])
    residents = [None if edit.operand is None else bank.resident(edit.operand) for edit in request.program.edits]
    applied = apply_reference(x, request.program, active, bank, residents, point, layer, request.decisions)
    acted = request.acted.setdefault(site_index(point, layer, LAYERS), set())
    acted.update(
        (positions[row], edit) for row, edit in applied.acted.nonzero().tolist() if positions[row] >= request.seen
    )
    return applied.x


def assert_counts(router: Router, request: Request) -> None:
    assert request.program is not None
    counts = router.receipt(request.id)
    assert counts is not None
    for index, edit in enumerate(request.program.edits):
        sites = [site_index(edit.point, layer, LAYERS) for layer in edit.layers]
        expected = [sum(m == index for _, m in request.acted.get(site, ())) for site in sites]
        assert counts.touched[index].tolist() == expected, request.program


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), pair=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_mixed_batches_get_what_the_formulas_say(bank: Bank, seed: int, pair: bool, dtype: torch.dtype) -> None:
    """Chunked prompts, decodes, preemptions, unsteered requests and many programs in one batch; then steady decode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    router = router_for(bank)
    requests = [
        Request(f"r{index}", rng.randint(1, 9), None if index % 3 == 2 else random_program(rng, LAYERS, POINTS))
        for index in range(9)
    ]
    for request in requests:
        if request.program is not None:
            router.admit(request.id, request.program, request.id, None, request.prompt_len)
    for _ in range(12):
        chosen = rng.sample(requests, rng.randint(1, len(requests)))
        batch = [
            (
                each,
                rng.randint(1, max(each.seen, each.prompt_len) - each.computed)
                if each.computed < max(each.seen, each.prompt_len)
                else 1,
            )
            for each in chosen
        ]
        step(router, batch, dtype, pair)
        if rng.random() < 0.2:
            rng.choice(requests).computed = 0
    for request in requests:
        step(router, [(request, max(1, request.prompt_len - request.computed))], dtype, pair)
    for _ in range(3):
        step(router, [(request, 1) for request in requests], dtype, pair)
    for request in requests:
        if request.program is not None:
            assert_counts(router, request)


def test_a_recomputed_token_is_edited_again_but_counted_once(bank: Bank) -> None:
    router = router_for(bank)
    request = Request("r", 6, Program((add("vector-0"),)))
    router.admit("r", request.program, "receipt", None, 6)
    step(router, [(request, 6)], torch.float32, True)
    step(router, [(request, 1)], torch.float32, True)
    request.computed = 0  # preempted: everything runs again
    step(router, [(request, 8)], torch.float32, True)
    counts = router.receipt("receipt")
    assert counts is not None and counts.touched[0].tolist() == [8] * LAYERS


def test_tokens_that_the_prefix_cache_held_are_reported_apart(bank: Bank) -> None:
    router = router_for(bank)
    program = Program((add("vector-0", (0,)), add("vector-1", (0,), 1.0, Span(prompt=False))))
    request = Request("r", 6, program, computed=4)
    router.admit("r", program, "receipt", None, 6)
    step(router, [(request, 3)], torch.float32, True)
    counts = router.receipt("receipt")
    assert counts is not None
    assert counts.cached.tolist() == [4, 0] and [each.tolist() for each in counts.touched] == [[3], [1]]


def test_counts_of_finished_requests_add_up_under_one_receipt(bank: Bank) -> None:
    router = router_for(bank)
    program = Program((add("vector-0", (0,)),))
    requests = [Request(f"r{index}", 2, program) for index in range(3)]
    for request in requests:
        router.admit(request.id, program, "shared", None, 2)
    step(router, [(request, 2) for request in requests], torch.float32, True)
    router.release("r0")
    counts = router.receipt("shared")
    assert counts is not None and counts.touched[0].tolist() == [6]
    assert router.receipt("shared") is None


class Watched(torch.Tensor):
    """Notes how the numbers of a tensor, or of what is made of it, are brought to the host."""

    read: set[str] = set()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.read |= {func.__name__} & {"cpu", "numpy", "to", "item", "tolist", "__array__", "__bool__", "__int__"}
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_step_never_waits_for_what_the_device_counted(bank: Bank) -> None:
    """Neither where requests end, nor where one gives its row to another; only whoever asks for a receipt waits."""
    router = router_for(bank, max_requests=1)
    program = Program((add("vector-0", (0,)),))
    router.tables.counters = router.tables.counters.as_subclass(Watched)  # type: ignore[assignment]
    Watched.read.clear()
    for name in "abc":
        router.admit(name, program, "shared", None, 2)
    for name, tokens, position in [("a", 2, 0), ("b", 2, 0), ("a", 1, 2), ("c", 2, 0)]:
        router.route(BatchView([name], [tokens], [position]))
    for name in "abc":
        router.release(name)
    assert Watched.read == set()
    assert router.receipt("shared") is not None
    assert Watched.read != set()


def test_a_row_that_is_used_again_starts_from_zero(bank: Bank) -> None:
    router = router_for(bank, max_requests=1)
    for name in ("a", "b"):
        request = Request(name, 2, Program((add("vector-0", (0,)),)))
        router.admit(name, request.program, name, None, 2)
        step(router, [(request, 2)], torch.float32, True)
        counts = router.receipt(name)
        assert counts is not None and counts.touched[0].tolist() == [2]
        router.release(name)


def test_more_requests_can_be_known_than_run_at_once(bank: Bank) -> None:
    """A preempted request gives its row away, and finds its counts and its gate's decision when it runs again."""
    torch.manual_seed(0)
    router = router_for(bank, max_requests=2)
    gate = Edit("gate", "vector-0", (0,), condition=Condition("dot", 0.0, scope="sequence"))
    requests = [
        Request(f"r{index}", 2, Program((gate, replace(add("vector-1", (1,), float(index)), gate=0))))
        for index in range(7)
    ]
    for request in requests:
        router.admit(request.id, request.program, request.id, None, 2)
    for pair in [(0, 1), (2, 3), (4, 5), (6, 0), (1, 2), (3, 4), (5, 6), (0, 6)]:
        step(router, [(requests[n], 1 if requests[n].computed else 2) for n in pair], torch.float32, True)
    assert {request.decisions[0] for request in requests} == {True, False}
    for request in requests:
        assert_counts(router, request)
        router.release(request.id)
    with pytest.raises(RuntimeError, match="more than 2 steered requests"):
        for request in requests:
            router.admit(request.id, request.program, request.id, None, 2)
        step(router, [(request, 1) for request in requests], torch.float32, True)


def test_a_new_request_with_the_layout_of_a_finished_one_gets_its_own_edits(bank: Bank) -> None:
    router = router_for(bank, max_requests=1)
    for strength in (1.0, -1.0):
        request = Request("r", 1, Program((add("vector-0", (0,), strength),)))
        router.admit("r", request.program, "r", None, 1)
        step(router, [(request, 1)], torch.float32, True)
        router.release("r")


def test_nothing_is_done_for_unsteered_batches_and_after_clear(bank: Bank) -> None:
    router = router_for(bank)
    request = Request("r", 2, Program((add("vector-0", (1,)),)))
    router.admit("r", request.program, "r", None, 2)
    router.route(BatchView(["r"], [2], [0]))
    assert [work is not None for work in router.works] == [False, True] + [False] * (len(SITES) - 2)
    router.route(BatchView(["other"], [1], [0]))
    assert router.works == [None] * len(SITES)
    router.route(BatchView(["r"], [1], [2]))
    router.clear()
    assert router.works == [None] * len(SITES)
    router.route(BatchView(["r"], [1], [3]))
    router.release("r")
    router.route(BatchView(["other"], [1], [0]))
    assert router.works == [None] * len(SITES)


def test_a_request_whose_vector_is_not_resident_is_never_admitted(bank: Bank) -> None:
    router = router_for(bank)
    with pytest.raises(RuntimeError, match="bank has no"):
        router.admit("r", Program((add("absent", (0,)),)), "r", None, 1)
    bank.bind("partial", 0, WIDTH, [Piece(1, "vector", 0, (WIDTH,))])
    with pytest.raises(RuntimeError, match=r"no layers \[0\]"):
        router.admit("r", Program((add("partial", (0, 1)),)), "r", None, 1)


@pytest.mark.parametrize("keep", ["mean", "rows"])
@pytest.mark.parametrize("chunks", [[7], [3, 3, 1], [1] * 7])
def test_captures_gather_over_chunks_and_take_no_token_twice(bank: Bank, chunks: list[int], keep: str) -> None:
    router = router_for(bank)
    sites = (("mlp_out", 0), ("resid_post", 2))
    numbers = tuple(site_index(point, layer, LAYERS) for point, layer in sites)
    spec = CaptureSpec(sites, Span(generation=False, exclude_prompt_positions=(0,)), keep)
    capture = Capture(CaptureSpec.from_wire(spec.wire), numbers, 7)
    router.admit("r", None, "r", capture, 7)
    hidden, residual = torch.randn(len(SITES), 7, WIDTH), torch.randn(len(SITES), 7, WIDTH)
    position = 0
    for tokens in [*chunks, -5, 5]:  # at the end a preemption: five tokens run again
        if tokens < 0:
            position += tokens
            continue
        router.route(BatchView(["other", "r"], [2, tokens], [0, position]))
        for site in range(len(SITES)):
            work = router.works[site]
            assert work is None or site in numbers
            if work is not None:
                rows = slice(position, position + tokens)
                padding = torch.full((2, WIDTH), 99.0)
                addends = [torch.cat([padding, each[site, rows]]) for each in (hidden, residual)]
                run(router, site, *addends)
        position += tokens
    captured = router.captured("r")
    assert captured is not None
    for site in numbers:
        x, taken = (hidden + residual)[site, 1:], captured.at[site]
        assert taken.tokens == 6
        if keep == "rows":
            torch.testing.assert_close(torch.cat(taken.rows), x)
        else:
            torch.testing.assert_close(taken.total, x.sum(0))
            torch.testing.assert_close(taken.norm_total, x.norm(dim=1).sum())


def test_the_sequence_gate_holds_its_first_decision_over_a_preemption(bank: Bank) -> None:
    """Also at sites that ran before the decision: they stay closed for the last prompt token."""
    torch.manual_seed(0)
    for above in (True, False) * 8:
        condition = Condition("dot", 0.0, above, "sequence")
        gate = Edit("gate", "vector-0", (1,), condition=condition)
        edits = [Edit("add", "vector-1", (layer,), 1.0, gate=0) for layer in range(LAYERS)]
        request = Request("r", 4, Program((gate, *edits)))
        router = router_for(bank)
        router.admit("r", request.program, "r", None, 4)
        for tokens in (3, 1, 1, 1):
            step(router, [(request, tokens)], torch.float32, True)
        assert request.decisions[0] is not None
        request.computed = 0
        step(router, [(request, 7)], torch.float32, True)
        step(router, [(request, 1)], torch.float32, True)
        assert_counts(router, request)
        router.release("r")
        fresh = Request("r", 4, request.program)
        router.admit("r", fresh.program, "r", None, 4)
        step(router, [(fresh, 1)], torch.float32, True)
        assert not router.tables.decisions.any()


def test_identities_hold_bit_for_bit(bank: Bank) -> None:
    """Strength 0, an empty mask and a closed gate leave every bit; so does `set` to the value that is there."""
    closed = Edit("gate", "vector-0", (0,), condition=Condition("cosine", 2.0))
    x = torch.randn(3, WIDTH)
    start = (len(bank.data) - WIDTH) // WIDTH * WIDTH
    bank.data[start:] = 0
    bank.bind("empty", start, WIDTH, [Piece(0, "mask", 0, (WIDTH,))])
    programs = [
        *((Edit(opcode, operand, (0,), 0.0),) for opcode, operand in OPERAND_OF.items()),
        *((closed, Edit(opcode, operand, (0,), 3.0, gate=0)) for opcode, operand in OPERAND_OF.items()),
        (Edit("scale", "empty", (0,), 5.0),),
        (closed, Edit("set", "vector-0", (0,), gate=0)),
        (closed, Edit("renorm", None, (0,), gate=0)),
        (Edit("renorm", None, (0,)),),
        (Edit("add", "vector-0", (0,), 3.0, Span(prompt=False)),),
    ]
    for edits in programs:
        for pair in (True, False):
            hidden, residual = (x / 3 if pair else None), x.clone()
            router = router_for(bank)
            router.admit("r", Program(edits), "r", None, 3)
            router.route(BatchView(["r"], [3], [0]))
            run(router, 0, hidden, residual)
            assert torch.equal(residual, x), edits


def test_set_to_the_activation_itself_changes_no_bit() -> None:
    for pair in (True, False):
        hidden, residual = (torch.randn(1, WIDTH) if pair else None), torch.randn(1, WIDTH)
        bank = Bank(4 * WIDTH)
        packed = pack({0: {"vector": (residual if hidden is None else residual + hidden)[0].numpy()}})
        bank.write(0, packed.data.tobytes())
        bank.bind("own", 0, WIDTH, packed.pieces)
        router = router_for(bank)
        router.admit("r", Program((Edit("set", "own", (0,)),)), "r", None, 1)
        router.route(BatchView(["r"], [1], [0]))
        before = residual.clone()
        run(router, 0, hidden, residual)
        assert torch.equal(residual, before)


def test_a_dense_map_equals_its_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((WIDTH, 3), (3, WIDTH)))
    x, edited = torch.randn(5, WIDTH), []
    for tensors in ({"matrix": (left @ right).numpy()}, {"left": left.numpy(), "right": right.numpy()}):
        packed, bank, residual = pack({0: tensors}), Bank(8 * WIDTH), x.clone()
        bank.write(0, packed.data.tobytes())
        bank.bind("map", 0, WIDTH, packed.pieces)
        router = router_for(bank)
        router.admit("r", Program((Edit("map", "map", (0,), 0.5),)), "r", None, 5)
        router.route(BatchView(["r"], [5], [0]))
        run(router, 0, None, residual)
        edited.append(residual)
    assert not torch.allclose(edited[0], x)
    torch.testing.assert_close(edited[0], edited[1])
