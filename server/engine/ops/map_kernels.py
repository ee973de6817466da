"""W x of many tokens, before the edit kernel adds it: the tokens of one matrix share its reads.

A fixed number of programs takes the tiles of the site's `MapPlan` in turn, and leaves at once where it is empty. A
factored map takes two launches, right x and then left (right x); a dense one is finished after the first.
"""

# Triton has no types, and its compiler refuses annotations of what is no constant.
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.ops import map_plan, tables
from server.engine.ops.tables import Tables

TOKEN_FIELDS = tl.constexpr(tables.TOKEN_FIELDS)
EDIT_FIELDS = tl.constexpr(tables.EDIT_FIELDS)
SITE_FIELDS = tl.constexpr(tables.SITE_FIELDS)
POINTERS = tl.constexpr(tables.POINTERS)

COLUMNS, DEPTH = 64, 64
"""Of a tile: numbers of the output, and of the input per round."""


def launch(tables: Tables, site: Tensor, residual: Tensor, hidden: Tensor | None) -> None:
    """Fill `tables.mapped` for the tokens planned at this site; arguments as of the edit kernel's `launch`."""
    width = residual.shape[1]
    is_cuda = residual.is_cuda
    programs = 2 * torch.cuda.get_device_properties(residual.device).multi_processor_count if is_cuda else 2
    columns = COLUMNS if width > COLUMNS else max(16, triton.next_power_of_2(width))
    for second in (False, True):
        _multiply[(programs,)](
            site,
            residual,
            residual if hidden is None else hidden,
            residual.stride(0),
            residual.stride(0) if hidden is None else hidden.stride(0),
            tables.tokens,
            tables.rows,
            tables.pointers,
            tables.bank.data,
            tables.plan.data,
            tables.mapped,
            tables.mapped.stride(0),
            tables.projected,
            tables.projected.stride(0),
            WIDTH=width,
            TILE=map_plan.TILE,
            COLUMNS=columns,
            DEPTH=columns,
            PAIR=hidden is not None,
            SECOND=second,
            EDITS=tables.max_edits,
            SITES=tables.sites,
            ROW_FIELDS=tables.row_fields,
            num_warps=4,
        )


@triton.jit
def _multiply(
    site_pointer,
    residual,
    hidden,
    residual_stride,
    hidden_stride,
    tokens,
    rows,
    pointers,
    bank,
    plan,
    mapped,
    mapped_stride,
    projected,
    projected_stride,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PAIR: tl.constexpr,
    SECOND: tl.constexpr,
    EDITS: tl.constexpr,
    SITES: tl.constexpr,
    ROW_FIELDS: tl.constexpr,
):
    """The first launch multiplies activations [tokens, width] with the matrix or `right`, whose rows are outputs; the
    second one the products of `right` [tokens, rank] with `left`, whose columns are outputs.
    """
    site = tl.load(site_pointer)
    start = tl.load(plan + site)
    if start == 0:
        return
    plan += start
    tiles = tl.load(plan)
    listed = plan + 1 + 2 * tiles
    # Programs side by side take tiles of the same columns: tiles of one matrix then find it in the cache.
    for item in range(tl.program_id(0), tiles * tl.cdiv(WIDTH, COLUMNS), tl.num_programs(0)):
        tile = item % tiles
        column = (item // tiles) * COLUMNS + tl.arange(0, COLUMNS)
        place = tl.arange(0, TILE)
        there = place < tl.load(plan + 1 + tiles + tile)
        first = tl.load(plan + 1 + tile)
        # Places behind the tile's end repeat its first token; nothing is stored for them.
        token = tl.load(listed + first + tl.where(there, place, 0)).to(tl.int64)
        row = tl.load(tokens + token * TOKEN_FIELDS).to(tl.int64)
        slot = tl.load(tokens + token * TOKEN_FIELDS + 3).to(tl.int64)
        site_fields = rows + row * ROW_FIELDS + EDITS * EDIT_FIELDS + site * SITE_FIELDS
        # All tokens of a tile have the same matrix, so the first one's will do.
        one = tl.load(listed + first).to(tl.int64)
        one_row = tl.load(tokens + one * TOKEN_FIELDS).to(tl.int64)
        edit = tl.load(rows + one_row * ROW_FIELDS + EDITS * EDIT_FIELDS + site * SITE_FIELDS + 2)
        pieces = pointers + ((one_row * SITES + site) * EDITS + edit) * POINTERS
        matrix = tl.load(pieces)
        left = tl.load(pieces + 1)
        count = tl.load(pieces + 4).to(tl.int32)
        total = tl.zeros((TILE, COLUMNS), tl.float32)
        if SECOND:
            if left >= 0:
                for begin in range(0, count, DEPTH):
                    k = begin + tl.arange(0, DEPTH)
                    x = tl.load(
                        projected + slot[:, None] * projected_stride + k[None, :], mask=(k < count)[None, :], other=0.0
                    )
                    weights = tl.load(
                        bank + left + k[:, None] * WIDTH + column[None, :],
                        mask=(k < count)[:, None] & (column < WIDTH)[None, :],
                        other=0.0,
                    )
                    total = tl.dot(x, weights, total, input_precision="ieee")
                tl.store(
                    mapped + slot[:, None] * mapped_stride + column[None, :],
                    total,
                    mask=there[:, None] & (column < WIDTH)[None, :],
                )
        else:
            if (item // tiles) * COLUMNS < count:
                set_edit = tl.load(site_fields + 3)
                is_set = (set_edit >= 0) & (
                    ((tl.load(tokens + token * TOKEN_FIELDS + 1) >> tl.maximum(set_edit, 0)) & 1) != 0
                )
                at = ((row * SITES + site) * EDITS + tl.maximum(set_edit, 0)) * POINTERS
                new = tl.load(pointers + at, mask=is_set, other=0)
                for begin in range(0, WIDTH, DEPTH):
                    k = begin + tl.arange(0, DEPTH)
                    within = k < WIDTH
                    read = (is_set == 0)[:, None] & within[None, :]
                    x = tl.load(residual + token[:, None] * residual_stride + k[None, :], mask=read, other=0.0).to(
                        tl.float32
                    )
                    if PAIR:
                        x += tl.load(hidden + token[:, None] * hidden_stride + k[None, :], mask=read, other=0.0).to(
                            tl.float32
                        )
                    x += tl.load(bank + new[:, None] + k[None, :], mask=is_set[:, None] & within[None, :], other=0.0)
                    weights = tl.load(
                        bank + matrix + column[None, :] * WIDTH + k[:, None],
                        mask=within[:, None] & (column < count)[None, :],
                        other=0.0,
                    )
                    total = tl.dot(x, weights, total, input_precision="ieee")
                if left < 0:
                    tl.store(
                        mapped + slot[:, None] * mapped_stride + column[None, :],
                        total,
                        mask=there[:, None] & (column < WIDTH)[None, :],
                    )
                else:
                    tl.store(
                        projected + slot[:, None] * projected_stride + column[None, :],
                        total,
                        mask=there[:, None] & (column < count)[None, :],
                    )
