"""What faults do to a running server under load, and that it recovers without hands, having lost nothing.

A supervisor starts `polyhelm serve` again whenever it ends, as a container runtime does. Clients complete steered and
unsteered prompts all the time, and writers publish artifacts, move an alias and upload facts, and remember what was
acknowledged. Then, one after the other: kill -9 of the worker, of the engine core, of the API process; a full disk (a
tmpfs of 512 MiB for all data, where this may be mounted); a store that is read-only (a bind mount);
databases that another process locks; a corrupt blob; a clock that jumps an hour ahead and back (given --faketime, the
library libfaketime.so.1). After each fault the server must become ready by itself, answer as before, and know all that
it has ever acknowledged. Writes results/faults.json; exits with 1 where that isn't so.

    .venv/bin/python benchmarks/faults.py --data-dir FOLDER --models polyhelm-data/models [--faketime libfaketime.so.1]
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
from typing import Any

import httpx
import psutil
from environment import environment
from replicas_check import publish

RESULTS = Path(__file__).parent / "results" / "faults.json"
COLLECTION, ALIAS = "/v1/kb/collections/faults", "/v1/artifacts/first/aliases/live"
PROMPT, TOKENS = "The weather today is", 16
FAULT_SECONDS, READY_SECONDS = 6.0, 180.0
CLIENTS = 4


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
    """Clients that never stop. `acknowledged` is what the server has said is written."""

    def __init__(self, url: str, model: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._model = model
        self.asked: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.facts: set[str] = set()
        self.artifacts: set[str] = set()
        self.alias = 0
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

    def counted(self, counter: Counter[str], ask: Callable[[], httpx.Response]) -> int:
        try:
            status = ask().status_code
            counter[str(status)] += 1
        except httpx.HTTPError as error:
            status = 0
            counter[type(error).__name__] += 1
            time.sleep(0.2)
        return status

    def _ask(self, number: int) -> None:
        while not self._ending.is_set():
            self.counted(self.asked, lambda: self.completion((None, 0.5)[number % 2]))

    def _write(self) -> None:
        number = 0
        while not self._ending.is_set():
            number += 1
            fact = {"id": f"f{number}", "text": f"fact {number}", "embedding": [1.0, number / 1000, 0.5, 0.25]}
            if self.counted(self.written, lambda f=fact: self._client.put(f"{COLLECTION}/facts", json=[f])) == 200:
                self.facts.add(f"f{number}")
            if number % 5 == 0:
                name = f"made-{number}"
                if self.counted(self.written, lambda n=name: self._publish(n)) in (200, 201):
                    self.artifacts.add(name)
                target = {"version": 1, "reason": str(number)}
                if self.counted(self.written, lambda t=target: self._client.put(ALIAS, json=t)) == 200:
                    self.alias = number
            time.sleep(0.05)

    def _publish(self, name: str) -> httpx.Response:
        try:
            return publish(self._client, name, len(self.artifacts))
        except (KeyError, ValueError) as error:  # capabilities that are an error
            raise httpx.HTTPError(str(error)) from error

    def lost(self) -> list[str]:
        """What was acknowledged and isn't there."""
        paths = [f"{COLLECTION}/facts/{each}" for each in sorted(self.facts)]
        paths += [f"/v1/artifacts/{each}/versions/1" for each in sorted(self.artifacts)]
        gone = [each for each in paths if self._client.get(each).status_code != 200]
        history = self._client.get("/v1/artifacts/first/history?alias=live").json()["data"]
        moved = not self.alias or any(each["action"] == "set_alias" for each in history)
        return [*gone, *([] if moved else ["alias live"])]

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
        self.clock.write_text("+0\n")
        variables = {"HF_HUB_OFFLINE": "1"}
        if options.faketime:
            variables |= {
                "LD_PRELOAD": str(options.faketime),
                "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_CACHE_DURATION": "1",
            }
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
            for file in (*self.data.glob("artifacts/*.sqlite*"), *self.data.glob("kb/**/*.sqlite*")):
                if file.suffix.startswith(".sqlite") and "-" not in file.suffix:
                    db = sqlite3.connect(file, timeout=10, isolation_level=None)
                    stack.callback(db.close)
                    db.execute("BEGIN EXCLUSIVE")
            yield

    @contextmanager
    def _ahead(self) -> Iterator[None]:
        self.clock.write_text("+3600\n")
        yield
        self.clock.write_text("+0\n")

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
            "others": load.completion(0.5).status_code,
        }

    def run(self) -> dict[str, Any]:
        self.wait_until_ready()
        model = self.client.get("/v1/models").json()["data"][0]["id"]
        encoder = {"name": "given", "dimension": 4, "digest": "sha256:" + "1" * 64}
        self.client.put(COLLECTION, json={"encoder": encoder}).raise_for_status()
        publish(self.client, "first", 10_000).raise_for_status()
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True, help="models that are converted already")
    parser.add_argument("--port", type=int, default=8170)
    parser.add_argument("--faketime", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.data_dir.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    try:
        result = run.run()
    finally:
        run.close()
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row["fault"] for row in result["faults"] if row["lost"] or not row["answers_as_before"]]
    return 1 if wrong or result["lost"] or result["corrupt_blob"]["others"] != 200 else 0


if __name__ == "__main__":
    sys.exit(main())
