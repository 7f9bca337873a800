"""The Mosaic TPU kernel: hidden states times a permuted output matrix, added up to units, the best of every bin kept.

Grid (token tiles, vocabulary blocks, width tiles), the last two in sequence. A step multiplies a tile [TM, DK] of hidden states
with a tile [R, DK] of the matrix into logits [TM, R] in VMEM; the last step of a block joins its planes (``layout``), adds
to the running log-sum-exps and puts every unit's mass into a *bin*: L bins per token, the DEPTH largest of each kept in order.
What falls out of a bin is only remembered by its maximum. That maximum is the certificate: if the k-th best kept is above it,
nothing that fell out can belong to the k best. There is no gather, scatter, sort or top-k in here: the kinds of the blocks and
the bins they start at come by scalar prefetch, the choice among L * DEPTH candidates happens outside (``aligned``).

The kernel's body is also what interpret mode runs; nothing in it depends on the hardware but the sizes in ``tuning``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import planes
from .layout import FAT, MOST, RESIDUAL, Arranged, Run
from .layout import planes as count_planes
from .tuning import Tiles

SUMS = ("aligned", "residual", "everything")  # a maximum and a sum each, in this order, then what was evicted


class Candidates(NamedTuple):
    """values float32 [N, DEPTH * L] and places int32 [N, DEPTH * L] (block * R + lane, -1 none); evicted float32 [N];
    log-sum-exps float32 [N], everything None where rows were not sliced."""

    values: jax.Array
    places: jax.Array
    evicted: jax.Array
    aligned: jax.Array
    residual: jax.Array
    everything: jax.Array | None


def first_bins(runs: tuple[Run, ...], block: int, bins: int) -> np.ndarray:
    """int32 [B]: the bin of each block's first lane. Blocks with fewer lanes than there are bins take turns at them."""
    starts = []
    for kind, _, count in runs:
        width = block // count_planes(kind)
        starts += [(i * width) % bins if width < bins else 0 for i in range(count)]
    return np.asarray(starts, np.int32)


def candidates(
    hidden: jax.Array,
    arranged: Arranged,
    tiles: Tiles,
    between: tuple[jax.Array, jax.Array] | None,
    soft_cap: float | None,
    temperature: float,
    interpret: bool,
) -> Candidates:
    """Runs the kernel. hidden [N, D], N a multiple of tiles.tokens; between: int32 [N, 1] twice, or None."""
    tokens, width = hidden.shape
    block, lanes, slots = arranged.block, arranged.block // MOST, tiles.bins * tiles.depth
    kinds = np.concatenate([np.full(count, kind, np.int32) for kind, _, count in arranged.runs])
    grid = (tokens // tiles.tokens, kinds.size, width // tiles.width)
    sliced = between is not None
    rows = 2 * len(SUMS) + 1

    specs = [
        pl.BlockSpec((tiles.tokens, tiles.width), lambda i, j, d, *_: (i, d)),
        pl.BlockSpec((block, tiles.width), lambda i, j, d, *_: (j, d)),
        pl.BlockSpec((None, 1, block), lambda i, j, d, *_: (j, 0, 0)),
        pl.BlockSpec((None, 1, lanes), lambda i, j, d, *_: (j, 0, 0)),
    ]
    if sliced:
        specs += [pl.BlockSpec((tiles.tokens, 1), lambda i, j, d, *_: (i, 0))] * 2
    call = pl.pallas_call(
        functools.partial(
            _kernel, present=tuple(dict.fromkeys(kind for kind, *_ in arranged.runs)), tiles=tiles, block=block, sliced=sliced,
            shape=functools.partial(planes.shape, soft_cap=soft_cap, temperature=temperature),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((tiles.tokens, slots), lambda i, j, d, *_: (i, 0)),
                pl.BlockSpec((tiles.tokens, slots), lambda i, j, d, *_: (i, 0)),
                pl.BlockSpec((rows, tiles.tokens, lanes), lambda i, j, d, *_: (0, i, 0)),
            ],
            scratch_shapes=[pltpu.VMEM((tiles.tokens, block), jnp.float32), pltpu.VMEM((tiles.tokens, lanes), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, slots), jnp.float32),
            jax.ShapeDtypeStruct((tokens, slots), jnp.int32),
            jax.ShapeDtypeStruct((rows, tokens, lanes), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_limit
        ),
        name="vocab_align",
        interpret=interpret,
    )  # fmt: skip
    values, places, stats = call(
        jnp.asarray(kinds), jnp.asarray(first_bins(arranged.runs, block, tiles.bins)), hidden, arranged.matrix,
        arranged.rank[:, None, :], arranged.parts[:, None, :], *(between or ()),
    )  # fmt: skip
    ends = [finish(stats[2 * i], stats[2 * i + 1]) for i in range(len(SUMS) if sliced else 2)]
    return Candidates(values, places, jnp.max(stats[-1], axis=1), *ends, *([] if sliced else [None]))


def finish(maximum: jax.Array, total: jax.Array) -> jax.Array:
    """[N] log-sum-exp from running ones per lane, [N, lanes]."""
    return jax.nn.logsumexp(maximum + jnp.log(total), axis=1)


def _kernel(kind_ref, bin_ref, hidden_ref, matrix_ref, rank_ref, parts_ref, *refs, present, tiles, block, sliced, shape):
    bounds, (values_ref, places_ref, stats_ref, logits_ref, carry_ref) = refs[: 2 * sliced], refs[2 * sliced :]
    index, part = pl.program_id(1), pl.program_id(2)

    @pl.when((index == 0) & (part == 0))
    def _start():
        values_ref[...] = jnp.full(values_ref.shape, -jnp.inf, jnp.float32)
        places_ref[...] = jnp.full(places_ref.shape, -1, jnp.int32)
        carry_ref[...] = jnp.full(carry_ref.shape, -jnp.inf, jnp.float32)
        for i in range(len(SUMS)):
            stats_ref[2 * i] = jnp.full(stats_ref.shape[1:], -planes.LARGEST, jnp.float32)
            stats_ref[2 * i + 1] = jnp.zeros(stats_ref.shape[1:], jnp.float32)
        stats_ref[2 * len(SUMS)] = jnp.full(stats_ref.shape[1:], -jnp.inf, jnp.float32)

    _multiply(hidden_ref, matrix_ref, logits_ref, part)

    for kind in present:  # static: only the kinds that the map has are compiled

        @pl.when((kind_ref[index] == kind) & (part == pl.num_programs(2) - 1))
        def _finish_block(kind=kind):
            def some_tokens(step, _):
                rows = pl.ds(pl.multiple_of(step * tiles.rows, tiles.rows), tiles.rows)
                read = functools.partial(_read, logits_ref, rank_ref, bounds, rows, shape)
                _tokens(kind, read, rows, index, bin_ref, parts_ref, values_ref, places_ref, stats_ref, carry_ref, tiles, block)
                return 0

            lax.fori_loop(0, tiles.tokens // tiles.rows, some_tokens, 0)


def _multiply(hidden_ref, matrix_ref, logits_ref, part):
    """logits [TM, R] += hidden [TM, DK] times matrix [R, DK] transposed, float32 accumulation; float32 inputs in full precision."""
    precision = lax.Precision.HIGHEST if matrix_ref.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    product = lax.dot_general(hidden_ref[...], matrix_ref[...], dims, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(part == 0)
    def _first():
        logits_ref[...] = product

    @pl.when(part > 0)
    def _more():
        logits_ref[...] += product


def _read(logits_ref, rank_ref, bounds, rows, shape, at, size):
    """(logits [rows, size] within the slice, logits of all rows that are somebody's) at columns ``at`` and on."""
    rank = rank_ref[:, at : at + size]
    # A minimum with -inf and not a product or a sum: padding stays out whatever its logit is.
    whole = jnp.minimum(shape(logits_ref[rows, at : at + size]), jnp.where(rank >= 0, jnp.inf, -jnp.inf))
    if not bounds:
        return whole, None
    rank = jnp.broadcast_to(rank, whole.shape)
    lower, upper = (jnp.broadcast_to(x[rows, :], whole.shape) for x in bounds)
    return jnp.where((rank >= lower) & (rank < upper), whole, -jnp.inf), whole


def _tokens(kind, read, rows, index, bin_ref, parts_ref, values_ref, places_ref, stats_ref, carry_ref, tiles, block):
    """One block for some of the tile's tokens: sums, and every unit into its bin."""
    count, lanes = count_planes(kind), block // MOST
    width = block // count
    if kind == RESIDUAL:
        for at in range(0, block, tiles.lanes):
            inside, whole = read(at, min(tiles.lanes, block))
            _add(stats_ref, rows, 1, [inside])
            _add(stats_ref, rows, 2, [whole])
        return
    span = min(width, tiles.bins)
    size = min(span, tiles.lanes)
    first = pl.multiple_of(bin_ref[index], lanes) if width < tiles.bins else 0
    for chunk in range(0, span, size):
        here = [pl.ds(level * tiles.bins + first + chunk, size) for level in range(tiles.depth)]
        kept = [(values_ref[rows, at], places_ref[rows, at]) for at in here]
        evicted, masses, everything = [], [], []
        for turn in range(chunk, width, span):
            slices = [read(plane * width + turn, size) for plane in range(count)]
            everything += [whole for _, whole in slices]
            mass = planes.join([inside for inside, _ in slices])
            if kind == FAT:
                parts = jnp.broadcast_to(parts_ref[...], mass.shape)
                mass, carry_ref[rows, :] = planes.scan_lanes(mass, parts, carry_ref[rows, :], lambda x, n: pltpu.roll(x, n, 1))
            masses.append(mass)
            lane = lax.broadcasted_iota(jnp.int32, mass.shape, 1)
            kept, out = insert(kept, mass, index * block + turn + lane)
            evicted.append(out)
        for at, (value, place) in zip(here, kept, strict=True):
            values_ref[rows, at], places_ref[rows, at] = value, place
        last = 2 * len(SUMS)
        stats_ref[last, rows] = functools.reduce(jnp.maximum, _pieces(evicted, lanes), stats_ref[last, rows])
        _add(stats_ref, rows, 0, masses)
        _add(stats_ref, rows, 2, everything)


def insert(kept: list[tuple[jax.Array, jax.Array]], value: jax.Array, place: jax.Array):
    """(bins with one more value each, what fell out): levels fall, and of equal values the earlier stays above."""
    new = []
    for old, where in kept:
        above = value > old
        new.append((jnp.maximum(value, old), jnp.where(above, place, where)))
        value, place = jnp.minimum(value, old), jnp.where(above, where, place)
    return new, value


def _add(stats_ref, rows, which, slices):
    """Arrays [rows, multiple of R / 16] into one of the SUMS; nothing where rows are not sliced."""
    if slices[0] is None:
        return
    running = (stats_ref[2 * which, rows], stats_ref[2 * which + 1, rows])
    running = planes.add(running, _pieces(slices, stats_ref.shape[2]))
    stats_ref[2 * which, rows], stats_ref[2 * which + 1, rows] = running


def _pieces(slices, lanes):
    """All of them cut into pieces of that many lanes."""
    return [x[:, at : at + lanes] for x in slices for at in range(0, x.shape[1], lanes)]
