"""Facts as lines of JSON, from a stream of any length in constant memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kb.collection import Collection, Encode
from kb.errors import DuplicateId, FactTooLarge, InvalidFact, KbError
from kb.facts import FactDraft, parse_draft
from kb.upserts import Outcome

MAX_FACT_BYTES = 128 << 10
BATCH_FACTS, BATCH_BYTES = 500, 4 << 20
MAX_ERRORS = 100


class LineOutcome(NamedTuple):
    """What became of the fact on a line; the first line is 1."""

    line: int
    outcome: Outcome


@dataclass
class Summary:
    """Of an import so far: facts by what became of them, and the first `MAX_ERRORS` errors."""

    lines: int = 0
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    superseded: int = 0
    failed: int = 0
    errors: list[LineOutcome] = field(default_factory=list)

    def add(self, result: LineOutcome) -> None:
        outcome = result.outcome
        if outcome.status == "error":
            self.failed += 1
            if len(self.errors) < MAX_ERRORS:
                self.errors.append(result)
            return
        setattr(self, outcome.status, getattr(self, outcome.status) + 1)
        self.superseded += len(outcome.supersedes)


class Importer:
    """Takes the pieces of a stream and writes its facts, some hundred to a transaction.

    A line that is at fault gets an error, and the others are written. A full disk ends the import with KbFull: what
    `feed` returned before is kept, and `summary` counts it. Close it at the end.
    """

    def __init__(self, collection: Collection, encode: Encode | None, max_fact_bytes: int = MAX_FACT_BYTES) -> None:
        self.summary = Summary()
        self._collection, self._encode, self._max = collection, encode, max_fact_bytes
        self._rest = b""
        self._skipping = False
        self._batch: list[tuple[int, FactDraft | KbError]] = []
        self._batch_bytes = 0
        self._seen = _SeenIds()

    def feed(self, piece: bytes) -> list[LineOutcome]:
        """Raises KbError where nothing more can be written."""
        results: list[LineOutcome] = []
        for line in self._lines(piece):
            self._take(line)
            if len(self._batch) >= BATCH_FACTS or self._batch_bytes >= BATCH_BYTES:
                results += self._write()
        return results

    def finish(self) -> list[LineOutcome]:
        """The end of the stream: the last line may lack its line break, but not its end."""
        rest, self._rest = self._rest, b""
        if rest and not self._skipping:
            self._take(rest)
            number, last = self._batch[-1] if self._batch else (0, None)
            if isinstance(last, InvalidFact) and last.param is None:
                cut_off = InvalidFact(f"the stream ends in the middle of a line; send the whole line ({last.message})")
                self._batch[-1] = (number, cut_off)
        return self._write()

    def close(self) -> None:
        self._seen.close()

    def _lines(self, piece: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if self._skipping:
                # The rest of a line that was refused when it grew too long.
                self._skipping = False
                continue
            yield line
        if len(self._rest) > self._max:
            if not self._skipping:
                yield self._rest
            self._skipping, self._rest = True, b""

    def _take(self, line: bytes) -> None:
        self.summary.lines += 1
        if not line.strip():
            return
        number = self.summary.lines
        self._batch.append((number, self._parsed(line, number)))
        self._batch_bytes += min(len(line), self._max)

    def _parsed(self, line: bytes, number: int) -> FactDraft | KbError:
        if len(line) > self._max:
            return FactTooLarge(f"a fact has more than {self._max} bytes; make it shorter, or split it")
        try:
            draft = parse_draft(line)
            if draft.id is not None:
                self._seen.add(draft.id, number)
            return draft
        except (InvalidFact, DuplicateId) as exc:
            return exc

    def _write(self) -> list[LineOutcome]:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        good = [(number, draft) for number, draft in batch if isinstance(draft, FactDraft)]
        written = self._collection.upsert([draft for _, draft in good], encode=self._encode, each=True) if good else []
        outcomes = dict(zip((number for number, _ in good), written, strict=True))
        results = [
            LineOutcome(number, outcomes[number] if isinstance(each, FactDraft) else Outcome(None, "error", error=each))
            for number, each in batch
        ]
        for result in results:
            self.summary.add(result)
        return results


class _SeenIds:
    """Which ids a stream had, and where; in a file that SQLite keeps for itself, so that memory doesn't grow."""

    def __init__(self) -> None:
        # Threads take turns with an importer.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def add(self, id: str, line: int) -> None:
        """Raises DuplicateId."""
        added = self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (id, line)).rowcount
        if not added:
            first = self._db.execute("SELECT line FROM seen WHERE id = ?", (id,)).fetchone()[0]
            raise DuplicateId(f"id {id!r} came before, on line {first}; send each fact once", "id")

    def close(self) -> None:
        self._db.close()
