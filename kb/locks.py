"""A lock that many threads may hold to read, or one to write; and turns, in which some go first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """A writer that waits keeps new readers out, so that a stream of searches can't hold off a change."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers_waiting = 0
        self._writing = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
            finally:
                self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class Turns:
    """One thread at a time. Those that go first wait only for the turn under way, the others for all of those."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self.waiting = {True: 0, False: 0}
        """How many wait, of those that go first and of the others."""

    @contextmanager
    def taken(self, *, first: bool) -> Iterator[None]:
        with self._changed:
            self.waiting[first] += 1
            try:
                self._changed.wait_for(lambda: not self._taken and (first or not self.waiting[True]))
            finally:
                self.waiting[first] -= 1
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
