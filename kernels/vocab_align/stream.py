"""Aligned top-k block by block in plain XLA: the default where there is no kernel, and what repairs a kernel's doubtful rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import blocks, planes
from .layout import FAT, MOST, RESIDUAL, Arranged
from .layout import planes as count_planes

Between = tuple[jax.Array, jax.Array] | None
Read = Callable[[jax.Array], jax.Array]  # number of a block -> its logits [N, R], float32


class Found(NamedTuple):
    """values float32 [N, k] falling, units int32 [N, k]; certain bool [N]: no other unit can belong there, ties included;
    log-sum-exps float32 [N]: over all units, over the residual (both within the slice), over every row."""

    values: jax.Array
    units: jax.Array
    certain: jax.Array
    aligned: jax.Array
    residual: jax.Array
    everything: jax.Array


class _State(NamedTuple):
    values: jax.Array
    units: jax.Array
    evicted: jax.Array  # [N] the largest value that was ever dropped
    aligned: tuple[jax.Array, jax.Array]
    residual: tuple[jax.Array, jax.Array]
    everything: tuple[jax.Array, jax.Array]
    open_unit: jax.Array  # [N, R / 16], see ``planes.scan_lanes``


def search(read: Read, tokens: int, arranged: Arranged, k: int, between: Between, by_unit: bool) -> Found:
    """The k units of most mass for each of N tokens, and the log-sum-exps.

    by_unit: equal masses are ordered by unit at every step: everything is certain then, at the price of a sort per block.
    Else only those among the k found are, and a row is doubtful where the k-th equals a unit that was dropped.
    """
    nothing = jnp.full((tokens,), -jnp.inf, jnp.float32)
    sums = blocks.start_logsumexp(tokens)
    state = _State(
        jnp.full((tokens, k), -jnp.inf, jnp.float32), jnp.full((tokens, k), -1, jnp.int32), nothing,
        sums, sums, sums, jnp.full((tokens, arranged.block // MOST), -jnp.inf, jnp.float32),
    )  # fmt: skip
    if by_unit:
        state = _walk_kinds_together(state, read, arranged, k, between)
    else:
        state = _walk_runs(state, read, arranged, k, between)
    values, units = state.values, state.units
    if not (by_unit or arranged.ordered):
        values, units = sort_by_unit(values, units)
    certain = (values[:, -1] > state.evicted) | jnp.isneginf(state.evicted)
    if by_unit or arranged.ordered:
        certain = jnp.ones_like(certain)
    ends = [blocks.finish_logsumexp(x) for x in (state.aligned, state.residual, state.everything)]
    return Found(values, jnp.where(jnp.isneginf(values), -1, units), certain, *ends)


def _walk_runs(state: _State, read: Read, arranged: Arranged, k: int, between: Between) -> _State:
    """A loop per run of blocks: a choice among the R / c lanes of its kind and no more."""
    for kind, first, count in arranged.runs:

        def body(state: _State, index: jax.Array, kind: int = kind) -> tuple[_State, None]:
            state, mass = _mass(state, read(index), index, kind, arranged, between)
            return (state if mass is None else _keep(state, mass, index, arranged, k, _choose)), None

        if count == 1:  # no loop: the compiler can fuse across it
            state = body(state, jnp.int32(first))[0]
        else:
            state = lax.scan(body, state, first + jnp.arange(count, dtype=jnp.int32))[0]
    return state


def _walk_kinds_together(state: _State, read: Read, arranged: Arranged, k: int, between: Between) -> _State:
    """One loop over all blocks, for the few rows that need it: a sort in it is dear to compile, so there is only one."""
    block, kinds = arranged.block, [kind for kind, *_ in arranged.runs]

    def branch(kind: int):
        def full_width(state: _State, logits: jax.Array, index: jax.Array) -> tuple[_State, jax.Array]:
            state, mass = _mass(state, logits, index, kind, arranged, between)
            mass = jnp.full_like(logits[:, :0], -jnp.inf) if mass is None else mass
            return state, jnp.pad(mass, ((0, 0), (0, block - mass.shape[1])), constant_values=-jnp.inf)

        return full_width

    def body(state: _State, at: tuple[jax.Array, jax.Array]) -> tuple[_State, None]:
        index, which = at
        state, mass = lax.switch(which, [branch(kind) for kind in kinds], state, read(index), index)
        return _keep(state, mass, index, arranged, k, _choose_by_unit), None

    which = np.repeat(np.arange(len(kinds), dtype=np.int32), [count for *_, count in arranged.runs])
    return lax.scan(body, state, (jnp.arange(which.size, dtype=jnp.int32), jnp.asarray(which)))[0]


def _mass(state, logits, index, kind, arranged, between) -> tuple[_State, jax.Array | None]:
    """(state with its sums, log mass [N, R / c] of a block's units or None) of logits [N, R], already capped and divided."""
    rank = lax.dynamic_index_in_dim(arranged.rank, index, keepdims=False)
    logits = jnp.where((rank >= 0)[None, :], logits, -jnp.inf)
    if between is not None:
        state = state._replace(everything=blocks.add_logsumexp(state.everything, logits))
        lower, upper = (x[:, None] for x in between)
        logits = jnp.where((rank[None, :] >= lower) & (rank[None, :] < upper), logits, -jnp.inf)
    if kind == RESIDUAL:
        return state._replace(residual=blocks.add_logsumexp(state.residual, logits)), None
    mass = planes.join(jnp.split(logits, count_planes(kind), axis=1))
    if kind == FAT:
        parts = lax.dynamic_index_in_dim(arranged.parts, index, keepdims=False)
        parts = jnp.broadcast_to(parts[None, :], mass.shape)
        mass, carry = planes.scan_lanes(mass, parts, state.open_unit, lambda x, n: jnp.roll(x, n, axis=1))
        state = state._replace(open_unit=carry)
    return state._replace(aligned=blocks.add_logsumexp(state.aligned, mass)), mass


def _keep(state, mass, index, arranged, k, choose) -> _State:
    units = lax.dynamic_index_in_dim(arranged.units, index, keepdims=False)[: mass.shape[1]]
    values, kept, evicted = choose(state.values, state.units, mass, units, k)
    return state._replace(values=values, units=kept, evicted=jnp.maximum(state.evicted, evicted))


def _choose(values, kept, mass, units, k):
    """(k best of those kept and a block's, their units, the best of those dropped). What is kept stands before the block."""
    # The barrier: two slices of one top-k make the CPU's compiler sort everything instead, 15 times slower. ``kept`` goes through it too,
    # for a barrier on the pair alone ends XLA's process, by a failed check in its TopkDecomposer, where it compiles for several devices.
    best, place, kept = lax.optimization_barrier((*lax.top_k(jnp.concatenate([values, mass], axis=1), k + 1), kept))
    place = place[:, :k]
    old = jnp.take_along_axis(kept, jnp.minimum(place, k - 1), axis=1)
    return best[:, :k], jnp.where(place < k, old, units[jnp.maximum(place - k, 0)]), best[:, k]


def _choose_by_unit(values, kept, mass, units, k):
    """The same with equal values in order of their units."""
    units = jnp.broadcast_to(units[None, :], mass.shape)
    best, units = sort_by_unit(jnp.concatenate([values, mass], axis=1), jnp.concatenate([kept, units], axis=1))
    return best[:, :k], units[:, :k], best[:, k]


def sort_by_unit(values: jax.Array, units: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[N, n] both, values falling, among equal ones the units rising."""
    falling, units = lax.sort((-values, units), num_keys=2)
    return -falling, units
