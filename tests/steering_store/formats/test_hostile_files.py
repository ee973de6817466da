"""Files that lie, files that lead elsewhere, and files whose bytes were changed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering_store.errors import InvalidTensor, StoreError, TooLarge, UnsupportedFile
from steering_store.formats import FORMATS, Draft, detect, import_artifact
from steering_store.formats.files import MAX_JSON_BYTES
from tests.steering_store.formats import layouts
from tests.steering_store.formats.layouts import OPTIONS, SAES, VECTORS, Written
from tests.steering_store.mutations import mutations

LAYOUTS = pytest.mark.parametrize("layout", SAES + VECTORS, ids=lambda layout: layout.__name__)
MEMORY = 24 << 20
"""What an import may take with the limit of 1 MiB of tensors: a few times that, and the headers."""

opened: list[str] | None = None


def _remember(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], str | bytes):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_remember)


@contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Fails where a file outside the folder is opened, or more memory taken than the limit explains."""
    global opened
    opened = []
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
        # Python may load a module of its own meanwhile.
        allowed = (str(folder), sys.prefix, sys.base_prefix)
        outside = [path for path in opened if not path.startswith(allowed)]
        assert outside == []
    finally:
        tracemalloc.stop()
        opened = None


def files_of(written: Written) -> list[Path]:
    root = written.path if written.path.is_dir() else written.path.parent
    return sorted(path for path in root.rglob("*") if path.is_file())


@LAYOUTS
def test_import_opens_nothing_outside_the_folder(layout: Callable[[Path], Written], tmp_path: Path) -> None:
    written = layout(tmp_path / "a")
    with confined(tmp_path / "a"):
        assert isinstance(import_artifact(written.path, written.options), Draft)
        assert opened


@LAYOUTS
def test_link_out_of_the_folder_is_not_followed(layout: Callable[[Path], Written], tmp_path: Path) -> None:
    for number in range(len(files_of(layout(tmp_path / "count")))):
        written = layout(tmp_path / str(number))
        file = files_of(written)[number]
        elsewhere = tmp_path / f"elsewhere{number}"
        file.rename(elsewhere)
        file.symlink_to(elsewhere)
        if file.name == "config.json" and written.format == "gemma_scope":
            continue
        with confined(tmp_path / str(number)), pytest.raises(UnsupportedFile, match="leads out of its folder"):
            import_artifact(written.path, written.options)


def test_linked_folder_of_checkpoints_is_not_followed(tmp_path: Path) -> None:
    written = layouts.llama_scope(tmp_path / "a")
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsupportedFile, match="leads out of its folder"):
        import_artifact(written.path, OPTIONS)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@LAYOUTS
def test_pipe_or_folder_in_place_of_a_file_is_refused(
    make: Callable[[Path], None], layout: Callable[[Path], Written], tmp_path: Path
) -> None:
    written = layout(tmp_path / "a")
    for file in files_of(written):
        if file.name == "config.json" and written.format == "gemma_scope":
            continue
        file.unlink()
        make(file)
    with pytest.raises(StoreError):
        import_artifact(written.path, written.options, written.format)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    written = layouts.saelens_v3(tmp_path)
    (tmp_path / "cfg.json").unlink()
    (tmp_path / "cfg.json").symlink_to("cfg.json")
    with pytest.raises(UnsupportedFile, match="missing, or no file"):
        import_artifact(written.path, OPTIONS)


def test_pickles_are_named_and_refused(tmp_path: Path) -> None:
    for name in ("sae.pt", "v.bin", "x.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        with pytest.raises(UnsupportedFile, match="pickle"):
            import_artifact(tmp_path / name, OPTIONS)
    with pytest.raises(UnsupportedFile, match="pickle"):
        import_artifact(tmp_path, OPTIONS)


def test_unknown_file_names_the_formats_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    for path in (tmp_path, tmp_path / "readme.txt", tmp_path / "missing"):
        with pytest.raises(UnsupportedFile, match=", ".join(FORMATS)):
            detect(path)
    with pytest.raises(UnsupportedFile, match="missing"):
        import_artifact(tmp_path / "missing.gguf", OPTIONS)


def npy(descr: str, shape: object, data: bytes, order: str = "False") -> bytes:
    header = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            content = members.get(name, npy("<f4", "(1,)", bytes(4)))
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    ("member", "error"),
    [
        (npy("|O", "(1,)", b"\x80\x04N."), InvalidTensor),
        (npy("<i8", "(2,)", bytes(16)), InvalidTensor),
        (npy("<f4", "(1099511627776,)", b""), TooLarge),
        (npy("<f4", "(4611686018427387904, 4611686018427387904)", b""), TooLarge),
        (npy("<f4", "(200000,)", bytes(8)), InvalidTensor),
        (npy("<f4", "(2,)", bytes(4)), InvalidTensor),
        (npy("<f4", "(1,)", bytes(400_000)), InvalidTensor),
        (npy("<f4", "(-1,)", bytes(4)), InvalidTensor),
        (npy("<f4", "(__import__('os'),)", bytes(4)), InvalidTensor),
        (npy("<f4", "(1,)" + " " * 20_000, bytes(4)), InvalidTensor),
        (b"PK", InvalidTensor),
    ],
)
def test_array_that_lies_is_refused_before_it_is_allocated(
    member: bytes, error: type[StoreError], tmp_path: Path
) -> None:
    npz(tmp_path / "params.npz", W_enc=member)
    options = layouts.ImportOptions(model=layouts.MODEL, point="resid_post", layer=1, max_bytes=1 << 20)
    with confined(tmp_path), pytest.raises(error):
        import_artifact(tmp_path, options)


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    size = 64 << 20
    options = layouts.ImportOptions(model=layouts.MODEL, point="resid_post", layer=1, max_bytes=1 << 20)
    for shape in (f"({size // 4},)", "(1,)"):
        npz(tmp_path / "params.npz", zipfile.ZIP_DEFLATED, W_enc=npy("<f4", shape, bytes(size)))
        assert (tmp_path / "params.npz").stat().st_size < 1 << 20
        with confined(tmp_path), pytest.raises((TooLarge, InvalidTensor)):
            import_artifact(tmp_path, options)


def test_endless_list_of_members_is_not_read(tmp_path: Path) -> None:
    path = npz(tmp_path / "params.npz")
    raw = path.read_bytes()
    end = raw.rindex(b"PK\x05\x06")
    size = 48 << 20
    # The list is said to be 48 MiB long, and the file has them.
    record = raw[end : end + 12] + struct.pack("<II", size, end) + raw[end + 20 :]
    path.write_bytes(raw[:end] + bytes(size) + record)
    options = layouts.ImportOptions(model=layouts.MODEL, point="resid_post", layer=1, max_bytes=1 << 20)
    with confined(tmp_path), pytest.raises(InvalidTensor):
        import_artifact(tmp_path, options)


def test_archive_of_many_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **{f"a{i}": np.zeros(1) for i in range(65)})
    options = layouts.ImportOptions(model=layouts.MODEL, point="resid_post", layer=1)
    with pytest.raises(TooLarge, match="65 arrays"):
        import_artifact(tmp_path, options)


GGUF = b"GGUF" + struct.pack("<I", 3)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")


def tensor(name: str, *dimensions: int, kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + shape + struct.pack("<IQ", kind, offset)


def gguf(tensors: list[bytes], keys: list[bytes], data: bytes = b"") -> bytes:
    head = GGUF + struct.pack("<QQ", len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (GGUF + struct.pack("<QQ", 1 << 62, 0), TooLarge),
        (GGUF + struct.pack("<QQ", 1, 1 << 62), InvalidTensor),
        (GGUF + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 62), InvalidTensor),
        (gguf([], [text("a") + struct.pack("<IIQ", 9, 8, 1 << 62)]), InvalidTensor),
        (gguf([], [text("a") + struct.pack("<IIQ", 9, 12, 1 << 62)]), InvalidTensor),
        (gguf([], [text("a") + struct.pack("<IIQ", 9, 9, 1)]), InvalidTensor),
        (gguf([], [text("a") + struct.pack("<I", 77)]), InvalidTensor),
        (gguf([tensor("direction.1", 1 << 40)], [ARCHITECTURE]), InvalidTensor),
        (gguf([tensor("direction.1", 1 << 62, 1 << 62)], [ARCHITECTURE]), InvalidTensor),
        (gguf([tensor("direction.1", 4, offset=1 << 62)], [ARCHITECTURE], bytes(16)), InvalidTensor),
        (gguf([tensor("direction.1", 4, kind=12)], [ARCHITECTURE], bytes(16)), InvalidTensor),
        (gguf([tensor("direction.1", 4)] * 2, [ARCHITECTURE], bytes(16)), InvalidTensor),
        (gguf([tensor("direction.1", *[1] * 5)], [ARCHITECTURE], bytes(16)), InvalidTensor),
        (gguf([], [ARCHITECTURE]), UnsupportedFile),
        (gguf([tensor("bias.1", 4)], [ARCHITECTURE], bytes(16)), UnsupportedFile),
        (gguf([tensor("direction.1", 4), tensor("direction.01", 4)], [ARCHITECTURE], bytes(16)), UnsupportedFile),
        (gguf([tensor("direction.-1", 4)], [ARCHITECTURE], bytes(16)), UnsupportedFile),
        (gguf([], [text("general.alignment") + struct.pack("<II", 4, 3)]), InvalidTensor),
        (b"GGUF" + struct.pack(">I", 3), InvalidTensor),
        (b"", InvalidTensor),
        (gguf([], [text("a" * (1 << 21)) + struct.pack("<IB", 0, 1)]), InvalidTensor),
    ],
)
def test_gguf_that_lies_is_refused(content: bytes, error: type[StoreError], tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(content)
    with confined(tmp_path), pytest.raises(error):
        import_artifact(tmp_path / "v.gguf", OPTIONS)


def test_tensors_beyond_the_limit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    large = {1: np.ones((1 << 20) // 4 + 1, np.float32)}
    layouts.write_gguf(tmp_path / "v.gguf", large, model_hint="m")
    layouts.save_file({"layer.1": large[1]}, tmp_path / "v.safetensors")
    np.savez(tmp_path / "params.npz", **layouts.weights() | {"W_enc": large[1]})
    options = layouts.ImportOptions(model=layouts.MODEL, point="resid_post", layer=1, max_bytes=1 << 20)
    for name in ("v.gguf", "v.safetensors", "params.npz"):
        with confined(tmp_path), pytest.raises(TooLarge, match="bytes as float32"):
            import_artifact(tmp_path / name, options)


def test_long_headers_are_refused(tmp_path: Path) -> None:
    header = json.dumps({f"layer.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)})
    (tmp_path / "v.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with confined(tmp_path), pytest.raises(TooLarge, match="header"):
        import_artifact(tmp_path / "v.safetensors", OPTIONS)
    written = layouts.saelens_v3(tmp_path / "a")
    (written.path / "cfg.json").write_text("{" + " " * MAX_JSON_BYTES + "}")
    with pytest.raises(TooLarge, match="cfg.json"):
        import_artifact(written.path, OPTIONS)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b'{"d_in": NaN}', b"[" * 200_000])
@pytest.mark.parametrize("layout", [layouts.saelens_v3, layouts.sparsify, layouts.llama_scope])
def test_broken_json_is_a_clear_error(content: bytes, layout: Callable[[Path], Written], tmp_path: Path) -> None:
    written = layout(tmp_path)
    (file,) = (path for path in files_of(written) if path.suffix == ".json")
    file.write_bytes(content)
    with pytest.raises(StoreError, match=file.name):
        import_artifact(written.path, written.options)


JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just([]), st.just({}), st.just([[0]])
)


@LAYOUTS
def test_changed_bytes_give_clear_errors_only(
    layout: Callable[[Path], Written], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    written = layout(root)
    originals = {path: path.read_bytes() for path in files_of(written)}
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(file=st.sampled_from(sorted(originals)), changes=st.lists(mutations(), min_size=1, max_size=3))
    def fuzz(file: Path, changes: list[Callable[[bytes], bytes]]) -> None:
        raw = originals[file]
        for change in changes:
            raw = change(raw)
        file.write_bytes(raw)
        try:
            with confined(root):
                draft = import_artifact(written.path, written.options)
                assert all(np.isfinite(array).all() for array in draft.tensors.values()) or draft.sae is None
            outcomes["read"] += 1
        except StoreError as exc:
            assert len(exc.message) < 1000
            outcomes["refused"] += 1
        finally:
            file.write_bytes(originals[file])

    fuzz()
    assert outcomes["refused"] > 25, outcomes
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "layout", [each for each in SAES if "gemma" not in each.__name__], ids=lambda each: each.__name__
)
def test_changed_fields_give_clear_errors_only(
    layout: Callable[[Path], Written], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    written = layout(root)
    (file,) = (path for path in files_of(written) if path.suffix == ".json")
    original: dict[str, Any] = json.loads(file.read_text())

    @settings(max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changed=st.dictionaries(st.sampled_from([*original, "norm", "k"]), JSON_VALUES, min_size=1, max_size=3))
    def fuzz(changed: dict[str, Any]) -> None:
        file.write_text(json.dumps(original | changed))
        try:
            with confined(root):
                import_artifact(written.path, written.options)
        except StoreError as exc:
            assert len(exc.message) < 1000

    fuzz()
