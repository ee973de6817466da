from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.bank_directory import BankDirectory, Grant, OperandsMissing, Refusal, Want


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def want(key: str, numbers: int = 10, width: int = 1) -> Want:
    return Want(key, "resid_post", width, numbers)


def reserve(directory: BankDirectory, *wants: Want) -> Grant | Refusal | ValueError:
    (answer,) = directory.reserve([wants])
    return answer


def load(directory: BankDirectory, *wants: Want) -> list[str]:
    """Reserve and upload; returns what was evicted."""
    answer = reserve(directory, *wants)
    assert isinstance(answer, Grant)
    for key, serial in answer.uploads.items():
        assert not isinstance(directory.run(key, serial), str)
        directory.loaded(key)
    return answer.evicted


def use(directory: BankDirectory, *keys: str) -> None:
    directory.take(keys)
    directory.release(keys)


def test_the_least_recently_used_makes_room() -> None:
    directory = BankDirectory(30)
    for key in "abc":
        load(directory, want(key))
        use(directory, key)
    use(directory, "a")
    assert load(directory, want("d")) == ["b"]


def test_one_in_use_stays_and_a_request_that_it_leaves_no_room_for_is_refused() -> None:
    directory = BankDirectory(20)
    load(directory, want("a"), want("b"))
    directory.take(["a", "b"])
    assert reserve(directory, want("c")) == Refusal(never=False, needed=40, in_use=80, budget=80)
    directory.release(["b"])
    assert load(directory, want("c")) == ["b"]


def test_operands_of_a_request_that_lie_in_its_own_way_are_uploaded_anew() -> None:
    directory = BankDirectory(10)
    for each in (want("a", 4), want("b", 2), want("c", 4)):
        load(directory, each)
        use(directory, each.key)
    assert sorted(load(directory, want("b", 2), want("d", 8))) == ["a", "b", "c"]
    directory.take(["b", "d"])
    directory.release(["b", "d"])
    load(directory, want("c", 8))
    directory.take(["b"])
    assert isinstance(reserve(directory, want("b", 2), want("e", 9)), Refusal), "one in use is never moved"


def test_room_is_promised_for_all_operands_or_for_none() -> None:
    directory = BankDirectory(20)
    load(directory, want("a"))
    directory.take(["a"])
    assert isinstance(reserve(directory, want("b"), want("c")), Refusal)
    assert isinstance(reserve(directory, want("a"), want("b")), Grant)


def test_operands_that_fit_into_no_bank_are_never_promised() -> None:
    answers = BankDirectory(20).reserve([[want("a", 21)], [want("b"), want("c"), want("d")], [want("e", 18, width=7)]])
    assert [isinstance(answer, Refusal) and answer.never for answer in answers] == [True, True, False]
    assert answers[1] == Refusal(never=True, needed=120, in_use=0, budget=80)


def test_holes_are_made_where_one_is_wide_enough() -> None:
    """Of the idle ones the two oldest don't lie side by side; the first that make a hole go, and only they."""
    directory = BankDirectory(40)
    for key in "abcd":
        load(directory, want(key))
        directory.take([key])
    for key in "acd":
        directory.release([key])
    assert load(directory, want("wide", 20)) == ["c", "d"]
    directory.release(["b"])
    use(directory, "a", "b")


def test_every_row_starts_at_a_multiple_of_its_width() -> None:
    directory = BankDirectory(40)
    load(directory, want("a", 10))
    answer = reserve(directory, want("b", 14, width=7))
    assert isinstance(answer, Grant)
    assert directory.run("b", answer.uploads["b"]) == (want("b", 14, width=7), 14)


def test_the_freshly_uploaded_waits_for_its_request() -> None:
    clock = Clock()
    directory = BankDirectory(10, clock)
    load(directory, want("a"))
    assert isinstance(reserve(directory, want("b")), Refusal)
    use(directory, "a")
    assert load(directory, want("b")) == ["a"]
    clock.now = 1
    assert isinstance(reserve(directory, want("c")), Refusal)
    clock.now = 2
    assert load(directory, want("c")) == ["b"], "its request never came"


def test_request_whose_operands_are_there_is_waited_for() -> None:
    clock = Clock()
    directory = BankDirectory(10, clock)
    load(directory, want("a"))
    clock.now = 1.5
    assert reserve(directory, want("a")) == Grant({}, [])
    clock.now = 3
    assert isinstance(reserve(directory, want("b")), Refusal)
    clock.now = 3.5
    assert isinstance(reserve(directory, want("b")), Grant)


def test_an_operand_waits_for_the_upload_of_its_requests_other_ones() -> None:
    clock = Clock()
    directory = BankDirectory(20, clock)
    load(directory, want("a"))
    assert isinstance(reserve(directory, want("a"), want("b")), Grant)
    clock.now = 9
    assert isinstance(reserve(directory, want("c")), Refusal)


def test_an_upload_that_nobody_goes_on_with_loses_its_place() -> None:
    clock = Clock()
    directory = BankDirectory(10, clock)
    answer = reserve(directory, want("a"))
    assert isinstance(answer, Grant)
    clock.now = 9
    assert directory.run("a", answer.uploads["a"]) == (want("a"), 0)
    clock.now = 18
    assert isinstance(reserve(directory, want("b")), Refusal)
    clock.now = 19
    assert load(directory, want("b")) == ["a"]
    assert directory.run("a", answer.uploads["a"]) == "lost"
    directory.take(["b"])


def test_a_promise_that_was_lost_does_not_count_for_the_next_one() -> None:
    """What was written for the first isn't where the second is."""
    clock = Clock()
    directory = BankDirectory(10, clock)
    first = reserve(directory, want("a"))
    clock.now = 20
    load(directory, want("b"))
    use(directory, "b")
    second = reserve(directory, want("a"))
    assert isinstance(first, Grant) and isinstance(second, Grant)
    assert directory.run("a", first.uploads["a"]) == "lost"
    assert directory.run("a", second.uploads["a"]) == (want("a"), 0)


def test_two_uploaders_of_one_operand_share_its_place() -> None:
    directory = BankDirectory(10)
    first, second = (reserve(directory, want("a")) for _ in range(2))
    assert first == second and isinstance(first, Grant)
    directory.loaded("a")
    assert directory.run("a", first.uploads["a"]) == "loaded"
    assert reserve(directory, want("a")) == Grant({}, [])


def test_request_without_its_operands_is_told_which_and_holds_none() -> None:
    directory = BankDirectory(20)
    load(directory, want("a"))
    reserve(directory, want("b"))
    with pytest.raises(OperandsMissing) as error:
        directory.take(["a", "b", "c"])
    assert error.value.keys == ["b", "c"]
    use(directory, "a")
    assert load(directory, want("d")) == ["a"]


@pytest.mark.parametrize("bad", [want("a", 0), want("a", 3, width=4), want("a", 4, width=0)])
def test_what_can_be_no_operand_is_refused_alone(bad: Want) -> None:
    error, grant = BankDirectory(20).reserve([[want("b"), bad], [want("c")]])
    assert isinstance(error, ValueError) and "is no operand" in str(error)
    assert isinstance(grant, Grant)


def test_one_key_has_one_operand() -> None:
    directory = BankDirectory(30)
    load(directory, want("a"))
    answers = directory.reserve([[want("b"), want("a", 11)], [want("b"), want("b", 11)], [want("b")]])
    assert [str(answer)[-30:] for answer in answers[:2]] == [f"{want('a')}"[-30:], "an operand is named twice"[-30:]]
    assert isinstance(answers[2], Grant)


def test_many_that_wait_for_the_same_much_are_answered_by_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = BankDirectory(10)
    load(directory, want("a"))
    directory.take(["a"])
    searches = []
    original = directory._place
    monkeypatch.setattr(directory, "_place", lambda *args: searches.append(args) or original(*args))
    answers = directory.reserve([[want("b")], [want("c")], [want("a")], [want("d"), want("e", 4)]])
    assert [type(answer) for answer in answers] == [Refusal, Refusal, Grant, Refusal]
    assert len(searches) == 2


NUMBERS = 40
WANTS = {
    f"{numbers}/{width}/{copy}": Want(f"{numbers}/{width}/{copy}", "resid_post", width, numbers)
    for numbers, width in ((4, 2), (6, 3), (10, 5), (10, 10), (16, 4), (21, 7), (40, 8))
    for copy in range(3)
}
KEYS = st.lists(st.sampled_from(sorted(WANTS)), min_size=1, max_size=3, unique=True)


class Banked(RuleBasedStateMachine):
    """Random uploads and requests. `arena` says which operand's number lies where, as a worker's bank would."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.directory = BankDirectory(NUMBERS, self.clock)
        self.arena: list[str | None] = [None] * NUMBERS
        self.promised: list[tuple[str, int]] = []
        self.bound: set[str] = set()
        self.running: list[list[str]] = []

    @rule(keys=KEYS)
    def ask(self, keys: list[str]) -> None:
        held = {key for request in self.running for key in request}
        (answer,) = self.directory.reserve([[WANTS[key] for key in keys]])
        assert not isinstance(answer, ValueError)
        if isinstance(answer, Refusal):
            assert answer.needed == 4 * sum(WANTS[key].numbers for key in keys)
            assert answer.in_use <= answer.budget == 4 * NUMBERS
            return
        assert not held & set(answer.evicted)
        # Its own that lie in its way are uploaded anew, elsewhere.
        assert set(keys) & set(answer.evicted) <= set(answer.uploads)
        self.bound -= set(answer.evicted)
        assert set(answer.uploads) == set(keys) - self.bound
        self.promised += answer.uploads.items()

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def write_a_part(self, data: st.DataObject) -> None:
        """An uploader may be late, and write at any time what it was promised at any time before."""
        key, serial = data.draw(st.sampled_from(self.promised))
        place = self.directory.run(key, serial)
        if isinstance(place, tuple):
            found, start = place
            assert start % found.width == 0
            first = data.draw(st.integers(0, found.numbers - 1))
            self.arena[start + first : start + found.numbers] = [key] * (found.numbers - first)

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key, serial = data.draw(st.sampled_from(self.promised))
        place = self.directory.run(key, serial)
        if isinstance(place, tuple):
            found, start = place
            self.arena[start : start + found.numbers] = [key] * found.numbers
            self.directory.loaded(key)
            self.bound.add(key)

    @rule(keys=KEYS)
    def start(self, keys: list[str]) -> None:
        try:
            self.directory.take(keys)
        except OperandsMissing as error:
            assert set(error.keys) == set(keys) - self.bound
        else:
            assert set(keys) <= self.bound
            self.running.append(keys)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.directory.release(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @rule(seconds=st.sampled_from([1.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def nobody_overlaps(self) -> None:
        runs = sorted((run.start, run.end) for run in self.directory._runs.values())
        assert all(0 <= start < end <= NUMBERS for start, end in runs)
        assert all(end <= start for (_, end), (start, _) in zip(runs, runs[1:], strict=False))

    @invariant()
    def what_is_bound_is_there_in_full(self) -> None:
        for key in self.bound:
            run = self.directory._runs[key]
            assert self.arena[run.start : run.end] == [key] * WANTS[key].numbers

    def teardown(self) -> None:
        """When all have left, there is room for everything that ever fits."""
        for keys in self.running:
            self.directory.release(keys)
        for key in WANTS:
            self.clock.now += 20
            (answer,) = self.directory.reserve([[WANTS[key]]])
            assert isinstance(answer, Grant)


TestBanked = Banked.TestCase
TestBanked.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
