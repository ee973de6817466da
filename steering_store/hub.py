"""Repositories of the Hugging Face hub as a source: `hf://org/repo[@revision][/path]`, pinned to a commit.

Only files of formats that can't run code are downloaded. They stay in huggingface_hub's own cache, and HF_ENDPOINT,
HF_TOKEN and HF_HOME mean what they mean there. That cache is links out of each folder, which nothing here follows: what
is to be read gets a folder of its own, of regular files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steering_store.errors import ArtifactNotFound, InvalidReference, RemoteUnavailable, StoreError, TooLarge

SCHEME = "hf://"
SUFFIXES = (".safetensors", ".json", ".jsonl", ".npz", ".gguf")
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_SOURCE = re.compile(rf"hf://({_PART}/{_PART})(?:@([A-Za-z0-9._-]+))?(?:/(.*))?")


@dataclass(frozen=True)
class HubSource:
    """A file or a folder of a repository; `path` is empty for all of it."""

    repo: str
    revision: str = "main"
    path: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.revision}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True)
class Snapshot:
    """What was downloaded: `source` with the commit as its revision, and where its file or folder lies."""

    source: HubSource
    location: Path
    files: tuple[str, ...]


def parse_source(url: str) -> HubSource:
    """Read `hf://org/repo[@revision][/path]`. Raises InvalidReference."""
    match = _SOURCE.fullmatch(url)
    path = (match[3] or "").rstrip("/") if match else ""
    if match is None or (path and not _is_plain(path)):
        raise InvalidReference(f"source {url!r}: write hf://org/repo@revision, and a path behind it if you like", "ref")
    return HubSource(match[1], match[2] or "main", path)


def download(
    source: HubSource, target: Path, *, max_bytes: int, endpoint: str | None = None, cache: Path | None = None
) -> Snapshot:
    """Download the files of a source that a store may open, at the commit that its revision is now.

    They are put below the empty folder `target`, as hard links to the cache where that is on the same disk. `max_bytes`
    bounds them together. Raises ArtifactNotFound, TooLarge, RemoteUnavailable.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors_named(source):
        info = HfApi(endpoint=endpoint).model_info(source.repo, revision=source.revision, files_metadata=True)
        pinned = HubSource(source.repo, str(info.sha), source.path)
        sizes = {file.rfilename: file.size for file in info.siblings or () if _is_wanted(file.rfilename, source.path)}
        _check_sizes(source, sizes, max_bytes)
        paths = {
            name: hf_hub_download(source.repo, name, revision=pinned.revision, endpoint=endpoint, cache_dir=cache)
            for name in sizes
        }
    for name, path in paths.items():
        _put(Path(path), target / name)
    return Snapshot(pinned, target / source.path, tuple(sorted(sizes)))


def _put(cached: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(cached.resolve(), path)
    except OSError:
        # Another disk, or one without hard links.
        shutil.copyfile(cached, path)


def _is_wanted(name: str, path: str) -> bool:
    return _is_plain(name) and name.endswith(SUFFIXES) and (not path or name == path or name.startswith(f"{path}/"))


def _is_plain(path: str) -> bool:
    """Whether a path stays below the folder that it is relative to."""
    return "\\" not in path and "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def _check_sizes(source: HubSource, sizes: dict[str, int | None], max_bytes: int) -> None:
    if not sizes:
        raise ArtifactNotFound(f"{source} has no files of a format that is read: {', '.join(SUFFIXES)}", "ref")
    if unknown := [name for name, size in sizes.items() if size is None]:
        raise RemoteUnavailable(f"{source}: the hub doesn't tell the size of {unknown[0]!r}")
    if (total := sum(size or 0 for size in sizes.values())) > max_bytes:
        raise TooLarge(f"{source}: {total} bytes, and at most {max_bytes} are accepted; name one file or folder of it")


@contextlib.contextmanager
def _hub_errors_named(source: HubSource) -> Iterator[None]:
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except StoreError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as exc:
        raise ArtifactNotFound(f"{source}: {exc}; check the name, and HF_TOKEN where it isn't public", "ref") from exc
    # The hub's client lets those of its HTTP library through, which is not always the same one.
    except Exception as exc:
        raise RemoteUnavailable(f"{source}: {exc or type(exc).__name__}; check the network and HF_ENDPOINT") from exc
