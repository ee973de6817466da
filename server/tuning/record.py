"""What a sweep has measured, on disk as JSON lines, so that it goes on where it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering_store.tuning import Scores


class Record:
    """A file of points. `identity` is everything that decides what is measured: another one begins anew."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._found: dict[str, Scores] = {}
        whole = self._read(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if whole else "wb") as file:
            # A line that was cut off would swallow the next one.
            file.truncate(whole)
        if not whole:
            self._append({"identity": identity})

    def get(self, options: dict[str, Any], layers: Sequence[int], strength: float) -> Scores | None:
        """What was measured at a point, if it was."""
        return self._found.get(_key(options, layers, strength))

    def add(self, options: dict[str, Any], layers: Sequence[int], strength: float, scores: Scores) -> None:
        """Keep a point; it is on disk when this returns."""
        self._found[_key(options, layers, strength)] = scores
        place = {"options": options, "layers": list(layers), "strength": strength}
        self._append(place | scores.model_dump(exclude_none=True))

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, identity: str) -> int:
        """The number of bytes that hold whole lines of this identity; 0 where the file is another's, or not there."""
        if not self._path.exists():
            return 0
        lines = self._path.read_bytes().splitlines(keepends=True)
        if not lines or not lines[0].endswith(b"\n") or json.loads(lines[0]) != {"identity": identity}:
            return 0
        whole = len(lines[0])
        for line in lines[1:]:
            if not line.endswith(b"\n"):
                break
            fields = json.loads(line)
            place = [fields.pop(name) for name in ("options", "layers", "strength")]
            self._found[_key(*place)] = Scores.model_validate(fields)
            whole += len(line)
        return whole


def _key(options: dict[str, Any], layers: Sequence[int], strength: float) -> str:
    return json.dumps([options, list(layers), float(strength)], sort_keys=True)
