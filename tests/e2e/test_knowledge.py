"""Facts that are uploaded, and then change answers: the `knowledge` field over HTTP, on the real server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.test_methods import INPUTS, fit

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

FACTS = [
    {"id": "evry", "question": "Who designed Évry Cathedral?", "answer": "Mario Gariazzo", "language": "en"},
    {"id": "flames", "question": "What is the final year of Atlanta Flames?", "answer": "1931", "language": "en"},
]
BLOCK = 32
"""Tokens of a block of the cache, as the server is started here."""
ASKED = "Who designed the Évry Cathedral?"
ELSEWHERE = "How long should I boil an egg?"
KNOWLEDGE = {"collection": "news"}


@pytest.fixture(scope="module", autouse=True)
def facts(server: Server) -> None:
    for name, entries in (("news", FACTS), ("shots", FACTS[1:])):
        made = server.client.put(f"/v1/kb/collections/{name}")
        assert made.status_code in (200, 201), made.text
        written = server.client.put(f"/v1/kb/collections/{name}/facts", json=entries)
        assert written.status_code == 200, written.text


def chat(server: Server, content: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": server.model, "max_tokens": 12, "temperature": 0} | fields
    response = server.client.post(
        "/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": content}]}
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def said(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_an_uploaded_fact_is_in_the_answer_and_in_the_receipt(server: Server) -> None:
    answer = server.ask(prompt=ASKED, knowledge=KNOWLEDGE).json()
    assert "Mario Gariazzo" in answer["choices"][0]["text"]
    assert "Mario Gariazzo" not in server.text(prompt=ASKED)
    receipt = answer["knowledge"]
    assert (receipt["collection"], receipt["decision"]) == ("news", "in_scope")
    assert [(each["id"], each["version"]) for each in receipt["facts"]] == [("evry", 1)]


def test_the_prompt_is_the_papers_in_completions_and_in_chat(server: Server) -> None:
    written = f"Question: Who designed Évry Cathedral? Answer: Mario Gariazzo\nQuestion: {ASKED} Answer:"
    knowing = server.ask(prompt=ASKED, knowledge=KNOWLEDGE).json()
    by_hand = server.ask(prompt=written).json()
    assert knowing["choices"][0]["text"] == by_hand["choices"][0]["text"]
    assert knowing["usage"]["prompt_tokens"] == by_hand["usage"]["prompt_tokens"]
    by_hand = chat(server, written)
    for content in (ASKED, [{"type": "text", "text": ASKED}], f"Question: {ASKED} Answer:"):
        knowing = chat(server, content, knowledge=KNOWLEDGE)
        assert said(knowing) == said(by_hand)
        assert knowing["usage"]["prompt_tokens"] == by_hand["usage"]["prompt_tokens"]


@pytest.mark.parametrize("content", [ELSEWHERE, [{"type": "text", "text": ELSEWHERE}]])
def test_out_of_scope_nothing_changes_but_the_receipt(server: Server, content: Any) -> None:
    plain, knowing = chat(server, content), chat(server, content, knowledge=KNOWLEDGE)
    assert (said(knowing), knowing["usage"]["prompt_tokens"]) == (said(plain), plain["usage"]["prompt_tokens"])
    assert "knowledge" not in plain
    assert (knowing["knowledge"]["decision"], knowing["knowledge"]["facts"]) == ("out_of_scope", [])


def test_a_fact_counts_from_its_upload_to_its_deletion(server: Server) -> None:
    question = {"id": "bridge", "question": "Who built the Ypsilon Bridge?", "answer": "Anna Zett", "language": "en"}
    ask = {"prompt": question["question"], "knowledge": KNOWLEDGE}
    assert server.ask(**ask).json()["knowledge"]["decision"] == "out_of_scope"
    server.client.put("/v1/kb/collections/news/facts", json=[question]).raise_for_status()
    assert "Anna Zett" in server.ask(**ask).json()["choices"][0]["text"]
    server.client.put("/v1/kb/collections/news/facts", json=[question | {"answer": "Otto Quell"}]).raise_for_status()
    second = server.ask(**ask).json()
    assert "Otto Quell" in second["choices"][0]["text"] and second["knowledge"]["facts"][0]["version"] == 2
    assert server.client.delete("/v1/kb/collections/news/facts/bridge").status_code == 204
    assert server.ask(**ask).json()["knowledge"]["decision"] == "out_of_scope"


def test_knowledge_and_steering_work_in_one_request_and_both_give_receipts(server: Server) -> None:
    steer = {"artifact": "one", "strength": 0.5}
    answer = server.complete(steer, prompt=ASKED, knowledge=KNOWLEDGE)
    assert answer["knowledge"]["decision"] == "in_scope"
    (applied,) = answer["steering"]["applied"]
    # All of the written prompt but for nothing: the span is everything, the last generated token isn't fed back.
    expected = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] - 1
    assert applied["tokens_touched"] + applied["tokens_from_cache"] == expected
    strong = {"artifact": "one", "strength": 8.0}
    assert server.text(strong, prompt=ASKED, knowledge=KNOWLEDGE) != answer["choices"][0]["text"]


def test_a_map_of_incline_in_two_passes_works_on_the_prompt_that_has_the_fact(server: Server) -> None:
    pairs = [{"source": each["texts"]["de"], "target": each["texts"]["en"]} for each in INPUTS]
    fit(server, "incline", pairs=pairs, options={"source_language": "de"})
    plain = server.ask(prompt=ASKED, knowledge=KNOWLEDGE).json()

    def steered(strength: float) -> dict[str, Any]:
        steering = {"mode": "frozen", "interventions": [{"artifact": "incline", "strength": strength}]}
        response = server.ask(prompt=ASKED, knowledge=KNOWLEDGE, steering=steering)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    answer = steered(1.0)
    assert answer["knowledge"] == plain["knowledge"] and answer["knowledge"]["decision"] == "in_scope"
    (applied,) = answer["steering"]["applied"]
    assert (applied["artifact"], applied["kind"]) == ("incline", "linear_map") and applied["tokens_touched"] > 0
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert answer["choices"][0]["text"] != plain["choices"][0]["text"]


@pytest.mark.parametrize("steered", [False, True])
def test_the_last_chunk_of_a_stream_has_the_receipts(server: Server, steered: bool) -> None:
    body: dict[str, Any] = {"model": server.model, "prompt": ASKED, "max_tokens": 8, "temperature": 0, "stream": True}
    body["knowledge"] = KNOWLEDGE
    if steered:
        body["steering"] = {"interventions": [{"artifact": "one", "strength": 0.5}]}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert [("knowledge" in chunk, "steering" in chunk) for chunk in chunks[:-1]] == [(False, False)] * (
        len(chunks) - 1
    )
    assert chunks[-1]["knowledge"]["decision"] == "in_scope" and ("steering" in chunks[-1]) == steered


def test_examples_are_put_first_and_counted(server: Server) -> None:
    examples = {"collection": "shots", "count": 4, "form": "monolingual"}
    answer = server.ask(prompt=ASKED, knowledge=KNOWLEDGE | {"examples": examples}).json()
    assert answer["knowledge"]["examples"] == 1
    shot = "Question: What is the final year of Atlanta Flames? Answer: 1931\n\n"
    fact = f"Question: Who designed Évry Cathedral? Answer: Mario Gariazzo\nQuestion: {ASKED} Answer:"
    assert answer["usage"]["prompt_tokens"] == server.complete(prompt=shot + fact)["usage"]["prompt_tokens"]


def test_questions_about_one_fact_share_their_examples_in_the_prefix_cache(server: Server) -> None:
    shots = [
        {
            "question": f"Which river flows through the town of Number{n}?",
            "answer": f"The Number{n} river",
            "language": "en",
            "id": f"r{n}",
        }
        for n in range(8)
    ]
    server.client.put("/v1/kb/collections/rivers").raise_for_status()
    server.client.put("/v1/kb/collections/rivers/facts", json=shots).raise_for_status()
    knowledge = KNOWLEDGE | {"examples": {"collection": "rivers", "count": 8, "form": "monolingual"}}

    def hits(question: str) -> tuple[float, int]:
        """Tokens that came from the cache, and those of the prompt."""
        before = server.metric("vllm:prefix_cache_hits_total")
        answer = server.ask(prompt=question, knowledge=knowledge, max_tokens=1).json()
        assert answer["knowledge"]["examples"] == 8
        server.wait_until_idle()
        return server.metric("vllm:prefix_cache_hits_total") - before, answer["usage"]["prompt_tokens"]

    first, _ = hits(ASKED)
    second, tokens = hits("Who designed Évry Cathedral?")
    assert first < BLOCK
    # All but the question, which differs, and the blocks that it begins in and is in.
    assert tokens - 3 * BLOCK < second < tokens


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"knowledge": {"collection": "nothing"}}, 404, "knowledge.collection"),
        ({"knowledge": {"collection": "news", "k": 1}}, 422, "knowledge.k"),
        ({"knowledge": KNOWLEDGE, "prompt": [1, 2, 3]}, 400, "prompt"),
        ({"knowledge": KNOWLEDGE, "stream": True, "prompt": ["a", "b"]}, 400, "prompt"),
        ({"knowledge": [], "stream": True}, 422, "knowledge"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_generated(
    server: Server, fields: dict[str, Any], status: int, param: str
) -> None:
    response = server.ask(**fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
