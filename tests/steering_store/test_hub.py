"""Against a local server that speaks what huggingface_hub asks of the hub; the client is the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steering_store.errors import ArtifactNotFound, InvalidReference, RemoteUnavailable, TooLarge
from steering_store.formats import import_artifact
from steering_store.hub import HubSource, download, parse_source
from tests.steering_store.formats import layouts
from tests.steering_store.hub_server import COMMIT, Hub, serving

FILES = {
    "README.md": b"# about",
    "model.bin": b"\x80\x04.",
    "layer_12/sae.safetensors": b"weights of 12",
    "layer_12/cfg.json": b"{}",
    "layer_13/sae.safetensors": b"weights of 13",
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def endpoint(online: None) -> Iterator[str]:
    with serving(FILES) as address:
        yield address


def test_folder_is_downloaded_and_pinned_to_the_commit(endpoint: str, tmp_path: Path) -> None:
    source = parse_source("hf://org/saes@main/layer_12")
    snapshot = download(source, tmp_path / "files", max_bytes=1000, endpoint=endpoint, cache=tmp_path / "cache")
    assert str(snapshot.source) == f"hf://org/saes@{COMMIT}/layer_12"
    assert snapshot.files == ("layer_12/cfg.json", "layer_12/sae.safetensors")
    assert (snapshot.location / "sae.safetensors").read_bytes() == b"weights of 12"
    assert {path.name for path in snapshot.location.iterdir()} == {"cfg.json", "sae.safetensors"}
    assert not any("layer_13" in each for each in Hub.requested)


def test_whole_repository_is_its_safe_files_only(endpoint: str, tmp_path: Path) -> None:
    snapshot = download(
        parse_source("hf://org/saes"), tmp_path / "files", max_bytes=1000, endpoint=endpoint, cache=tmp_path / "cache"
    )
    found = {str(path.relative_to(snapshot.location)) for path in snapshot.location.rglob("*") if path.is_file()}
    assert found == set(snapshot.files) == {name for name in FILES if not name.endswith((".md", ".bin"))}
    assert not any(word in each for each in Hub.requested for word in ("README", ".bin", "escape"))


def test_one_file_is_its_own_location(endpoint: str, tmp_path: Path) -> None:
    source = HubSource("org/saes", COMMIT, "layer_13/sae.safetensors")
    snapshot = download(source, tmp_path / "files", max_bytes=1000, endpoint=endpoint, cache=tmp_path / "cache")
    assert snapshot.location.read_bytes() == b"weights of 13"


@pytest.mark.parametrize(
    "write",
    [layouts.saelens_v6_jumprelu, layouts.gemma_scope, layouts.llama_scope, layouts.sparsify, layouts.repeng],
    ids=lambda write: write.__name__,
)
def test_what_was_downloaded_is_imported(
    online: None, tmp_path: Path, write: Callable[[Path], layouts.Written]
) -> None:
    """The cache is links from one folder into another, and an import follows none that leads out of its folder."""
    original = tmp_path / "original"
    written = write(original)
    found = {str(path.relative_to(original)): path.read_bytes() for path in original.rglob("*") if path.is_file()}
    source = HubSource("org/saes", COMMIT, str(written.path.relative_to(original)).removeprefix("."))
    with serving(found) as address:
        snapshot = download(source, tmp_path / "files", max_bytes=1 << 20, endpoint=address, cache=tmp_path / "cache")
    assert any(path.is_symlink() for path in (tmp_path / "cache").rglob("*")), "else this shows nothing"
    draft, expected = (import_artifact(path, written.options) for path in (snapshot.location, written.path))
    assert {name: tensor.tobytes() for name, tensor in draft.tensors.items()} == {
        name: tensor.tobytes() for name, tensor in expected.tensors.items()
    }
    assert draft.manifest == expected.manifest


def test_more_than_the_limit_is_refused_before_any_file_is_asked_for(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="28 bytes, and at most 27"):
        download(
            parse_source("hf://org/saes"), tmp_path / "files", max_bytes=27, endpoint=endpoint, cache=tmp_path / "cache"
        )
    assert len(Hub.requested) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_named(endpoint: str, tmp_path: Path) -> None:
    for url in ("hf://org/nobody", "hf://org/saes/layer_99"):
        with pytest.raises(ArtifactNotFound, match=url.partition("//")[2].partition("/")[0]):
            download(parse_source(url), tmp_path / "files", max_bytes=1000, endpoint=endpoint, cache=tmp_path / "cache")


def test_hub_that_does_not_answer_is_an_error_of_its_own(online: None, tmp_path: Path) -> None:
    with pytest.raises(RemoteUnavailable, match="HF_ENDPOINT"):
        download(
            parse_source("hf://org/saes"),
            tmp_path / "files",
            max_bytes=1000,
            endpoint="http://127.0.0.1:9",
            cache=tmp_path,
        )


@pytest.mark.parametrize(
    "url",
    ["hf://saes", "hf://org/saes@", "hf://org/saes@a/../b", "hf://org/saes@main/..", "hf://../saes",
     "hf://org/saes@main//etc", "hf://org/saes@main/a\\..\\b", "http://org/saes"],
)  # fmt: skip
def test_malformed_sources_are_refused(url: str) -> None:
    with pytest.raises(InvalidReference):
        parse_source(url)
