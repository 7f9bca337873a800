"""A divergence over everything that a student and a teacher of another tokenizer can be compared in: mode "full" across tokenizers.

Classes of a token, as ``align.target`` and its ``fold`` say: the units that the teacher can reach there; what is set apart where the
written token is no unit; and one rest, that of mode "tail" with k = all units: the teacher's residual against the student's mass on all
other ids. It is summed and not subtracted, and less than 2^-24 (``divergences.LEAST_REST``) counts as that on either side: empty on both
it adds 0. So where nothing is in the rest this is mode "salient" with all units, and of one tokenizer it is ``full_kl``.

Both output matrices are walked in blocks of the same units (``kernels.vocab_align.unit_walk``), twice forwards and once backwards, so no
array is [tokens, ids] of either side. The yardstick of the truncated forms (arXiv 2606.30616, section 2.3, has k ids), and slow.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from a1jax.kernels.vocab_align import blocks, logsumexp
from a1jax.kernels.vocab_align.unit_walk import Read, Walk
from a1jax.losses import divergence as divergences
from a1jax.losses import unit_sums
from a1jax.losses.distill import ABSENT


def aligned_divergence(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    teacher_hidden: jax.Array,
    teacher_unembed: jax.Array,
    walk: Walk,
    read: Read,
    *,
    divergence: divergences.Divergence = "reverse",
    block: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """(divergence [N], teacher entropy [N] over the classes), float32; gradient to the student's two arrays only.

    student_hidden [N, D], student_unembed [V, D]; teacher_hidden [N, D']: the rows that predict the teacher's token in which each token
    starts; teacher_unembed [V_T, D']. walk, read [N]: ``align.whole``; all N tokens are of the same walk. block: ids of the student's
    log-sum-exp. Rows that hold -inf are no tokens. A token that may read nothing, or whose rows the teacher all rules out, adds 0.
    Where a chain takes all that a unit has, 2^-24 of it stays, as in ``vocab_align.aligned_targets``.

    Memory: a few times N * (B + B') floats, and one float32 gradient of student_unembed.
    Raises ValueError for an unknown divergence and for shapes that do not belong together.
    """
    divergences.term(divergence)
    tokens = student_hidden.shape[:1]
    wrong = {name: x.shape for name, x in read._asdict().items() if x.shape != tokens}
    if wrong or teacher_hidden.shape[:1] != tokens:
        raise ValueError(f"read {wrong} and teacher_hidden {teacher_hidden.shape} must have {tokens[0]} tokens, as student_hidden")
    if walk.valid.shape[0] != student_unembed.shape[0]:
        raise ValueError(f"the walk is of {walk.valid.shape[0]} student ids, and the output matrix has {student_unembed.shape[0]} rows")
    walk, read = jax.tree.map(jnp.asarray, (walk, read))
    arrays = student_hidden, student_unembed, *lax.stop_gradient((teacher_hidden, teacher_unembed)), walk, read
    value, entropy = _divergence(*arrays, divergence, block)
    return value, lax.stop_gradient(entropy)


def batch_divergence(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    teacher_hidden: jax.Array,
    teacher_unembed: jax.Array,
    walks: tuple[Walk, Walk],
    whole: Read,
    inside: Read,
    index: jax.Array,
    *,
    divergence: divergences.Divergence = "reverse",
    block: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """The same for a batch of R rows of T tokens, of both walks: (divergence [R, T], teacher entropy [R, T]).

    student_hidden [R, T, D], teacher_hidden [R, T, D']; walks: of whole tokens, and of what is left of them; whole [R, T]: what tokens
    read that begin with one of the teacher's; inside [R, S]: what those read that begin inside of one, and index [R, S] which those are, T
    for none. Few do, so they are compared apart. Errors as of ``aligned_divergence``.
    """
    rows, length = student_hidden.shape[:2]
    at = jnp.minimum(index, length - 1)[:, :, None]

    def flat(x):
        return x.reshape(-1, *x.shape[2:])

    def compare(ours, theirs, walk, read):
        arrays = flat(ours), student_unembed, flat(theirs), teacher_unembed, walk, jax.tree.map(flat, read)
        return (x.reshape(ours.shape[:2]) for x in aligned_divergence(*arrays, divergence=divergence, block=block))

    found = compare(student_hidden, teacher_hidden, walks[0], whole)
    picked = (jnp.take_along_axis(x, at, axis=1) for x in (student_hidden, teacher_hidden))
    more = compare(*picked, walks[1], inside)
    line = jnp.arange(rows)[:, None]
    return tuple(x.at[line, index].add(y, mode="drop") for x, y in zip(found, more, strict=True))


def _classes(teacher, units, read):
    """Log-probabilities [N, L] of a block's units with the chain's mass moved, and whether each is a class."""
    named, score = (units >= 0)[None, :], read.score[:, None]
    moves = (read.chained > 0)[:, None]
    taken = moves & named & (units[None, :] == read.source[:, None])
    teacher = jnp.where(taken, teacher + divergences.log_rest(score - teacher), teacher)
    given = moves & named & (units[None, :] == read.unit[:, None])
    teacher = jnp.where(given, jnp.logaddexp(teacher, score), teacher)
    return teacher, named & ~jnp.isneginf(teacher)


def _terms(term, student, teacher, counts):
    """Of classes that count, 0 elsewhere: terms, their slopes in the student's log-probability, terms of the teacher's entropy."""
    student = jnp.where(counts, jnp.where(jnp.isneginf(student), ABSENT, student), 0)  # so that nothing infinite reaches a slope
    teacher = jnp.where(counts, teacher, 0)
    value, slope = jax.vjp(lambda x: term(x, teacher), student)
    return tuple(jnp.where(counts, x, 0) for x in (value, slope(jnp.ones_like(value))[0], -jnp.exp(teacher) * teacher))


def _forward(student_hidden, student_unembed, teacher_hidden, teacher_unembed, walk, read, divergence, block):
    term = divergences.term(divergence)
    total, apart, fat_theirs = unit_sums.teacher(teacher_hidden, teacher_unembed, walk, read)
    silent = jnp.isneginf(total)  # a teacher that rules out what is written says nothing about how it goes on
    total = jnp.where(silent, 0, total)
    moves = (read.chained > 0) & ~jnp.isneginf(read.score) & ~silent
    alone = (read.alone >= 0) & (moves | ~jnp.isneginf(apart))
    read = read._replace(
        chained=(moves & (alone | (read.source != read.unit))).astype(jnp.int32), alone=jnp.where(alone, read.alone, -1),
        unit=jnp.where(alone, -1, read.unit),
    )  # fmt: skip
    everything = logsumexp(student_hidden, student_unembed, block, walk.valid)

    def fat(state, part):
        mass, own = state
        of, rows = part
        logits, _, between = unit_sums.ours(student_hidden, student_unembed, walk, read, rows)
        stay, away = unit_sums.split(logits, between & unit_sums.leaves(read, walk.fat_units[of][None]))
        return (unit_sums.add(mass, stay, of), blocks.add_logsumexp(own, away)), None

    fat_ours, own = unit_sums.nothing(student_hidden, walk), blocks.start_logsumexp(total.shape[0])
    if walk.fat_of.shape[0]:
        fat_ours, own = lax.scan(fat, (fat_ours, own), (walk.fat_of, walk.fat_ours))[0]

    def add(sums, student, teacher, units):
        teacher, counts = _classes(teacher - total[:, None], units, read)
        student = student - everything[:, None]
        rests = jnp.where(counts, 0, jnp.exp(student)), jnp.where((units >= 0)[None, :], 0, jnp.exp(teacher))
        parts = (*_terms(term, student, teacher, counts), *rests)
        return tuple(x + jnp.sum(y, axis=1) for x, y in zip(sums, parts, strict=True))

    def thin(state, part):
        sums, own = state
        units, rows, place, their_rows, their_place, keys = part
        logits, _, between = unit_sums.ours(student_hidden, student_unembed, walk, read, rows)
        stay, away = unit_sums.split(logits, between & unit_sums.leaves(read, units[place]))
        teacher, their_apart = unit_sums.theirs(teacher_hidden, teacher_unembed, read, their_rows, keys)
        teacher, _ = unit_sums.split(teacher, their_apart & unit_sums.leaves(read, units[their_place]))
        sums = add(sums, unit_sums.join(stay, place, units.size), unit_sums.join(teacher, their_place, units.size), units)
        return (sums, blocks.add_logsumexp(own, away)), None

    sums = add((jnp.zeros(total.shape, jnp.float32),) * 5, fat_ours, fat_theirs, walk.fat_units)
    parts = (walk.units, walk.ours, walk.our_place, walk.theirs, walk.their_place, walk.keys)
    (value, slopes, entropy, our_rest, their_rest), own = lax.scan(thin, (sums, own), parts)[0]
    own = blocks.finish_logsumexp(own) - everything

    amount = jnp.where(read.chained > 0, jnp.exp(read.score), 0)
    their_rest = their_rest - jnp.where(read.source < 0, amount, 0) + jnp.where((read.unit < 0) & ~alone, amount, 0)
    least = divergences.LEAST_REST
    rests = (jnp.log(jnp.maximum(x, least)) for x in (our_rest, their_rest))
    rest = _terms(term, *rests, jnp.ones(alone.shape, bool))
    set_apart = jnp.logaddexp(apart - total, jnp.where(read.chained > 0, read.score, -jnp.inf))
    lone = _terms(term, own, set_apart, alone)
    of_rest = jnp.where(our_rest > least, rest[1], 0)  # a rest that is raised to the least has no slope
    slopes = slopes + of_rest + lone[1]
    value, entropy = (jnp.where(silent, 0, x + rest[i] + lone[i]) for x, i in ((value, 0), (entropy, 2)))
    saved = (read, silent, total, everything, slopes, of_rest / jnp.maximum(our_rest, least), own, lone[1], fat_ours, fat_theirs)
    return (value, entropy), saved


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _divergence(student_hidden, student_unembed, teacher_hidden, teacher_unembed, walk, read, divergence, block):
    return _forward(student_hidden, student_unembed, teacher_hidden, teacher_unembed, walk, read, divergence, block)[0]


def _divergence_forward(student_hidden, student_unembed, teacher_hidden, teacher_unembed, walk, read, divergence, block):
    arrays = (student_hidden, student_unembed, teacher_hidden, teacher_unembed, walk)
    found, saved = _forward(*arrays, read, divergence, block)
    return found, (*arrays, saved)


def _divergence_backward(divergence, block, saved, cotangents):
    student_hidden, student_unembed, teacher_hidden, teacher_unembed, walk, sums = saved
    read, silent, total, everything, slopes, rest, own, lone, fat_ours, fat_theirs = sums
    term = divergences.term(divergence)
    cotangent = jnp.where(silent, 0, cotangents[0])[:, None]
    slopes, rest, lone, own = (x[:, None] for x in (slopes, rest, lone, own))

    def classes(student, teacher, units):
        """Student's log-probabilities of a block's units, slopes, and which units count."""
        teacher, counts = _classes(teacher - total[:, None], units, read)
        student = student - everything[:, None]
        return student, _terms(term, student, teacher, counts)[1], counts

    def add(gradients, rows, place, units, of_block):
        """One block's part. An id's share in its class is p / (the class's), and every class feels the sum of all slopes through p."""
        d_hidden, d_unembed = gradients
        logits, matrix, between = unit_sums.ours(student_hidden, student_unembed, walk, read, rows)
        student, slope, counts = (x[:, place] for x in of_block)
        apart = between & unit_sums.leaves(read, units[place])
        logp = logits - everything[:, None]
        share = jnp.where(apart, logp - own, jnp.where(counts, logp - student, logp))
        share = jnp.where(jnp.isneginf(logits), 0, jnp.exp(share))
        grad = jnp.where(apart, lone, jnp.where(counts, slope, rest)) * share - slopes * jnp.exp(logp)
        grad = jnp.where(cotangent == 0, 0, cotangent * grad)
        d_rows = lax.dot_general(grad, student_hidden.astype(jnp.float32), (((0,), (0,)), ((), ())))
        d_hidden = d_hidden + grad @ matrix.astype(jnp.float32)
        rows = jnp.where(rows < 0, student_unembed.shape[0], rows)
        return d_hidden, d_unembed.at[rows].add(d_rows, mode="drop")

    def thin(gradients, part):
        units, rows, place, their_rows, their_place, keys = part
        logits, _, between = unit_sums.ours(student_hidden, student_unembed, walk, read, rows)
        stay, _ = unit_sums.split(logits, between & unit_sums.leaves(read, units[place]))
        teacher, their_apart = unit_sums.theirs(teacher_hidden, teacher_unembed, read, their_rows, keys)
        teacher, _ = unit_sums.split(teacher, their_apart & unit_sums.leaves(read, units[their_place]))
        of_block = classes(unit_sums.join(stay, place, units.size), unit_sums.join(teacher, their_place, units.size), units)
        return add(gradients, rows, place, units, of_block), None

    def fat(gradients, part):
        of, rows = part
        of_block = tuple(x[:, of][:, None] for x in of_fat)
        return add(gradients, rows, jnp.zeros(rows.shape, jnp.int32), walk.fat_units[of][None], of_block), None

    gradients = blocks.zero_gradients(student_hidden, student_unembed)
    if walk.fat_of.shape[0]:
        of_fat = classes(fat_ours, fat_theirs, walk.fat_units)
        gradients = lax.scan(fat, gradients, (walk.fat_of, walk.fat_ours))[0]
    parts = (walk.units, walk.ours, walk.our_place, walk.theirs, walk.their_place, walk.keys)
    d_hidden, d_unembed = lax.scan(thin, gradients, parts)[0]
    return d_hidden.astype(student_hidden.dtype), d_unembed.astype(student_unembed.dtype), None, None, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)
