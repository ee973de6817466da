"""`POST /v1/activations` on a real server in float32: equal to transformers, through files, and refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from tests.server.engine.hooks import hooked

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

POINTS = ("resid_post", "mlp_act")
SITES = ["resid_post.11", "blocks.12.mlp.hook_post"]
NAMES = ("resid_post.11", "mlp_act.12")
MiB = 1 << 20
MEMORY_BYTES, MAX_BYTES = MiB, 96 * MiB
LONG = "The quick brown fox jumps over the lazy dog. " * 12
CHAT = {"messages": [{"role": "user", "content": "How was the film?"}]}
STEERING = {"interventions": [{"artifact": "one", "strength": 1.5}]}
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Prompts run in chunks, and little fits in memory."""
    data_dir = tmp_path_factory.mktemp("activations") / "data"
    settings = {
        "POLYHELM_POINTS": ",".join(POINTS),
        "POLYHELM_CAPTURE_MEMORY_BYTES": str(MEMORY_BYTES),
        "POLYHELM_MAX_CAPTURE_BYTES": str(MAX_BYTES),
    }
    with start_server(data_dir, "--dtype", "float32", "--max-num-batched-tokens", "48", **settings) as server:
        server.publish("one", seed=1)
        yield server


@pytest.fixture(scope="module")
def model(models: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(models / "smollm2", dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(models / "smollm2")


def post(server: Server, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/activations", json={"prompts": ["Hello there"], "sites": SITES} | fields)


def capture(server: Server, **fields: Any) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of the answer."""
    response = post(server, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/safetensors"
    assert int(response.headers["content-length"]) == len(response.content)
    size = int.from_bytes(response.content[:8], "little")
    return safetensors.numpy.load(response.content), json.loads(response.content[8 : 8 + size])["__metadata__"]


def spool_files(server: Server) -> list[Path]:
    return list((server.data_dir / "captures").rglob("*.rows"))


def assert_nothing_left(server: Server) -> None:
    """Folders go when the answer has been sent, or a moment after the client has left."""
    deadline = time.monotonic() + 20
    while left := [path for path in (server.data_dir / "captures").glob("*/*")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def reference(
    model: torch.nn.Module, ids: list[int], vectors: dict[int, torch.Tensor] | None = None
) -> dict[str, np.ndarray]:
    """What transformers computes for tokens, with vectors added to the residual stream."""
    seen: dict[str, np.ndarray] = {}

    def at(point: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        if point == "resid_post" and vectors and layer in vectors:
            x = x + vectors[layer]
        seen[f"{point}.{layer}"] = x.numpy().copy()
        return x

    with torch.no_grad(), hooked(model, POINTS, at):
        model(torch.tensor([ids]))
    return seen


def vectors(server: Server) -> dict[int, torch.Tensor]:
    """What STEERING adds."""
    return {layer: 1.5 * torch.from_numpy(server.vectors(1)[f"layer.{layer}"]) for layer in (10, 11)}


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-3 * np.linalg.norm(wanted, axis=-1).mean()


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("generation", [False, True], ids=["prompt", "generation"])
@pytest.mark.parametrize("positions", ["last", "mean", "all", [-1, 0, 3]], ids=str)
def test_activations_equal_transformers(
    server: Server, model: torch.nn.Module, positions: Any, generation: bool, steered: bool
) -> None:
    ids = [13, 904, 72, 1203, 88, 410]
    prompts = ["I watched the film last night and", ids, CHAT]
    fields = {"positions": positions, "generation": generation, "max_tokens": 6}
    if steered:
        fields["steering"] = STEERING
    tensors, metadata = capture(server, prompts=prompts, **fields)
    assert metadata["model"] == server.model
    assert metadata["weights_digest"] == server.capabilities["model"]["weights_digest"]
    assert len(tensors) == 3 * 4
    ran = 0
    for index in range(3):
        tokens = tensors[f"{index}.token_ids"].tolist()
        prompt_len = len(tokens) - 6
        assert metadata[f"{index}.finish_reason"] == "length"
        prompt = {"last": [prompt_len - 1], "mean": list(range(prompt_len)), "all": list(range(prompt_len))}
        rows = prompt[positions] if isinstance(positions, str) else [0, 3, prompt_len - 1]
        rows += range(prompt_len, len(tokens) - 1) if generation else []
        assert tensors[f"{index}.positions"].dtype == np.int64
        assert tensors[f"{index}.positions"].tolist() == rows
        wanted = reference(model, tokens[:-1], vectors(server) if steered else None)
        for name in NAMES:
            expected = wanted[name][rows]
            assert_close(tensors[f"{index}.{name}"], expected.mean(0) if positions == "mean" else expected)
        if steered:
            plain = reference(model, tokens[:-1])["resid_post.11"][rows]
            assert np.abs(plain - wanted["resid_post.11"][rows]).max() > 1, "the steering does nothing"
        ran += len(tokens) - 1
    assert tensors["1.token_ids"][:6].tolist() == ids
    if steered:
        (applied,) = json.loads(metadata["steering"])["applied"]
        assert (applied["artifact"], applied["tokens_touched"], applied["tokens_from_cache"]) == ("one", ran, 0)
    else:
        assert "steering" not in metadata
    assert_nothing_left(server)


def test_prompts_are_those_of_completions_and_chat(server: Server, tokenizer: Any) -> None:
    text = "où est le café ?"
    tensors, metadata = capture(server, prompts=[text, CHAT], max_tokens=8)
    assert tensors["0.token_ids"][:-8].tolist() == tokenizer(text)["input_ids"]
    assert metadata["0.text"] == server.text(prompt=text, max_tokens=8)
    chat = {"model": server.model, "max_tokens": 8, "temperature": 0, **CHAT}
    answer = server.client.post("/v1/chat/completions", json=chat).json()
    assert metadata["1.text"] == answer["choices"][0]["message"]["content"]
    assert len(tensors["1.token_ids"]) == answer["usage"]["total_tokens"]


def test_a_generation_that_stops_by_itself_has_no_row_too_many(server: Server, model: torch.nn.Module) -> None:
    """The engine runs the token behind the last one before it learns that this was the last."""
    prompt = {"messages": [{"role": "user", "content": "Answer with one word: what is the capital of France?"}]}
    found = {}
    for positions in ("all", "mean"):
        tensors, metadata = capture(server, prompts=[prompt], positions=positions, generation=True, max_tokens=200)
        assert metadata["0.finish_reason"] == "stop"
        tokens = tensors["0.token_ids"].tolist()
        assert tensors["0.positions"].tolist() == list(range(len(tokens) - 1))
        found[positions] = tensors["0.resid_post.11"]
    wanted = reference(model, tokens[:-1])["resid_post.11"]
    assert_close(found["all"], wanted)
    assert_close(found["mean"], wanted.mean(0))


@pytest.mark.parametrize("steering", [None, STEERING], ids=["plain", "steered"])
def test_the_prefix_cache_saves_no_token(server: Server, model: torch.nn.Module, steering: Any) -> None:
    fields = {"prompts": [LONG], "positions": "all"} | ({"steering": steering} if steering else {})
    answers = [capture(server, **fields)[0] for _ in range(2)]
    hits = server.metric("vllm:prefix_cache_hits_total")
    assert server.ask(prompt=LONG, max_tokens=1, **({"steering": steering} if steering else {})).status_code == 200
    assert server.metric("vllm:prefix_cache_hits_total") > hits, "the cache holds nothing: this proves nothing"
    wanted = reference(model, answers[0]["0.token_ids"].tolist()[:-1], vectors(server) if steering else None)
    assert len(wanted["resid_post.11"]) > 2 * 48
    for tensors in answers:
        for name in NAMES:
            assert_close(tensors[f"0.{name}"], wanted[name])


def test_a_large_capture_goes_through_files_and_equals_small_ones(server: Server) -> None:
    everywhere = {"points": list(POINTS), "layers": None}
    body = {"prompts": [LONG], "sites": everywhere, "positions": "all", "generation": True, "max_tokens": 3}
    with server.client.stream("POST", "/v1/activations", json=body) as response:
        assert response.status_code == 200
        size = int(response.headers["content-length"])
        assert size > 20 * MEMORY_BYTES
        files = spool_files(server)
        assert sum(file.stat().st_size for file in files) > size - MEMORY_BYTES
        large = safetensors.numpy.load(response.read())
    assert_nothing_left(server)
    tokens = len(large["0.token_ids"]) - 1
    assert len(large) == 2 + 2 * 30
    for name in ("resid_post.0", "resid_post.29", "mlp_act.17"):
        small, _ = capture(server, **body | {"sites": [name]})
        assert small[f"0.{name}"].nbytes < MEMORY_BYTES
        assert len(small[f"0.{name}"]) == tokens
        np.testing.assert_array_equal(small[f"0.{name}"], large[f"0.{name}"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types_are_the_rounded_numbers(server: Server, dtype: str) -> None:
    # Not the first token, whose activation is beyond float16 in many models.
    fields = {"positions": [-1, -2], "sites": ["resid_post.5"], "prompts": ["Hello there, my friend"]}
    exact, _ = capture(server, **fields)
    response = post(server, dtype=dtype, **fields)
    rounded = safetensors.torch.load(response.content)["0.resid_post.5"]
    wanted = torch.from_numpy(exact["0.resid_post.5"]).to(getattr(torch, dtype))
    assert rounded.dtype == wanted.dtype
    assert torch.equal(rounded, wanted)


def test_sampling_is_seeded(server: Server) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5}
    texts = [capture(server, seed=seed, **fields)[1]["0.text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("moment", ["while it runs", "while it is sent"])
def test_a_client_that_leaves_ends_the_request_and_leaves_no_file(server: Server, moment: str) -> None:
    server.wait_until_idle()
    generated = server.metric("vllm:generation_tokens_total")
    running = moment == "while it runs"
    body = {
        "prompts": [LONG] if not running else ["One, two, three, four,", LONG],
        "sites": {"points": ["resid_post"], "layers": list(range(12)) if running else None},
        "positions": "all",
        "generation": True,
        "max_tokens": 1500 if running else 2,
    }
    if running:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post("/v1/activations", json=body, timeout=4)
    else:
        with server.client.stream("POST", "/v1/activations", json=body) as response:
            assert response.status_code == 200
            assert spool_files(server)
    server.wait_until_idle()
    assert_nothing_left(server)
    assert server.metric("vllm:generation_tokens_total") - generated < 1500
    capture(server)


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompts": []}, 422, "prompts", "at least 1"),
    ({"prompts": ["a"] * 257}, 422, "prompts", "256"),
    ({"prompts": [3]}, 422, "prompts.0", "need a text"),
    ({"prompts": ["a", {"text": "b"}]}, 422, "prompts.1", "need a text"),
    ({"prompts": ["a", ""]}, 422, "prompts.1", "0 tokens"),
    ({"prompts": [[]]}, 422, "prompts.0", "0 tokens"),
    ({"prompts": [[1, 49152]]}, 422, "prompts.0.1", "below 49152"),
    ({"prompts": [[1, -1]]}, 422, "prompts.0.1", "below 49152"),
    ({"prompts": [[True]]}, 422, "prompts.0.0", "token id"),
    ({"prompts": [[5] * 2048]}, 422, "prompts.0", "1 to 2047"),
    ({"prompts": [[5] * 10], "max_tokens": 2040}, 422, "prompts.0", "1 to 8"),
    ({"prompts": [{"messages": "hello"}]}, 422, "prompts.0.messages", "messages"),
    ({"prompts": [{"messages": [{"role": "user", "content": 3}]}]}, 422, "prompts.0.messages", "messages.0"),
    ({"sites": []}, 422, "sites", "resid_post.14"),
    ({"sites": ["resid_post.11", "nowhere.3"]}, 422, "sites.1", "the points are"),
    ({"sites": ["resid_post.30"]}, 422, "sites.0", "30 layers"),
    ({"sites": {"points": ["resid_post"], "layers": [0, 30]}}, 422, "sites.layers.1", "0 to 29"),
    ({"sites": {"points": ["resid_post"], "layer": [0]}}, 422, "sites.layer", "remove it"),
    ({"sites": ["attn_out.3"]}, 400, "sites.0", "POLYHELM_POINTS"),
    ({"sites": {"points": ["resid_post", "head_out"]}}, 400, "sites.points.1", "POLYHELM_POINTS"),
    ({"positions": "first"}, 422, "positions", "last, mean, all"),
    ({"positions": []}, 422, "positions", "last, mean, all"),
    ({"positions": [0, "1"]}, 422, "positions.1", "integer"),
    ({"positions": [0, 40]}, 422, "positions.1", "outside a prompt of"),
    ({"max_tokens": 0}, 422, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "2"}, 422, "max_tokens", "integer"),
    ({"generation": "yes"}, 422, "generation", "boolean"),
    ({"temperature": -1}, 422, "temperature", "greater than or equal to 0"),
    ({"seed": 1.5}, 422, "seed", "integer"),
    ({"dtype": "int8"}, 422, "dtype", "float32"),
    ({"layers": [1]}, 422, "layers", "remove it"),
    ({"steering": {}}, 422, "steering.interventions", "required"),
    ({"steering": STEERING | {"mode": "frozen"}}, 400, "steering.mode", "frozen"),
    ({"steering": {"interventions": [{"artifact": "absent"}]}}, 404, "steering.interventions.0.artifact", "absent"),
    (
        {"steering": {"interventions": [{"artifact": "one", "apply": {"generation": "all"}}]}},
        400,
        "steering.interventions.0.apply",
        "the span is empty",
    ),
    (
        {"steering": {"interventions": [{"artifact": "one"}, {"artifact": "one"}], "conflict": "error"}},
        400,
        "steering.conflict",
        "the same direction",
    ),
]


@pytest.mark.parametrize(("fields", "status", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_captured_is_refused(
    server: Server, fields: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    response = post(server, **fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (status, param)
    assert words in error["message"]
    assert list((server.data_dir / "captures").glob("*/*")) == []


def test_what_is_too_large_is_refused_before_it_runs(server: Server) -> None:
    steps = server.metric("vllm:prompt_tokens_total")
    response = post(server, prompts=[[5] * 1000], sites={"points": list(POINTS)}, positions="all")
    assert response.status_code == 413
    error = response.json()["error"]
    assert str(1000 * 30 * (576 + 1536) * 4) in error["message"] and str(MAX_BYTES) in error["message"]
    assert server.metric("vllm:prompt_tokens_total") == steps
    # A mean of the same is small.
    capture(server, prompts=[[5] * 1000], sites={"points": list(POINTS)}, positions="mean")


def test_blocks_that_a_steered_capture_leaves_are_kept_apart_by_salt(
    start_server: Callable[..., Any], tmp_path: Path
) -> None:
    with start_server(tmp_path / "data", "--prefix-cache", "cache_salt") as server:
        server.publish("one", seed=1)
        assert server.capabilities["prefix_cache"] == "cache_salt"
        capture(server, prompts=[LONG], steering=STEERING)
        hits = [server.metric("vllm:prefix_cache_hits_total")]
        for steering in ({}, {"steering": STEERING}):
            assert server.ask(prompt=LONG, max_tokens=1, **steering).status_code == 200
            hits.append(server.metric("vllm:prefix_cache_hits_total"))
        assert hits[0] == hits[1] < hits[2]
