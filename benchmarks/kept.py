"""Finished parts of a measurement, on disk: an interrupted run goes on behind them, and says how long the rest is."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Kept:
    """Parts by name, one JSON line each. What was measured with other options is in another file."""

    def __init__(self, folder: Path, script: str, options: Mapping[str, Any], parts: int) -> None:
        """`options` is all that decides what is measured, as JSON can hold it; `parts` how many there will be."""
        identity = json.dumps(dict(options), sort_keys=True, default=str)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{script}.{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
        self._parts, self._seconds = parts, list[float]()
        self._found: dict[str, Any] = {}
        whole = b""
        for line in self._file.read_bytes().splitlines(keepends=True) if self._file.exists() else ():
            if not line.endswith(b"\n"):
                break  # cut off by the end of the run that wrote it
            name, value = json.loads(line)
            self._found[name] = value
            whole += line
        self._file.write_bytes(whole)
        if self._found:
            print(f"{len(self._found)} of {parts} parts are there already: {self._file}", flush=True)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was kept under the name, or what `measure` returns, which is kept: as JSON gives it back."""
        if name not in self._found:
            started = time.monotonic()
            line = json.dumps([name, measure()])
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")
            self._found[name] = json.loads(line)[1]
            self._seconds.append(time.monotonic() - started)
            left = max(0, self._parts - len(self._found)) * sum(self._seconds) / len(self._seconds)
            print(
                f"{name}: {self._seconds[-1]:.1f} s; {len(self._found)} of {self._parts} parts, about "
                f"{left / 60:.1f} min left",
                flush=True,
            )
        return self._found[name]
