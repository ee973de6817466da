"""What holds a server up, looked at four times a second: the machine, the server's event loop, or pages from the disk.

A thread that only sleeps wakes late where the machine stands still or is taken by others. `/livez` needs neither the
model nor the disk: it is slow where the event loop is. A major fault is a page of a program or a file that had to be
read from the disk, since the system had taken it away.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

EVERY = 0.25
LONG = 0.5
"""Seconds from which on something counts as held up."""


class Look(NamedTuple):
    at: float
    late: float
    """Seconds that the thread slept longer than it wanted to."""
    livez: float
    """Seconds that the answer took."""
    faults: int
    """Major faults of the server and its children since the look before."""


class Stalls(threading.Thread):
    """Looks until `stop`, from a thread of its own. `looks` are by time.monotonic()."""

    def __init__(self, url: str, pid: int) -> None:
        super().__init__(daemon=True)
        self.looks: list[Look] = []
        self._url, self._server = url, psutil.Process(pid)
        self._stopped = threading.Event()
        self._failed: Exception | None = None

    def run(self) -> None:
        try:
            self._look()
        except Exception as error:
            self._failed = error

    def _look(self) -> None:
        with httpx.Client(base_url=self._url, timeout=300, trust_env=False) as client:
            before = self._faults()
            while not self._stopped.is_set():
                at = time.monotonic()
                time.sleep(EVERY)
                woken = time.monotonic()
                client.get("/livez").raise_for_status()
                answered, faults = time.monotonic(), self._faults()
                self.looks.append(Look(at, woken - at - EVERY, answered - woken, max(0, faults - before)))
                before = faults

    def stop(self) -> None:
        """Raises what a look failed with: what wasn't seen isn't told from what wasn't there."""
        self._stopped.set()
        self.join()
        if self._failed is not None:
            raise self._failed

    def held_up(self, begin: float, end: float) -> list[dict[str, float]]:
        """The looks in that time at which something took long, with seconds from `begin`."""
        return [
            {
                "second": round(each.at - begin, 1),
                "late": round(each.late, 2),
                "livez": round(each.livez, 2),
                "major_faults": each.faults,
            }
            for each in self.looks
            if begin <= each.at < end and max(each.late, each.livez) > LONG
        ]

    def _faults(self) -> int:
        return sum(_major_faults(each.pid) for each in [self._server, *self._server.children(recursive=True)])


def _major_faults(pid: int) -> int:
    """Of a process of Linux since its start; 0 for one that has ended."""
    try:
        # Behind the name, which may have spaces and brackets in it, the tenth field (proc(5)).
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[9])
    except (FileNotFoundError, ProcessLookupError):
        return 0
