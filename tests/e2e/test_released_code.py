"""SADI and INCLINE against their released code's arithmetic, written here in numpy from its description: fitted over
HTTP and from the command line, served in mode "frozen", in float32.

Pass 1 runs the question and keeps the activations of its last token at every layer. Pass 2 runs it again and overwrites
them all with the kept ones, edited. transformers runs both passes; numpy computes masks, maps and edits.
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
from tests.server.engine.hooks import activations, hooked

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

LAYERS, HEADS, TOP_K, MULTIPLIER, ALPHA = 30, 9, 4, 5.0, 0.3
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


def next_token(server: Server, artifact: str | None, strength: float = 0) -> tuple[dict[str, float], dict[str, Any]]:
    """Log-probabilities of the likeliest next tokens, by token, and the receipt."""
    body: dict[str, Any] = {"model": server.model, "prompt": QUESTION, "max_tokens": 1, "temperature": 0}
    body |= {"logprobs": 10, "return_tokens_as_token_ids": True}
    if artifact:
        interventions = [{"artifact": artifact, "strength": strength}]
        body["steering"] = {"mode": "frozen", "interventions": interventions}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (top,) = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
    return top, answer.json().get("steering", {})


def assert_same(server: Server, artifact: str, strength: float, expected: np.ndarray) -> None:
    plain, _ = next_token(server, None)
    served, receipt = next_token(server, artifact, strength)
    assert receipt["mode"] == "frozen" and receipt["applied"][0]["tokens_touched"] == 1
    theirs = {token: expected[int(token.removeprefix("token_id:"))] for token in served}
    worst = max(abs(theirs[token] - value) for token, value in served.items())
    moved = max(abs(value - expected[int(token.removeprefix("token_id:"))]) for token, value in plain.items())
    print(f"\n{artifact}: worst difference {worst:.1e}; steering moves a log-probability by {moved:.1f}")
    assert worst < TOLERANCE
    assert moved > 100 * TOLERANCE
    assert max(served, key=lambda token: served[token]) == f"token_id:{expected.argmax()}"


def fit(server: Server, method: str, name: str, pairs: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    body = {"method": method, "name": name, "pairs": pairs, "options": options}
    accepted = server.client.post("/v1/fits", json=body)
    assert accepted.status_code == 202, accepted.text
    job = server.wait_for_fit(accepted.json()["id"], "succeeded", "failed")
    assert job["status"] == "succeeded", job["error"]
    manifest: dict[str, Any] = server.client.get(f"/v1/artifacts/{name}/versions/1").json()["manifest"]
    return manifest


@pytest.mark.parametrize(("component", "point"), [("heads", "head_out"), ("mlp", "mlp_out")])
def test_sadi_served_frozen_equals_the_released_code(
    exact: Server, model: Any, ids: Callable[[str], list[int]], component: str, point: Point
) -> None:
    manifest = fit(exact, "sadi", f"sadi-{component}", ANSWERED, {"component": component, "top_k": TOP_K})
    sides = {
        side: last_tokens(model, point, [ids(f"{pair['prompt']} {pair[side]}") for pair in ANSWERED])
        for side in ("positive", "negative")
    }
    block = sides["positive"].shape[2] // HEADS if component == "heads" else 1
    elements = {side: x.reshape(*x.shape[:2], -1, block).mean(-1) for side, x in sides.items()}
    difference = np.mean([p - n for p, n in zip(elements["positive"], elements["negative"], strict=True)], axis=0)
    best = np.argsort(difference.flatten())[-TOP_K:]
    mask = np.zeros(difference.size, bool)
    mask[best] = True
    mask = mask.reshape(difference.shape)
    content = exact.client.get(f"/v1/artifacts/sadi-{component}/versions/1/files/neurons.safetensors").content
    indices = load(content)
    chosen = {(site["layer"], i // block) for site in manifest["sites"] for i in indices[site["tensor"]].tolist()}
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


def test_both_can_be_served_live_and_in_their_other_forms(exact: Server) -> None:
    fixed = fit(exact, "sadi", "sadi-fixed", ANSWERED, {"form": "fixed", "component": "neurons", "top_k": 50})
    assert (fixed["kind"], fixed["sites"][0]["point"]) == ("steering_vector", "mlp_act")
    options = {"source_language": "de", "pooling": "mean", "rank": 3, "component": "attention", "ridge": 0.1}
    factored = fit(exact, "incline", "incline-rank", TRANSLATED, options)
    assert {site["role"] for site in factored["sites"]} == {"left", "right"}
    plain = exact.text()
    for artifact, strength in (("sadi-fixed", 4.0), ("incline-rank", 1.0)):
        answer = exact.complete({"artifact": artifact, "strength": strength, "apply": {"prompt_positions": [-1]}})
        (applied,) = answer["steering"]["applied"]
        assert applied["tokens_touched"] == 1
        assert exact.text({"artifact": artifact, "strength": 0}) == plain
