"""Builds the cpu image with buildah from a fresh Debian root, and runs it as a container runtime does, but without one.

For Linux machines where no image can be pulled and no daemon runs. Needs root, and Debian's debootstrap, buildah and
util-linux. What is checked: the shipped Dockerfile builds; the service runs as its user without capabilities on a
read-only root, and as a user without a name; HEALTHCHECK fails before it serves and passes then; it answers; SIGTERM
lets a running answer end, and ends it with 0. Writes about 16 GiB into --work, and each finding into --output.

    python3 docker/check_image.py --work FOLDER --torch-index ADDRESS
    python3 docker/check_image.py --work FOLDER --pip-conf pip.conf --mount /wheels:/wheels
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASE, IMAGE = "localhost/debian:bookworm-slim", "localhost/polyhelm:cpu"
USER, NAMELESS = "2000:0", "1000650000:0"
START_SECONDS, STOP_SECONDS = 900, 90
FINDINGS: list[dict[str, Any]] = []
"""Every check that was made, in order."""
START = r"""
set -eu
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount -o remount,bind,ro "$ROOT"
mount -t proc proc "$ROOT/proc"
mount -t sysfs -o ro sysfs "$ROOT/sys"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount -t tmpfs tmpfs "$ROOT/dev"
mkdir "$ROOT/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/dev/shm"
for each in null zero full random urandom; do touch "$ROOT/dev/$each"; mount --bind "/dev/$each" "$ROOT/dev/$each"; done
for each in hosts hostname resolv.conf; do
    if test -e "$ROOT/etc/$each"; then mount --bind "/etc/$each" "$ROOT/etc/$each"; fi
done
for each in data cache; do mount --bind "$VOLUMES/$each" "$ROOT/$each"; done
exec chroot "$ROOT" "$@"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder, which is removed at the end")
    parser.add_argument("--keep", action="store_true", help="keep it, and next time check the image that is in it")
    parser.add_argument("--torch-index", default="", help="address of PyTorch's CPU wheel index")
    parser.add_argument("--pip-conf", help="pip.conf of a mirror, given to the build as a secret")
    parser.add_argument("--mount", action="append", default=[], help="FROM:TO, read-only in the build; repeatable")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "image.json")
    arguments = parser.parse_args()
    missing = [name for name in ("debootstrap", "buildah", "unshare", "nsenter") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        sys.exit(f"needs root, and these programs: {', '.join(missing) or 'all are here'}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        if not buildah(arguments.work, "images", "--quiet", IMAGE, check=False):
            base_image(arguments.work)
            build(arguments.work, arguments)
        check(arguments.work)
    finally:
        write(arguments.output)
        buildah(arguments.work, "rm", "--all", check=False)
        if not arguments.keep:
            buildah(arguments.work, "rmi", "--all", "--force", check=False)
            shutil.rmtree(arguments.work)


def write(output: Path) -> None:
    """What was found, up to the check that failed, if one did."""
    builder = run("buildah", "--version", check=False)
    system = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "builder": builder}
    found = {"date": datetime.now(UTC).date().isoformat(), **system, "findings": FINDINGS}
    output.write_text(json.dumps(found, indent=1) + "\n")


def check(work: Path) -> None:
    container = buildah(work, "from", "--pull-never", IMAGE)
    root = Path(buildah(work, "mount", container))
    config = json.loads(buildah(work, "inspect", "--type", "image", IMAGE))["OCIv1"]["config"]
    config["Healthcheck"] = json.loads(buildah(work, "inspect", "--type", "image", IMAGE))["Docker"]["config"][
        "Healthcheck"
    ]
    say("image", f"{sum(f.lstat().st_blocks * 512 for f in root.rglob('*')) / 2**30:.2f} GiB", config["User"] == USER)
    check_files(root)
    # In the order of a container's life: a first start on empty volumes, and a second one by a user without a name.
    with tempfile.TemporaryDirectory(dir=work) as folder:
        check_service(Path(folder) / "first", root, config, USER)
        check_service(Path(folder) / "second", root, config, NAMELESS)


def base_image(work: Path) -> None:
    """A minimal Debian, installed by this machine's apt sources, as a local image."""
    debian = work / "debian"
    run("debootstrap", "--variant=minbase", "bookworm", str(debian))
    container = buildah(work, "from", "scratch")
    buildah(work, "add", container, str(debian), "/")
    buildah(work, "commit", "--rm", container, BASE)
    shutil.rmtree(debian)


def build(work: Path, arguments: argparse.Namespace) -> None:
    options = ["--isolation", "chroot", "--target", "cpu", "--build-arg", f"DEBIAN={BASE}", "--format", "docker"]
    options += ["--build-arg", f"TORCH_INDEX={arguments.torch_index}", "--pull-never", "--layers=false"]
    for mount in arguments.mount:
        options += ["--volume", f"{mount}:ro"]
    if arguments.pip_conf:
        options += ["--secret", f"id=pip,src={arguments.pip_conf}"]
    before = time.monotonic()
    buildah(work, "bud", *options, "-f", str(ROOT / "docker" / "Dockerfile"), "-t", IMAGE, str(ROOT))
    say("build", f"{time.monotonic() - before:.0f} s", True)


def check_files(root: Path) -> None:
    """The code can't be changed by its user, no tool for building stays, and nothing of the checkout but the code."""
    code = root / "opt" / "polyhelm"
    foreign = [f for f in code.rglob("*") if f.lstat().st_uid != 0 or (not f.is_symlink() and f.lstat().st_mode & 0o22)]
    say("code is root's alone", str(foreign[:3]), not foreign)
    left = [name for name in ("src", "etc/pip.conf", "usr/bin/pip", "usr/bin/gcc") if (root / name).exists()]
    say("no tools and no sources", str(left), not left)


def check_service(folder: Path, root: Path, config: dict[str, Any], user: str) -> None:
    volumes = {name: folder / name for name in ("data", "cache")}
    for path in volumes.values():
        path.mkdir(parents=True)
        # As the image has them; an orchestrator gives the group of its users.
        path.chmod(0o2775)
        os.chown(path, 2000, 0)
    with container(folder, root, config, user) as process:
        inside = Inside(process, config, user)
        status = inside.run("cat", "/proc/1/status").stdout
        expected = [f"Uid:\t{user.split(':')[0]}", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"]
        say(f"user {user}", ", ".join(expected), all(line in status for line in expected))
        for path in ("/probe", "/opt/polyhelm/probe", "/etc/probe"):
            done = inside.run("touch", path)
            say("read-only root", path, "Read-only" in done.stderr)
        say("HEALTHCHECK before it serves", "fails", inside.probe() != 0)
        inside.wait_until_ready()
        say("HEALTHCHECK when it serves", "passes", inside.probe() == 0)
        check_stop(inside)


def check_stop(inside: Inside) -> None:
    """SIGTERM while an answer is under way: it ends as it would have, and the process with 0."""
    body = {"model": "smollm2", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(f"{inside.url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=STOP_SECONDS) as response:
        first = response.readline()
        os.kill(inside.pid, signal.SIGTERM)
        rest = response.read()
    say("answer under way at SIGTERM", "ends", first.startswith(b"data:") and rest.rstrip().endswith(b"data: [DONE]"))
    say("exit after SIGTERM", str(code := inside.process.wait(STOP_SECONDS)), code == 0)


class Inside:
    """The running container: its process 1, and commands in the same root as the same user."""

    def __init__(self, process: subprocess.Popen[bytes], config: dict[str, Any], user: str) -> None:
        self.process = process
        self.config = config
        self.user = user
        self.url = f"http://127.0.0.1:{environment(config)['POLYHELM_PORT']}"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.05)
        self.pid = int(found[0])
        # Until the mounts are there and the process is in the new root.
        while (
            os.readlink(f"/proc/{self.pid}/root") == "/"
            or b"tini" not in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        ):
            time.sleep(0.05)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root"]
        return subprocess.run([*enter, *as_user(self.config, self.user), *command], capture_output=True, text=True)

    def probe(self) -> int:
        test = self.config["Healthcheck"]["Test"]
        assert test[0] == "CMD"
        return self.run(*test[1:]).returncode

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit(f"the service ended with {self.process.returncode}")
            try:
                urllib.request.urlopen(f"{self.url}/readyz", timeout=5)
                return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        sys.exit(f"the service isn't ready after {START_SECONDS} s")


@contextmanager
def container(folder: Path, root: Path, config: dict[str, Any], user: str) -> Iterator[subprocess.Popen[bytes]]:
    """The image's entry point as process 1 of its own namespaces, in a read-only root."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config["Env"] = [*config["Env"], f"POLYHELM_PORT={probe.getsockname()[1]}"]
    variables = {"ROOT": str(root), "VOLUMES": str(folder), "PATH": os.environ["PATH"]}
    command = [*as_user(config, user), *config["Entrypoint"], *config["Cmd"], "--shutdown-timeout", "60"]
    shell = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", START, "start", *command]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(shell, env=variables, stdout=log, stderr=log)
    try:
        yield process
    except BaseException:
        print((folder / "log").read_text("utf-8", "replace")[-5000:])
        raise
    finally:
        process.kill()
        process.wait()


def environment(config: dict[str, Any]) -> dict[str, str]:
    return dict(each.split("=", 1) for each in config["Env"])


def as_user(config: dict[str, Any], user: str) -> list[str]:
    """What a container runtime does before the command: the image's variables, its user, no capabilities."""
    uid, gid = user.split(":")
    drop = ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
    drop += ["--bounding-set=-all", "--inh-caps=-all"]
    folder = ["/usr/bin/env", "-i", f"--chdir={config['WorkingDir']}", *config["Env"]]
    return [*drop, "--", *folder]


def buildah(work: Path, *command: str, check: bool = True) -> str:
    storage = ["--root", str(work / "storage"), "--runroot", str(work / "run"), "--storage-driver", "overlay"]
    return run("buildah", *storage, *command, check=check)


def run(*command: str, check: bool = True) -> str:
    """Standard output of a command, whose error output goes to ours."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if check and done.returncode:
        sys.exit(f"{' '.join(command[:6])} … failed:\n{done.stdout[-3000:]}")
    return done.stdout.strip()


def say(what: str, found: str, ok: bool) -> None:
    print(f"{'ok' if ok else 'NO'}: {what}: {found}", flush=True)
    FINDINGS.append({"what": what, "found": found, "ok": ok})
    if not ok:
        sys.exit(1)


if __name__ == "__main__":
    main()
