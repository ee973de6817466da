from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import TokenizersBackend
from vllm.sampling_params import RequestOutputKind
from vllm.tokenizers.hf import maybe_make_thread_pool

from server.engine.bank_directory import BankFull
from server.engine.capture import CaptureSpec
from server.engine.client import ATTEMPTS, Counts, Engine, Unavailable, merged
from server.engine.edits import Edit, Program
from server.engine.seams import PROGRAM
from server.engine.seams.core import MISSING
from server.engine.spans import Span

LOADERS: dict[str, Any] = {"key": "the loader"}
STEERED = Program((Edit("add", "key", (0,)),))


def output(*stop_reasons: str | None) -> Any:
    choices = [
        SimpleNamespace(index=index, stop_reason=reason, token_ids=[1]) for index, reason in enumerate(stop_reasons)
    ]
    return SimpleNamespace(outputs=choices, prompt_token_ids=[1, 2])


class Client:
    """vLLM's client: each call gives the next of `runs`, a list of outputs."""

    model_config = SimpleNamespace(model="served", served_model_name="served")

    def __init__(self, *runs: list[Any]) -> None:
        self.runs = list(runs)
        self.closed = 0

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        try:
            for each in self.runs.pop(0):
                yield each
        finally:
            self.closed += 1


class Uploads:
    def __init__(self) -> None:
        self.did: list[str] = []
        self.full = False

    def forget(self, keys: tuple[str, ...]) -> None:
        self.did.append(f"forget {keys}")

    async def ensure(self, program: Program, loaders: Any) -> None:
        self.did.append(f"ensure {loaders}")
        if self.full:
            raise BankFull("no room")


def generate(client: Client, uploads: Uploads, program: Any = STEERED.wire, *, full: bool = False) -> list[Any]:
    """Run a request whose operands were ensured, with a bank that is full from then on or isn't."""
    engine = Engine(client, 1, 0, 0, 0)  # type: ignore[arg-type]
    engine._uploader = uploads  # type: ignore[assignment]
    params = SimpleNamespace(extra_args={PROGRAM: program} if program else None, output_kind=RequestOutputKind.DELTA)

    async def run() -> list[Any]:
        await engine.ensure(STEERED, LOADERS)
        uploads.did.clear()
        uploads.full = full
        return [each async for each in client.generate("prompt", params, "id")]

    return asyncio.run(run())


SENT_BACK = [output(MISSING)]
RAN = [output(None), output(None)]


def test_request_that_is_sent_back_is_sent_again_and_nobody_sees_it() -> None:
    client, uploads = Client(SENT_BACK, SENT_BACK, RAN), Uploads()
    assert generate(client, uploads) == RAN
    assert uploads.did == ["forget ('key',)", f"ensure {LOADERS}"] * 2
    assert client.closed == 3


def test_request_that_runs_costs_no_upload() -> None:
    uploads = Uploads()
    assert generate(Client(RAN), uploads) == RAN
    assert uploads.did == []


def test_it_is_not_sent_for_ever() -> None:
    client = Client(*[SENT_BACK] * (ATTEMPTS + 1))
    with pytest.raises(Unavailable, match="gave the request's operands away") as error:
        generate(client, Uploads())
    assert (client.closed, error.value.status_code, isinstance(error.value, BankFull)) == (ATTEMPTS, 503, True)


def test_no_room_for_another_upload_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="no room"):
        generate(Client(SENT_BACK), Uploads(), full=True)


def test_all_of_several_choices_sent_back_are_sent_again() -> None:
    client = Client([output(MISSING), output(MISSING)], [output(None)])
    assert len(generate(client, Uploads())) == 1


@pytest.mark.parametrize(
    "run", [[output(MISSING), output(None)], [output(None), output(MISSING)], [output(None, MISSING)]]
)
def test_some_of_several_choices_sent_back_are_an_error(run: list[Any]) -> None:
    """The others have run already, and their counts are in the receipt."""
    client = Client(run, RAN)
    with pytest.raises(Unavailable, match="the bank changed"):
        generate(client, Uploads())
    assert client.closed == 1


@pytest.mark.parametrize("program", [None, "forged"])
def test_without_a_program_of_ours_vllm_is_called_as_it_is(program: Any) -> None:
    assert generate(Client(SENT_BACK), Uploads(), program) == SENT_BACK


def worker(touched: list[list[int]], cached: list[int]) -> dict[str, Any]:
    return {"touched": touched, "cached": cached}


def test_receipts_of_workers_are_merged_and_those_of_engines_added() -> None:
    tensor_parallel = [worker([[3, 3], [1]], [2, 0])] * 2
    pipeline_parallel = [worker([[4, 0], [0]], [1, 1]), worker([[0, 4], [5]], [1, 1])]
    assert merged([tensor_parallel, pipeline_parallel, [None, None]]) == Counts([[7, 7], [6]], [3, 1])


def test_receipt_that_nobody_ran_is_none() -> None:
    assert merged([[None], [None, None]]) is None


def test_workers_that_never_answer_keep_no_cancelled_capture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that shuts down answers nobody: the process would never end."""
    monkeypatch.setattr("server.engine.client.DROP_SECONDS", 0.05)

    class Silent(Client):
        async def generate(self, *args: Any, **fields: Any) -> AsyncIterator[Any]:
            await asyncio.sleep(60)
            yield

    engine = Engine(Silent(), 1, 0, 0, 0)  # type: ignore[arg-type]

    async def ask(*args: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(engine, "_ask_workers", ask)
    spec = CaptureSpec((("resid_post", 0),), Span(), "rows")

    async def run() -> None:
        capture = asyncio.create_task(engine.run_capture([1, 2], spec))
        await asyncio.sleep(0.05)
        capture.cancel()
        await asyncio.wait({capture}, timeout=5)
        assert capture.cancelled()

    asyncio.run(run())
    assert "didn't answer" in caplog.text


class Words(TokenizersBackend):
    """A real tokenizer whose calls last long enough to meet, and which counts its copies."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Words:
        Words.copies += 1
        return Words(tokenizer_object=Tokenizer.from_str(self.backend_tokenizer.to_str()))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.01)
        return super().__call__(*arguments, **options)


def test_texts_that_come_at_once_are_tokenized_without_a_tokenizer_for_each() -> None:
    words = Words(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")))
    maybe_make_thread_pool(words)
    made = Words.copies
    client = Client()
    client.get_tokenizer = lambda: words  # type: ignore[attr-defined]
    engine = Engine(client, 1, 0, 0, 0)  # type: ignore[arg-type]

    async def run() -> list[Any]:
        return await asyncio.gather(engine.tokenize("a"), *(engine.tokenize(["b", "a"]) for _ in range(8)))

    assert asyncio.run(run()) == [[0], *[[[1], [0]]] * 8]
    assert Words.copies == made
