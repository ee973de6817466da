"""What faults do to a running server under load, and that it recovers without hands, having lost nothing.

A supervisor starts `polyhelm serve` again whenever it ends, as a container runtime does. Clients complete steered and
unsteered prompts all the time, and writers publish artifacts, move an alias and upload facts, and remember what was
acknowledged. Then, one after the other: kill -9 of the worker, of the engine core, of the API process; a full disk (a
tmpfs of 512 MiB for all data, where this may be mounted); a store that is read-only (a bind mount); databases that
another process locks; a corrupt blob; a clock that jumps an hour ahead and back (with --clock, which compiles
clock_shift.c with cc). After each fault the server must become ready by itself, answer as before, and know all that it
has ever acknowledged, as it was acknowledged; and until then nobody may get another status than the fault explains.
Writes results/faults.json; exits with 1 where that isn't so.

    .venv/bin/python benchmarks/faults.py --data-dir FOLDER --models polyhelm-data/models [--clock]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from environment import environment
from replicas_check import publish

RESULTS = Path(__file__).parent / "results" / "faults.json"
COLLECTION, ALIAS = "/v1/kb/collections/faults", "/v1/artifacts/first/aliases/live"
PROMPT, TOKENS = "The weather today is", 16
FAULT_SECONDS, READY_SECONDS = 6.0, 600.0
CLIENTS = 4
GONE = {"ConnectError", "ReadError", "RemoteProtocolError"}
"""What clients see of a server that isn't there, or ends in the middle."""


class Outcome(NamedTuple):
    """What may be answered while a fault lasts, and what must be seen of it."""

    completions: set[str]
    writes: set[str]
    must: set[str] = set()
    """Of both together, one at least."""


DIES = Outcome({"200", "500", *GONE}, {"200", "201", *GONE}, GONE)
OUTCOMES = {
    "kill -9 of the worker": DIES,
    "kill -9 of the engine core": DIES,
    "kill -9 of the API process": DIES,
    "full disk": Outcome({"200", "507"}, {"200", "201", "507"}, {"507"}),
    "read-only store": Outcome({"200"}, {"200", "201", "503"}, {"503"}),
    "locked databases": Outcome({"200"}, {"200", "201", "503"}),
    "clock an hour ahead, and back": Outcome({"200"}, {"200", "201"}),
}


class Supervisor:
    """Starts the server again whenever it ends, until `end`."""

    def __init__(self, command: list[str], variables: dict[str, str], log: Path) -> None:
        self._command, self._variables, self._log = command, os.environ | variables, log
        self.exits: list[int] = []
        self._ending = False
        self.process = self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, env=self._variables, stdout=log, stderr=log, start_new_session=True)

    def _watch(self) -> None:
        while True:
            self.exits.append(self.process.wait())
            if self._ending:
                return
            time.sleep(0.5)
            self.process = self._start()

    def family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def named(self, name: str) -> psutil.Process:
        found = [each for each in self.family() if name in " ".join([each.name(), *each.cmdline()])]
        if not found:
            raise SystemExit(f"the server has no process named {name}")
        return found[-1]

    def kill(self) -> None:
        self._ending = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        self._ending = True
        self.process.send_signal(signal.SIGTERM)
        self._thread.join(60)
        return self.exits[-1]


class Load:
    """Clients that never stop. `facts` (id to text), `artifacts` (name to digest) and `moves` of the alias (numbers, in
    order) are what the server has said is written.
    """

    def __init__(self, url: str, model: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._model = model
        self.asked: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.facts: dict[str, str] = {}
        self.artifacts: dict[str, str] = {}
        self.moves: list[int] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(CLIENTS)]
        self._threads.append(threading.Thread(target=self._write, daemon=True))
        for each in self._threads:
            each.start()

    def completion(self, strength: float | None) -> httpx.Response:
        body: dict[str, Any] = {"model": self._model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        if strength is not None:
            body["steering"] = {"interventions": [{"artifact": "first@1", "strength": strength}]}
        return self._client.post("/v1/completions", json=body)

    def counted(self, counter: Counter[str], ask: Callable[[], httpx.Response]) -> Any:
        """The body of an answer of 200 or 201; else None."""
        try:
            answer = ask()
        except httpx.HTTPError as error:
            counter[type(error).__name__] += 1
            time.sleep(0.2)
            return None
        counter[str(answer.status_code)] += 1
        return answer.json() if answer.status_code in (200, 201) else None

    def _ask(self, number: int) -> None:
        while not self._ending.is_set():
            self.counted(self.asked, lambda: self.completion((None, 0.5)[number % 2]))

    def _write(self) -> None:
        number = 0
        while not self._ending.is_set():
            number += 1
            fact = {"id": f"f{number}", "text": f"fact {number}", "embedding": [1.0, number / 1000, 0.5, 0.25]}
            if self.counted(self.written, lambda f=fact: self._client.put(f"{COLLECTION}/facts", json=[f])):
                self.facts[f"f{number}"] = f"fact {number}"
            if number % 5 == 0:
                name = f"made-{number}"
                if published := self.counted(self.written, lambda n=name: self._publish(n)):
                    self.artifacts[name] = published["digest"]
                target = {"version": 1 + number // 5 % 2, "reason": str(number)}
                # Where it points there already, the answer is the move that did it.
                if moved := self.counted(self.written, lambda t=target: self._client.put(ALIAS, json=t)):
                    self.moves.append(int(moved["reason"]))
            time.sleep(0.05)

    def _publish(self, name: str) -> httpx.Response:
        try:
            return publish(self._client, name, len(self.artifacts))
        except (KeyError, ValueError) as error:  # capabilities that are an error
            raise httpx.HTTPError(str(error)) from error

    def lost(self) -> list[str]:
        """What was acknowledged and isn't there, or isn't what it was."""
        gone = []
        for id, text in list(self.facts.items()):
            found = self._client.get(f"{COLLECTION}/facts/{id}")
            gone += [] if found.status_code == 200 and found.json()["text"] == text else [f"fact {id}"]
        for name, digest in list(self.artifacts.items()):
            found = self._client.get(f"/v1/artifacts/{name}/versions/1")
            gone += [] if found.status_code == 200 and found.json()["digest"] == digest else [f"artifact {name}"]
        acknowledged = list(self.moves)
        recorded = {int(each["reason"]) for each in self._history() if each["action"] == "set_alias"}
        gone += [f"move {each} of the alias" for each in acknowledged if each not in recorded]
        points = int(self._client.get(ALIAS).json()["reason"]) if acknowledged else 0
        return gone + (["the alias points back"] if acknowledged and points < acknowledged[-1] else [])

    def _history(self) -> Iterator[dict[str, Any]]:
        """All that the alias has been through, page by page."""
        after, more = 0, True
        while more:
            page = self._client.get("/v1/artifacts/first/history", params={"alias": "live", "after": after}).json()
            yield from page["data"]
            after, more = page["last_id"], page["has_more"]

    def end(self) -> None:
        self._ending.set()
        for each in self._threads:
            each.join(90)


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.data: Path = options.data_dir
        mount = ["mount", "-t", "tmpfs", "-o", "size=512m", "polyhelm-faults", str(self.data)]
        self._mounted = subprocess.run(mount, capture_output=True).returncode == 0
        (self.data / "models").symlink_to(options.models.resolve())
        self.url = f"http://127.0.0.1:{options.port}"
        self.clock = self.data / "clock"
        self.clock.write_text("0\n")
        variables = {"HF_HUB_OFFLINE": "1"}
        if options.clock:
            library = self.data / "clock_shift.so"
            source = str(Path(__file__).with_name("clock_shift.c"))
            subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), source, "-ldl"], check=True)
            variables |= {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(self.clock)}
        command = [str(Path(sys.executable).with_name("polyhelm")), "serve", "--data-dir", str(self.data)]
        command += ["--port", str(options.port), "--max-model-len", "512", "--max-num-seqs", "16"]
        self.supervisor = Supervisor(command, variables, self.data / "faults.log")
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def close(self) -> None:
        self.supervisor.kill()
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.data)], check=True)

    def wait_until_ready(self) -> float:
        """Seconds until a completion succeeds."""
        started = time.monotonic()
        while time.monotonic() - started < READY_SECONDS:
            with suppress(httpx.HTTPError):
                if self.client.get("/readyz").status_code == 200:
                    return time.monotonic() - started
            time.sleep(0.1)
        raise SystemExit("the server doesn't become ready; see faults.log in the data folder")

    def faults(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "kill -9 of the worker", lambda: self._die(self.supervisor.named("VLLM::Worker"))
        yield "kill -9 of the engine core", lambda: self._die(self.supervisor.named("EngineCore"))
        yield "kill -9 of the API process", lambda: self._die(self.supervisor.process)
        if self._mounted:
            yield "full disk", lambda: self._for_a_while(self._full_disk)
        yield "read-only store", lambda: self._for_a_while(self._read_only)
        yield "locked databases", lambda: self._for_a_while(self._locked, 8.0)
        if self.supervisor._variables.get("LD_PRELOAD"):
            yield "clock an hour ahead, and back", lambda: self._for_a_while(self._ahead)

    def _die(self, process: psutil.Process | subprocess.Popen[bytes]) -> str:
        """Kill one process; the whole server must end, so that it is started again."""
        before, started = len(self.supervisor.exits), time.monotonic()
        process.kill()
        while len(self.supervisor.exits) == before:
            if time.monotonic() - started > READY_SECONDS:
                raise SystemExit("the server lives on without one of its processes")
            time.sleep(0.05)
        return f"the server ended after {time.monotonic() - started:.1f} s"

    def _for_a_while(self, fault: Callable[[], Any], seconds: float = FAULT_SECONDS) -> str | None:
        try:
            with fault():
                time.sleep(seconds)
        except (subprocess.CalledProcessError, OSError, sqlite3.Error) as error:
            return f"not done: {error}"
        return None

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Not a byte is left where the store, the facts and the log are."""
        filler = self.data / "filler"
        try:
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                for size in (1 << 20, 1 << 12, 1):
                    with suppress(OSError):
                        while file.write(b"x" * size):
                            pass
            yield
        finally:
            filler.unlink()

    @contextmanager
    def _read_only(self) -> Iterator[None]:
        store = str(self.data / "artifacts")
        subprocess.run(["mount", "--bind", store, store], check=True, capture_output=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True, capture_output=True)
            yield
        finally:
            subprocess.run(["umount", "--lazy", store], check=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for file in self.data.rglob("*.sqlite*"):
                if file.suffix.startswith(".sqlite") and "-" not in file.suffix:
                    db = sqlite3.connect(file, timeout=10, isolation_level=None)
                    stack.callback(db.close)
                    db.execute("BEGIN EXCLUSIVE")
            yield

    @contextmanager
    def _ahead(self) -> Iterator[None]:
        self.clock.write_text("3600\n")
        yield
        self.clock.write_text("0\n")

    def corrupt_blob(self, load: Load) -> dict[str, Any]:
        """Change a byte of an artifact that nobody has used yet: it must be refused by name, and nothing else."""
        publish(self.client, "damaged", 10_001).raise_for_status()
        version = self.client.get("/v1/artifacts/damaged/versions/1").json()
        digest = version["manifest"]["files"][0]["sha256"]
        (blob,) = (each for each in (self.data / "artifacts").rglob(f"*{digest[2:]}*") if each.is_file())
        blob.chmod(0o644)
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
        steering = {"interventions": [{"artifact": "damaged", "strength": 1.0}]}
        body = {"model": load._model, "prompt": PROMPT, "max_tokens": 1, "steering": steering}
        refused = self.client.post("/v1/completions", json=body)
        return {
            "status": refused.status_code,
            "message": refused.json()["error"]["message"],
            "names_the_file": digest in refused.text,
            "others": load.completion(0.5).status_code,
        }

    def run(self) -> dict[str, Any]:
        self.wait_until_ready()
        model = self.client.get("/v1/models").json()["data"][0]["id"]
        encoder = {"name": "given", "dimension": 4, "digest": "sha256:" + "1" * 64}
        self.client.put(COLLECTION, json={"encoder": encoder}).raise_for_status()
        for seed in (10_000, 10_002):
            publish(self.client, "first", seed).raise_for_status()
        load = Load(self.url, model)
        expected = [load.completion(each).json()["choices"][0]["text"] for each in (None, 0.5)]
        time.sleep(2)
        rows = []
        for name, inject in self.faults():
            load.asked.clear()
            load.written.clear()
            starts = len(self.supervisor.exits)
            note = inject()
            recovered = self.wait_until_ready()
            during = dict(load.asked), dict(load.written)
            answers = [load.completion(each) for each in (None, 0.5)]
            right = [each.status_code == 200 and each.json()["choices"][0]["text"] for each in answers] == expected
            row = {
                "fault": name,
                "note": note,
                "ready_seconds": round(recovered, 1),
                "exits": self.supervisor.exits[starts:],
                "completions": during[0],
                "writes": during[1],
                "answers_as_before": right,
                "unexplained": unexplained(name, *during),
                "lost": load.lost(),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
            time.sleep(2)
        blob = self.corrupt_blob(load)
        print(json.dumps(blob), flush=True)
        load.end()
        lost = load.lost()
        return {
            "environment": environment(),
            "acknowledged": {"facts": len(load.facts), "artifacts": len(load.artifacts)},
            "faults": rows,
            "corrupt_blob": blob,
            "lost": lost,
            "exit_after_sigterm": self.supervisor.end(),
        }


def unexplained(fault: str, completions: dict[str, int], writes: dict[str, int]) -> list[str]:
    """What was seen that the fault doesn't explain, or not seen that shows that it was there."""
    outcome = OUTCOMES[fault]
    found = [f"completions: {each}" for each in sorted(completions.keys() - outcome.completions)]
    found += [f"writes: {each}" for each in sorted(writes.keys() - outcome.writes)]
    seen = completions.keys() | writes.keys()
    return found + (["the fault was not felt"] if outcome.must and not outcome.must & seen else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="models that are converted already")
    parser.add_argument("--port", type=int, default=8170)
    parser.add_argument("--clock", action="store_true", help="let the clock jump; needs cc")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.data_dir.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    try:
        result = run.run()
    finally:
        run.close()
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [f"{row['fault']}: {key}" for row in result["faults"] for key in ("lost", "unexplained") if row[key]]
    wrong += [f"{row['fault']}: other answers" for row in result["faults"] if not row["answers_as_before"]]
    wrong += [
        f"{row['fault']}: {row['note']}" for row in result["faults"] if (row["note"] or "").startswith("not done")
    ]
    blob = result["corrupt_blob"]
    wrong += [] if (blob["status"], blob["others"]) == (500, 200) and blob["names_the_file"] else ["corrupt blob"]
    wrong += ["lost at the end"] if result["lost"] else []
    wrong += ["exit after SIGTERM"] if result["exit_after_sigterm"] else []
    print("\n".join(wrong) or "as it must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
