"""Steered requests as a user sends them, with the official client: what comes back, and that the receipt is true."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from openai import APIStatusError, OpenAI
from safetensors.numpy import load

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

ONE = {"artifact": "one", "strength": 1.0}
TWO = {"artifact": "two", "strength": 1.5}
PROMPT = "The weather today is"
MESSAGES: Any = [{"role": "user", "content": "How was the film?"}]


@pytest.fixture(scope="module")
def openai(server: Server) -> Iterator[OpenAI]:
    """The official client, unmodified."""
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def extra(*interventions: dict[str, Any]) -> dict[str, Any]:
    return {"steering": {"interventions": list(interventions)}}


def total(applied: dict[str, Any]) -> int:
    """Tokens of the span that were edited, now or when the cache was filled."""
    return int(applied["tokens_touched"]) + int(applied["tokens_from_cache"])


def fresh(text: str) -> str:
    """A prompt that no other request of this session has had, so that nothing of it is cached."""
    return f"{time.monotonic_ns()}. {text}"


def test_chat_answers_with_a_receipt(server: Server, openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model=server.model, messages=MESSAGES, max_tokens=12, temperature=0, extra_body=extra(ONE)
    )
    receipt = answer.steering  # type: ignore[attr-defined]
    (applied,) = receipt["applied"]
    published = server.client.get("/v1/artifacts/one/versions/1").json()
    assert receipt["fingerprint"].startswith("sha256:")
    assert (applied["artifact"], applied["version"], applied["digest"]) == ("one", 1, published["digest"])
    assert (applied["kind"], applied["op"], applied["strength"]) == ("steering_vector", "add", 1.0)
    assert applied["sites"] == ["resid_post.10", "resid_post.11"]
    assert answer.usage is not None
    assert total(applied) == answer.usage.prompt_tokens + answer.usage.completion_tokens - 1


def test_completion_answers_with_a_receipt(server: Server, openai: OpenAI) -> None:
    answer = openai.completions.create(
        model=server.model, prompt=fresh(PROMPT), max_tokens=12, temperature=0, extra_body=extra(ONE, TWO)
    )
    assert answer.usage is not None
    for applied in answer.steering["applied"]:  # type: ignore[attr-defined]
        assert applied["tokens_touched"] == answer.usage.prompt_tokens + answer.usage.completion_tokens - 1


@pytest.mark.parametrize("usage", [False, True], ids=["no usage", "usage"])
def test_chat_stream_carries_the_receipt_in_its_last_chunk_only(server: Server, openai: OpenAI, usage: bool) -> None:
    whole = openai.chat.completions.create(
        model=server.model, messages=MESSAGES, max_tokens=12, temperature=0, extra_body=extra(ONE)
    )
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    stream = openai.chat.completions.create(
        model=server.model,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        extra_body=extra(ONE),
        **options,
    )
    chunks = list(stream)
    assert [index for index, chunk in enumerate(chunks) if hasattr(chunk, "steering")] == [len(chunks) - 1]
    (streamed,), (expected,) = chunks[-1].steering["applied"], whole.steering["applied"]  # type: ignore[attr-defined]
    assert total(streamed) == total(expected)
    assert chunks[-1].steering["fingerprint"] == whole.steering["fingerprint"]  # type: ignore[attr-defined]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert (chunks[-1].usage is not None) == usage


def test_completion_stream_equals_the_whole_answer(server: Server, openai: OpenAI) -> None:
    chunks = list(
        openai.completions.create(
            model=server.model, prompt=PROMPT, max_tokens=12, temperature=0, stream=True, extra_body=extra(TWO)
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == server.text(TWO, max_tokens=12)
    (applied,) = chunks[-1].steering["applied"]  # type: ignore[attr-defined]
    assert total(applied) == 4 + 12 - 1


def test_unsteered_answers_have_no_receipt(server: Server, openai: OpenAI) -> None:
    answer = openai.completions.create(model=server.model, prompt=PROMPT, max_tokens=2)
    chunks = list(openai.completions.create(model=server.model, prompt=PROMPT, max_tokens=2, stream=True))
    assert not any(hasattr(each, "steering") for each in (answer, *chunks))


def test_refusal_reaches_the_official_client_as_its_own_exception(server: Server, openai: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(APIStatusError) as error:
            openai.completions.create(
                model=server.model, prompt=PROMPT, stream=stream, extra_body=extra({"artifact": "nobody"})
            )
        assert error.value.status_code == 404
        assert error.value.param == "steering.interventions.0.artifact"


@pytest.mark.parametrize(
    ("apply", "expected"),
    [
        ({}, lambda p, g: p + g - 1),
        ({"prompt": "all"}, lambda p, g: p),
        ({"generation": "all"}, lambda p, g: g - 1),
        ({"prompt": "all", "generation": "all"}, lambda p, g: p + g - 1),
        ({"prompt_positions": [-1]}, lambda p, g: 1),
        ({"prompt_positions": [0, -1, 0]}, lambda p, g: 2),
        ({"prompt_window": [1, 3]}, lambda p, g: 2),
        ({"prompt_window": [-2, None]}, lambda p, g: 2),
        ({"prompt_window": [1, 9999]}, lambda p, g: p - 1),
        ({"generation_window": [2, 5]}, lambda p, g: 3),
        ({"generation_window": [2, None]}, lambda p, g: g - 3),
        ({"generation_window": [4, 9999]}, lambda p, g: g - 5),
        ({"prompt_positions": [-1], "generation_window": [0, 2]}, lambda p, g: 3),
        ({"exclude_prompt_positions": [0, 1]}, lambda p, g: p + g - 3),
        ({"exclude_prompt_window": [0, -1]}, lambda p, g: g),
        ({"exclude_generation_window": [0, 3]}, lambda p, g: p + g - 4),
        ({"prompt": "all", "exclude_prompt_positions": [-1]}, lambda p, g: p - 1),
    ],
)
def test_tokens_touched_is_exactly_the_span(
    server: Server, apply: dict[str, Any], expected: Callable[[int, int], int]
) -> None:
    answer = server.complete(ONE | {"apply": apply}, prompt=fresh(PROMPT), max_tokens=9, ignore_eos=True)
    (applied,) = answer["steering"]["applied"]
    usage = answer["usage"]
    assert applied["tokens_touched"] == expected(usage["prompt_tokens"], usage["completion_tokens"])
    assert applied["tokens_from_cache"] == 0


def test_each_intervention_has_its_own_span_and_count(server: Server) -> None:
    steering = (ONE | {"apply": {"prompt": "all"}}, TWO | {"apply": {"generation_window": [0, 2]}}, ONE)
    answer = server.complete(*steering, prompt=fresh(PROMPT), max_tokens=6, ignore_eos=True)
    prompt = answer["usage"]["prompt_tokens"]
    assert [each["tokens_touched"] for each in answer["steering"]["applied"]] == [prompt, 2, prompt + 5]


def test_several_choices_are_counted_together(server: Server) -> None:
    answer = server.complete(ONE, prompt=fresh(PROMPT), n=2, temperature=1.0, max_tokens=7, ignore_eos=True, seed=3)
    (applied,) = answer["steering"]["applied"]
    assert len({choice["text"] for choice in answer["choices"]}) == 2
    assert total(applied) == 2 * (answer["usage"]["prompt_tokens"] + 6)


def test_several_prompts_are_counted_together(server: Server) -> None:
    prompts = [fresh("A cat"), fresh("The capital of France is"), fresh("Once upon a time there was")]
    lengths = [
        server.client.post("/tokenize", json={"model": server.model, "prompt": prompt}).json()["count"]
        for prompt in prompts
    ]
    answer = server.complete(ONE, prompt=prompts, max_tokens=5, ignore_eos=True)
    (applied,) = answer["steering"]["applied"]
    assert applied["tokens_touched"] == sum(lengths) + 3 * 4
    assert len(answer["choices"]) == 3


def test_strength_decides_how_far_the_text_moves(server: Server) -> None:
    plain = server.text(max_tokens=16)
    assert server.text(ONE | {"strength": 0}, max_tokens=16) == plain
    texts = {server.text(ONE | {"strength": strength}, max_tokens=16) for strength in (-2.0, 1.0, 4.0)}
    assert len(texts | {plain}) == 4


def test_norm_relative_steering_moves_the_text(server: Server) -> None:
    answer = server.complete({"artifact": "one", "op": "add_norm", "strength": -0.7}, max_tokens=16)
    (applied,) = answer["steering"]["applied"]
    assert (applied["op"], applied["relative_dose"]) == ("add_norm", 0.7)
    assert answer["choices"][0]["text"] != server.text(max_tokens=16)


def test_steered_and_unsteered_requests_in_turn_leave_no_trace_on_each_other(server: Server) -> None:
    prompt = "It was a long winter, and the people of the village had little left to eat. " * 8
    kinds: list[tuple[dict[str, Any], ...]] = [(), (ONE,), (TWO,), (), (ONE, TWO)]
    first = [server.text(*kind, prompt=prompt, max_tokens=12) for kind in kinds]
    again = [server.text(*kind, prompt=prompt, max_tokens=12) for kind in reversed(kinds)]
    assert first[0] == first[3]
    assert len(set(first)) == 4
    assert first == again[::-1]


def test_second_steered_request_finds_its_own_blocks_in_the_prefix_cache(server: Server) -> None:
    prompt = fresh("It was a long winter, and the people of the village had little left to eat. " * 8)
    unsteered = server.text(prompt=prompt, max_tokens=12)
    first, second = (server.complete(ONE, prompt=prompt, max_tokens=12, ignore_eos=True) for _ in range(2))
    ((cold,), (warm,)) = first["steering"]["applied"], second["steering"]["applied"]
    length = first["usage"]["prompt_tokens"]
    assert (cold["tokens_touched"], cold["tokens_from_cache"]) == (length + 11, 0)
    assert warm["tokens_from_cache"] >= length - 64
    assert total(warm) == length + 11
    assert first["choices"][0]["text"] == second["choices"][0]["text"] != unsteered


def test_edits_of_generation_only_share_the_prompt_with_everybody(server: Server) -> None:
    prompt = fresh("It was a long winter, and the people of the village had little left to eat. " * 8)
    server.text(prompt=prompt, max_tokens=1)
    hits = server.metric("vllm:prefix_cache_hits_total")
    (applied,) = server.complete(ONE | {"apply": {"generation": "all"}}, prompt=prompt, ignore_eos=True)["steering"][
        "applied"
    ]
    assert server.metric("vllm:prefix_cache_hits_total") > hits
    assert (applied["tokens_touched"], applied["tokens_from_cache"]) == (7, 0)


def test_logprobs_are_those_of_the_steered_model(server: Server) -> None:
    steered, plain = (server.complete(*kind, logprobs=2, max_tokens=3) for kind in ((ONE,), ()))
    first, other = (answer["choices"][0]["logprobs"]["top_logprobs"][0] for answer in (steered, plain))
    assert len(steered["choices"][0]["logprobs"]["tokens"]) == 3
    assert first != other


def test_stop_ends_a_steered_text(server: Server) -> None:
    text = server.text(ONE, max_tokens=16)
    stop = text.strip().split()[2]
    choice = server.complete(ONE, max_tokens=16, stop=[stop])["choices"][0]
    assert (choice["finish_reason"], choice["text"]) == ("stop", text[: text.index(stop)])


def test_structured_output_holds_under_steering(server: Server, openai: OpenAI) -> None:
    colour = {"type": "string", "enum": ["red", "green", "blue"]}
    schema = {"type": "object", "properties": {"colour": colour}, "required": ["colour"], "additionalProperties": False}
    answer = openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Name a colour as JSON."}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}},
        extra_body=extra(TWO | {"strength": 0.4}),
    )
    assert json.loads(answer.choices[0].message.content or "")["colour"] in colour["enum"]
    assert total(answer.steering["applied"][0]) > 0  # type: ignore[attr-defined]


def test_tools_work_under_steering(server: Server, openai: OpenAI) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": city}}
    answer = openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        max_tokens=100,
        temperature=0,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        extra_body=extra(ONE | {"strength": 0.2}),
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "weather"  # type: ignore[union-attr]
    assert total(answer.steering["applied"][0]) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/version", "/metrics", "/livez", "/readyz", "/openapi.json"]
)
def test_vllms_and_our_own_routes_answer(server: Server, path: str) -> None:
    assert server.client.get(path).status_code == 200


def test_models_and_tokenize_are_vllms(server: Server, openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == [server.model]
    assert server.client.post("/tokenize", json={"model": server.model, "prompt": PROMPT}).json()["count"] == 4


def test_capabilities_name_the_model_and_the_limits(server: Server) -> None:
    told = server.capabilities
    assert (told["layers"], told["hidden_size"], told["limits"]["bank_bytes"]) == (30, 576, 256 << 20)
    assert (told["prefix_cache"], told["captures"], told["limits"]["max_edits"]) == ("tagged", None, 16)
    widths = {point: described["width"] for point, described in told["points"].items()}
    assert widths == {
        "resid_post": 576,
        "mlp_out": 576,
        "attn_out": 576,
        "head_out": 576,
        "mlp_act": 1536,
        "resid_pre": 576,
    }
    assert all(described["opcodes"] == told["opcodes"] for described in told["points"].values())


def test_strength_and_layers_come_from_the_artifact(server: Server) -> None:
    (applied,) = server.complete({"artifact": "one"})["steering"]["applied"]
    assert (applied["strength"], applied["sites"]) == (2.0, ["resid_post.10", "resid_post.11"])
    server.publish("no-default-layers", seed=1, default_layers=None)
    (applied,) = server.complete({"artifact": "no-default-layers"})["steering"]["applied"]
    assert applied["sites"] == ["resid_post.10", "resid_post.11", "resid_post.12"]


@pytest.mark.parametrize("layers", [[10], [12, 11], [10, 11, 12]])
def test_relative_dose_follows_from_the_published_tensors(server: Server, layers: list[int]) -> None:
    url = "/v1/artifacts/one/versions/1"
    vectors = load(server.client.get(f"{url}/files/vectors.safetensors").content)
    h_norm = server.client.get(url).json()["manifest"]["h_norm"]
    doses = [3.0 * float(np.linalg.norm(vectors[f"layer.{layer}"])) / h_norm[str(layer)] for layer in layers]
    (applied,) = server.complete(ONE | {"strength": -3.0, "layers": layers})["steering"]["applied"]
    assert applied["relative_dose"] == pytest.approx(max(doses), rel=1e-5)


def test_relative_dose_is_null_where_the_artifact_has_no_norms(server: Server) -> None:
    server.publish("no-norms", seed=1, h_norm={})
    (applied,) = server.complete({"artifact": "no-norms"})["steering"]["applied"]
    assert applied["relative_dose"] is None


def test_reference_by_name_version_and_digest(server: Server) -> None:
    first, second = (server.publish("versioned", seed=seed) for seed in (31, 32))
    found = [
        server.complete({"artifact": reference})
        for reference in ("versioned", "versioned@1", f"versioned@{first['digest']}", f"versioned@{second['digest']}")
    ]
    applied = [answer["steering"]["applied"][0] for answer in found]
    assert [each["version"] for each in applied] == [2, 1, 1, 2]
    assert [each["digest"] for each in applied] == [
        second["digest"],
        first["digest"],
        first["digest"],
        second["digest"],
    ]
    texts = [answer["choices"][0]["text"] for answer in found]
    assert texts[0] == texts[3] != texts[1] == texts[2]


def test_equal_vectors_steer_equally_whatever_their_name(server: Server) -> None:
    server.publish("copy-of-one", seed=1)
    assert server.text({"artifact": "copy-of-one"}, max_tokens=12) == server.text({"artifact": "one"}, max_tokens=12)


def test_fitted_vector_steers(server: Server, fitted: dict[str, Any]) -> None:
    answer = server.complete({"artifact": fitted["artifact"], "strength": 2.0}, max_tokens=16)
    (applied,) = answer["steering"]["applied"]
    assert (applied["artifact"], applied["version"]) == ("fitted", 1)
    assert applied["relative_dose"] > 0
    assert answer["choices"][0]["text"] != server.text(max_tokens=16)


def leave_in_the_middle(server: Server, chunks: int) -> None:
    """Ask for a long stream and close the connection after some of its chunks."""
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True} | extra(
        ONE
    )
    with (
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        for _ in range(chunks):
            next(lines)


def test_client_that_leaves_in_the_middle_frees_the_engine(server: Server) -> None:
    for chunks in range(3):
        leave_in_the_middle(server, chunks)
    server.wait_until_idle()
    assert server.text(TWO)


def test_client_that_leaves_before_a_whole_answer_frees_the_engine(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            "/v1/completions",
            json={"model": server.model, "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True} | extra(ONE),
            timeout=1.5,
        )
    server.wait_until_idle()
    assert server.text(ONE)


def test_concurrent_mixed_streams_each_get_their_own_steering(server: Server) -> None:
    kinds: list[tuple[dict[str, Any], ...]] = [
        (),
        (ONE,),
        (TWO,),
        (ONE, TWO),
        ({"artifact": "one", "op": "add_norm", "strength": 0.6},),
        (ONE | {"apply": {"generation": "all"}},),
    ]

    def run(index: int) -> tuple[str, list[int]]:
        kind = kinds[index % len(kinds)]
        body = {"model": server.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True} | (extra(*kind) if kind else {})
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert data[-1] == "[DONE]"
        chunks = [json.loads(line) for line in data[:-1]]
        applied = chunks[-1].get("steering", {"applied": []})["applied"]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]), [total(a) for a in applied]

    with ThreadPoolExecutor(24) as pool:
        results = list(pool.map(run, range(24)))
    expected = [[], [27], [27], [27, 27], [27], [23]]
    for index, (_, counts) in enumerate(results):
        assert counts == expected[index % len(kinds)]
    # Batched arithmetic may break a tie otherwise than alone, but no two kinds may come out the same.
    texts = [{text for text, _ in results[kind :: len(kinds)]} for kind in range(len(kinds))]
    assert sum(len(each) for each in texts) == len(set.union(*texts))
    server.wait_until_idle()


def test_an_idle_connection_stays_open_longer_than_clients_keep_it(server: Server) -> None:
    where = httpx.URL(server.base_url)
    connection = http.client.HTTPConnection(where.host, where.port, timeout=60)
    connection.auto_open = 0  # a closed connection is an error, not silently a new one
    with closing(connection):
        connection.connect()
        for pause in (6, 0):
            connection.request("GET", "/livez")
            assert connection.getresponse().read() is not None
            time.sleep(pause)
