"""The edit program of every token of a step at one site, as a Triton kernel.

Which rows, edits and operands there are is read from the device buffers of `Tables`, and the site's number from memory,
so that one captured graph, and one compiled layer, serve all steps and all layers. The reference says what is computed.
"""

# Triton has no types, and its compiler refuses annotations of what is no constant.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.edits import OPCODES
from server.engine.ops import map_kernels, tables
from server.engine.ops.tables import WIDEST, Tables

ADD_NORM = tl.constexpr(1 + OPCODES.index("add_norm"))
ADD = tl.constexpr(1 + OPCODES.index("add"))
SCALE = tl.constexpr(1 + OPCODES.index("scale"))
RANK = tl.constexpr(1 + OPCODES.index("rank"))
MAP = tl.constexpr(1 + OPCODES.index("map"))
RENORM = tl.constexpr(1 + OPCODES.index("renorm"))
GATE = tl.constexpr(1 + OPCODES.index("gate"))
RELU = tl.constexpr(tables.ACTIVATIONS.index("relu"))
JUMPRELU = tl.constexpr(tables.ACTIVATIONS.index("jumprelu"))
CLAMPS = tl.constexpr(tables.CLAMPS)
COSINE = tl.constexpr(tables.COSINE)
ABOVE = tl.constexpr(tables.ABOVE)
SEQUENCE = tl.constexpr(tables.SEQUENCE)
CLOSED = tl.constexpr(tables.CLOSED)
OPEN = tl.constexpr(tables.OPEN)
TOKEN_FIELDS = tl.constexpr(tables.TOKEN_FIELDS)
EDIT_FIELDS = tl.constexpr(tables.EDIT_FIELDS)
SITE_FIELDS = tl.constexpr(tables.SITE_FIELDS)
POINTERS = tl.constexpr(tables.POINTERS)

BLOCK = 4096
"""Numbers of an activation that one program edits, where no edit needs more of it."""
RANKS = 2
"""Coefficients of a `rank` edit that are computed at once."""
REGISTERS = 128
"""Of a thread at most: with more, a multiprocessor would hold only one program of 4096 numbers at a time."""


def launch(tables: Tables, site: Tensor, residual: Tensor, hidden: Tensor | None = None, *, maps: bool = True) -> None:
    """Edit the activations of one site in place, without waiting for the device.

    The activation of a token is hidden + residual in float32, or `residual` alone; both are [tokens, width], in
    bfloat16, float16 or float32. What the program adds to it is added to `residual` and rounded once. `site` is the
    site's number, int32 [1] on the device. `maps=False` leaves the map kernels out, for a site that is not one of
    `tables.map_sites`; a `map` is then computed token by token, wherever it is.
    """
    count, width = residual.shape
    if count > tables.max_tokens:
        raise ValueError(f"{count} tokens are over the limit of {tables.max_tokens}")
    if residual.stride(1) != 1 or (hidden is not None and (hidden.stride(1) != 1 or hidden.shape != residual.shape)):
        raise ValueError("activations need rows without gaps, and hidden the shape of residual")
    if count == 0:
        return
    maps = maps and bool(tables.map_sites) and width <= tables.mapped.shape[1]
    if maps:
        map_kernels.launch(tables, site, residual, hidden)
    whole = triton.next_power_of_2(width) if width <= WIDEST else 0
    block = min(whole or BLOCK, BLOCK)
    _edit[(count, triton.cdiv(width, block))](
        site,
        residual,
        residual if hidden is None else hidden,
        residual.stride(0),
        residual.stride(0) if hidden is None else hidden.stride(0),
        tables.tokens,
        tables.rows,
        tables.rows.view(torch.float32),
        tables.pointers,
        tables.bank.data,
        tables.decisions,
        tables.counters,
        tables.mapped,
        tables.mapped.stride(0),
        WIDTH=width,
        ALIGN=math.gcd(width, 16),
        BLOCK=block,
        WHOLE=whole,
        RANKS=RANKS,
        PAIR=hidden is not None,
        MAPS=maps,
        EDITS=tables.max_edits,
        EDITS_2=triton.next_power_of_2(tables.max_edits),
        SITES=tables.sites,
        BOUNDS=tables.max_bounds,
        ROW_FIELDS=tables.row_fields,
        num_warps=min(max(max(whole, block) // 512, 4), 16),
        maxnreg=REGISTERS,
    )


@triton.jit
def _edit(
    site_pointer,
    residual,
    hidden,
    residual_stride,
    hidden_stride,
    tokens,
    rows,
    row_floats,
    pointers,
    bank,
    decisions,
    counters,
    mapped,
    mapped_stride,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    RANKS: tl.constexpr,
    PAIR: tl.constexpr,
    MAPS: tl.constexpr,
    EDITS: tl.constexpr,
    EDITS_2: tl.constexpr,
    SITES: tl.constexpr,
    BOUNDS: tl.constexpr,
    ROW_FIELDS: tl.constexpr,
):
    """One token and one block of its activation; the whole of it in block 0, where an edit needs that."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = tl.load(tokens + token * TOKEN_FIELDS).to(tl.int64)
    if row == 0:
        return
    bits = tl.load(tokens + token * TOKEN_FIELDS + 1)
    site = tl.load(site_pointer)
    edits = rows + row * ROW_FIELDS
    site_fields = edits + EDITS * EDIT_FIELDS + site * SITE_FIELDS
    active = tl.load(site_fields) & bits
    if active == 0:
        return
    # The map that the map kernels have computed for this token: an edit like any other here. -1 for none.
    map_edit = tl.load(site_fields + 2)
    slot = tl.load(tokens + token * TOKEN_FIELDS + 3).to(tl.int64)
    needs_whole = tl.load(site_fields + 1)
    if map_edit >= 0:
        if (slot < 0) | (MAPS == 0):
            needs_whole = needs_whole | (1 << map_edit)
            map_edit = -1
    map_row = mapped + tl.maximum(slot, 0) * mapped_stride
    edit_floats = row_floats + row * ROW_FIELDS
    bounds = edit_floats + EDITS * EDIT_FIELDS + SITES * SITE_FIELDS
    pointers += (row * SITES + site) * (EDITS * POINTERS)
    decisions += row * EDITS
    residual += token * residual_stride
    hidden += token * hidden_stride
    # Bits of the edits that acted, and of the gates that are open at this site.
    acted = 0
    opened = 0
    if (active & needs_whole) == 0:
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < WIDTH
        x = _activation(residual, hidden, offsets, inside, PAIR)
        for index in range(EDITS):
            fields = edits + index * EDIT_FIELDS
            floats = edit_floats + index * EDIT_FIELDS
            starts = pointers + index * POINTERS
            if _acts(active, index, fields, decisions, opened):
                acted = acted | (1 << index)
                x = _elementwise(x, fields, floats, starts, bank, map_row, index == map_edit, offsets, inside, ALIGN)
        _write(residual, hidden, offsets, inside, x, PAIR)
    elif (WHOLE > 0) & (block == 0):
        offsets = tl.arange(0, max(WHOLE, 1))
        inside = offsets < WIDTH
        x = _activation(residual, hidden, offsets, inside, PAIR)
        for index in range(EDITS):
            fields = edits + index * EDIT_FIELDS
            floats = edit_floats + index * EDIT_FIELDS
            starts = pointers + index * POINTERS
            if _acts(active, index, fields, decisions, opened):
                acted = acted | (1 << index)
                opcode = tl.load(fields)
                if opcode == GATE:
                    is_open = _is_open(x, fields, floats, starts, bank, decisions + index, offsets, inside, ALIGN)
                    opened = opened | (is_open.to(tl.int32) << index)
                elif opcode == RENORM:
                    before = _activation(residual, hidden, offsets, inside, PAIR)
                    x = x * _ratio(_norm(before), _norm(x))
                elif opcode == ADD_NORM:
                    vector = tl.load(bank + _start(starts, 0, ALIGN) + offsets, mask=inside, other=0.0)
                    inverse = tl.load(bank + tl.load(starts + 1))
                    x = x + (tl.load(floats + 5) * _norm(x) * inverse) * vector
                elif (opcode == RANK) | ((opcode == MAP) & (index != map_edit)):
                    x = _rank(x, fields, floats, starts, bank, bounds, offsets, inside, WIDTH, ALIGN, RANKS, BOUNDS)
                else:
                    is_mapped = index == map_edit
                    x = _elementwise(x, fields, floats, starts, bank, map_row, is_mapped, offsets, inside, ALIGN)
        _write(residual, hidden, offsets, inside, x, PAIR)
    if (block == 0) & (tl.load(tokens + token * TOKEN_FIELDS + 2) != 0):
        each = tl.arange(0, EDITS_2)
        counted = (acted >> each) & 1
        tl.atomic_add(counters + (row * SITES + site) * EDITS + each, counted, mask=counted != 0)


@triton.jit
def _activation(residual, hidden, offsets, inside, PAIR: tl.constexpr):
    x = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    if PAIR:
        x += tl.load(hidden + offsets, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _write(residual, hidden, offsets, inside, x, PAIR: tl.constexpr):
    """Write the numbers that changed: all others keep their bits."""
    before = _activation(residual, hidden, offsets, inside, PAIR)
    written = x
    if PAIR:
        written = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32) + (x - before)
    tl.store(residual + offsets, written.to(residual.dtype.element_ty), mask=inside & (x != before))


@triton.jit
def _acts(active, index, fields, decisions, opened):
    """Whether the edit's span covers the token, and it has no gate or one that is open, here or for the sequence."""
    acts = ((active >> index) & 1) != 0
    if acts:
        gate = tl.load(fields + 1)
        named = tl.maximum(gate, 0)
        acts = (gate < 0) | (((opened >> named) & 1) != 0) | (tl.load(decisions + named) == OPEN)
    return acts


@triton.jit
def _start(starts, piece: tl.constexpr, ALIGN: tl.constexpr):
    """Where a tensor of rows starts in the bank: at a multiple of their width, which the compiler can't know."""
    return tl.multiple_of(tl.load(starts + piece), ALIGN)


@triton.jit
def _elementwise(x, fields, floats, starts, bank, map_row, is_mapped, offsets, inside, ALIGN: tl.constexpr):
    """x after an `add`, a `scale`, a `set`, or a `map` whose W x is in `map_row`."""
    opcode = tl.load(fields)
    strength = tl.load(floats + 5)
    if is_mapped:
        operand = tl.load(map_row + offsets, mask=inside, other=0.0)
    else:
        operand = tl.load(bank + _start(starts, 0, ALIGN) + offsets, mask=inside, other=0.0)
    changed = tl.where((opcode == ADD) | (opcode == MAP), x + strength * operand, operand)
    return tl.where(opcode == SCALE, x * (1 + strength * operand), changed)


@triton.jit
def _norm(x):
    return tl.sqrt_rn(tl.sum(x * x, 0))


@triton.jit
def _ratio(before, norm):
    """before / norm; 1 where they are the same, which an approximate division might miss."""
    return tl.where(norm != before, before / tl.where(norm > 0, norm, 1.0), 1.0)


@triton.jit
def _is_open(x, fields, floats, starts, bank, decision, offsets, inside, ALIGN: tl.constexpr):
    """Whether the gate is open; for a sequence as first decided, which this makes known to later launches."""
    code = tl.load(fields + 2)
    threshold = tl.load(floats + 6)
    vector = tl.load(bank + _start(starts, 0, ALIGN) + offsets, mask=inside, other=0.0)
    readout = tl.sum(x * vector, 0)
    if (code & COSINE) != 0:
        norm = _norm(x)
        readout = tl.where(norm > 0, readout * tl.load(bank + tl.load(starts + 1)) / tl.where(norm > 0, norm, 1.0), 0.0)
    is_open = tl.where((code & ABOVE) != 0, readout > threshold, readout < threshold)
    if (code & SEQUENCE) != 0:
        decided = tl.load(decision).to(tl.int32)
        decided = tl.where(decided == 0, tl.where(is_open, OPEN, CLOSED), decided)
        tl.store(decision, decided.to(tl.int8))
        is_open = decided == OPEN
    return is_open


@triton.jit
def _rank(
    x,
    fields,
    floats,
    starts,
    bank,
    bounds,
    offsets,
    inside,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    RANKS: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """x + s sum_k f(x . e_k + b_k) d_k, all coefficients from the same x. A factored map is the same with e = right and
    d = left, a dense one with the matrix's rows for e and unit vectors for d; both without b.
    """
    code = tl.load(fields + 2)
    first_bound = tl.load(fields + 3)
    bound_stride = tl.load(fields + 4)
    encoder = _start(starts, 0, ALIGN)
    decoder = tl.load(starts + 1)
    bias = tl.load(starts + 2)
    threshold = tl.load(starts + 3)
    count = tl.load(starts + 4).to(tl.int32)
    added = tl.zeros_like(x)
    for first in range(0, count, RANKS):
        k = first + tl.arange(0, RANKS)
        there = k < count
        places = k[:, None] * WIDTH + offsets[None, :]
        both = there[:, None] & inside[None, :]
        c = tl.sum(tl.load(bank + encoder + places, mask=both, other=0.0) * x[None, :], 1)
        if bias >= 0:
            c += tl.load(bank + bias + k, mask=there, other=0.0)
            is_on = c > tl.load(bank + threshold + k, mask=there, other=0.0)
            activation = code & (CLAMPS - 1)
            c = tl.where((activation == RELU) & (c < 0), 0.0, c)
            c = tl.where((activation == JUMPRELU) & (is_on == 0), 0.0, c)
            if (code & CLAMPS) != 0:
                low = tl.load(bounds + first_bound + k * bound_stride, mask=there, other=0.0)
                high = tl.load(bounds + BOUNDS + first_bound + k * bound_stride, mask=there, other=0.0)
                c = tl.minimum(tl.maximum(c, low), high) - c
        c = tl.where(there, c, 0.0)
        if decoder >= 0:
            d = tl.load(bank + tl.multiple_of(decoder, ALIGN) + places, mask=both, other=0.0)
        else:
            d = (offsets[None, :] == k[:, None]).to(tl.float32)
        added += tl.sum(c[:, None] * d, 0)
    return x + tl.load(floats + 5) * added
