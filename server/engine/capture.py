"""Reads activations at the sites while the engine runs.

A capture belongs to one request. At every site it keeps, in float32, the sum of the activation over the captured tokens
and the sum of its norm, so that a long prompt in chunks costs no more memory than a short one. Edits of the same
request at the same site have acted already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from server.engine.edits import Interval, Span

Pooling = Literal["last", "mean"]


def pooling_span(pooling: Pooling) -> Span:
    """`last`: the last prompt token. `mean`: all prompt tokens but the first, whose activation is an attention sink
    with a norm far from all others (Sun et al. 2024, "Massive activations in large language models")."""
    if pooling == "last":
        return Span(prompt=False, generation=False, prompt_positions=(-1,))
    return Span(prompt=False, generation=False, prompt_window=(1, None))


class Capture:
    """Running sums of one request at all sites."""

    def __init__(
        self, sites: int, hidden_size: int, intervals: tuple[Interval, ...], device: torch.device | str = "cpu"
    ) -> None:
        self.intervals = intervals
        self.total = torch.zeros(sites, hidden_size, dtype=torch.float32, device=device)
        self.norm_total = torch.zeros(sites, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(sites, dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True)
class CaptureSlice:
    """Rows [start, end) of the batch that one capture reads at one site."""

    capture: Capture
    site: int
    start: int
    end: int

    def add(self, hidden: torch.Tensor | None, residual: torch.Tensor) -> None:
        x = residual[self.start : self.end].float()
        if hidden is not None:
            x = x + hidden[self.start : self.end].float()
        self.capture.total[self.site] += x.sum(0)
        self.capture.norm_total[self.site] += x.norm(dim=1).sum()
        self.capture.tokens[self.site] += self.end - self.start
