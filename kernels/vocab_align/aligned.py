"""Top-k of units: a teacher's logits added up to the units of a student, the k best of them, exactly; see ../README.md.

Letters: N tokens, D width, V teacher ids, k units kept. Everything is float32 whatever the inputs are. No gradient, by design:
teachers are frozen. Tokens may be sharded only through ``jax.shard_map``, where the compiler cannot cut the kernel itself.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import blocks, kernel, kernel_gpu, planes, stream, tuning
from .layout import FAT, NOWHERE, Arranged, Layout

Implementation = Literal["auto", "xla", "pallas", "triton", "interpret"]
Between = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray] | None

TOGETHER = 8192  # tokens that go through the kernel at a time: its candidates are 16 KiB a token
AGAIN = 16  # doubtful rows that are computed again at a time: mostly there are one or two, and each costs a sort per block


class Aligned(NamedTuple):
    """What a teacher says at N tokens, in units.

    values float32 [N, k]: log of the sum of exp(logit) over a unit's rows, falling; log q is values - logsumexp[:, None].
    units int32 [N, k]; equal values: the lower unit first. A place that no unit can take: value -inf, unit -1.
    residual [N]: the same sum over rows of no unit. logsumexp [N]: over all rows, of the slice if there is one.
    everything [N]: over all rows whatever the slice; log Z of a straddled position is logsumexp - everything.
    recomputed int32 scalar: rows that the fast way could not certify.
    """

    values: jax.Array
    units: jax.Array
    residual: jax.Array
    logsumexp: jax.Array
    everything: jax.Array
    recomputed: jax.Array


def aligned_topk(
    hidden: jax.Array,
    arranged: Arranged,
    k: int,
    *,
    between: Between = None,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    implementation: Implementation = "auto",
    tiles: tuning.Tiles | None = None,
) -> Aligned:
    """The k units of most mass of every token, exactly, from hidden states: the logits [N, V] are never an array.

    hidden [N, D]; arranged: ``layout.arrange(unembed, layout.build(unit_of_teacher))``; between: int32 [N] twice, only rows of
    rank lower <= rank < upper count then (a straddled position: teacher tokens that start with the pending bytes).
    soft_cap, temperature: logits become cap * tanh(logit / cap) / temperature. implementation: "auto" is the kernel on a TPU
    and blocked XLA elsewhere; "triton" is the kernel for GPUs, no faster on an H100; "interpret" runs the TPU kernel's body
    anywhere, slowly. tiles: of the kernel, by default for the device in use; no result depends on them.

    Raises ValueError for shapes that do not belong together, k below 1, another implementation, or a temperature not above 0.
    """
    tokens = _check(hidden, arranged.matrix.shape[1], k, between, temperature, implementation)
    hidden, arranged = lax.stop_gradient((hidden, arranged))
    between = None if between is None else tuple(jnp.asarray(x, jnp.int32) for x in between)

    def search(by_unit: bool, hidden: jax.Array, between: Between) -> stream.Found:
        read = _reader(hidden, arranged, soft_cap, temperature)
        return stream.search(read, hidden.shape[0], arranged, k, between, by_unit)

    if implementation == "auto":
        implementation = "pallas" if jax.default_backend() == "tpu" else "xla"
    if implementation == "xla":
        found = search(False, hidden, between)
    else:
        name = "gpu" if implementation == "triton" else jax.devices()[0].device_kind
        tiles = tiles or tuning.tiles_for(name, arranged.block, hidden.shape[1], k)
        form = kernel_gpu if implementation == "triton" else kernel
        found = _with_kernel(hidden, arranged, k, between, soft_cap, temperature, tiles, implementation == "interpret", form)
    return _certified(found, search, (hidden, between), tokens)


def aligned_topk_logits(
    logits: jax.Array, layout: Layout, k: int, *, between: Between = None, soft_cap: float | None = None, temperature: float = 1.0
) -> Aligned:
    """The same from logits [N, V] of a teacher that is served elsewhere, in blocked XLA. Logits of -inf are in no sum.

    Prefer hidden states where they can be had: they are a hundred times smaller. Logits that were rounded to few bits are full of
    ties, and rows with a tie at the k-th place are computed again with a sort per block.
    """
    arranged = layout.without_matrix()
    if logits.ndim != 2 or logits.shape[1] <= layout.source.max(initial=-1):
        raise ValueError(f"logits {logits.shape} must be [N, V] with V above {layout.source.max(initial=-1)}, the highest id of the map")
    tokens = _check(logits, logits.shape[1], k, between, temperature, "xla")
    logits = lax.stop_gradient(logits)
    between = None if between is None else tuple(jnp.asarray(x, jnp.int32) for x in between)
    source = jnp.asarray(layout.source).reshape(-1, layout.block)

    def search(by_unit: bool, logits: jax.Array, between: Between) -> stream.Found:
        def read(index):
            ids = lax.dynamic_index_in_dim(source, index, keepdims=False)
            return planes.shape(logits[:, jnp.maximum(ids, 0)].astype(jnp.float32), soft_cap, temperature)

        return stream.search(read, logits.shape[0], arranged, k, between, by_unit)

    return _certified(search(False, logits, between), search, (logits, between), tokens)


def _check(array, width, k, between, temperature, implementation) -> int:
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}, choose one of {', '.join(get_args(Implementation))}")
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"hidden {array.shape} must be [N, {width}], the width of the output matrix")
    tokens = array.shape[0]
    if between is not None and any(x.shape != (tokens,) for x in between):
        raise ValueError(f"between {[x.shape for x in between]} must be [{tokens}] twice, one slice per token")
    if k < 1 or not temperature > 0:
        raise ValueError(f"k is {k} and temperature {temperature}: k must be at least 1, a temperature above 0")
    return tokens


def _reader(hidden: jax.Array, arranged: Arranged, soft_cap: float | None, temperature: float) -> stream.Read:
    """Number of a block -> its logits [N, R]."""

    def read(index: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(arranged.matrix, index * arranged.block, arranged.block)
        return planes.shape(blocks.product(hidden, rows), soft_cap, temperature)

    return read


def _with_kernel(hidden, arranged, k, between, soft_cap, temperature, tiles, interpret, form=kernel) -> stream.Found:
    """The kernel on tiles of tokens, and the choice among its candidates."""
    if k >= tiles.bins * tiles.depth:
        raise ValueError(
            f"k is {k}, but {tiles.bins} bins of {tiles.depth} hold no more than {tiles.bins * tiles.depth}: more depth, or xla"
        )
    tokens = hidden.shape[0]
    together = min(TOGETHER // tiles.tokens * tiles.tokens, -(-tokens // tiles.tokens) * tiles.tokens)

    def some(part):
        hidden, bounds = part
        found = form.candidates(hidden, arranged, tiles, bounds, soft_cap, temperature, interpret)
        values, place = lax.top_k(found.values, k + 1)
        places = jnp.take_along_axis(found.places, place[:, :k], axis=1)
        units = jnp.where(jnp.isneginf(values[:, :k]), NOWHERE, arranged.units.reshape(-1)[jnp.maximum(places, 0)])
        # What was dropped: out of a bin, or out of the candidates. A tie with it is no certificate: the other may be the lower unit.
        dropped = jnp.maximum(found.evicted, values[:, k])
        certain = (values[:, k - 1] > dropped) | jnp.isneginf(dropped)
        everything = jnp.logaddexp(found.aligned, found.residual) if found.everything is None else found.everything
        best = stream.Found(*stream.sort_by_unit(values[:, :k], units), certain, found.aligned, found.residual, everything)
        fat = tuple(run for run in arranged.runs if run[0] == FAT)
        if form is kernel or not fat:
            return best
        read, bounds = _reader(hidden, arranged, soft_cap, temperature), bounds and tuple(x[:, 0] for x in bounds)
        rest = stream.search(read, hidden.shape[0], dataclasses.replace(arranged, runs=fat), k, bounds, False)
        return _merge(best, rest, bounds is not None)

    bounds = None if between is None else tuple(x[:, None] for x in between)
    parts = jax.tree.map(lambda x: _cut(x, together), (hidden, bounds))
    found = lax.map(some, parts) if parts[0].shape[0] > 1 else jax.tree.map(lambda x: x[None], some(jax.tree.map(lambda x: x[0], parts)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], found)


def _merge(a: stream.Found, b: stream.Found, sliced: bool) -> stream.Found:
    """The best of two searches over blocks that share no unit."""
    values, units = (jnp.concatenate(pair, axis=1) for pair in ((a.values, b.values), (a.units, b.units)))
    values, units = stream.sort_by_unit(values, units)
    aligned, residual = jnp.logaddexp(a.aligned, b.aligned), jnp.logaddexp(a.residual, b.residual)
    everything = jnp.logaddexp(a.everything, b.everything) if sliced else jnp.logaddexp(aligned, residual)
    k = a.values.shape[1]
    return stream.Found(values[:, :k], units[:, :k], a.certain & b.certain, aligned, residual, everything)


def _cut(x: jax.Array, size: int) -> jax.Array:
    """[N, ...] -> [ceil(N / size), size, ...], padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def _certified(found: stream.Found, search, arrays, tokens: int) -> Aligned:
    """``found`` with its doubtful rows computed again, AGAIN at a time; usually there are none, and no step is taken."""
    size = min(AGAIN, tokens)
    doubtful = jnp.sum(jnp.logical_not(found.certain).astype(jnp.int32))
    order = jnp.argsort(found.certain, stable=True)
    order = jnp.concatenate([order, jnp.full((-tokens % size,), tokens, order.dtype)])  # one past the end: reads 0, writes nothing

    def step(state):
        index, values, units = state
        rows = lax.dynamic_slice_in_dim(order, index * size, size)
        again = search(True, *jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), arrays))
        return index + 1, *(old.at[rows].set(new, mode="drop") for old, new in ((values, again.values), (units, again.units)))

    state = (jnp.int32(0), found.values, found.units)
    values, units = lax.while_loop(lambda state: state[0] * size < doubtful, step, state)[1:]
    logsumexp = jnp.logaddexp(found.aligned, found.residual)
    sliced = arrays[1] is not None
    return Aligned(values, units, found.residual, logsumexp, found.everything if sliced else logsumexp, doubtful)
