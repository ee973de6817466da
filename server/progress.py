"""Says how far a long job is: a bar on a terminal, a line per tenth elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass
class Reporter:
    """Steps and progress for a person who waits."""

    console: Console = field(default_factory=lambda: Console(file=sys.stderr, highlight=False))
    started: float = field(default_factory=time.monotonic)

    def step(self, text: str) -> None:
        self.console.print(f"[{time.monotonic() - self.started:5.1f} s] {text}", markup=False)

    def progress(self, name: str) -> Callable[[int, int], None]:
        """A callback that takes (done, total)."""
        if not self.console.is_terminal:
            return self._lines(name)
        bar = Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console)
        task = bar.add_task(name)

        def show(done: int, total: int) -> None:
            if done == 0:
                bar.start()
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.stop()

        return show

    def _lines(self, name: str) -> Callable[[int, int], None]:
        def show(done: int, total: int) -> None:
            if done % max(total // 10, 1) == 0 or done == total:
                self.step(f"{name}: {done}/{total}")

        return show
