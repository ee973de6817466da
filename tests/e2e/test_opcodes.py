"""Artifacts of every kind, published and used over HTTP: each op, gates, frozen mode, conflicts, doses, refusals."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

FILE = "tensors.safetensors"
PROMPT = "The weather today is"
MESSAGES = [{"role": "user", "content": "How was the film?"}]
LAYERS, LAYER, OTHER = (10, 11, 12), 11, 14
FEATURES, RANK = 64, 4
BLOCK = 32
"""Tokens of a block of the prefix cache, as conftest.py starts the server."""
DTYPES = {"float32": "F32", "int64": "I64", "int32": "I32"}
Tensors = dict[tuple[int, str | None], np.ndarray]
RNG = np.random.default_rng(7)


def unit_rows(*shape: int) -> np.ndarray:
    rows = RNG.standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def publish(server: Server, name: str, kind: str, point: str, tensors: Tensors, **changes: Any) -> dict[str, Any]:
    """Publish tensors, by layer and role."""
    names = {key: f"{key[0]}.{key[1]}" for key in tensors}
    widths = {each: server.capabilities["points"][each]["width"] for each in ("head_out", "mlp_act")}
    manifest = server.manifest(
        kind=kind,
        default_layers=None,
        default_strength=1.0,
        h_norm={str(layer): 80.0 for layer, _ in tensors},
        sites=[
            {
                "point": point,
                "layer": layer,
                "role": role,
                "file": FILE,
                "tensor": names[layer, role],
                "shape": list(tensor.shape),
                "dtype": DTYPES[tensor.dtype.name],
            }
            for (layer, role), tensor in tensors.items()
        ],
        **changes,
    )
    manifest["model"] = manifest["model"] | {"widths": widths}
    file = save({names[key]: np.ascontiguousarray(tensor) for key, tensor in tensors.items()})
    response = server.send_artifact(name, manifest, {FILE: file})
    assert response.status_code in (200, 201), response.text
    version: dict[str, Any] = response.json()
    return version


ALONE = ("mlp_out", "attn_out", "head_out", "mlp_act", "resid_pre")
"""Points at which one artifact each acts here; most others act at resid_post."""


@pytest.fixture(scope="module")
def artifacts(server: Server) -> dict[str, Any]:
    """Artifacts of every kind and point, by name."""
    hidden, neurons = server.capabilities["hidden_size"], server.capabilities["points"]["mlp_act"]["width"]
    vectors: Tensors = {(layer, None): 60 * unit_rows(hidden) for layer in LAYERS}
    dictionary: Tensors = {
        (LAYER, "encoder"): unit_rows(FEATURES, hidden),
        (LAYER, "encoder_bias"): np.full(FEATURES, 0.5, np.float32),
        (LAYER, "threshold"): np.zeros(FEATURES, np.float32),
        (LAYER, "decoder"): unit_rows(FEATURES, hidden),
    }
    made = {
        "vector": publish(server, "vector", "steering_vector", "resid_post", vectors),
        "neurons": publish(
            server, "neurons", "neuron_set", "mlp_act", {(n, None): np.arange(0, neurons, 2) for n in LAYERS}
        ),
        "no-neurons": publish(server, "no-neurons", "neuron_set", "mlp_act", {(10, None): np.array([], np.int32)}),
        "dense": publish(
            server, "dense", "linear_map", "resid_post", {(n, "matrix"): unit_rows(hidden, hidden) for n in LAYERS}
        ),
        "sae": publish(server, "sae", "sae", "resid_post", dictionary, activation="jumprelu"),
        "condition": publish(server, "condition", "steering_vector", "resid_post", vectors),
    }
    left, right = unit_rows(hidden, RANK), unit_rows(RANK, hidden)
    factors: Tensors = {(LAYER, "left"): left, (LAYER, "right"): right}
    made["factored"] = publish(server, "factored", "linear_map", "resid_post", factors)
    made["product"] = publish(server, "product", "linear_map", "resid_post", {(LAYER, "matrix"): left @ right})
    for point in ALONE:
        name, width = f"at-{point.replace('_', '-')}", server.capabilities["points"][point]["width"]
        layers = (0,) if point == "resid_pre" else LAYERS
        made[name] = publish(server, name, "steering_vector", point, {(n, None): 20 * unit_rows(width) for n in layers})
    return made


CLOSED = {"artifact": "condition", "threshold": 1.1}
"""No cosine is above 1.1."""
OPEN = {"artifact": "condition", "threshold": -1.1}
CLAMP = {"index": 3, "op": "clamp", "value": 60.0}

OPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "add": ({"artifact": "vector"}, ["add"]),
    "add_norm": ({"artifact": "vector", "op": "add_norm", "strength": 0.6}, ["add_norm"]),
    "ablate": ({"artifact": "vector", "op": "ablate"}, ["rank"]),
    "cap": ({"artifact": "vector", "op": "clamp", "min": 40.0}, ["rank"]),
    "pin": ({"artifact": "vector", "op": "clamp", "value": 60}, ["rank"]),
    "set": ({"artifact": "vector", "op": "set", "layers": [12]}, ["set"]),
    "scale": ({"artifact": "neurons", "strength": -1.0}, ["scale"]),
    "map": ({"artifact": "dense", "strength": 0.5}, ["map"]),
    "factored map": ({"artifact": "factored", "strength": 30.0}, ["map"]),
    "features": (
        {
            "artifact": "sae",
            "features": [
                CLAMP,
                {"index": 5, "op": "add", "value": 50.0},
                {"index": 7, "op": "scale", "value": 9.0},
                {"index": 9, "op": "ablate"},
                {"index": 11, "op": "clamp", "min": 10.0},
            ],
        },
        ["rank", "add"],
    ),
    "renorm": ({"artifact": "vector", "renorm": True}, ["add", "renorm"]),
    "gate for tokens": ({"artifact": "vector", "condition": OPEN}, ["gate", "add"]),
    "gate for the sequence": (
        {"artifact": "vector", "condition": OPEN | {"scope": "sequence", "site": "blocks.10.hook_resid_post"}},
        ["gate", "add"],
    ),
    **{point: ({"artifact": f"at-{point.replace('_', '-')}"}, ["add"]) for point in ALONE},
}


def chat(server: Server, *interventions: Mapping[str, Any], **fields: Any) -> httpx.Response:
    steering = {"interventions": list(interventions)} | fields.pop("steering", {})
    body = {"model": server.model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | fields
    return server.client.post("/v1/chat/completions", json=body | ({"steering": steering} if interventions else {}))


def complete(server: Server, *interventions: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A completion with log-probabilities, and with fields of `steering` beside its interventions."""
    steering = {"interventions": list(interventions)} | fields.pop("steering", {})
    response = server.ask(logprobs=1, **({"steering": steering} if interventions else {}), **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def numbers(answer: dict[str, Any]) -> tuple[str, list[float]]:
    """The text and the log-probabilities of its tokens."""
    (choice,) = answer["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("name", OPS)
def test_every_op_steers_completions_and_chats_and_says_so(
    server: Server, artifacts: dict[str, Any], name: str
) -> None:
    intervention, opcodes = OPS[name]
    steered = complete(server, intervention)
    assert numbers(steered) != numbers(complete(server))
    answered = chat(server, intervention)
    assert answered.status_code == 200, answered.text
    for answer in (steered, answered.json()):
        (applied,) = answer["steering"]["applied"]
        published = artifacts[intervention["artifact"]]
        assert (applied["digest"], applied["kind"]) == (published["digest"], published["manifest"]["kind"])
        assert [edit["opcode"] for edit in applied["edits"]] == opcodes
        usage = answer["usage"]
        tokens = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        touched = applied["tokens_touched"] + applied["tokens_from_cache"]
        if name == "gate for the sequence":
            # It decides at the last prompt token, and the layers edited are those behind it.
            assert touched <= tokens - usage["prompt_tokens"] + 1
            assert applied["tokens_touched"] > 0
        else:
            assert touched == tokens
        for edit in applied["edits"]:
            assert (edit["relative_dose"] is None) == (edit["opcode"] in ("map", "renorm", "gate"))


@pytest.mark.parametrize(
    "intervention",
    [
        *(
            {**intervention, "strength": 0.0}
            for intervention, _ in OPS.values()
            if intervention.get("op") != "set" and not intervention.get("renorm")
        ),
        {"artifact": "no-neurons", "strength": 5.0},
        {"artifact": "vector", "condition": CLOSED},
        {"artifact": "vector", "op": "ablate", "condition": CLOSED | {"scope": "sequence", "layer": 10}},
        {"artifact": "vector", "op": "clamp", "min": -1e4, "max": 1e4},
    ],
    ids=str,
)
def test_what_must_change_nothing_changes_nothing(
    server: Server, artifacts: dict[str, Any], intervention: dict[str, Any]
) -> None:
    assert numbers(complete(server, intervention)) == numbers(complete(server))


def test_closed_gate_touches_no_token_and_was_read_at_every_one(server: Server, artifacts: dict[str, Any]) -> None:
    (applied,) = complete(server, {"artifact": "vector", "condition": CLOSED}, prompt="Never seen: the sea is")[
        "steering"
    ]["applied"]
    gate, add = applied["edits"]
    assert (add["tokens_touched"], applied["tokens_touched"]) == (0, 0)
    assert gate["tokens_touched"] > 8
    assert applied["condition"] == f"condition@{artifacts['condition']['digest']}"


def test_gate_that_is_open_below_its_threshold(server: Server, artifacts: dict[str, Any]) -> None:
    above = {"artifact": "vector", "condition": OPEN}
    below = {"artifact": "vector", "condition": CLOSED | {"above": False}}
    assert numbers(complete(server, above)) == numbers(complete(server, below))
    assert numbers(complete(server, above)) == numbers(complete(server, {"artifact": "vector"}))


def test_dense_map_equals_its_factors(server: Server, artifacts: dict[str, Any]) -> None:
    text, dense = numbers(complete(server, {"artifact": "product", "strength": 20.0}))
    other, factored = numbers(complete(server, {"artifact": "factored", "strength": 20.0}))
    assert text == other
    np.testing.assert_allclose(dense, factored, atol=0.05)


def test_streams_carry_the_receipt_of_every_edit(server: Server, artifacts: dict[str, Any]) -> None:
    intervention, opcodes = OPS["features"]
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stream": True}
    response = server.client.post("/v1/completions", json=body | {"steering": {"interventions": [intervention]}})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    (applied,) = chunks[-1]["steering"]["applied"]
    assert [edit["opcode"] for edit in applied["edits"]] == opcodes


# ---- frozen mode


@pytest.mark.parametrize(("name", "sites"), [("vector", 30), ("at-mlp-act", 30), ("at-resid-pre", 1)])
def test_frozen_mode_without_an_effect_puts_back_what_was_there(
    server: Server, artifacts: dict[str, Any], name: str, sites: int
) -> None:
    nothing = {"artifact": name, "strength": 0.0}
    frozen = complete(server, nothing, steering={"mode": "frozen"}, prompt=f"Frozen {name}: the sky is")
    assert numbers(frozen) == numbers(complete(server, prompt=f"Frozen {name}: the sky is"))
    assert frozen["steering"]["mode"] == "frozen"
    (put_back,) = frozen["steering"]["frozen"]
    assert (put_back["opcode"], put_back["tokens_touched"], len(put_back["sites"])) == ("set", 1, sites)


def test_frozen_edits_do_not_act_on_each_other(server: Server, artifacts: dict[str, Any]) -> None:
    apply = {"prompt_positions": [-1]}
    earlier = {"artifact": "vector", "layers": [10], "apply": apply}
    scale = {"artifact": "vector", "op": "add_norm", "strength": 0.7, "layers": [12], "apply": apply}
    last = {"max_tokens": 1, "prompt": "One token only: the sky is"}
    (live,) = numbers(complete(server, earlier, scale, **last))[1]
    (frozen,) = numbers(complete(server, earlier, scale, **last, steering={"mode": "frozen"}))[1]
    # All layers are overwritten at the last prompt token, so that its prediction is that of the last, which is clean
    # but for the rounding of bfloat16: a layer returns the stream as a sum, of which one part is written.
    (clean,) = numbers(complete(server, **last))[1]
    assert abs(frozen - clean) < 0.02
    assert abs(live - clean) > 0.1


def test_frozen_mode_streams_and_takes_several_choices_and_chats(server: Server, artifacts: dict[str, Any]) -> None:
    intervention = {"artifact": "at-mlp-out", "strength": 3.0}
    # As good as greedy, of which vLLM gives one choice only.
    sampling = {"temperature": 1, "top_k": 1}
    answer = chat(server, intervention, steering={"mode": "frozen"}, n=2, **sampling)
    assert answer.status_code == 200, answer.text
    first, second = (choice["message"]["content"] for choice in answer.json()["choices"])
    assert first == second
    (applied,) = answer.json()["steering"]["applied"]
    assert applied["tokens_touched"] + applied["tokens_from_cache"] == 2
    streamed = chat(server, intervention, steering={"mode": "frozen"}, stream=True, **sampling)
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == first
    assert chunks[-1]["steering"]["mode"] == "frozen"


def test_frozen_mode_keeps_what_shapes_the_prompt_and_drops_what_shapes_the_answer(
    server: Server, artifacts: dict[str, Any]
) -> None:
    function = {"name": "rate", "parameters": {"type": "object", "properties": {"stars": {"type": "integer"}}}}
    answer = chat(
        server,
        {"artifact": "at-mlp-out"},
        steering={"mode": "frozen"},
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        min_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.status_code == 200, answer.text
    (put_back,) = answer.json()["steering"]["frozen"]
    assert put_back["tokens_touched"] == 1
    assert answer.json()["usage"]["completion_tokens"] > 1


def test_second_pass_reuses_the_prompt_but_for_its_last_block(server: Server, artifacts: dict[str, Any]) -> None:
    prompt = "Reused. " + "word " * 200
    tokens = server.client.post("/tokenize", json={"model": server.model, "prompt": prompt}).json()["count"]
    hits = server.metric("vllm:prefix_cache_hits_total")
    complete(server, {"artifact": "vector"}, steering={"mode": "frozen"}, prompt=prompt, max_tokens=2)
    # At least one token always runs, so that of a prompt of whole blocks the last one is run again.
    assert server.metric("vllm:prefix_cache_hits_total") - hits == (tokens - 1) // BLOCK * BLOCK


# ---- uploads

BIG = 5
"""Dense maps of every layer, some 40 MB each."""
CHUNK = 4 << 20
"""Bytes that are written between two steps."""


SEEN = 8
"""Chunks between the first and the last look at an upload that say something."""


def test_a_large_upload_lets_a_running_request_have_a_step_for_each_chunk(server: Server) -> None:
    # A busy machine may let us look too late, or too seldom.
    for attempt in range(4):
        chunks, tokens = steps_of_an_upload(server, f"big-{attempt}")
        if chunks >= SEEN:
            assert tokens > chunks / 2
            return
    pytest.fail("too little of the uploads was seen")


def steps_of_an_upload(server: Server, name: str) -> tuple[float, float]:
    """Chunks that were uploaded, and tokens that were generated, between two looks at an upload under way."""
    hidden, layers = server.capabilities["hidden_size"], server.capabilities["layers"]
    maps = RNG.standard_normal((layers, hidden, hidden)).astype(np.float32)
    for index in range(BIG):
        maps[0, 0, 0] = index
        publish(server, f"{name}-{index}", "linear_map", "resid_post", {(n, "matrix"): maps[n] for n in range(layers)})
    before, _ = progress(server)
    total, samples = BIG * maps.nbytes, []
    assert total > 190e6
    interventions = [{"artifact": f"{name}-{index}", "strength": 1e-6} for index in range(BIG)]
    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(keep_one_running, server, done)
        try:
            steered = pool.submit(complete, server, *interventions, max_tokens=1)
            while not steered.done() and not running.done():
                samples.append(progress(server))
        finally:
            done.set()
        running.result()
        assert len(steered.result()["steering"]["applied"]) == BIG
    meanwhile = [(uploaded, tokens) for uploaded, tokens in samples if before < uploaded < before + total]
    if not meanwhile:
        return 0, 0
    (first, at_first), (last, at_last) = meanwhile[0], meanwhile[-1]
    return (last - first) / CHUNK, at_last - at_first


def keep_one_running(server: Server, done: threading.Event) -> None:
    body = {"model": server.model, "prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    while not done.is_set():
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            for _ in response.iter_lines():
                if done.is_set():
                    return


def progress(server: Server) -> tuple[float, float]:
    """Bytes uploaded to the bank, and tokens generated, both of one moment."""
    lines = server.client.get("/metrics").text.splitlines()

    def value(name: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[ {{]", line))

    return value("polyhelm_bank_uploaded_bytes_total"), value("vllm:generation_tokens_total")


# ---- refusals


def assert_refused(response: httpx.Response, status: int, param: str, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (status, param), error["message"]
    for word in words:
        assert word in error["message"]


def ask(server: Server, *interventions: Mapping[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 4}
    body |= {name: fields.pop(name) for name in ("prompt", "max_tokens") if name in fields}
    return server.client.post(
        "/v1/completions", json=body | {"steering": {"interventions": list(interventions)} | fields}
    )


def test_conflict_is_refused_only_where_asked_for(server: Server, artifacts: dict[str, Any]) -> None:
    pair = ({"artifact": "vector"}, {"artifact": "condition", "strength": -0.5})
    words = ("interventions 0 and 1", "resid_post.10")
    assert ask(server, *pair).status_code == 200
    assert_refused(ask(server, *pair, conflict="error"), 400, "steering.conflict", *words)
    assert_refused(chat(server, *pair, steering={"conflict": "error"}), 400, "steering.conflict", *words)
    apart = (
        {"artifact": "vector", "apply": {"prompt": "all"}},
        {"artifact": "condition", "apply": {"generation": "all"}},
    )
    assert ask(server, *apart, conflict="error").status_code == 200
    apart = ({"artifact": "vector", "layers": [10]}, {"artifact": "condition", "layers": [11]})
    assert ask(server, *apart, conflict="error").status_code == 200
    map_too = ({"artifact": "dense"}, {"artifact": "sae", "features": [CLAMP]})
    assert_refused(ask(server, *map_too, conflict="error"), 400, "steering.conflict", "resid_post.11")


def test_dose_is_guarded(server: Server, artifacts: dict[str, Any]) -> None:
    assert ask(server, {"artifact": "vector"}, max_relative_dose=0.8).status_code == 200
    refused = ask(server, {"artifact": "vector", "strength": -1.2}, max_relative_dose=0.8)
    assert_refused(refused, 400, "steering.interventions.0.strength", "0.9", "max_relative_dose, 0.8")
    features = {"artifact": "sae", "features": [{"index": 1, "op": "add", "value": 80.0}]}
    assert_refused(
        ask(server, features, max_relative_dose=0.8), 400, "steering.interventions.0.strength", "resid_post.11"
    )
    elsewhere = {"artifact": "at-mlp-out", "layers": [10]}
    assert ask(server, elsewhere, max_relative_dose=0.8).status_code == 200
    server.publish("unknown-dose", h_norm={})
    unknown = ask(server, {"artifact": "unknown-dose"}, max_relative_dose=0.8)
    assert_refused(unknown, 400, "steering.interventions.0.artifact", "h_norm")


FIRST = "steering.interventions.0"


@pytest.mark.parametrize(
    ("intervention", "fields", "status", "param", "word"),
    [
        ({"artifact": "vector", "op": "scale"}, {}, 422, f"{FIRST}.op", "'ablate'"),
        ({"artifact": "vector", "op": "project"}, {}, 422, f"{FIRST}.op", "'clamp'"),
        ({"artifact": "neurons", "op": "add"}, {}, 422, f"{FIRST}.op", "'scale'"),
        ({"artifact": "sae"}, {}, 422, f"{FIRST}.features", "list those"),
        ({"artifact": "sae", "features": [CLAMP | {"index": 64}]}, {}, 422, f"{FIRST}.features.0.index", "64"),
        ({"artifact": "sae", "features": [CLAMP | {"gain": 1}]}, {}, 422, f"{FIRST}.features.0.gain", "remove it"),
        ({"artifact": "vector", "features": [CLAMP]}, {}, 422, f"{FIRST}.features", "leave it out"),
        ({"artifact": "vector", "op": "clamp"}, {}, 422, f"{FIRST}.value", "min, max or both"),
        ({"artifact": "vector", "min": 0}, {}, 422, f"{FIRST}.min", "clamp only"),
        ({"artifact": "vector", "op": "set", "strength": 2}, {}, 422, f"{FIRST}.strength", "leave it out"),
        ({"artifact": "vector", "renorm": "yes"}, {}, 422, f"{FIRST}.renorm", "boolean"),
        ({"artifact": "vector", "condition": {"artifact": "sae", "threshold": 0}}, {}, 422,
         f"{FIRST}.condition.artifact", "is a sae"),
        ({"artifact": "vector", "condition": OPEN | {"scope": "sequence"}}, {}, 422, f"{FIRST}.condition.layer", "one"),
        ({"artifact": "vector", "condition": OPEN | {"readout": 1}}, {}, 422, f"{FIRST}.condition.readout", "'dot'"),
        ({"artifact": "vector", "condition": OPEN | {"artifact": "no"}}, {}, 404, f"{FIRST}.condition.artifact", "no"),
        ({"artifact": "vector"}, {"mode": "cold"}, 422, "steering.mode", "'frozen'"),
        ({"artifact": "vector"}, {"conflict": "sum"}, 422, "steering.conflict", "'error'"),
        ({"artifact": "vector"}, {"max_relative_dose": "1"}, 422, "steering.max_relative_dose", "number"),
        ({"artifact": "vector", "apply": {"generation": "all"}}, {"mode": "frozen"}, 422, f"{FIRST}.apply", "last"),
        ({"artifact": "vector"}, {"mode": "frozen", "prompt": ["a", "b"]}, 400, "steering.mode", "one prompt"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(
    server: Server,
    artifacts: dict[str, Any],
    intervention: dict[str, Any],
    fields: dict[str, Any],
    status: int,
    param: str,
    word: str,
) -> None:
    assert_refused(ask(server, intervention, **fields), status, param, word)


def test_span_that_touches_nothing_names_its_intervention_also_behind_a_gate(
    server: Server, artifacts: dict[str, Any]
) -> None:
    gated = {"artifact": "vector", "condition": OPEN}
    far = {"artifact": "vector", "apply": {"prompt_positions": [500]}}
    assert_refused(ask(server, gated, far), 400, "steering.interventions.1.apply", "outside the prompt")


def test_more_edits_than_a_program_holds_are_refused_with_both_numbers(
    server: Server, artifacts: dict[str, Any]
) -> None:
    refused = ask(server, *[{"artifact": "vector", "condition": OPEN, "renorm": True}] * 6)
    assert_refused(refused, 422, "steering.interventions", "6 interventions make 18 edits", "at most 16")
    assert OTHER not in LAYERS
    lacking = ask(server, {"artifact": "vector", "layers": [OTHER]})
    assert_refused(lacking, 422, f"{FIRST}.layers", str(OTHER))
