"""What the kernels read: the programs of the running requests and the tokens of the step, in device buffers.

The buffers are allocated once, so that captured graphs can hold their addresses. The host writes them between steps by
copies on the current stream, from pinned memory that PyTorch keeps until the copy is done; it never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engine.banks import Bank, Resident
from server.engine.edits import MAX_BOUNDS, OPCODES, Edit, Opcode, Program, site_index
from server.engine.operands import Role
from server.engine.ops.map_plan import MapPlan

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

TOKEN_FIELDS = 4
"""Of a token: its row (0: no program), the bits of the edits whose spans cover it, whether it counts, and its slot in
`Tables.mapped`, or -1.
"""
EDIT_FIELDS = 8
"""Of a row's edit: opcode (1 + its index in OPCODES), gate or -1, code, first bound, bounds per coefficient (0 or 1),
strength, threshold, nothing.
"""
SITE_FIELDS = 4
"""Of a row's site: bits of the edits that act there, bits of those that need the whole activation, the `map` that the
map kernels compute or -1, and the `set` just before it or -1.
"""
POINTERS = 5
"""Of a row's edit at a site: where its tensors start in the bank (see `READS`), and how many coefficients it has."""

ACTIVATIONS = ("identity", "relu", "jumprelu")
CLAMPS = 4
"""In the code of a `rank` edit, beside the index of its activation."""
COSINE, ABOVE, SEQUENCE = 1, 2, 4
"""In the code of a `gate`."""
CLOSED, OPEN = 1, 2
"""In `Tables.decisions`; 0 is undecided."""

WIDEST = 16384
"""An activation that one kernel program can hold whole."""
ELEMENTWISE: frozenset[Opcode] = frozenset({"add", "scale", "set"})


class Kept(NamedTuple):
    """What a request's row holds that its program doesn't say: `Tables.decisions` [edits] and `counters` [sites, edits]
    of the row, on the device.
    """

    decisions: Tensor
    counts: Tensor


class Tables:
    """Device buffers for rows 1 to `max_rows`, one per running request; row 0 stands for "no program".

    `widths` has the width of the activation at each site where edits may act, this rank's part of it where it is
    sharded; sites are numbered by `site_index` below `sites`. At the sites in `map_sites`, `map` edits of many tokens
    are computed together by kernels of their own, for up to `max_mapped` tokens a step and factors up to rank
    `max_map_rank`; the edit kernel computes all others itself, token by token.
    """

    def __init__(
        self,
        bank: Bank,
        sites: int,
        widths: Mapping[int, int],
        *,
        max_rows: int,
        max_tokens: int,
        max_edits: int = 16,
        max_bounds: int = MAX_BOUNDS,
        map_sites: frozenset[int] = frozenset(),
        max_mapped: int = 1024,
        max_map_rank: int = 512,
    ) -> None:
        if not 1 <= max_edits <= 31:
            raise ValueError(f"max_edits is {max_edits}; a token has bits for 1 to 31 edits")
        self.bank, self.sites, self.widths = bank, sites, dict(widths)
        self.max_rows, self.max_tokens, self.max_edits, self.max_bounds = max_rows, max_tokens, max_edits, max_bounds
        self.map_sites = map_sites
        self.max_mapped = min(max_mapped, max_tokens) if map_sites else 0
        self.max_map_rank = max_map_rank
        self._width_at = np.array([self.widths.get(site, 0) for site in range(sites)])
        device, rows = bank.device, max_rows + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.row_fields = max_edits * EDIT_FIELDS + sites * SITE_FIELDS + 2 * max_bounds
        self.tokens = zeros(max_tokens, TOKEN_FIELDS)
        self.rows = zeros(rows, self.row_fields)
        """Per row: its edits, its sites, its lower and its upper bounds."""
        self.pointers = zeros(rows, sites, max_edits, POINTERS, dtype=torch.int64)
        self.decisions = zeros(rows, max_edits, dtype=torch.int8)
        self.counters = zeros(rows, sites, max_edits)
        self.plan = MapPlan(sites, rows, max_edits, sorted(map_sites), self.max_mapped, device)
        map_width = max((self.widths[site] for site in map_sites), default=1)
        self.mapped = zeros(max(self.max_mapped, 1), map_width, dtype=torch.float32)
        """W x of the tokens that the map kernels compute."""
        self.projected = zeros(max(self.max_mapped, 1), max_map_rank if map_sites else 1, dtype=torch.float32)
        """right x of those with factors."""
        self.staged: Int32 = np.zeros((0, TOKEN_FIELDS), np.int32)
        """The step's part of `tokens`, on the host."""
        self.steered: Int64 = np.zeros(0, np.int64)
        """Tokens of the step that an edit covers, and the last of them, or -1."""
        self.last_steered = -1
        self._changed = True

    def set_row(
        self,
        row: int,
        program: Program,
        residents: Sequence[Resident | None],
        layers: int,
        kept: Kept | None = None,
    ) -> None:
        """Make `row` run `program`, with nothing decided and nothing counted but what was `kept` of a row that it had
        before. `residents` has one entry per edit.

        ValueError, before anything is written, where the program exceeds a limit, an operand has nothing for a layer,
        or an edit needs more of the activation than this rank has.
        """
        self._check_row(row)
        if len(program.edits) > self.max_edits:
            raise ValueError(f"a program of {len(program.edits)} edits is over the limit of {self.max_edits}")
        edits = np.zeros((self.max_edits, EDIT_FIELDS), np.int32)
        bounds = np.zeros((2, self.max_bounds), np.float32)
        pointers = np.zeros((self.sites, self.max_edits, POINTERS), np.int64)
        sites = np.zeros((self.sites, SITE_FIELDS), np.int32)
        sites[:, 2:] = -1
        used = 0
        for index, (edit, resident) in enumerate(zip(program.edits, residents, strict=True)):
            used += self._describe(edit, edits[index], bounds, used)
            chosen = np.array(edit.layers)
            acting = site_index(edit.point, 0, layers) + chosen
            self._check_sites(edit, acting, resident)
            sites[acting, 0] |= 1 << index
            if edit.opcode not in ELEMENTWISE:
                sites[acting, 1] |= 1 << index
            if resident is not None:
                pointers[acting, index] = _pointers(edit, resident, chosen)
        if any(edit.opcode == "map" for edit in program.edits):
            self._plan_maps(program, sites, pointers)
        record = np.concatenate([edits.reshape(-1), sites.reshape(-1), bounds.view(np.int32).reshape(-1)])
        self._copy(self.rows[row], record)
        self._copy(self.pointers[row], pointers)
        if kept is None:
            self.decisions[row].zero_()
            self.counters[row].zero_()
        else:
            self.decisions[row].copy_(kept.decisions)
            self.counters[row].copy_(kept.counts)
        self.plan.set_row(row, sites[:, 2], residents)
        self._changed = True

    def keep(self, row: int) -> Kept:
        """What `row` has decided and counted."""
        self._check_row(row)
        return Kept(self.decisions[row].clone(), self.counters[row].clone())

    def clear_row(self, row: int) -> None:
        """Make `row` do nothing, even where tokens still name it."""
        self._check_row(row)
        self.rows[row].zero_()
        self.plan.clear_row(row)
        self._changed = True

    def stage(self, token_rows: Int32, token_bits: Int32 | Int64, fresh: npt.NDArray[np.bool_]) -> None:
        """Lay out a step of T tokens: their rows [T], bit e of whose bits [T] says that the span of edit e covers the
        token, and whether they count [T]. All further tokens, such as a graph's padding, belong to row 0.
        """
        if len(token_rows) > self.max_tokens:
            raise ValueError(f"a step of {len(token_rows)} tokens is over the limit of {self.max_tokens}")
        tokens = np.empty((len(token_rows), TOKEN_FIELDS), np.int32)
        tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens[:, 3] = token_rows, token_bits, fresh, -1
        if not self._changed and np.array_equal(tokens[:, :3], self.staged[:, :3]):
            return
        if len(tokens) and not 0 <= token_rows.min() <= token_rows.max() <= self.max_rows:
            raise ValueError(f"token rows {token_rows.min()} to {token_rows.max()} are outside 0 to {self.max_rows}")
        plan = self.plan.lay_out(tokens)
        if plan is not None:
            self._copy(self.plan.data[: len(plan)], plan)
        extent = max(len(tokens), len(self.staged))
        padded = np.zeros((extent, TOKEN_FIELDS), np.int32)
        padded[: len(tokens)] = tokens
        self._copy(self.tokens[:extent], padded)
        self.staged, self._changed = tokens, False
        self.steered = np.flatnonzero((tokens[:, 0] > 0) & (tokens[:, 1] != 0))
        self.last_steered = int(self.steered[-1]) if len(self.steered) else -1

    def idle(self) -> None:
        """Lay out a step in which no token has a program."""
        self.stage(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.bool_))

    def counts(self, row: int) -> Int32:
        """Tokens on which each edit acted since `set_row`, int32 [sites, edits]. Waits for the device."""
        self._check_row(row)
        counts: Int32 = self.counters[row].cpu().numpy()
        return counts

    def _copy(self, target: Tensor, source: npt.NDArray[np.integer]) -> None:
        if target.is_cuda:
            pinned = torch.empty(source.shape, dtype=target.dtype, pin_memory=True)
            pinned.numpy()[...] = source
            target.copy_(pinned.view(target.shape), non_blocking=True)
        else:
            target.numpy()[...] = source.reshape(target.shape)

    def _check_row(self, row: int) -> None:
        if not 1 <= row <= self.max_rows:
            raise ValueError(f"row {row} is outside 1 to {self.max_rows}")

    def _check_sites(self, edit: Edit, sites: Int64, resident: Resident | None) -> None:
        width = int(self._width_at[sites].min())
        if width == 0:
            missing = sites[self._width_at[sites] == 0][0]
            raise ValueError(f"{edit.opcode} at {edit.point}: site {missing} has no activation here")
        if edit.opcode in ELEMENTWISE:
            if resident is not None and resident.width % width:
                raise ValueError(
                    f"{edit.opcode} at {edit.point}: its operand is {resident.width} wide, the activation {width}"
                )
            return
        if resident is not None and width != resident.width:
            raise ValueError(
                f"{edit.opcode} at {edit.point} reads an activation {resident.width} wide, of which {width} are here"
            )
        if width > WIDEST:
            raise ValueError(f"{edit.opcode} at {edit.point}: the activation is {width} wide, over {WIDEST}")

    def _describe(self, edit: Edit, fields: Int32, bounds: npt.NDArray[np.float32], used: int) -> int:
        """Fill the edit's fields, and its bounds behind the `used` ones. Returns how many bounds it has."""
        fields[0] = 1 + OPCODES.index(edit.opcode)
        fields[1] = -1 if edit.gate is None else edit.gate
        fields.view(np.float32)[5] = edit.strength
        if edit.condition is not None:
            fields[2] = COSINE * (edit.condition.readout == "cosine") | ABOVE * edit.condition.above
            fields[2] |= SEQUENCE * (edit.condition.scope == "sequence")
            fields.view(np.float32)[6] = edit.condition.threshold
        if edit.function is None:
            return 0
        fields[2] = ACTIVATIONS.index(edit.function.activation)
        if not edit.function.clamps:
            return 0
        low, high = edit.function.low or (-np.inf,), edit.function.high or (np.inf,)
        count = edit.function.bounds
        if used + count > self.max_bounds:
            raise ValueError(f"a program of {used + count} or more bounds is over the limit of {self.max_bounds}")
        fields[2:5] = fields[2] | CLAMPS, used, int(count > 1)
        bounds[0, used : used + count], bounds[1, used : used + count] = low, high
        return count

    def _plan_maps(self, program: Program, sites: Int32, pointers: Int64) -> None:
        """Fill in, of each site's fields, what is computed ahead there."""
        found: dict[tuple[int, bool], tuple[int, int]] = {}
        for site in self.map_sites.intersection(np.flatnonzero(sites[:, 0]).tolist()):
            indices = [e for e in range(len(program.edits)) if sites[site, 0] >> e & 1]
            is_high = bool((pointers[site, :, 4] > min(self.max_map_rank, self.widths[site])).any())
            key = int(sites[site, 0]), is_high
            if key not in found:
                found[key] = self._map_ahead(program, indices, site, pointers[site])
            map_edit, set_edit = found[key]
            sites[site, 2:] = map_edit, set_edit
            if map_edit >= 0:
                sites[site, 1] &= ~(1 << map_edit)

    def _map_ahead(self, program: Program, indices: list[int], site: int, pointers: Int64) -> tuple[int, int]:
        """The `map` here that can be computed before the edit kernel runs, and the `set` that makes its input; or -1.

        Nothing else may change its input, and that `set` must act whenever the map does and its span covers the token.
        """
        ordered = [e for e in indices if program.edits[e].opcode != "gate"]
        set_edit = ordered.pop(0) if ordered and program.edits[ordered[0]].opcode == "set" else -1
        if not ordered or program.edits[ordered[0]].opcode != "map":
            return -1, -1
        index = ordered[0]
        if set_edit >= 0 and program.edits[set_edit].gate not in (None, program.edits[index].gate):
            return -1, -1
        is_factored = pointers[index, 1] >= 0
        if is_factored and pointers[index, 4] > min(self.max_map_rank, self.widths[site]):
            return -1, -1
        return index, set_edit


READS: dict[Opcode, tuple[Role, ...]] = {
    "add": ("vector",),
    "set": ("vector",),
    "add_norm": ("vector", "inverse_norm"),
    "gate": ("vector", "inverse_norm"),
    "scale": ("mask", "indices"),
    "rank": ("encoder", "decoder", "bias", "threshold"),
}
"""The tensors that an opcode reads, in the order of their pointers; of `map`, `right` and `left`, or `matrix`. Not
every mask has `indices`.
"""


def _pointers(edit: Edit, resident: Resident, layers: Int64) -> Int64:
    """Where the tensors of `READS` start, -1 for what isn't there, and at the end the number of coefficients
    [layers, POINTERS].
    """
    pointers = np.full((len(layers), POINTERS), -1, np.int64)
    if edit.opcode == "map":
        dense = _starts(resident, "matrix", layers)
        pointers[:, 0] = np.maximum(dense, _starts(resident, "right", layers))
        pointers[:, 1] = _starts(resident, "left", layers)
        roles: tuple[Role, ...] = ("right",)
    else:
        roles = READS[edit.opcode]
        for column, role in enumerate(roles):
            pointers[:, column] = _starts(resident, role, layers)
    required = 1 if edit.opcode == "scale" else len(roles)
    if (missing := np.argwhere(pointers[:, :required] < 0)).size:
        at, column = missing[0]
        raise ValueError(f"{edit.opcode}: {edit.operand} has no {roles[column]} for layer {layers[at]}")
    pointers[:, 4] = resident.ranks[layers] if edit.opcode in ("rank", "map", "scale") else 0
    if edit.opcode == "rank":
        _check_bounds(edit, set(pointers[:, 4].tolist()))
    return pointers


def _starts(resident: Resident, role: Role, layers: Int64) -> Int64:
    """Where a role's tensor starts at each of the layers, -1 where there is none."""
    starts = resident.starts.get(role)
    if starts is None or layers.max() >= len(starts):
        return np.array([resident.pieces.get((layer, role), (-1,))[0] for layer in layers.tolist()])
    return starts[layers]


def _check_bounds(edit: Edit, ranks: set[int]) -> None:
    for bounds in (edit.function.low, edit.function.high) if edit.function is not None else ():
        if bounds is not None and len(bounds) != 1 and (wrong := ranks - {len(bounds)}):
            rank = min(wrong)
            raise ValueError(f"rank: {len(bounds)} bounds for an operand of rank {rank}; give one, or {rank}")
