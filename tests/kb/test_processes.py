"""Several processes on one folder: what one was told is written, every other finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kb.knowledge_base import KnowledgeBase
from tests.kb.ngrams import Ngrams

ROOT = Path(__file__).parents[2]
PROCESSES = 4

# Each process does what it reads, a line of JSON, and answers with a line.
CHILD = """
import json, sys
from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from tests.kb.ngrams import Ngrams

encoder = Ngrams()
collection = KnowledgeBase.open(sys.argv[1]).collection("facts")
for line in sys.stdin:
    action, id, text = json.loads(line)
    if action == "upsert":
        (outcome,) = collection.upsert([FactDraft(id=id, text=text)], encode=encoder.encode_documents)
        answer = outcome.version
    elif action == "delete":
        answer = collection.delete([id]).facts
    elif action == "snapshot":
        answer = collection.snapshot()["last_seq"]
    else:
        hits = collection.search(encoder.encode_queries([text]), 1)[0]
        answer = [[hit.fact.id, hit.fact.text] for hit in hits if hit.score > 0.999]
    print(json.dumps(answer), flush=True)
"""


def start(folder: Path, script: str = CHILD, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], action: str, id: str = "", text: str = "") -> object:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([action, id, text]) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def test_every_process_reads_what_any_other_was_told_is_written(tmp_path: Path) -> None:
    KnowledgeBase.open(tmp_path).create("facts", Ngrams().identity)
    processes = [start(tmp_path) for _ in range(PROCESSES)]
    for number in range(48):
        writer, *readers = (processes[(number + shift) % PROCESSES] for shift in range(PROCESSES))
        id = f"f{number % 7}"
        text = f"the text that number {number} has"
        assert ask(writer, "upsert", id, text)
        assert [ask(reader, "query", text=text) for reader in readers] == [[[id, text]]] * (PROCESSES - 1)
        if number % 3 == 0:
            assert ask(readers[0], "delete", id) == 1
            assert [ask(each, "query", text=text) for each in processes] == [[]] * PROCESSES
        if number % 10 == 0:
            assert ask(readers[1], "snapshot")
    for process in processes:
        process.communicate()
        assert process.returncode == 0


WRITE_MANY = """
import sys
from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from tests.kb.ngrams import Ngrams

collection, _ = KnowledgeBase.open(sys.argv[1]).create("facts", Ngrams().identity)
for number in range(40):
    drafts = [FactDraft(id=f"own-{sys.argv[2]}-{number}", text=f"{sys.argv[2]} {number}"),
              FactDraft(id="shared", text=f"shared {sys.argv[2]} {number}"),
              FactDraft(text=f"common {number}")]
    collection.upsert(drafts, encode=Ngrams().encode_documents)
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    # They also race to make the database and the collection.
    processes = [start(tmp_path, WRITE_MANY, str(number)) for number in range(PROCESSES)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    collection = KnowledgeBase.open(tmp_path).collection("facts")
    facts = collection.facts(limit=1000).facts
    assert {fact.id for fact in facts} > {f"own-{own}-{n}" for own in range(PROCESSES) for n in range(40)}
    assert len(facts) == PROCESSES * 40 + 1 + 40, "a fact with the same content is the same fact"
    history = collection.history("shared")
    assert [fact.version for fact in history] == list(range(1, PROCESSES * 40 + 1))
    seqs = [fact.seq for fact in facts] + [fact.seq for fact in history[:-1]]
    assert len(set(seqs)) == len(seqs) == collection.stats().last_seq
