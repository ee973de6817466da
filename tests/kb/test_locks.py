"""Who goes first."""

from __future__ import annotations

import threading
import time

from kb.locks import Turns


def test_a_turn_goes_to_those_that_go_first_whoever_waited_longer() -> None:
    turns = Turns()
    order: list[str] = []

    def take(name: str, first: bool) -> None:
        with turns.taken(first=first):
            order.append(name)

    with turns.taken(first=False):
        threads = []
        for name, first in (("document", False), ("query", True), ("another query", True)):
            threads.append(threading.Thread(target=take, args=(name, first)))
            threads[-1].start()
            while sum(turns.waiting.values()) < len(threads):
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(30)
    assert set(order[:2]) == {"query", "another query"} and order[2] == "document"
    assert turns.waiting == {True: 0, False: 0}
