"""The engine against transformers with forward hooks, in float32: the same log-probabilities, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from server.engine.edits import Edit, Span
from tests.server.engine.child import Request, Result, run_engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

TOLERANCE = 2e-3
PROMPT_TOKENS, NEW_TOKENS = 21, 32
SHAPE = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
TINY = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2
    ),
}


def programs(layers: int) -> dict[str, tuple[Edit, ...]]:
    everywhere, middle = tuple(range(layers)), (layers // 2,)
    last_prompt_token = Span(prompt=False, generation=False, prompt_positions=(-1,))
    window = Span(prompt=False, generation=False, prompt_window=(4, 9), generation_window=(3, 20))
    return {
        "unsteered": (),
        "one layer": (Edit("add", "v", middle, 3.0),),
        "all layers": (Edit("add", "v", everywhere, 0.5),),
        "generation only": (Edit("add", "v", everywhere, 0.5, Span(prompt=False)),),
        "last prompt token only": (Edit("add", "v", middle, 4.0, last_prompt_token),),
        "a window": (Edit("add", "w", everywhere, 0.5, window),),
        "add_norm": (Edit("add_norm", "w", middle, 0.4), Edit("add_norm", "v", (0, layers - 1), -0.2)),
        "three that add up": (
            Edit("add", "v", everywhere, 0.4),
            Edit("add", "w", middle, -2.0, Span(prompt=False)),
            Edit("add_norm", "v", middle, 0.3, Span(exclude_prompt_positions=(0,))),
        ),
    }


def reference(
    model: torch.nn.Module, vectors: dict[str, np.ndarray], edits: tuple[Edit, ...], ids: list[int]
) -> list[float]:
    """Log-probability of every token but the first, from one forward pass with a hook on each decoder layer."""

    def hook_for(layer: int):
        def hook(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            for edit in edits:
                if layer in edit.layers:
                    x = x + steps(edit, x, torch.from_numpy(vectors[edit.operand][layer]))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    def steps(edit: Edit, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[1], 1)
        for start, end in edit.span.intervals(PROMPT_TOKENS):
            mask[start : min(end, x.shape[1])] = 1
        scale = 1 if edit.opcode == "add" else x.norm(dim=-1, keepdim=True) / v.norm()
        return mask * edit.strength * scale * v

    handles = [layer.register_forward_hook(hook_for(index)) for index, layer in enumerate(model.model.layers)]
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()
    return torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].tolist()


def check(model: torch.nn.Module, folder: Path, job: Path) -> None:
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    rng = np.random.default_rng(0)
    typical = model.get_input_embeddings().weight.norm(dim=1).mean().item() / hidden**0.5
    vectors = {key: (typical * rng.standard_normal((layers, hidden))).astype(np.float32) for key in "vw"}
    cases = programs(layers)
    prompts = {name: rng.integers(3, min(model.config.vocab_size, 5000), PROMPT_TOKENS).tolist() for name in cases}
    requests = [Request(prompts[name], edits, NEW_TOKENS, prompt_logprobs=True) for name, edits in cases.items()]
    # Chunks shorter than the prompt, so that prompts are split and mixed with decodes.
    engine = {"model": str(folder), "max_model_len": 256, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    texts = list(prompts.values())[:2]
    run = run_engine(job, vectors, [requests], engine, texts)
    ((*results,),) = run.rounds
    model.eval()
    check_captures(model, texts, run.captures)
    for (name, edits), result in zip(cases.items(), results, strict=True):
        ids = prompts[name] + result.tokens
        found = result.prompt_logprobs + result.logprobs
        expected = reference(model, vectors, edits, ids)
        worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert worst < TOLERANCE, f"{name}: log-probabilities differ by {worst}"
        unsteered = reference(model, vectors, (), ids)
        if edits:
            moved = max(abs(a - b) for a, b in zip(found, unsteered, strict=True))
            assert moved > 10 * TOLERANCE, f"{name}: steering moved nothing, so this proves nothing"
        check_counts(edits, result, layers)


def check_captures(model: torch.nn.Module, texts: list[list[int]], captures: dict[str, np.ndarray]) -> None:
    """The residual stream after each layer is what transformers' decoder layer returns."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.model.layers
    ]
    for index, ids in enumerate(texts):
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([ids]))
        x = torch.stack([each.reshape(len(ids), -1) for each in seen])
        for pooling, tokens in (("last", x[:, -1:]), ("mean", x[:, 1:])):
            mean, norm = tokens.mean(1).numpy(), tokens.norm(dim=2).mean(1).numpy()
            np.testing.assert_allclose(captures[f"{index}-{pooling}-norm"], norm, rtol=1e-3)
            error = np.linalg.norm(captures[f"{index}-{pooling}-mean"] - mean, axis=1)
            assert (error < 1e-3 * np.linalg.norm(mean, axis=1)).all(), f"captured {pooling} differs by {error}"
    for handle in handles:
        handle.remove()


def check_counts(edits: tuple[Edit, ...], result: Result, layers: int) -> None:
    ran = PROMPT_TOKENS + NEW_TOKENS - 1
    for edit, touched in zip(edits, result.touched, strict=True):
        tokens = sum(min(end, ran) - start for start, end in edit.span.intervals(PROMPT_TOKENS) if start < ran)
        assert touched == [tokens if layer in edit.layers else 0 for layer in range(layers)]


@pytest.mark.parametrize("family", sorted(TINY))
def test_steered_log_probabilities_equal_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(TINY[family](), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    check(model, tmp_path / "model", tmp_path)


def test_steered_log_probabilities_equal_transformers_on_the_demo_model(smollm2: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    check(model, smollm2, tmp_path)
