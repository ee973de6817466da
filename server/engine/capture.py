"""Reads activations at the sites while the engine runs.

A capture belongs to one request. At each of its sites it keeps either every captured token's activation, or the sum of
them and the sum of their norms, so that a long prompt in chunks costs no more memory than a short one. Rows beyond a
number of bytes go to a file (spool.py). Edits of the same request at the same site have acted already.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

from server.engine.edits import Point
from server.engine.spans import Interval, Span, clip
from server.engine.spool import Extent, FailureKind, Spool

Pooling = Literal["last", "mean"]
Keep = Literal["mean", "rows"]
Dtype = Literal["float32", "float16", "bfloat16"]

DTYPES: dict[Dtype, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
}
"""As torch and as safetensors call them."""

HELD_BACK = 8
"""Generated tokens that a mean leaves out until it is asked for. With asynchronous scheduling the engine has begun to
run a token or two behind the last one when it learns that this was the last.
"""


def pooling_span(pooling: Pooling) -> Span:
    """`last`: the last prompt token. `mean`: all prompt tokens but the first, whose activation is an attention sink
    with a norm far from all others (Sun et al. 2024, "Massive activations in large language models")."""
    if pooling == "last":
        return Span(prompt=False, generation=False, prompt_positions=(-1,))
    return Span(prompt=False, generation=False, prompt_window=(1, None))


@dataclass(frozen=True)
class CaptureSpec:
    """What to capture of a request: at which sites, of which tokens, and whether their mean or every row, and as what
    type.

    With a folder `spool`, rows beyond `memory_bytes` go to a file there.
    """

    sites: tuple[tuple[Point, int], ...]
    span: Span
    keep: Keep = "mean"
    dtype: Dtype = "float32"
    spool: str | None = None
    memory_bytes: int = 0

    @property
    def wire(self) -> bytes:
        return json.dumps({**asdict(self), "span": self.span.to_json()}).encode()

    @classmethod
    def from_wire(cls, wire: bytes) -> CaptureSpec:
        fields = json.loads(wire)
        sites = tuple((point, layer) for point, layer in fields.pop("sites"))
        return cls(sites, Span.from_json(fields.pop("span")), **fields)


@dataclass(slots=True)
class SiteCapture:
    """What was captured at one site: `rows` [tokens, width] in order of position, behind those in `extents` of the
    file; or running sums, and in `rows` the tokens that aren't summed yet.
    """

    tokens: int = 0
    width: int = 0
    total: torch.Tensor | None = None
    norm_total: torch.Tensor | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)

    def sum(self, x: torch.Tensor) -> None:
        total, norm = x.sum(0), x.norm(dim=1).sum()
        self.total = total if self.total is None else self.total + total
        self.norm_total = norm if self.norm_total is None else self.norm_total + norm


class Capture:
    """The activations of one request."""

    def __init__(self, spec: CaptureSpec, sites: tuple[int, ...], prompt_len: int) -> None:
        """`sites` are the numbers of the spec's sites, in its order."""
        self.spec = spec
        self.sites = sites
        self.intervals: tuple[Interval, ...] = spec.span.intervals(prompt_len)
        self.at = {site: SiteCapture() for site in sites}
        self.failure: dict[str, Any] | None = None
        """Why the activations are lost, as `collect` answers. The request goes on, and the others in its batch do."""
        self._prompt_tokens = sum(end - start for start, end in clip(self.intervals, 0, prompt_len))
        self._held = 0
        self._spool: Spool | None = None
        self._closed = False

    def add(self, site: int, x: torch.Tensor) -> None:
        """Take activations [tokens, width] float32, which follow in position those taken before."""
        if self._closed:
            return
        taken = self.at[site]
        certain = min(len(x), max(0, self._prompt_tokens - taken.tokens))
        taken.tokens += len(x)
        taken.width = x.shape[1]
        if self.spec.keep == "rows":
            self._keep(taken, x)
            return
        if certain:
            taken.sum(x[:certain])
        for index in range(certain, len(x)):
            taken.rows.append(x[index : index + 1].clone())
            if len(taken.rows) > HELD_BACK:
                taken.sum(taken.rows.pop(0))

    def _keep(self, taken: SiteCapture, x: torch.Tensor) -> None:
        rows = x.to(DTYPES[self.spec.dtype][0]).cpu()
        if self._overflows(rows):
            return
        size = rows.numel() * rows.element_size()
        if self._held + size > self.spec.memory_bytes:
            self._flush()
        if self._closed:
            return
        taken.rows.append(rows)
        self._held += size
        if self._held > self.spec.memory_bytes:
            self._flush()

    def _overflows(self, x: torch.Tensor) -> bool:
        if x.dtype != torch.float16 or not x.isinf().any():
            return False
        self._fail("dtype", "an activation is beyond float16: ask for bfloat16 or float32")
        return True

    def _flush(self) -> None:
        """Move all rows to the file, if there may be one."""
        if self.spec.spool is None:
            return
        try:
            for taken in self.at.values():
                self._write(taken)
        except OSError as error:
            # Raised in the middle of a step it would end the engine.
            self._fail("disk", f"the activations can't be written to disk: {error}")
            return
        self._held = 0

    def _write(self, taken: SiteCapture) -> None:
        if not taken.rows:
            return
        if self._spool is None:
            self._spool = Spool(Path(self.spec.spool or ""))
        rows = torch.cat(taken.rows)
        taken.extents.append((self._spool.write(_bytes_of(rows)), len(rows)))
        taken.rows.clear()

    def _fail(self, kind: FailureKind, error: str) -> None:
        self.close()
        self.failure = {"error": error, "kind": kind}

    def close(self) -> None:
        """Let go of everything, the file too, and take no more."""
        self._closed, self._held = True, 0
        self.at.clear()
        if self._spool is not None:
            self._spool.close()

    def collect(self, tokens: int | None = None) -> bytes | dict[str, Any]:
        """What was captured, of the first `tokens` captured tokens only where that is given; takes no more afterwards.

        Three answers: a safetensors file (`tensors`); where there is a file of rows, its `path`, which is the caller's
        to remove, and `tensors` by site, with `dtype`, `shape` and `extents`; or the reason as `error`, and its `kind`.
        """
        if self.failure is None and tokens is not None:
            for taken in self.at.values():
                beyond = taken.tokens - tokens
                if taken.tokens and (beyond < 0 or (self.spec.keep == "mean" and beyond > len(taken.rows))):
                    self._fail("lost", f"{taken.tokens} tokens were captured where {tokens} ran")
                    break
        if self.failure is None and self._spool is not None:
            self._flush()
        if self.failure is not None:
            return self.failure
        self._closed = True
        if self._spool is None:
            tensors = self.tensors(tokens)
            if not any(self._overflows(each) for each in tensors.values()):
                return safetensors.torch.save(tensors)
            assert self.failure is not None
            return self.failure
        return {"path": str(self._spool.hand_over()), "tensors": self._index(tokens)}

    def _index(self, tokens: int | None) -> dict[str, dict[str, Any]]:
        dtype = DTYPES[self.spec.dtype][1]
        return {
            name: {"dtype": dtype, "shape": [_first(taken, tokens), taken.width], "extents": taken.extents}
            for name, taken in self._named()
        }

    def _named(self) -> list[tuple[str, SiteCapture]]:
        """Sites of other pipeline stages, which took nothing, are left out."""
        numbered = zip(self.spec.sites, self.sites, strict=True)
        return [(f"{point}.{layer}", self.at[site]) for (point, layer), site in numbered if self.at[site].tokens]

    def tensors(self, tokens: int | None = None) -> dict[str, torch.Tensor]:
        """By site, `resid_post.14`: rows [tokens, width], or the mean [width] and, as `resid_post.14.norm`, the mean L2
        norm, float32. Only of what isn't in a file.
        """
        found: dict[str, torch.Tensor] = {}
        for name, taken in self._named():
            count = _first(taken, tokens)
            if self.spec.keep == "rows":
                found[name] = torch.cat(taken.rows)[:count]
                continue
            while len(taken.rows) > taken.tokens - count:
                taken.sum(taken.rows.pop(0))
            assert taken.total is not None and taken.norm_total is not None
            found[name] = (taken.total / count).to(DTYPES[self.spec.dtype][0]).cpu()
            found[f"{name}.norm"] = (taken.norm_total / count).cpu()
        return found


def _first(taken: SiteCapture, tokens: int | None) -> int:
    return taken.tokens if tokens is None else tokens


def _bytes_of(rows: torch.Tensor) -> memoryview:
    data: np.ndarray = rows.contiguous().view(torch.uint8).numpy()
    return data.data.cast("B")


@dataclass(frozen=True, slots=True)
class CaptureSlice:
    """Rows [start, end) of the batch that one capture reads at one site."""

    capture: Capture
    site: int
    start: int
    end: int

    def add(self, hidden: torch.Tensor | None, residual: torch.Tensor) -> None:
        x = residual[self.start : self.end].to(torch.float32, copy=True)
        self.capture.add(self.site, x if hidden is None else x.add_(hidden[self.start : self.end]))
