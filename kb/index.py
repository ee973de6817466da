"""An index of vectors in memory: FAISS, and which fact lies at which position.

FAISS's own ids are not used: `add_with_ids` takes an id twice, and HNSW can't remove. Vectors are only ever appended;
one that is changed or deleted is dead where it lies, and searches leave it out until the index is made anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np

Kind = Literal["auto", "flat", "hnsw", "ivf"]
_MIN_TRAINING = 39
"""Vectors per list below which FAISS warns that k-means has too little to go by."""


_THREADS = faiss.omp_get_max_threads()
_FEW = 256
"""Dead vectors that are never worth making an index anew."""


@dataclass(frozen=True)
class IndexOptions:
    """`auto` is exact (`flat`) up to `exact_below` facts, and `hnsw` beyond."""

    kind: Kind = "auto"
    exact_below: int = 300_000
    hnsw_links: int = 32
    hnsw_build: int = 80
    hnsw_search: int = 64
    ivf_probes: int = 16
    dead_share: float = 0.25
    """Share of dead vectors at which the index is made anew."""
    snapshot_share: float = 0.2
    """Share of facts changed since the last snapshot at which another one is kept."""
    snapshot_from: int = 10_000
    """Smaller indexes aren't kept unasked: making them takes no time."""
    threads: int = 4
    """At most, and no more than OpenMP has: making an index must leave cores to the requests of that time."""

    def kind_for(self, facts: int) -> Literal["flat", "hnsw", "ivf"]:
        if self.kind != "auto":
            # k-means needs something to go by.
            return "flat" if self.kind == "ivf" and facts < _MIN_TRAINING else self.kind
        return "flat" if facts <= self.exact_below else "hnsw"


class Found(NamedTuple):
    """Each [queries, k]: cosines, numbers of facts (-1 where there were no more), and the writes they are from."""

    scores: np.ndarray
    numbers: np.ndarray
    seqs: np.ndarray


class VectorIndex:
    """Not safe to change while it is searched."""

    def __init__(self, dimension: int, options: IndexOptions, inner: Any = None) -> None:
        self.options = options
        self.last_seq = 0
        self.token: str | None = None
        """Of the transaction that `last_seq` ended, in an index that was read from a file."""
        self.inner = inner or faiss.IndexFlatIP(dimension)
        self._numbers = np.empty(0, np.int64)
        self._seqs = np.empty(0, np.int64)
        self._live = np.empty(0, bool)
        self._position = np.empty(0, np.int64)
        self.dead = 0

    @classmethod
    def build(
        cls, dimension: int, options: IndexOptions, numbers: np.ndarray, seqs: np.ndarray, vectors: np.ndarray
    ) -> VectorIndex:
        """An index of the kind that this many facts need. `vectors` is float32 [facts, dimension]."""
        _limit_threads(options)
        index = cls(dimension, options, _made(options, dimension, vectors))
        index.put(numbers, seqs, vectors)
        return index

    @classmethod
    def restored(
        cls, options: IndexOptions, inner: Any, numbers: np.ndarray, seqs: np.ndarray, live: np.ndarray
    ) -> VectorIndex:
        """The index that `state` told of."""
        index = cls(inner.d, options, inner)
        index._numbers, index._seqs, index._live = numbers, seqs, live
        index.dead = int((~live).sum())
        index._grow(int(numbers.max(initial=-1)) + 1)
        index._position[numbers[live]] = np.flatnonzero(live)
        return index

    def state(self) -> dict[str, np.ndarray]:
        """What `restored` needs beside the FAISS index."""
        count = self.count
        return {"numbers": self._numbers[:count], "seqs": self._seqs[:count], "live": self._live[:count]}

    @property
    def count(self) -> int:
        return int(self.inner.ntotal)

    @property
    def facts(self) -> int:
        return self.count - self.dead

    @property
    def kind(self) -> str:
        for kind, cls in (("hnsw", faiss.IndexHNSW), ("ivf", faiss.IndexIVF)):
            if isinstance(self.inner, cls):
                return kind
        return "flat"

    @property
    def outdated(self) -> bool:
        """Whether too much is dead, or there is too much for the kind."""
        return (
            self.dead > max(_FEW, self.options.dead_share * self.count)
            or self.options.kind_for(self.facts) != self.kind
        )

    def put(self, numbers: np.ndarray, seqs: np.ndarray, vectors: np.ndarray) -> None:
        """Add or replace facts: int64 [n] twice, float32 [n, dimension]."""
        if not len(numbers):
            return
        self.remove(numbers)
        first = self.count
        self.inner.add(np.ascontiguousarray(vectors, np.float32))
        self._numbers = _appended(self._numbers, first, numbers)
        self._seqs = _appended(self._seqs, first, seqs)
        self._live = _appended(self._live, first, np.ones(len(numbers), bool))
        self._position[numbers] = np.arange(first, self.count)

    def remove(self, numbers: np.ndarray) -> None:
        """Those that it doesn't have are no error."""
        if not len(numbers):
            return
        self._grow(int(numbers.max()) + 1)
        positions = self._position[numbers]
        positions = positions[positions >= 0]
        self._live[positions] = False
        self._position[numbers] = -1
        self.dead += len(positions)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Found:
        """The k nearest of all facts, or exactly of those with the numbers `allowed`; float32 [queries, dimension]."""
        bits: np.ndarray | None = None
        if allowed is not None:
            known = allowed[allowed < len(self._position)]
            positions = self._position[known]
            bits = np.zeros(self.count, bool)
            bits[positions[positions >= 0]] = True
        elif self.dead:
            bits = self._live[: self.count]
        k = min(k, self.facts if allowed is None else int(bits.sum()) if bits is not None else 0)
        if k == 0:
            empty = np.empty((len(queries), 0), np.int64)
            return Found(empty.astype(np.float32), empty, empty)
        scores, positions = self._search(np.ascontiguousarray(queries, np.float32), k, bits, exact=allowed is not None)
        numbers, seqs = (np.where(positions < 0, -1, column[positions]) for column in (self._numbers, self._seqs))
        return Found(scores, numbers, seqs)

    def _search(
        self, queries: np.ndarray, k: int, bits: np.ndarray | None, *, exact: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        _limit_threads(self.options)
        selector = None
        if bits is not None:
            packed = np.packbits(bits, bitorder="little")
            selector = faiss.IDSelectorBitmap(packed)
        index = self.inner
        if self.kind == "hnsw" and exact:
            # A graph can't be walked through the few that are allowed; its storage is a flat index.
            index = faiss.downcast_index(index.storage)
        if isinstance(index, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(self.options.hnsw_search, 2 * k))
        elif isinstance(index, faiss.IndexIVF):
            probes = index.nlist if exact else min(self.options.ivf_probes, index.nlist)
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
        elif selector is None:
            parameters = None
        else:
            parameters = faiss.SearchParameters(sel=selector)
        scores, positions = index.search(queries, k, params=parameters)
        return scores, positions

    def _grow(self, size: int) -> None:
        if size > len(self._position):
            grown = np.full(max(size, 2 * len(self._position)), -1, np.int64)
            grown[: len(self._position)] = self._position
            self._position = grown


def _limit_threads(options: IndexOptions) -> None:
    """Of what this very thread calls; OpenMP keeps the number for each."""
    faiss.omp_set_num_threads(max(1, min(options.threads, _THREADS)))


def _made(options: IndexOptions, dimension: int, vectors: np.ndarray) -> Any:
    kind = options.kind_for(len(vectors))
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, options.hnsw_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = options.hnsw_build
        return index
    if kind == "ivf":
        lists = max(1, min(4 * math.isqrt(len(vectors)), len(vectors) // _MIN_TRAINING))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        return index
    return faiss.IndexFlatIP(dimension)


def _appended(column: np.ndarray, used: int, values: np.ndarray) -> np.ndarray:
    """The column with values behind its `used` first; it grows in steps, so that appending stays cheap."""
    if used + len(values) > len(column):
        grown = np.empty(max(used + len(values), 2 * len(column)), column.dtype)
        grown[:used] = column[:used]
        column = grown
    column[used : used + len(values)] = values
    return column
