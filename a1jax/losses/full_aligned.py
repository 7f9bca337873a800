"""A divergence over everything that two models with different tokenizers can be compared in: mode "full" across tokenizers.

The yardstick of the truncated forms over units. Classes at a position: the units that the teacher can reach there, the token written
where it is compared on its own, and one rest that holds the teacher's residual and the student's mass on all other ids. Both vocabularies
are walked in blocks of the same units, so no array is [N, V]. Slow: every block is multiplied once forwards and twice in the gradient.

Letters: N tokens that start at the same offset d into a teacher token, V and V_T rows of the student's and the teacher's output matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a1jax.kernels import vocab_align
from a1jax.kernels.vocab_align import blocks
from a1jax.losses import divergence as divergences
from a1jax.losses.distill import ABSENT, reduce
from a1jax.types import Metrics

LARGEST = float(jnp.finfo(jnp.float32).max)


class Plan(NamedTuple):
    """Blocks of units and the rows of both output matrices that belong to them; int32 arrays, made by ``plan`` for one offset.

    units [blocks, L]: the unit in each place of a block, -1: none, whose rows are the rest. ours [blocks, B], theirs [blocks, B']:
    rows, -1 for none; our_place, their_place: the place of each row's unit. rank [blocks, B']: of their rows. valid bool [V]: the
    student's tokens.
    """

    units: np.ndarray
    ours: np.ndarray
    our_place: np.ndarray
    theirs: np.ndarray
    their_place: np.ndarray
    rank: np.ndarray
    valid: np.ndarray


class Chain(NamedTuple):
    """Where the mass of several teacher tokens that spell one token of the student moves, [N] each, as in ``align.positions``.

    score float32: the log of it, at all chained tokens. source int32: the unit it leaves; unit, alone int32: the unit it goes to, or
    the token that is a class of its own. -1 for none: out of the residual, or into it; in all three: not chained.
    """

    score: jax.Array | np.ndarray
    source: jax.Array | np.ndarray
    unit: jax.Array | np.ndarray
    alone: jax.Array | np.ndarray


def plan(
    unit_of_student: np.ndarray,
    unit_of_teacher: np.ndarray,
    rank: np.ndarray,
    student_valid: np.ndarray,
    teacher_valid: np.ndarray,
    block: int = 2048,
) -> Plan:
    """The blocks of one offset d. On the host, a fraction of a second; once per teacher and offset.

    unit_of_student int [V]: the fold; unit_of_teacher int [V_T]: the unit that each teacher id stands for from its byte d on; -1: none.
    rank int [V_T]: the place of each teacher id in the map's order. block: rows of either side, unless one unit has more.
    Raises ValueError for shapes that do not belong together.
    """
    fold, unit = (np.where(valid, x, -2) for x, valid in ((unit_of_student, student_valid), (unit_of_teacher, teacher_valid)))
    if fold.ndim != 1 or unit.ndim != 1 or rank.shape != unit.shape or block < 1:
        raise ValueError(f"unit_of_student {fold.shape}, unit_of_teacher {unit.shape} and rank {rank.shape} must be [V], [V_T] and [V_T]; "
                         f"block is {block}")  # fmt: skip
    mine, yours = (np.argsort(x, kind="stable")[np.count_nonzero(x == -2) :] for x in (fold, unit))
    # Pieces of whole units, or of the rows of none: (unit, rows of ours, rows of theirs).
    names = np.union1d(fold[mine], unit[yours])
    counts = [np.searchsorted(x[rows], names, "right") - np.searchsorted(x[rows], names) for x, rows in ((fold, mine), (unit, yours))]
    pieces = [(int(u), int(a), int(b)) for u, a, b in zip(names, *counts, strict=True)]
    if pieces and pieces[0][0] == -1:
        _, a, b = pieces.pop(0)
        parts = range(max(-(-a // block), -(-b // block)))
        pieces = [(-1, min(block, max(a - i * block, 0)), min(block, max(b - i * block, 0))) for i in parts] + pieces
    (place, block_of), sizes, number = np.zeros((2, len(pieces)), np.int64), np.zeros(3, np.int64), 0
    for i, (_, a, b) in enumerate(pieces):
        if sizes[0] and (sizes + (1, a, b) > block).any():
            number, sizes = number + 1, np.zeros(3, np.int64)
        block_of[i], place[i] = number, sizes[0]
        sizes += (1, a, b)
    table = np.full((number + 1, int(place.max(initial=0)) + 1), -1, np.int32)
    table[block_of, place] = [u for u, *_ in pieces]
    ours, our_place = _rows(mine, np.array([a for _, a, _ in pieces], np.int64), block_of, place, number + 1)
    theirs, their_place = _rows(yours, np.array([b for *_, b in pieces], np.int64), block_of, place, number + 1)
    ranks = np.where(theirs >= 0, rank[np.maximum(theirs, 0)], -1).astype(np.int32)
    return Plan(table, ours, our_place, theirs, their_place, ranks, np.asarray(student_valid, bool))


def _rows(rows, counts, block_of, place, blocks_):
    """([blocks, B] rows, [blocks, B] the place of each) of rows in order of their pieces."""
    start = np.concatenate([[0], np.cumsum(np.bincount(block_of, counts, blocks_)).astype(np.int64)])
    of, width = np.repeat(block_of, counts), int(np.diff(start).max(initial=1))
    made = np.full((2, blocks_, max(width, 1)), -1, np.int32)
    made[0, of, np.arange(rows.size) - start[of]] = rows
    made[1, of, np.arange(rows.size) - start[of]] = np.repeat(place, counts)
    return made[0], np.where(made[0] < 0, int(place.max(initial=0)), made[1])  # rising, so that sums over places need no order


def full_aligned(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    teacher_hidden: jax.Array,
    teacher_unembed: jax.Array,
    weights: jax.Array,
    plan: Plan,
    low: jax.Array | np.ndarray,
    high: jax.Array | np.ndarray,
    chain: Chain,
    *,
    divergence: divergences.Divergence = "reverse",
    block: int = 4096,
) -> tuple[jax.Array, Metrics]:
    """sum over n of weights[n] * divergence[n], and metrics; gradient to the student's two arrays only.

    student_hidden [N, D], student_unembed [V, D]; teacher_hidden [N, D']: the rows that predict the teacher token in which each token
    starts, teacher_unembed [V_T, D']; weights float32 [N]. low, high int32 [N]: the teacher ids with low <= rank < high are possible.
    An empty rest counts 2^-24 (``divergences.LEAST_REST``) on the side where it is empty; so does a unit that a chain took all of,
    relative to what it had. Where the teacher rules out its whole slice everything is rest on both sides, and the divergence 0.

    Memory: a few times N * B floats, and a copy of the student's output matrix. Metrics as of ``distill`` in mode "full".
    """
    divergences.term(divergence)
    tokens = student_hidden.shape[:1]
    given = {"weights": weights, "low": low, "high": high, **chain._asdict()}
    if {x.shape for x in given.values()} != {tokens} or teacher_hidden.shape[:1] != tokens:
        raise ValueError(f"{', '.join(f'{n} {x.shape}' for n, x in given.items())}, teacher_hidden {teacher_hidden.shape}: "
                         f"all must be {tokens} long, as student_hidden")  # fmt: skip
    if plan.valid.shape[0] != student_unembed.shape[0]:
        raise ValueError(f"the plan is of {plan.valid.shape[0]} student ids, and the output matrix has {student_unembed.shape[0]} rows")
    teacher_hidden, teacher_unembed = lax.stop_gradient((teacher_hidden, teacher_unembed))
    value, entropy = _divergence(
        student_hidden, student_unembed, teacher_hidden, teacher_unembed, plan, low, high, chain, divergences.term(divergence), block
    )
    return reduce(value, weights, teacher_entropy=entropy)


def _divergence(student_hidden, student_unembed, teacher_hidden, teacher_unembed, plan, low, high, chain, term, block):
    score, source, unit, alone = (jnp.asarray(x)[:, None] for x in chain)
    moves = ((source >= 0) | (unit >= 0) | (alone >= 0)) & ~jnp.isneginf(score)
    alone = jnp.where(moves, alone, -1)
    plan = Plan(*(jnp.asarray(x) for x in plan))
    low, high = (jnp.asarray(x)[:, None] for x in (low, high))

    def theirs(rows, rank):
        """Log-masses of a block's teacher rows, -inf where they are not possible."""
        logits = blocks.product(teacher_hidden, teacher_unembed[jnp.maximum(rows, 0)])
        return jnp.where((rows >= 0)[None, :] & (rank[None, :] >= low) & (rank[None, :] < high), logits, -jnp.inf)

    def add(running, part):
        return blocks.add_logsumexp(running, theirs(*part)), None

    running = lax.scan(add, blocks.start_logsumexp(low.shape[0]), (plan.theirs, plan.rank))[0]
    total = blocks.finish_logsumexp(running)[:, None]
    silent = jnp.isneginf(total)  # a teacher that rules out what is written says nothing about how it goes on
    total = jnp.where(silent, 0, total)
    everything = vocab_align.logsumexp(student_hidden, student_unembed, block, plan.valid)[:, None]

    @jax.checkpoint
    def step(sums, part):
        """Adds a block's terms, student's and teacher's rest, and the teacher's entropy."""
        units, ours, matrix, our_place, their_rows, their_place, rank = part
        teacher = _join(theirs(their_rows, rank), their_place, units.size) - total
        logits = blocks.product(student_hidden, matrix)
        logits = jnp.where((ours >= 0)[None, :] & (ours[None, :] != alone), logits, -jnp.inf)
        student = _join(logits, our_place, units.size) - everything
        named = (units >= 0)[None, :]
        teacher = jnp.where(moves & named & (units[None, :] == source), teacher + divergences.log_rest(score - teacher), teacher)
        teacher = jnp.where(moves & named & (units[None, :] == unit), jnp.logaddexp(teacher, score), teacher)
        reached = named & (teacher > ABSENT / 2)
        terms, entropies = _terms(term, student, teacher, reached)
        rests = jnp.where(reached, 0, jnp.exp(student)), jnp.where(named, 0, jnp.exp(teacher))
        return tuple(total + jnp.sum(x, axis=1) for total, x in zip(sums, (terms, *rests, entropies), strict=True)), None

    matrices = student_unembed[jnp.maximum(plan.ours, 0)]  # one gather, so that the gradient is one scatter
    parts = (plan.units, plan.ours, matrices, plan.our_place, plan.theirs, plan.their_place, plan.rank)
    nothing = jnp.zeros(low.shape[:1], jnp.float32)
    value, our_rest, their_rest, entropy = lax.scan(step, (nothing,) * 4, parts)[0]

    amount = jnp.where(moves, jnp.exp(score), 0)[:, 0]
    out, back = (moves & (source < 0))[:, 0], (moves & (unit < 0) & (alone < 0))[:, 0]
    their_rest = their_rest - jnp.where(out, amount, 0) + jnp.where(back, amount, 0)
    rests = (jnp.log(jnp.maximum(x, divergences.LEAST_REST))[:, None] for x in (our_rest, their_rest))
    own = vocab_align.gather_logits(student_hidden, student_unembed, jnp.maximum(alone, 0)) - everything
    last = _terms(term, *rests, jnp.ones(alone.shape, bool)), _terms(term, own, score, alone >= 0)
    value, entropy = (jnp.where(silent[:, 0], 0, x + sum(y[i][:, 0] for y in last)) for i, x in enumerate((value, entropy)))
    return value, lax.stop_gradient(entropy)


def _terms(term, student, teacher, counts):
    """The divergence's terms of classes that count, 0 elsewhere, and the terms of the teacher's entropy."""
    student, teacher = jnp.where(counts, student, 0), jnp.where(counts, teacher, 0)  # so that nothing infinite reaches a gradient
    return jnp.where(counts, term(student, teacher), 0), jnp.where(counts, -jnp.exp(teacher) * teacher, 0)


def _join(logits, place, count):
    """[N, B] -> [N, count]: log-sum-exp of the columns of each place (rising), ABSENT where there is nothing."""
    over = {"segment_ids": place, "num_segments": count, "indices_are_sorted": True}
    most = lax.stop_gradient(jnp.maximum(jax.ops.segment_max(logits.T, **over), -LARGEST))
    total = jax.ops.segment_sum(jnp.exp(logits.T - most[place]), **over)
    some = total > 0
    return jnp.where(some, most + jnp.log(jnp.where(some, total, 1)), ABSENT).T
