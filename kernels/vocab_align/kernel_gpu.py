"""The same search for GPUs, through Pallas' Triton backend. Interpreted in tests; on an H100 as fast as blocked XLA: not a default.

One program per tile of tokens walks the permuted matrix in *pieces*: R / 16 lanes of one block, all its planes, which a loop adds
up as it multiplies. So the kinds need no branches, a piece is (first row, stride, planes, bin). The bins live in the output and are
read and written per piece. FAT blocks need a scan over lanes that Triton does not give: ``aligned`` does that run in XLA.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from . import planes
from .kernel import SUMS, Candidates, finish, first_bins, insert
from .layout import FAT, MOST, RESIDUAL, Arranged, Run
from .layout import planes as count_planes
from .tuning import Tiles


def pieces(runs: tuple[Run, ...], block: int, bins: int) -> np.ndarray:
    """int32 [pieces, 5]: first row, rows from plane to plane, planes, first bin, 1 for units and 0 for the residual."""
    lanes, table, starts = block // MOST, [], first_bins(runs, block, bins)
    for kind, first, count in runs:
        width = block // count_planes(kind)
        for index in range(first, first + count) if kind != FAT else ():
            if kind == RESIDUAL:  # all of it is one sum: as many planes as there are
                table.append((index * block, lanes, MOST, 0, 0))
                continue
            for at in range(0, width, lanes):
                table.append((index * block + at, width, kind, (starts[index] + at) % bins, 1))
    return np.asarray(table, np.int32).reshape(-1, 5)


def candidates(
    hidden: jax.Array,
    arranged: Arranged,
    tiles: Tiles,
    between: tuple[jax.Array, jax.Array] | None,
    soft_cap: float | None,
    temperature: float,
    interpret: bool,
) -> Candidates:
    """As ``kernel.candidates``, over every block but the FAT ones. tiles.width, tiles.tokens and R / 16 must be powers of 2, 16 or more."""
    tokens, lanes, slots, rows = hidden.shape[0], arranged.block // MOST, tiles.bins * tiles.depth, 2 * len(SUMS) + 1
    table = pieces(arranged.runs, arranged.block, tiles.bins)
    shape = functools.partial(planes.shape, soft_cap=soft_cap, temperature=temperature)
    call = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, lanes=lanes, count=len(table), sliced=between is not None, shape=shape),
        grid=(tokens // tiles.tokens,),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, slots), jnp.float32),
            jax.ShapeDtypeStruct((tokens, slots), jnp.int32),
            jax.ShapeDtypeStruct((rows, tokens, lanes), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        name="vocab_align_gpu",
        interpret=interpret,
    )
    bounds = () if between is None else [x[:, 0] for x in between]
    values, places, stats = call(hidden, arranged.matrix, arranged.rank.reshape(-1), jnp.asarray(table.reshape(-1)), *bounds)
    ends = [finish(stats[2 * i], stats[2 * i + 1]) for i in range(len(SUMS) if between is not None else 2)]
    return Candidates(values, places, jnp.max(stats[-1], axis=1), *ends, *([None] if between is None else []))


def _kernel(hidden_ref, matrix_ref, rank_ref, table_ref, *refs, tiles, lanes, count, sliced, shape):
    bounds, (values_ref, places_ref, stats_ref) = refs[: 2 * sliced], refs[2 * sliced :]
    rows = pl.ds(pl.program_id(0) * tiles.tokens, tiles.tokens)
    size = (tiles.tokens, lanes)
    bounds = [jnp.broadcast_to(x[rows][:, None], size) for x in bounds]
    for at in range(0, tiles.bins * tiles.depth, lanes):
        values_ref[rows, pl.ds(at, lanes)] = jnp.full(size, -jnp.inf, jnp.float32)
        places_ref[rows, pl.ds(at, lanes)] = jnp.full(size, -1, jnp.int32)

    def empty():
        return jnp.full(size, -planes.LARGEST, jnp.float32), jnp.zeros(size, jnp.float32)

    def piece(number, state):
        sums, evicted = state
        first, stride, many, start, is_unit = (table_ref[number * 5 + i] for i in range(5))

        def plane(index, running):
            at = pl.ds(first + index * stride, lanes)
            inside, whole = _logits(hidden_ref, matrix_ref, rank_ref, rows, at, tiles, bounds, shape)
            here, everything = running
            return planes.add(here, [inside]), planes.add(everything, [whole]) if sliced else everything

        (maximum, total), everything = lax.fori_loop(0, many, plane, (empty(), sums[2]))
        mass = maximum + jnp.log(total)
        unit = jnp.where(is_unit == 1, mass, -jnp.inf)
        sums = planes.add(sums[0], [unit]), planes.add(sums[1], [jnp.where(is_unit == 1, -jnp.inf, mass)]), everything
        here = [pl.ds(level * tiles.bins + start, lanes) for level in range(tiles.depth)]
        kept = [(values_ref[rows, at], places_ref[rows, at]) for at in here]
        kept, out = insert(kept, unit, first + lax.broadcasted_iota(jnp.int32, size, 1))
        for at, (value, place) in zip(here, kept, strict=True):
            values_ref[rows, at], places_ref[rows, at] = value, place
        return sums, jnp.maximum(evicted, out)

    start = ((empty(), empty(), empty()), jnp.full(size, -jnp.inf, jnp.float32))
    sums, evicted = lax.fori_loop(0, count, piece, start)
    for i, x in enumerate([x for pair in sums for x in pair] + [evicted]):
        stats_ref[i, rows, :] = x


def _logits(hidden_ref, matrix_ref, rank_ref, rows, at, tiles, bounds, shape):
    """(logits [TM, lanes] within the slice, of all rows that are somebody's) of the rows ``at`` of the matrix."""
    precision = lax.Precision.HIGHEST if matrix_ref.dtype == jnp.float32 else None

    def part(index, total):
        columns = pl.ds(index * tiles.width, tiles.width)
        return total + plgpu.dot(hidden_ref[rows, columns], matrix_ref[at, columns], trans_b=True, precision=precision)

    width = hidden_ref.shape[1] // tiles.width
    total = lax.fori_loop(0, width, part, jnp.zeros((rows.size, at.size), jnp.float32))
    rank = jnp.broadcast_to(rank_ref[at][None, :], total.shape)
    whole = jnp.where(rank >= 0, shape(total), -jnp.inf)
    if not bounds:
        return whole, whole
    return jnp.where((rank >= bounds[0]) & (rank < bounds[1]), whole, -jnp.inf), whole
