from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from server.cli.foreign import HEADER_BYTES, Activations
from steering_store.errors import InvalidTensor, StoreError, TooLarge
from tests.steering_store.mutations import mutations

DIGEST = "sha256:" + "a" * 64
ROOM = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "captured.safetensors"


def answer(**more: Any) -> bytes:
    """Two prompts of three and two tokens, at two sites, as POST /v1/activations writes them."""
    tensors = {}
    for prompt, tokens in enumerate((3, 2)):
        tensors[f"{prompt}.positions"] = np.arange(tokens)
        tensors[f"{prompt}.token_ids"] = np.arange(tokens) + 7
        for layer in (1, 12):
            values = np.full((tokens, 4), 100 * prompt + layer, np.float16)
            tensors[f"{prompt}.resid_post.{layer}"] = values
    return save(tensors | more, {"weights_digest": DIGEST, "0.text": "", "model": "tiny"})


def test_first_token_of_each_prompt_is_left_out(path: Path) -> None:
    path.write_bytes(answer())
    captured = Activations(path, DIGEST, ROOM)("resid_post", 1)
    assert captured.dtype == np.float32
    assert captured.tolist() == [[1] * 4, [1] * 4, [101] * 4]


@pytest.mark.parametrize(
    ("metadata", "ours", "words"),
    [
        (None, DIGEST, "doesn't say"),
        ({"weights_digest": ""}, DIGEST, "doesn't say"),
        ({"weights_digest": "sha256:" + "b" * 64}, DIGEST, "another model"),
        ({"weights_digest": DIGEST}, None, "another model"),
    ],
)
def test_activations_must_be_of_the_very_weights(
    path: Path, metadata: dict[str, str] | None, ours: str | None, words: str
) -> None:
    save_file({"0.resid_post.1": np.ones((9, 4), np.float32), "0.positions": np.arange(9)}, path, metadata)
    with pytest.raises(InvalidTensor, match=words):
        Activations(path, ours, ROOM)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"2.resid_post.1": np.ones((3, 4), np.float16)}, "no tensor '2.positions'"),
        ({"0.resid_post.1": np.ones((2, 4), np.float16)}, "means"),
        ({"0.resid_post.1": np.ones((3,), np.float16)}, "means"),
        ({"0.positions": np.arange(3)[:, None]}, "means"),
        ({"0.resid_post.1": np.ones((3, 5), np.float16)}, "differs in width"),
    ],
)
def test_what_does_not_belong_together_is_named(path: Path, more: dict[str, Any], words: str) -> None:
    path.write_bytes(answer(**more))
    with pytest.raises(InvalidTensor, match=words):
        Activations(path, DIGEST, ROOM)("resid_post", 1)


def test_more_than_the_limit_is_refused_before_it_is_read(path: Path) -> None:
    path.write_bytes(answer())
    with pytest.raises(TooLarge, match="100 bytes"):
        Activations(path, DIGEST, 99)("resid_post", 1)
    path.write_bytes((HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (HEADER_BYTES + 1))
    with pytest.raises(TooLarge, match="header"):
        Activations(path, DIGEST, ROOM)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", json.dumps({"a": 1}).encode()])
def test_what_is_no_answer_at_all_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"captured\.safetensors"):
        Activations(path, DIGEST, ROOM)


def test_changed_bytes_give_clear_errors_only(path: Path) -> None:
    original = answer()
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changes=st.lists(mutations(), min_size=1, max_size=3))
    def fuzz(changes: list[Callable[[bytes], bytes]]) -> None:
        raw = original
        for change in changes:
            raw = change(raw)
        path.write_bytes(raw)
        try:
            Activations(path, DIGEST, ROOM)("resid_post", 12)
            outcomes["read"] += 1
        except StoreError as exc:
            assert len(exc.message) < 1000
            outcomes["refused"] += 1

    fuzz()
    assert min(outcomes.values()) > 10, outcomes
