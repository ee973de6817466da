"""What is refused by name, and how a module's output is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engine.points import UnsupportedModel
from server.engine.sites import STACKED, refuse_unsupported, split_stream


def config(**changes: Any) -> Any:
    """The parts of vLLM's configuration that decide; all is well by default."""
    parallel = {"prefill_context_parallel_size": 1, "use_ubatching": False, "use_sequence_parallel_moe": False}
    streams = {name: changes.pop(name) for name in STACKED if name in changes}
    model = {"is_diffusion": False, "hf_text_config": SimpleNamespace(**streams)}
    model |= {"enable_prompt_embeds": False, "multimodal_config": None}
    return SimpleNamespace(
        speculative_config=changes.pop("speculative_config", None),
        model_config=SimpleNamespace(**{name: changes.pop(name, value) for name, value in model.items()}),
        parallel_config=SimpleNamespace(**{**parallel, **changes}),
    )


def test_a_plain_configuration_is_accepted() -> None:
    refuse_unsupported(config())
    refuse_unsupported(config(hc_mult=1))
    refuse_unsupported(config(altup_num_inputs=None))
    refuse_unsupported(config(multimodal_config=SimpleNamespace(enable_mm_embeds=False)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"is_diffusion": True}, "diffusion language models"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"use_ubatching": True}, "microbatching"),
        ({"use_sequence_parallel_moe": True}, "sequence-parallel mixtures of experts"),
        ({"altup_num_inputs": 4}, "stacked residual streams"),  # Gemma 3n
        ({"hc_mult": 4}, "stacked residual streams"),
        ({"hc_count": 4}, "stacked residual streams"),  # Qwen4Exp
        ({"enable_prompt_embeds": True}, "no pickles"),
        ({"multimodal_config": SimpleNamespace(enable_mm_embeds=True)}, "no pickles"),
    ],
)
def test_what_would_not_be_exact_or_safe_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        refuse_unsupported(config(**changes))


def test_the_stream_is_a_pair_a_pair_with_none_or_a_tensor() -> None:
    hidden, residual = torch.zeros(3, 4), torch.ones(3, 4)
    assert split_stream((hidden, residual))[1] is residual
    assert split_stream((hidden, None)) == (None, hidden)
    assert split_stream(hidden) == (None, hidden)
    batched = torch.zeros(1, 3, 4)
    _, rows = split_stream(batched)
    rows += 1
    assert batched.sum() == 12, "an edit must reach the tensor itself"


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 4), (torch.zeros(3, 4), torch.zeros(2, 4)), [torch.zeros(3, 4)]])
def test_other_outputs_are_refused(output: Any) -> None:
    with pytest.raises(UnsupportedModel):
        split_stream(output)
