"""One model served by one engine, by two data-parallel ones and by two tensor-parallel ranks: the same answers, counts
and banks. Run as a script, it is the job that such an engine does.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1300)]

LAYERS, HIDDEN, NEURONS = 4, 128, 192
SHAPE = {
    "vocab_size": 160,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
MODES: dict[str, dict[str, Any]] = {
    "one": {},
    "data parallel": {"data_parallel_size": 2, "data_parallel_backend": "mp"},
    "tensor parallel": {"tensor_parallel_size": 2},
}
REQUESTS = 12
TOKENS = 8
ROOM = 3
"""Operands that the bank holds."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    found = {}
    for mode, arguments in MODES.items():
        command = [sys.executable, __file__, str(folder), json.dumps(arguments)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-6000:]
        found[mode] = json.loads((folder / "answers.json").read_text())
    return found


@pytest.mark.parametrize("mode", ["data parallel", "tensor parallel"])
def test_answers_and_counts_are_those_of_one_engine(answers: dict[str, dict[str, Any]], mode: str) -> None:
    alone = answers["one"]
    assert answers[mode]["touched"] == alone["touched"]
    for name in ("plain", "steered"):
        for one, other in zip(alone[name], answers[mode][name], strict=True):
            assert one["tokens"] == other["tokens"]
            np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=2e-3)


def test_every_request_is_steered_by_its_own_operand(answers: dict[str, dict[str, Any]]) -> None:
    alone = answers["one"]
    steered = [tuple(each["logprobs"]) for each in alone["steered"]]
    assert len({*steered, *(tuple(each["logprobs"]) for each in alone["plain"])}) == REQUESTS + 1
    assert alone["touched"] == [[[6 + TOKENS - 1] * LAYERS]] * REQUESTS


@pytest.mark.parametrize("mode", MODES)
def test_both_choices_of_a_request_are_counted(answers: dict[str, dict[str, Any]], mode: str) -> None:
    assert answers[mode]["choices"] == [[2 * (6 + TOKENS - 1)] * LAYERS]


@pytest.mark.parametrize("mode", MODES)
def test_request_whose_operand_another_process_evicted_is_sent_again(
    answers: dict[str, dict[str, Any]], mode: str
) -> None:
    evicted, uploads = answers[mode]["evicted"], answers[mode]["uploads"]
    assert evicted["tokens"] == answers[mode]["steered"][0]["tokens"]
    assert uploads["again"] > uploads["before"] == uploads["believed"]


@pytest.mark.parametrize("mode", MODES)
def test_in_the_end_nothing_is_held(answers: dict[str, dict[str, Any]], mode: str) -> None:
    """A request for the whole bank is promised it by every engine."""
    whole = answers[mode]["whole_bank"]
    told = {"uploads", "evicted", "resident_bytes", "budget_bytes"}
    assert [set(promised) for promised in whole] == [told] * len(whole)


async def main(folder: Path, arguments: dict[str, Any]) -> None:
    os.environ |= {
        "POLYHELM_ENGINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engine.bank_directory import BankDirectory
    from server.engine.client import Engine
    from server.engine.edits import Edit, Point, Program
    from server.engine.operands import Operand, pack
    from server.engine.seams import patch

    patch()
    bank_bytes = 4 * ROOM * LAYERS * (NEURONS + 64)
    client = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=256,
            additional_config={"polyhelm": {"bank_bytes": bank_bytes, "max_edits": 4}},
            **arguments,
        )
    )
    engine = Engine(client, 4, bank_bytes, bank_host_bytes=1 << 20, bank_wait_seconds=60)
    await engine.describe()
    points: tuple[Point, ...] = ("resid_post", "head_out", "mlp_act")
    uploads: list[str] = []
    send = engine._uploader._call

    async def counted(core: Any, method: str, *parameters: Any) -> Any:
        uploads.append(method)
        return await send(core, method, *parameters)

    engine._uploader._call = counted

    def program(index: int) -> Program:
        point = points[index % 3]
        return Program((Edit("scale", f"operand-{index}", tuple(range(LAYERS)), 0.8, point=point),))

    async def load(index: int) -> Operand:
        width = NEURONS if points[index % 3] == "mlp_act" else HIDDEN
        mask = np.random.default_rng(index).integers(0, 2, (LAYERS, width)).astype(np.float32)
        return pack({layer: {"mask": row} for layer, row in enumerate(mask)})

    async def ask(index: int | None, n: int = 1, receipt: str | None = None) -> dict[str, Any]:
        params = SamplingParams(
            n=n, temperature=n - 1, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0
        )
        chosen = None if index is None else program(index)
        if chosen is not None:
            await engine.ensure(chosen, {f"operand-{index}": lambda: load(index)})
        choice = (await engine.generate([5, 6, 7, 8, 9, 10], params, chosen, receipt)).outputs[0]
        logprobs = [at[token].logprob for token, at in zip(choice.token_ids, choice.logprobs, strict=True)]
        return {"tokens": list(choice.token_ids), "logprobs": logprobs}

    result: dict[str, Any] = {"plain": await asyncio.gather(*(ask(None) for _ in range(4)))}
    steered = [ask(index, receipt=f"receipt-{index}") for index in range(REQUESTS)]
    result["steered"] = await asyncio.gather(*steered)
    result["touched"] = [(await engine.receipt(f"receipt-{index}")).touched for index in range(REQUESTS)]
    await ask(1, n=2, receipt="choices")
    result["choices"] = (await engine.receipt("choices")).touched

    await ask(0)
    counts = {"before": len(uploads)}
    await ask(0)
    counts["believed"] = len(uploads)
    # An engine that didn't run the request waits this long for it.
    await asyncio.sleep(BankDirectory.ARRIVAL_SECONDS + 0.5)
    # What another API process would do: the whole bank is promised to it, and everything idle goes.
    cores = client.engine_core.core_engines
    rival = [["rival", "resid_post", 1, bank_bytes // 4]]
    await asyncio.gather(*(engine._call(core, "polyhelm_reserve", [rival]) for core in cores))
    result["evicted"] = await ask(0)
    counts["again"] = len(uploads)
    result["uploads"] = counts
    await asyncio.sleep(BankDirectory.ARRIVAL_SECONDS + 0.5)
    other = [["other rival", "resid_post", 1, bank_bytes // 4]]
    result["whole_bank"] = [(await engine._call(core, "polyhelm_reserve", [other]))[0] for core in cores]
    (folder / "answers.json").write_text(json.dumps(result))
    client.shutdown()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
