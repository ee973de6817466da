"""Which tokens the `map` kernels compute, and in which order: those with the same matrix side by side, so that a matrix
is read once for up to TILE of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from server.engine.banks import Resident

Int32 = npt.NDArray[np.int32]

TILE = 16
"""Tokens that share one read of a matrix."""


class MapPlan:
    """The plan of a step: `data` int32 on the device.

    `data[site]` is where the site's plan starts, 0 for none. A plan is its number of tiles, the tiles' first places in
    the list of tokens, the tiles' lengths, and the list. Sites at which the same edits act share a plan.
    """

    def __init__(
        self, sites: int, rows: int, max_edits: int, map_sites: list[int], max_mapped: int, device: torch.device
    ) -> None:
        self.sites, self.map_sites, self.max_mapped = sites, map_sites, max_mapped
        self.data = torch.zeros(sites + len(map_sites) * (1 + 3 * max_mapped), dtype=torch.int32, device=device)
        self._edit = np.full((rows, len(map_sites)), -1, np.int32)
        """By row and map site: the edit to compute, or -1."""
        self._bits = np.zeros(rows, np.int32)
        self._matrix = np.zeros((rows, max_edits), np.int64)
        """By row and edit: what tells one operand from another."""
        self.is_empty = True
        """No token of the step is computed ahead anywhere."""

    def set_row(self, row: int, edits: Int32, residents: Sequence[Resident | None]) -> None:
        """`edits` has the edit to compute at each site, or -1 [sites]."""
        self._edit[row] = edits[self.map_sites]
        self._bits[row] = np.bitwise_or.reduce(1 << self._edit[row][self._edit[row] >= 0], initial=0)
        for index, resident in enumerate(residents):
            if resident is not None:
                self._matrix[row, index] = resident.first

    def clear_row(self, row: int) -> None:
        self._edit[row], self._bits[row] = -1, 0

    def tiles(self, site: int) -> list[Int32]:
        """The tokens of each tile of the step at a site, read back from `data`: for a CPU, where that is free."""
        start = int(self.data[site])
        if start == 0:
            return []
        plan: Int32 = self.data[start:].numpy()
        count = plan[0]
        listed = plan[1 + 2 * count :]
        return [listed[a : a + n] for a, n in zip(plan[1 : 1 + count], plan[1 + count : 1 + 2 * count], strict=True)]

    def lay_out(self, tokens: Int32) -> Int32 | None:
        """Give slots to the tokens that a map may act on, in the last column of `tokens` [T, TOKEN_FIELDS].

        Returns what `data` has to begin with, or None where it was empty and stays so.
        """
        chosen = np.flatnonzero(tokens[:, 1] & self._bits[tokens[:, 0]])[: self.max_mapped]
        if not len(chosen):
            if self.is_empty:
                return None
            self.is_empty = True
            return np.zeros(self.sites, np.int32)
        self.is_empty = False
        tokens[chosen, 3] = np.arange(len(chosen))
        plans: dict[bytes, int] = {}
        starts, parts, end = np.zeros(self.sites, np.int32), [], self.sites
        for column, site in enumerate(self.map_sites):
            edits = self._edit[tokens[chosen, 0], column]
            if edits.tobytes() not in plans:
                plan = self._plan(tokens, chosen, edits)
                plans[edits.tobytes()] = end if len(plan) else 0
                parts.append(plan)
                end += len(plan)
            starts[site] = plans[edits.tobytes()]
        layout: Int32 = np.concatenate([starts, *parts])
        return layout

    def _plan(self, tokens: Int32, chosen: npt.NDArray[np.intp], edits: Int32) -> Int32:
        """The plan of the sites at which these edits [chosen] are to be computed; empty when none acts."""
        acts = (edits >= 0) & (tokens[chosen, 1] >> np.maximum(edits, 0) & 1 == 1)
        listed, edits = chosen[acts], edits[acts]
        matrices = self._matrix[tokens[listed, 0], edits]
        order = np.argsort(matrices, kind="stable")
        cuts = np.flatnonzero(np.diff(matrices[order])) + 1
        firsts: list[int] = []
        lengths: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
            for first in range(start, end, TILE):
                firsts.append(first)
                lengths.append(min(TILE, end - first))
        if not firsts:
            return np.empty(0, np.int32)
        return np.array([len(firsts), *firsts, *lengths, *listed[order]], np.int32)
