"""Fan-in planes: the rows of a teacher's output matrix permuted once, so that adding teacher ids up to units needs no gather.

A *unit* is what teacher ids are added up to (a student id, for the kernel just a number); its fan-in is how many rows it has.
The permuted matrix is cut into blocks of R rows. A block of kind c holds units of fan-in up to c as c planes of R / c lanes:

    row of the block = plane * (R / c) + lane,    a unit's rows lie in one lane, one per plane.

So the logits [N, R] of a block become the log mass of R / c units by a log-sum-exp over c slices. Kinds 1, 2, 4, 8, 16 are
these. FAT is for larger fan-ins: 16 planes, and a unit takes as many neighbouring lanes as it needs (over the end of a block
into the next one if need be); a segmented scan over the lanes joins them, and the unit's mass stands in its last lane.
RESIDUAL blocks hold the rows that belong to no unit. Blocks of one kind are neighbours: the kinds are *runs*.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESIDUAL, FAT = 0, 32
PLANES = (1, 2, 4, 8, 16)
MOST = PLANES[-1]  # planes of the widest kind; R / MOST lanes are the smallest piece that is ever handled
NOWHERE = -1  # a row of the permuted matrix that no teacher id takes, a lane that no unit takes

Run = tuple[int, int, int]  # (kind, first block, number of blocks)


def planes(kind: int) -> int:
    """Into how many slices a block of that kind is cut; a residual block is not."""
    return MOST if kind == FAT else max(kind, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A permutation of the output matrix into B blocks of R rows, made by ``build``. All arrays are numpy, int32.

    source [B * R]: the teacher id in each row of the permuted matrix, or NOWHERE. rank [B, R]: the lexicographic rank of that
    id (0 where ranks were not given), NOWHERE where there is none. units [B, R]: the unit in each lane of each block, NOWHERE in
    lanes without one, which all lanes past R / planes(kind) are. parts [B, R / 16]: in FAT blocks 2 * (number of the lane's
    segment) + (1 in the unit's last lane); 0 elsewhere. ordered: units rise along the lanes of all blocks, so that the first
    place is also the lowest unit, and ties need no care. Always so where every unit has one row and units rise with ids.
    """

    block: int
    runs: tuple[Run, ...]
    ordered: bool
    source: np.ndarray
    rank: np.ndarray
    units: np.ndarray
    parts: np.ndarray

    @property
    def rows(self) -> int:
        """Teacher ids that are in it."""
        return int(np.count_nonzero(self.source >= 0))

    @property
    def padding(self) -> float:
        """Extra rows that are multiplied, as a share of the rows that are needed: 0.1 is 10 % more work."""
        return self.source.size / max(self.rows, 1) - 1

    @property
    def num_units(self) -> int:
        """Units that have a row at all: a top-k beyond it has empty places."""
        return int(np.count_nonzero(self.units >= 0))

    def without_matrix(self) -> Arranged:
        """What reads logits in the layout's order, for a teacher whose logits are at hand."""
        return _arranged(jnp.zeros((0, 0)), jnp.asarray(self.rank), self)


def build(unit_of_teacher: np.ndarray, block: int = 2048, rank: np.ndarray | None = None, valid: np.ndarray | None = None) -> Layout:
    """The layout for a map from teacher ids to units.

    unit_of_teacher: int [V_T], the unit of every teacher id, -1 for the residual. rank: int [V_T] >= 0, the place of the id
    when all are sorted by their bytes; needed only for slices of rows (``aligned_topk(between=)``). valid: bool [V_T], False
    for rows that are no token: they are left out, in no sum at all. block: rows R per block, a multiple of 16; a TPU wants
    a multiple of 2048. An output matrix may have more rows than V_T: those are left out too.

    Raises ValueError for shapes, ids or sizes that make no sense.
    """
    units = np.asarray(unit_of_teacher)
    if units.ndim != 1 or not np.issubdtype(units.dtype, np.integer) or units.size == 0:
        raise ValueError(f"unit_of_teacher is {units.dtype} {units.shape}: it must be integers [V_T], one unit per teacher id")
    if block < MOST or block % MOST:
        raise ValueError(f"block is {block}: it must be a multiple of {MOST}, and of {128 * MOST} for a TPU")
    if units.min() < -1:
        raise ValueError(f"unit_of_teacher has {units.min()}: units are numbers from 0, and -1 is the residual")
    valid = np.ones(units.size, bool) if valid is None else np.asarray(valid)
    rank = np.zeros(units.size, np.int32) if rank is None else np.asarray(rank)
    if valid.shape != units.shape or rank.shape != units.shape or rank.min() < 0:
        raise ValueError(f"valid {valid.shape} and rank {rank.shape} must be [{units.size}] like unit_of_teacher, ranks from 0")

    ids = np.flatnonzero(valid & (units >= 0))
    ids = ids[np.argsort(units[ids], kind="stable")]
    names, first, fan_in = np.unique(units[ids], return_index=True, return_counts=True)
    runs, kind_of, lane_of = _lanes(fan_in, block)

    residual = np.flatnonzero(valid & (units < 0))
    if residual.size:
        runs = (*runs, (RESIDUAL, sum(count for *_, count in runs), -(-residual.size // block)))
    blocks = sum(count for *_, count in runs)
    source = np.full(blocks * block, NOWHERE, np.int32)
    table = np.full((blocks, block), NOWHERE, np.int32)
    parts = np.zeros((blocks, block // MOST), np.int32)
    for kind, start, _ in runs:
        if kind == RESIDUAL:
            source[start * block : start * block + residual.size] = residual
            continue
        here = np.flatnonzero(kind_of == kind)
        wide = _wide(kind, fan_in[here])
        width = block // planes(kind)
        which = np.repeat(np.arange(here.size), fan_in[here])  # the rows of all units of this kind, one after the other
        nth = np.arange(which.size) - np.repeat(np.cumsum(fan_in[here]) - fan_in[here], fan_in[here])
        lane = lane_of[here][which] + nth % wide[which]
        row = (start + lane // width) * block + nth // wide[which] * width + lane % width
        source[row] = ids[first[here][which] + nth]
        last = lane_of[here] + wide - 1
        table[start + last // width, last % width] = names[here]
        if kind == FAT:
            _mark_parts(parts[start:], lane_of[here], wide)
    flat = table[table >= 0]
    ranks = np.where(source >= 0, rank[source], NOWHERE).astype(np.int32).reshape(blocks, block)
    return Layout(block, runs, bool(np.all(flat[1:] > flat[:-1])), source, ranks, table, parts)


def identity(vocab: int, block: int = 2048, valid: np.ndarray | None = None) -> Layout:
    """Every teacher id is its own unit: one kind, in the order of the ids, padding only at the end."""
    return build(np.arange(vocab, dtype=np.int32), block, valid=valid)


def _lanes(fan_in: np.ndarray, block: int) -> tuple[tuple[Run, ...], np.ndarray, np.ndarray]:
    """(runs, kind of each unit, its first lane within the run of its kind).

    A unit goes to the narrowest kind that holds it, but lanes left over in the last block of a kind take units of the next
    narrower one: they are multiplied anyway.
    """
    kind_of = np.select([fan_in <= c for c in PLANES], PLANES, FAT).astype(np.int32)
    lane_of = np.zeros(fan_in.size, np.int32)
    runs: list[Run] = []
    first = 0
    for kind in (FAT, *reversed(PLANES)):
        here = np.flatnonzero(kind_of == kind)
        if here.size == 0:
            continue
        wide = _wide(kind, fan_in[here])
        ends = np.cumsum(wide)
        lane_of[here] = ends - wide
        width = block // planes(kind)
        count = -(-int(ends[-1]) // width)
        spare = count * width - int(ends[-1])
        narrower = np.flatnonzero(kind_of < kind)
        # The largest fan-ins first, of equal ones the highest unit: what stays behind is still in order.
        taken = narrower[np.lexsort((narrower, fan_in[narrower]))][narrower.size - min(spare, narrower.size) :]
        kind_of[taken] = kind
        lane_of[taken] = ends[-1] + np.arange(taken.size)
        runs.append((kind, first, count))
        first += count
    return tuple(runs), kind_of, lane_of


def _wide(kind: int, fan_in: np.ndarray) -> np.ndarray:
    """Lanes that each unit takes in a block of that kind."""
    return -(-fan_in // MOST) if kind == FAT else np.ones(fan_in.size, np.int64)


def _mark_parts(parts: np.ndarray, lanes: np.ndarray, wide: np.ndarray) -> None:
    """Fills ``parts`` [blocks, lanes] of a FAT run: a segment per unit, its last lane marked; lanes past all units differ from them."""
    flat = parts.reshape(-1)
    order = np.argsort(lanes)
    used = int(wide.sum())
    flat[:used] = 2 * np.repeat(np.arange(lanes.size), wide[order])
    flat[used:] = 2 * lanes.size
    flat[(lanes + wide - 1)] += 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arranged:
    """A permuted output matrix with what the ops need to read it; made by ``arrange``. A pytree: pass it through jit.

    matrix [B * R, D]; rank int32 [B, R]; units int32 [B, R]; parts int32 [B, R / 16]; the rest is static, see ``Layout``.
    """

    matrix: Any  # arrays; not declared so, because jax rebuilds pytrees with shapes or shardings in their place
    rank: Any
    units: Any
    parts: Any
    block: int = dataclasses.field(metadata={"static": True})
    runs: tuple[Run, ...] = dataclasses.field(metadata={"static": True})
    ordered: bool = dataclasses.field(metadata={"static": True})


def arrange(unembed: jax.Array, layout: Layout) -> Arranged:
    """The output matrix [V, D] in the layout's order, zeros where a row is nobody's. Once per teacher, not per step.

    Rows that hold -inf are padding here as everywhere: they become zeros that are in no sum. Raises ValueError when the matrix
    has fewer rows than the layout's ids need.
    """
    if unembed.ndim != 2 or unembed.shape[0] <= layout.source.max(initial=-1):
        raise ValueError(f"unembed {unembed.shape} must be [V, D] with V above {layout.source.max(initial=-1)}, the highest id of the map")
    rows = jnp.asarray(unembed).at[layout.source].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    token = jnp.logical_not(jnp.any(jnp.isneginf(rows), axis=1))
    rank = jnp.where(token.reshape(layout.rank.shape), layout.rank, NOWHERE)
    return _arranged(jnp.where(token[:, None], rows, 0), rank, layout)


def _arranged(matrix: jax.Array, rank: jax.Array, layout: Layout) -> Arranged:
    units, parts = jnp.asarray(layout.units), jnp.asarray(layout.parts)
    return Arranged(matrix, rank, units, parts, layout.block, layout.runs, layout.ordered)
