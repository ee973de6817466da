"""The layers of a Llama in one decode step, with random weights: what gpu_overhead.py adds edits to.

The norms and the feed-forward's activation are fused kernels, as in an inference engine; a slower stack would make the
edits look cheaper than they are. There are no positions and no sampling, and the key-value cache stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

Site = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's number, the residual stream [tokens, hidden] and what the layer's feed-forward adds to it."""


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    kv_length: int


LLAMA_3_8B = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, kv_length=1024)
TOY = Shape(layers=3, hidden=48, heads=4, kv_heads=2, head_dim=16, intermediate=64, kv_length=8)

CACHE_BYTES = 1 << 29
"""Layers share key-value caches of this size together: more than a GPU's cache holds, less than one for every layer."""


class Stack:
    """Weights in bfloat16, and a step over `batch` requests of one token each."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.layers = [
            (
                self.random(rows, shape.hidden),
                self.random(shape.hidden, shape.heads * shape.head_dim),
                self.random(2 * shape.intermediate, shape.hidden),
                self.random(shape.hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        ]
        self.norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.bfloat16, device=self.device).mul_(size[-1] ** -0.5)

    def caches(self, batch: int) -> list[Tensor]:
        """Keys and values, [2, batch, kv_heads, kv_length, head_dim] each."""
        shape = self.shape
        size = (2, batch, shape.kv_heads, shape.kv_length, shape.head_dim)
        count = min(shape.layers, -(-CACHE_BYTES // (2 * torch.Size(size).numel())))
        return [torch.randn(size, dtype=torch.bfloat16, device=self.device) for _ in range(count)]

    def step(self, start: Tensor, caches: list[Tensor], site: Site | None) -> Tensor:
        """One decode step from the embeddings `start` [batch, hidden]."""
        shape, batch = self.shape, len(start)
        residual, hidden = torch.zeros_like(start), start.clone()
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        for layer, (qkv, output, gate_up, down) in enumerate(self.layers):
            projected = linear(add_norm(hidden, residual, self.norm), qkv)
            # Heads that share keys and values stand side by side as queries of one head.
            query = projected[:, :queries].reshape(batch, shape.kv_heads, -1, shape.head_dim)
            key, value = caches[layer % len(caches)]
            key[:, :, 0] = projected[:, queries : queries + keys].view(batch, shape.kv_heads, -1)
            value[:, :, 0] = projected[:, queries + keys :].view(batch, shape.kv_heads, -1)
            context = scaled_dot_product_attention(query, key, value).reshape(batch, queries)
            hidden = linear(add_norm(linear(context, output), residual, self.norm), gate_up)
            hidden = linear(silu_product(hidden), down)
            if site is not None:
                site(layer, residual, hidden)
        return add_norm(hidden, residual, self.norm)


def add_norm(hidden: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """residual += hidden in place; returns the RMS norm of it."""
    tokens, width = hidden.shape
    normed = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    _add_norm[(tokens,)](hidden, residual, weight, normed, WIDTH=width, BLOCK=block, num_warps=8)
    return normed


@triton.jit
def _add_norm(hidden, residual, weight, normed, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < WIDTH
    places = tl.program_id(0).to(tl.int64) * WIDTH + offsets
    x = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + places, x.to(residual.dtype.element_ty), mask=inside)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + 1e-5)
    x = x * tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + places, x.to(normed.dtype.element_ty), mask=inside)


def silu_product(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [tokens, 2 * intermediate]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = gate_up.new_empty(tokens, width)
    _silu_product[(tokens, triton.cdiv(width, 1024))](gate_up, product, WIDTH=width, BLOCK=1024)
    return product


@triton.jit
def _silu_product(gate_up, product, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < WIDTH
    gate = tl.load(gate_up + token * 2 * WIDTH + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * WIDTH + WIDTH + offsets, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(product + token * WIDTH + offsets, value.to(product.dtype.element_ty), mask=inside)
