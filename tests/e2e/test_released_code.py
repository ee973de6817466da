"""Every method against its released code's arithmetic, or where there is none its paper's, written here in numpy from
the description: fitted over HTTP and from the command line, in float32.

SADI and INCLINE are served in mode "frozen". Pass 1 runs the question and keeps the activations of its last token at
every layer. Pass 2 runs it again and overwrites them all with the kept ones, edited. LF-Steering, ExpertSteer and
shared neurons have one pass, in which every token is edited. transformers runs the passes; numpy computes the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load

from server.engine.edits import Point
from tests.e2e.test_fits import polyhelm
from tests.e2e.test_opcodes import publish
from tests.server.engine.hooks import activations, hooked

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

LAYERS, HEADS, MULTIPLIER, ALPHA, SAE_LAYER = 30, 9, 5.0, 0.3, 12
TOLERANCE = 1e-4
QUESTION = "The opposite of a hot summer day is a"
ANSWERED = [
    {"prompt": "Is water wet?", "positive": "yes", "negative": "no"},
    {"prompt": "Is fire cold?", "positive": "no", "negative": "yes"},
    {"prompt": "Can birds fly?", "positive": "yes", "negative": "no"},
    {"prompt": "Is the moon made of cheese?", "positive": "no", "negative": "yes"},
    {"prompt": "Do fish live in trees?", "positive": "no", "negative": "yes"},
    {"prompt": "Is Paris in France?", "positive": "yes", "negative": "no"},
]
TRANSLATED = [
    {"source": "Das Wetter ist heute schön", "target": "The weather is nice today"},
    {"source": "Wo ist der Bahnhof", "target": "Where is the station"},
    {"source": "Ich habe keine Zeit", "target": "I have no time"},
    {"source": "Der Zug fährt um acht Uhr", "target": "The train leaves at eight"},
    {"source": "Sie kaufte drei rote Äpfel", "target": "She bought three red apples"},
    {"source": "Die Regierung trat gestern zurück", "target": "The government resigned yesterday"},
]

Edit = Callable[[int, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def exact(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start_server(tmp_path_factory.mktemp("exact") / "data", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def model(models: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(models / "smollm2", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(models: Path) -> Callable[[str], list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "smollm2")
    return lambda text: list(tokenizer(text)["input_ids"])


def last_tokens(model: Any, point: Point, sequences: list[list[int]]) -> np.ndarray:
    """[texts, layers, width]"""
    seen = [activations(model, (point,), ids) for ids in sequences]
    return np.stack([[each[point, layer][-1].numpy() for layer in range(LAYERS)] for each in seen])


def two_passes(model: Any, point: Point, ids: list[int], edit: Edit) -> np.ndarray:
    """The log-probabilities of the next token."""
    (clean,) = last_tokens(model, point, [ids])

    def overwrite(_: Point, layer: int, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[-1] = torch.from_numpy(edit(layer, clean[layer]).astype(np.float32))
        return x

    with torch.no_grad(), hooked(model, (point,), overwrite):
        logits = model(torch.tensor([ids])).logits[0, -1]
    found: np.ndarray = torch.log_softmax(logits, -1).numpy()
    return found


def one_pass(model: Any, point: Point, ids: list[int], edit: Edit) -> np.ndarray:
    """The log-probabilities of the next token, where `edit` is given the activations [tokens, width] of each layer."""

    def edited(_: Point, layer: int, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(edit(layer, x.numpy()).astype(np.float32))

    with torch.no_grad(), hooked(model, (point,), edited):
        logits = model(torch.tensor([ids])).logits[0, -1]
    found: np.ndarray = torch.log_softmax(logits, -1).numpy()
    return found


def next_token(
    server: Server, artifact: str | None, strength: float = 0, mode: str = "frozen"
) -> tuple[dict[str, float], dict[str, Any]]:
    """Log-probabilities of the likeliest next tokens, by token, and the receipt."""
    body: dict[str, Any] = {"model": server.model, "prompt": QUESTION, "max_tokens": 1, "temperature": 0}
    body |= {"logprobs": 10, "return_tokens_as_token_ids": True}
    if artifact:
        interventions = [{"artifact": artifact, "strength": strength}]
        body["steering"] = {"mode": mode, "interventions": interventions}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (top,) = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
    return top, answer.json().get("steering", {})


def assert_same(
    server: Server, artifact: str, strength: float, expected: np.ndarray, tokens: int = 1, mode: str = "frozen"
) -> None:
    """`tokens` are those that are edited."""
    plain, _ = next_token(server, None)
    served, receipt = next_token(server, artifact, strength, mode)
    (applied,) = receipt["applied"]
    assert receipt["mode"] == mode and applied["tokens_touched"] + applied["tokens_from_cache"] == tokens
    theirs = {token: expected[int(token.removeprefix("token_id:"))] for token in served}
    worst = max(abs(theirs[token] - value) for token, value in served.items())
    moved = max(abs(value - expected[int(token.removeprefix("token_id:"))]) for token, value in plain.items())
    print(f"\n{artifact}: worst difference {worst:.1e}; steering moves a log-probability by {moved:.1f}")
    assert worst < TOLERANCE
    assert moved > 100 * TOLERANCE
    assert max(served, key=lambda token: served[token]) == f"token_id:{expected.argmax()}"


def tensors(server: Server, name: str, manifest: dict[str, Any]) -> dict[tuple[int, str | None], np.ndarray]:
    """By layer and role."""
    (file,) = {site["file"] for site in manifest["sites"]}
    loaded = load(server.client.get(f"/v1/artifacts/{name}/versions/1/files/{file}").content)
    return {(site["layer"], site.get("role")): loaded[site["tensor"]] for site in manifest["sites"]}


def fit(
    server: Server, method: str, name: str, pairs: list[Any], options: dict[str, Any], field: str = "pairs"
) -> dict[str, Any]:
    body = {"method": method, "name": name, field: pairs, "options": options}
    accepted = server.client.post("/v1/fits", json=body)
    assert accepted.status_code == 202, accepted.text
    job = server.wait_for_fit(accepted.json()["id"], "succeeded", "failed")
    assert job["status"] == "succeeded", job["error"]
    manifest: dict[str, Any] = server.client.get(f"/v1/artifacts/{name}/versions/1").json()["manifest"]
    return manifest


@pytest.mark.parametrize(
    ("component", "point", "top_k"),
    [("heads", "head_out", 4), ("mlp", "mlp_out", 4), ("neurons", "mlp_act", 40), ("hidden", "resid_post", 4)],
)
def test_sadi_served_frozen_equals_the_released_code(
    exact: Server, model: Any, ids: Callable[[str], list[int]], component: str, point: Point, top_k: int
) -> None:
    manifest = fit(exact, "sadi", f"sadi-{component}", ANSWERED, {"component": component, "top_k": top_k})
    sides = {
        side: last_tokens(model, point, [ids(f"{pair['prompt']} {pair[side]}") for pair in ANSWERED])
        for side in ("positive", "negative")
    }
    block = sides["positive"].shape[2] // HEADS if component == "heads" else 1
    if component == "neurons":
        # The code's hook is on the gate's non-linearity, before the product.
        sides = {
            side: last_gates(model, [ids(f"{pair['prompt']} {pair[side]}") for pair in ANSWERED]) for side in sides
        }
    elements = {side: x.reshape(*x.shape[:2], -1, block).mean(-1) for side, x in sides.items()}
    difference = np.mean([p - n for p, n in zip(elements["positive"], elements["negative"], strict=True)], axis=0)
    best = np.argsort(difference.flatten())[-top_k:]
    mask = np.zeros(difference.size, bool)
    mask[best] = True
    mask = mask.reshape(difference.shape)
    found = tensors(exact, f"sadi-{component}", manifest)
    chosen = {(layer, i // block) for (layer, _), indices in found.items() for i in indices.tolist()}
    assert chosen == set(zip(*map(np.ndarray.tolist, np.nonzero(mask)), strict=True))

    def edit(layer: int, clean: np.ndarray) -> np.ndarray:
        blocks = clean.reshape(-1, block)
        return np.where(mask[layer][:, None], MULTIPLIER * blocks, blocks).reshape(-1)

    expected = two_passes(model, point, ids(QUESTION), edit)
    assert_same(exact, f"sadi-{component}", MULTIPLIER - 1, expected)


def test_incline_fitted_by_the_command_line_and_served_frozen_equals_the_released_code(
    exact: Server, model: Any, ids: Callable[[str], list[int]], tmp_path: Path
) -> None:
    file = tmp_path / "translations.jsonl"
    file.write_text("\n".join(json.dumps(pair) for pair in TRANSLATED))
    options = ("--source-language", "de", "--solver", "min_norm", "--strength", str(ALPHA), "--json")
    done = polyhelm("fit", "incline", "--url", exact.base_url, "--pairs", str(file), "--name", "incline", *options)
    assert done.returncode == 0, done.stderr
    manifest = exact.client.get("/v1/artifacts/incline/versions/1").json()["manifest"]
    assert (manifest["languages"], manifest["default_strength"]) == (["de", "en"], ALPHA)
    source, target = (
        last_tokens(model, "resid_post", [ids(pair[side]) for pair in TRANSLATED]) for side in ("source", "target")
    )
    maps = [np.linalg.lstsq(source[:, layer], target[:, layer], rcond=None)[0] for layer in range(LAYERS)]

    def edit(layer: int, clean: np.ndarray) -> np.ndarray:
        return clean + ALPHA * clean @ maps[layer]

    expected = two_passes(model, "resid_post", ids(QUESTION), edit)
    assert_same(exact, "incline", ALPHA, expected)

    def last_layer_only(layer: int, clean: np.ndarray) -> np.ndarray:
        return edit(layer, clean) if layer == LAYERS - 1 else clean

    # Each layer's state is overwritten, so that the first token depends on the last layer's edit alone.
    np.testing.assert_allclose(two_passes(model, "resid_post", ids(QUESTION), last_layer_only), expected, atol=1e-5)


def test_incline_as_the_code_for_llama_fits_it_equals_its_arithmetic(
    exact: Server, model: Any, ids: Callable[[str], list[int]]
) -> None:
    """The MLP's output, averaged over a text's tokens (here without the first), every second pair joined with its
    translation.
    """
    options = {"source_language": "de", "component": "ffn", "pooling": "mean", "mix": "target_first"}
    fit(exact, "incline", "incline-code", TRANSLATED, options | {"solver": "min_norm"})
    texts: dict[str, list[str]] = {"source": [], "target": []}
    for number, pair in enumerate(TRANSLATED):
        joined = number % 2 == 1
        texts["source"].append(f"{pair['target']}\n{pair['source']}" if joined else pair["source"])
        texts["target"].append(f"{pair['target']}\n{pair['target']}" if joined else pair["target"])
    source, target = (averages(model, "mlp_out", [ids(text) for text in texts[side]]) for side in ("source", "target"))
    maps = [np.linalg.lstsq(source[:, layer], target[:, layer], rcond=None)[0] for layer in range(LAYERS)]
    expected = two_passes(model, "mlp_out", ids(QUESTION), lambda layer, clean: clean + 2 * ALPHA * clean @ maps[layer])
    assert_same(exact, "incline-code", 2 * ALPHA, expected)


def averages(model: Any, point: Point, sequences: list[list[int]]) -> np.ndarray:
    """[texts, layers, width], over all tokens but the first."""
    seen = [activations(model, (point,), ids) for ids in sequences]
    return np.stack([[each[point, layer][1:].numpy().mean(0) for layer in range(LAYERS)] for each in seen])


def test_incline_with_its_bias_equals_its_formula(exact: Server, model: Any, ids: Callable[[str], list[int]]) -> None:
    """The default: W and b by ridge towards the mean, here with a known lambda."""
    options = {"source_language": "de", "ridge": 0.1, "prior": "mean"}
    manifest = fit(exact, "incline", "incline-bias", TRANSLATED, options)
    assert {site["role"] for site in manifest["sites"]} == {"left", "right", "bias"}
    source, target = (
        last_tokens(model, "resid_post", [ids(pair[side]) for pair in TRANSLATED]).astype(np.float64)
        for side in ("source", "target")
    )

    def edit(layer: int, clean: np.ndarray) -> np.ndarray:
        mean_h, mean_t = source[:, layer].mean(0), target[:, layer].mean(0)
        h, t = source[:, layer] - mean_h, target[:, layer] - mean_t
        gram = h @ h.T
        inverse = np.linalg.inv(gram + 0.1 * np.trace(gram) / len(h) * np.eye(len(h)))
        return clean + ALPHA * (mean_t + (clean - mean_h) @ h.T @ inverse @ t)

    assert_same(exact, "incline-bias", ALPHA, two_passes(model, "resid_post", ids(QUESTION), edit))


def test_lf_steering_fitted_with_an_sae_of_the_store_equals_the_delta_form(
    exact: Server, model: Any, ids: Callable[[str], list[int]]
) -> None:
    rng, alpha = np.random.default_rng(0), 3.0
    seen = (activations(model, ("resid_post",), ids(each["source"])) for each in TRANSLATED)
    states = np.concatenate([each["resid_post", SAE_LAYER][1:].numpy() for each in seen])
    features = rng.standard_normal((48, states.shape[1])).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    bias = rng.standard_normal(48).astype(np.float32)
    threshold = np.maximum(np.median(states @ features.T + bias, axis=0), 0).astype(np.float32)
    offset = states.mean(0)
    roles = {"encoder": features, "encoder_bias": bias, "threshold": threshold, "decoder": features}
    roles["decoder_bias"] = offset
    parts = {(SAE_LAYER, role): tensor for role, tensor in roles.items()}
    publish(exact, "planted", "sae", "resid_post", parts, activation="jumprelu")
    pairs = [{"right": each["target"], "wrong": each["source"]} for each in TRANSLATED]
    options = {"sae": "planted", "threshold": 0.5, "most": 10}
    manifest = fit(exact, "lf_steering", "lf", pairs, options)

    def code(x: np.ndarray) -> np.ndarray:
        z = x @ features.T + bias
        return np.where(z > threshold, z, 0)

    right, wrong = (
        code(last_tokens(model, "resid_post", [ids(pair[side]) for pair in pairs])[:, SAE_LAYER])
        for side in ("right", "wrong")
    )
    gains = np.abs(right - wrong).mean(0)
    key = [i for i in np.argsort(-gains)[:10] if gains[i] > 0.5]
    assert manifest["provenance"]["config"]["key"]["features"] == key and len(key) > 3

    def edit(layer: int, x: np.ndarray) -> np.ndarray:
        fires = code(x)[:, key] != 0
        return x + alpha * (fires * gains[key]) @ features[key] if layer == SAE_LAYER else x

    def literal(layer: int, x: np.ndarray) -> np.ndarray:
        a = code(x)
        a[:, key] += alpha * (a[:, key] != 0) * gains[key]
        return a @ features + offset if layer == SAE_LAYER else x

    tokens = len(ids(QUESTION))
    assert_same(exact, "lf", alpha, one_pass(model, "resid_post", ids(QUESTION), edit), tokens, "live")
    fit(exact, "lf_steering", "lf-literal", pairs, options | {"form": "literal", "alpha": alpha})
    assert_same(exact, "lf-literal", 1.0, one_pass(model, "resid_post", ids(QUESTION), literal), tokens, "live")


def test_expertsteer_adds_its_vectors_at_every_token(
    exact: Server, model: Any, ids: Callable[[str], list[int]]
) -> None:
    texts = [
        {"text": f"{pair[side]}{end}", "label": label}
        for pair in TRANSLATED
        for side, label, ends in (("source", "positive", ("", ", sagte er")), ("target", "negative", ("", ", he said")))
        for end in ends
    ]
    epsilon, options = 20.0, {"control": "self_expert", "pairs": 3, "mutual_information_texts": 4}
    manifest = fit(exact, "expertsteer", "expert", texts, options, "texts")
    ends = [target for _, target in manifest["provenance"]["config"]["layer_pairs"]]
    vectors = {layer: vector for (layer, _), vector in tensors(exact, "expert", manifest).items()}
    assert vectors.keys() == set(ends)
    for layer, vector in vectors.items():
        # Widths agree, so that each pair adds nu itself, which has length 1.
        assert np.linalg.norm(vector) <= ends.count(layer) + 1e-5
    expected = one_pass(
        model, "resid_post", ids(QUESTION), lambda layer, x: x + epsilon * vectors[layer] if layer in vectors else x
    )
    assert_same(exact, "expert", epsilon, expected, len(ids(QUESTION)), "live")


def last_gates(model: Any, sequences: list[list[int]]) -> np.ndarray:
    """What the non-linearity of each gate returns: [texts, layers, neurons]."""
    found: list[np.ndarray] = []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda module, args, output: found.append(output[0, -1].numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return np.stack(found).reshape(len(sequences), LAYERS, -1)


def test_shared_neurons_are_those_open_in_every_language_and_are_zeroed_at_every_token(
    exact: Server, model: Any, ids: Callable[[str], list[int]]
) -> None:
    inputs = [{"texts": {"de": pair["source"], "en": pair["target"]}} for pair in TRANSLATED]
    manifest = fit(exact, "shared_neurons", "shared", inputs, {"share": 1.0}, "inputs")
    gates = last_gates(model, [ids(pair[side]) for pair in TRANSLATED for side in ("source", "target")])
    expected_neurons = (gates > 0).all(0)
    assert manifest["metrics"]["gates_error"] < 1e-2
    # A value this near to 0 may have either sign in the engine's arithmetic.
    clear = (np.abs(gates) > 1e-4).all(0)
    always = np.zeros_like(expected_neurons)
    for (layer, _), neurons in tensors(exact, "shared", manifest).items():
        always[layer, neurons] = True
    np.testing.assert_array_equal(always[clear], expected_neurons[clear])
    assert clear.mean() > 0.9 and 0.001 < always.mean() < 0.5
    expected = one_pass(model, "mlp_act", ids(QUESTION), lambda layer, x: np.where(always[layer], 0, x))
    assert_same(exact, "shared", -1.0, expected, len(ids(QUESTION)), "live")


def test_both_can_be_served_live_and_in_their_other_forms(exact: Server) -> None:
    fixed = fit(exact, "sadi", "sadi-fixed", ANSWERED, {"form": "fixed", "component": "neurons", "top_k": 50})
    assert (fixed["kind"], fixed["sites"][0]["point"]) == ("steering_vector", "mlp_act")
    options = {"source_language": "de", "pooling": "mean", "rank": 3, "component": "attention", "ridge": 0.1}
    factored = fit(exact, "incline", "incline-rank", TRANSLATED, options)
    assert {site["role"] for site in factored["sites"]} == {"left", "right", "bias"}
    plain = exact.text()
    for artifact, strength in (("sadi-fixed", 4.0), ("incline-rank", 1.0)):
        answer = exact.complete({"artifact": artifact, "strength": strength, "apply": {"prompt_positions": [-1]}})
        (applied,) = answer["steering"]["applied"]
        assert applied["tokens_touched"] == 1
        assert exact.text({"artifact": artifact, "strength": 0}) == plain
