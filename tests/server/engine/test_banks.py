from __future__ import annotations

import numpy as np
import pytest

from server.engine.banks import Bank
from server.engine.operands import pack


def filled(numbers: int, width: int = 4, ranks: tuple[int, int] = (0, 1)) -> Bank:
    """A bank that holds `a`: a vector of each of layers 0 and 2, [0, 1, ...] and [width, width + 1, ...]."""
    bank = Bank(numbers)
    operand = pack({layer: {"vector": np.arange(width) + start} for layer, start in ((0, 0), (2, width))})
    bank.write(width, operand.data.tobytes())
    bank.bind("a", width, width, operand.pieces, ranks)
    return bank


def test_operand_is_read_where_it_was_written() -> None:
    bank = filled(16)
    resident = bank.resident("a")
    assert (resident.width, resident.layers) == (4, {0, 2})
    assert bank.tensor(*resident.pieces[2, "vector"]).tolist() == [4, 5, 6, 7]
    assert bank.rows(4)[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_keeps_its_part_of_the_rows_of_a_split_point(rank: int) -> None:
    bank = filled(16, ranks=(rank, 2))
    first, shape = bank.resident("a").pieces[2, "vector"]
    assert bank.tensor(first, shape)[:2].tolist() == [4 + 2 * rank, 5 + 2 * rank]


def test_dropped_operand_is_never_read() -> None:
    bank = filled(16)
    bank.drop("a")
    with pytest.raises(RuntimeError, match="bank has no 'a'"):
        bank.resident("a")


@pytest.mark.parametrize("start", [-1, 13])
def test_writing_outside_the_bank_is_refused(start: int) -> None:
    with pytest.raises(IndexError, match="outside the bank of 16"):
        Bank(16).write(start, np.ones(4, np.float32).tobytes())


def test_operand_off_its_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of its width"):
        Bank(16).bind("a", 2, 4, pack({0: {"vector": np.ones(4, np.float32)}}).pieces)
