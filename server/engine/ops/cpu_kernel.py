"""The edit program of every token of a step at one site, compiled for the CPU.

Reads the same `Tables` as the Triton kernel and computes the same, token by token; `map` edits that several tokens may
share are computed ahead of it by matrix products. The reference says what is computed.
"""

# What Numba compiles has no types.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from server.engine.edits import OPCODES
from server.engine.ops.tables import (
    ABOVE,
    ACTIVATIONS,
    CLAMPS,
    CLOSED,
    COSINE,
    EDIT_FIELDS,
    OPEN,
    SEQUENCE,
    SITE_FIELDS,
    Tables,
)

ADD, ADD_NORM, SCALE, RANK, MAP, SET, RENORM, GATE = (
    1 + OPCODES.index(each) for each in ("add", "add_norm", "scale", "rank", "map", "set", "renorm", "gate")
)
RELU, JUMPRELU = ACTIVATIONS.index("relu"), ACTIVATIONS.index("jumprelu")
X, BEFORE, ADDED = range(3)
"""Rows of the kernel's scratch."""

log = logging.getLogger(__name__)

# llvmlite's proxy of its library makes up any attribute that it is asked for. When an engine starts on a CPU, vLLM
# reads the `__dict__` of all that the loaded modules hold, and would trip over the one made up.
ffi.lib._fntab["__dict__"] = {}


class CpuKernel:
    """The kernel over one set of tables. `launch` isn't for several threads at once: they would share its scratch."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._scratch = np.zeros((3, max(tables.widths.values(), default=1)), np.float32)
        rows = tables.rows.numpy()
        self._arguments = (
            tables.tokens.numpy(),
            rows,
            rows.view(np.float32),
            tables.pointers.numpy(),
            tables.bank.data.numpy(),
            tables.decisions.numpy(),
            tables.counters.numpy(),
            tables.mapped.numpy(),
            self._scratch,
        )
        # bfloat16 as its bits. One number of each type tells Numba what it finds at an address.
        self._samples = {torch.float32: np.zeros(1, np.float32), torch.bfloat16: np.zeros(1, np.uint16)}
        self._bounds_at = tables.max_edits * EDIT_FIELDS + tables.sites * SITE_FIELDS

    def compile(self, dtype: torch.dtype) -> None:
        """Compile for activations of that type now, instead of at the first step that is steered."""
        self.launch(0, torch.zeros(1, self._scratch.shape[1], dtype=dtype))

    def launch(self, site: int, residual: Tensor, hidden: Tensor | None = None) -> None:
        """Edit the activations of one site in place.

        The activation of a token is hidden + residual in float32, or `residual` alone; both are [tokens, width], in
        bfloat16, float16 or float32. What the program adds to it is added to `residual` and rounded once.
        """
        # Between two sites a layer's weights go through the caches: here every line costs several times what it would
        # cost in a loop.
        sample = self._samples.get(residual.dtype)
        if sample is None:  # float16, for which Numba has no arithmetic
            wide = residual.float()
            self.launch(site, wide, None if hidden is None else hidden.float())
            residual.copy_(wide)
            return
        tables = self._tables
        count, width = residual.shape
        stride, unit = residual.stride()
        address = hidden_stride = 0
        if hidden is not None:
            hidden_stride, hidden_unit = hidden.stride()
            if hidden.shape != residual.shape or hidden_unit != 1:
                raise ValueError("activations need rows without gaps, and hidden the shape of residual")
            address = hidden.data_ptr()
        if unit != 1:
            raise ValueError("activations need rows without gaps")
        if tables.last_steered >= count:
            raise ValueError(f"token {tables.last_steered} of a step is edited, which has {count} activations")
        if not tables.plan.is_empty:
            _map_ahead(tables, site, residual, hidden)
        _edit(
            site,
            tables.steered,
            sample,
            residual.data_ptr(),
            stride,
            address,
            hidden_stride,
            width,
            self._bounds_at,
            tables.max_bounds,
            *self._arguments,
        )


def _map_ahead(tables: Tables, site: int, residual: Tensor, hidden: Tensor | None) -> None:
    """W x of the tokens in the plan of the site, into `Tables.mapped`."""
    width, bank = residual.shape[1], tables.bank
    rows, pointers = tables.rows.numpy(), tables.pointers.numpy()
    at = tables.max_edits * EDIT_FIELDS + site * SITE_FIELDS
    for tile in tables.plan.tiles(site):
        programs = tables.staged[tile, 0]
        tokens = torch.from_numpy(tile)
        x = residual.index_select(0, tokens).float()
        if hidden is not None:
            x += hidden.index_select(0, tokens)
        # A `set` just before the map makes its input.
        sets = rows[programs, at + 3]
        for position in np.flatnonzero((sets >= 0) & (tables.staged[tile, 1] >> np.maximum(sets, 0) & 1 == 1)):
            x[position] = bank.tensor(int(pointers[programs[position], site, sets[position], 0]), (width,))
        first, left, _, _, rank = pointers[programs[0], site, rows[programs[0], at + 2]].tolist()
        y = x @ bank.tensor(first, (rank, width)).T
        if left >= 0:
            y = y @ bank.tensor(left, (rank, width))
        tables.mapped[:, :width].index_copy_(0, torch.from_numpy(tables.staged[tile, 3]).long(), y)


def _compiled(function: Callable[..., None]) -> Any:
    try:
        return njit(cache=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):  # Numba's words for: there is no folder to keep it in
            raise
        log.info("the CPU kernel is compiled at every start: %s", error)
        return njit(function)


# Only sums may be reordered, so that they can be vectorised: elsewhere an unchanged number has to keep its bits.
_SUM = {"reassoc", "contract"}


@_compiled
def _edit(
    site,
    chosen,
    sample,
    residual,
    residual_stride,
    hidden,
    hidden_stride,
    width,
    bounds_at,
    max_bounds,
    tokens,
    rows,
    floats,
    pointers,
    bank,
    decisions,
    counters,
    mapped,
    scratch,
):
    x, before, added = scratch[X, :width], scratch[BEFORE, :width], scratch[ADDED, :width]
    max_edits = decisions.shape[1]
    site_at = max_edits * EDIT_FIELDS + site * SITE_FIELDS
    for token in chosen:
        row = tokens[token, 0]
        active = rows[row, site_at] & tokens[token, 1]
        if active == 0:
            continue
        # The map that was computed ahead for this token: an edit like any other here. -1 for none.
        slot = tokens[token, 3]
        map_edit = rows[row, site_at + 2] if slot >= 0 else -1
        own = _at(residual, token * residual_stride, width, sample)
        other = _at(hidden, token * hidden_stride, width if hidden else 0, sample)
        acted = 0
        opened = 0
        few = _few(active, rows[row], pointers[row, site])
        if few >= 0:
            starts = pointers[row, site, few]
            acted = active
            _scale_few(
                own,
                other,
                floats[row, few * EDIT_FIELDS + 5],
                bank[starts[0] : starts[0] + width],
                bank[starts[1] : starts[1] + starts[4]],
            )
            active = 0
        else:
            _load(own, other, x, before)
        for index in range(max_edits):
            if not active >> index & 1:
                continue
            at = index * EDIT_FIELDS
            gate = rows[row, at + 1]
            if gate >= 0 and not opened >> gate & 1 and decisions[row, gate] != OPEN:
                continue
            acted |= 1 << index
            opcode, code, strength = rows[row, at], rows[row, at + 2], floats[row, at + 5]
            starts = pointers[row, site, index]
            first = bank[starts[0] : starts[0] + width]
            if opcode == ADD:
                _add(x, strength, first)
            elif opcode == SCALE:
                if starts[4] > 0:
                    for i in bank[starts[1] : starts[1] + starts[4]]:
                        x[int(i)] *= np.float32(1) + strength * first[int(i)]
                else:
                    for i in range(width):
                        x[i] = x[i] * (np.float32(1) + strength * first[i])
            elif opcode == SET:
                x[:] = first
            elif opcode == ADD_NORM:
                _add(x, strength * _norm(x) * bank[starts[1]], first)
            elif opcode == RENORM:
                norm, was = _norm(x), _norm(before)
                if norm > 0 and norm != was:
                    ratio = was / norm
                    for i in range(width):
                        x[i] *= ratio
            elif opcode == GATE:
                readout = _dot(first, x)
                if code & COSINE:
                    norm = _norm(x)
                    readout = readout / norm * bank[starts[1]] if norm > 0 else np.float32(0)
                threshold = floats[row, at + 6]
                is_open = readout > threshold if code & ABOVE else readout < threshold
                if code & SEQUENCE:
                    # The first decision holds, also when the token is run again after a preemption.
                    if decisions[row, index] == 0:
                        decisions[row, index] = OPEN if is_open else CLOSED
                elif is_open:
                    opened |= 1 << index
            elif index == map_edit:
                _add(x, strength, mapped[slot, :width])
            else:
                added[:] = 0
                for k in range(starts[4]):
                    c = _dot(bank[starts[0] + k * width : starts[0] + (k + 1) * width], x)
                    if opcode == RANK:
                        c += bank[starts[2] + k]
                        activation = code & (CLAMPS - 1)
                        if (activation == RELU and c < 0) or (activation == JUMPRELU and not c > bank[starts[3] + k]):
                            c = np.float32(0)
                        if code & CLAMPS:
                            bound = bounds_at + rows[row, at + 3] + k * rows[row, at + 4]
                            c = min(max(c, floats[row, bound]), floats[row, bound + max_bounds]) - c
                    if starts[1] >= 0:
                        _add(added, c, bank[starts[1] + k * width : starts[1] + (k + 1) * width])
                    else:
                        added[k] = c
                _add(x, strength, added)
        if active:
            _store(own, other, x, before)
        if tokens[token, 2]:
            for index in range(max_edits):
                counters[row, site, index] += acted >> index & 1


@njit
def _few(active, edits, pointers):
    """The edit, if it is the only one and scales a few numbers on no condition: then no others are read. Or -1."""
    if active & (active - 1):
        return -1
    index = 0
    while not active >> index & 1:
        index += 1
    at = index * EDIT_FIELDS
    return index if edits[at] == SCALE and edits[at + 1] < 0 and pointers[index, 4] > 0 else -1


@njit
def _scale_few(residual, hidden, strength, mask, indices):
    for each in indices:
        i = int(each)
        stored = _wide(residual[i])
        before = stored + _wide(hidden[i]) if len(hidden) else stored
        x = before * (np.float32(1) + strength * mask[i])
        if x != before:
            residual[i] = _narrow(stored + (x - before) if len(hidden) else x, residual[i])


@intrinsic
def _pointer(context, address):
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), code


@njit
def _at(address, first, count, sample):
    """`count` numbers like those of `sample`, from the `first` one behind the address of a tensor. Building an array
    from the tensor itself would take longer than a row's edit.
    """
    return carray(_pointer(address + first * sample.itemsize), count, sample.dtype)


@njit
def _load(residual, hidden, x, before):
    """The activation in float32, twice."""
    for i in range(len(x)):
        before[i] = _wide(residual[i])
    if len(hidden):
        for i in range(len(x)):
            before[i] += _wide(hidden[i])
    for i in range(len(x)):
        x[i] = before[i]


@njit
def _store(residual, hidden, x, before):
    """Write the numbers that changed: all others keep their bits."""
    if len(hidden):
        for i in range(len(x)):
            new = _narrow(_wide(residual[i]) + (x[i] - before[i]), residual[i])
            residual[i] = new if x[i] != before[i] else residual[i]
    else:
        for i in range(len(x)):
            new = _narrow(x[i], residual[i])
            residual[i] = new if x[i] != before[i] else residual[i]


def _wide(number):
    """A float32, or the bits of a bfloat16, as float32."""
    raise NotImplementedError("compiled only")


@overload(_wide)
def _(number):
    if isinstance(number, types.Float):
        return lambda number: number
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _narrow(number, like):
    """A float32 as `like` has it, rounded to the nearest, ties to even."""
    raise NotImplementedError("compiled only")


@overload(_narrow)
def _(number, like):
    if isinstance(like, types.Float):
        return lambda number, like: number

    def bits(number, like):
        wide = np.float32(number).view(np.uint32)
        rounded = np.uint32(wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))
        return np.uint16((rounded if number == number else np.uint32(0x7FC00000)) >> np.uint32(16))

    return bits


@njit
def _add(x, factor, vector):
    for i in range(len(x)):
        x[i] = x[i] + factor * vector[i]


@njit(fastmath=_SUM)
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(b)):
        total += a[i] * b[i]
    return total


@njit
def _norm(x):
    return np.sqrt(_dot(x, x))
