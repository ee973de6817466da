from __future__ import annotations

import json
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from steering_store.errors import InvalidTensor, TooLarge, UnsupportedFile
from steering_store.manifest import Manifest, parse_manifest
from steering_store.tensors import CHUNK_BYTES, MAX_HEADER_BYTES, check_tensors, read_header, read_tensors

FILE = "vectors.safetensors"


@pytest.fixture
def parsed(manifest: dict[str, Any]) -> Manifest:
    return parse_manifest(manifest)


def check(manifest: Manifest, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check_tensors(manifest, {FILE: path})


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_dtype_is_read_as_float32(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator).to(getattr(torch, dtype)),
        "b": torch.tensor(-2.5).to(getattr(torch, dtype)),
        "empty": torch.zeros(0, 4).to(getattr(torch, dtype)),
    }
    save_file(tensors, tmp_path / FILE, metadata={"note": "kept"})
    read = read_tensors(tmp_path / FILE)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], tensor.float().numpy())


def test_tensor_larger_than_a_chunk_is_read_whole() -> None:
    values = np.arange(CHUNK_BYTES // 4 + 3, dtype=np.float32)
    np.testing.assert_array_equal(read_tensors(save({"a": values}))["a"], values)


def test_vector_that_matches_its_manifest_is_accepted(parsed: Manifest, tmp_path: Path) -> None:
    check(parsed, tmp_path / "f", save({"layer.2": np.ones(8, np.float32)}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_value_is_refused_and_its_tensor_named(parsed: Manifest, tmp_path: Path, value: float) -> None:
    values = np.ones(8, np.float32)
    values[5] = value
    with pytest.raises(InvalidTensor, match="'layer.2' holds NaN"):
        check(parsed, tmp_path / "f", save({"layer.2": values}))


def test_a_vector_of_zeros_is_refused_as_it_would_steer_nothing(parsed: Manifest, tmp_path: Path) -> None:
    with pytest.raises(InvalidTensor, match="'layer.2' is all zeros"):
        check(parsed, tmp_path / "f", save({"layer.2": np.zeros(8, np.float32)}))


@pytest.mark.parametrize(("dtype", "bits"), [("F16", 0x7C00), ("BF16", 0x7FC0)])
def test_non_finite_value_of_16_bits_is_refused(
    manifest: dict[str, Any], tmp_path: Path, dtype: str, bits: int
) -> None:
    manifest["sites"][0]["dtype"] = dtype
    data = np.array([0] * 7 + [bits], "<u2").tobytes()
    with pytest.raises(InvalidTensor, match="NaN"):
        check(
            parse_manifest(manifest),
            tmp_path / "f",
            raw_file({"layer.2": {"dtype": dtype, "shape": [8], "data_offsets": [0, 16]}}, data),
        )


def test_value_that_overflows_float32_is_refused(manifest: dict[str, Any], tmp_path: Path) -> None:
    manifest["sites"][0]["dtype"] = "F64"
    with pytest.raises(InvalidTensor, match="beyond float32"):
        check(parse_manifest(manifest), tmp_path / "f", save({"layer.2": np.full(8, 1e300)}))


@pytest.mark.parametrize(
    ("tensors", "param"),
    [
        ({"layer.2": np.ones(9, np.float32)}, "sites.0.shape"),
        ({"layer.2": np.ones((8, 1), np.float32)}, "sites.0.shape"),
        ({"layer.2": np.ones(8, np.float16)}, "sites.0.dtype"),
        ({"layer.3": np.ones(8, np.float32)}, "sites.0.tensor"),
        ({"layer.2": np.ones(8, np.float32), "more": np.ones(8, np.float32)}, "sites"),
        ({"layer.2": np.ones(8, np.int32)}, "sites.0.dtype"),
        ({"layer.2": np.ones(8, np.int8)}, "files"),
    ],
)
def test_file_that_differs_from_its_manifest_is_refused(
    parsed: Manifest, tmp_path: Path, tensors: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidTensor) as caught:
        check(parsed, tmp_path / "f", save(tensors))
    assert caught.value.param == param


def test_file_cut_anywhere_or_padded_is_refused(parsed: Manifest, tmp_path: Path) -> None:
    whole = save({"layer.2": np.ones(8, np.float32)})
    for length in range(len(whole)):
        with pytest.raises(InvalidTensor, match="not a whole safetensors file"):
            check(parsed, tmp_path / "f", whole[:length])
    with pytest.raises(InvalidTensor, match="padded"):
        check(parsed, tmp_path / "f", whole + b"\0")


def entry(start: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        raw_file(b"{"),
        raw_file(b"[]"),
        raw_file(b"\xff"),
        raw_file(b"[" * 5000),
        raw_file({"a": 1}),
        raw_file({"a": entry(0, 4) | {"more": 1}}, b"\0" * 4),
        raw_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"\0" * 4),
        raw_file({"a": entry(0, 4, shape=[-1])}, b"\0" * 4),
        raw_file({"a": entry(0, 4, shape=[2**62, 4])}, b"\0" * 4),
        raw_file({"a": entry(4, 0)}, b"\0" * 4),
        raw_file({"a": entry(-4, 0)}, b"\0" * 4),
        raw_file({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4),
        raw_file({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
        raw_file({"a": entry(4, 8)}, b"\0" * 8),
        raw_file({"a": entry(0, 4, dtype="U32")}, b"\0" * 4),
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_malformed_header_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidTensor):
        read_header(BytesIO(content), FILE)


def test_header_longer_than_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with path.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(TooLarge, match="header has 2097153 bytes"):
        read_tensors(path)


@pytest.mark.parametrize("content", [pickle.dumps({"a": [1.0] * 9}), b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 90])
def test_pickle_with_another_name_is_refused_as_a_pickle(content: bytes) -> None:
    with pytest.raises(UnsupportedFile, match="is a pickle"):
        read_header(BytesIO(content), FILE)
