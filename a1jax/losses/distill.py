"""On-policy distillation by salient vocabulary alignment (SVA), of a teacher with the student's tokenizer or with another one.

At every token the student wrote, S is the teacher's k best ids; with another tokenizer its k best *units*, each a sum over ids of the
student (``members``), and the written token with what begins with it where that is no unit (``alone``). Both distributions are
renormalised on S and compared there (arXiv 2606.30616, sections 2.3 and 4.3): the student's log-sum-exp cancels, so value and gradient
need k rows of its output matrix instead of V. The loss is blind to mass outside S: a student may write, nearly always, what its teacher
never would, and pay nothing. Hence the coverage (student mass on S), reported unless refused, and ``tail_below``.

    salient  renormalised on S: the paper. Never negative. Zero only if both agree on S.
    tail     one more class holds the rest on both sides: sees mass outside S, costs the student's log-sum-exp and its gradient.
    full     the whole vocabulary (k = V): ``distill`` only, as it needs the teacher's hidden states and not its logits on S;
             of another tokenizer all units: ``full_aligned``.

A fourth form, ``sampled``, needs one number of the teacher per token; it lies in its own file.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from a1jax.kernels import vocab_align
from a1jax.kernels.vocab_align.members import Members
from a1jax.kernels.vocab_align.ops import SLAB
from a1jax.losses import divergence as divergences
from a1jax.losses.full_kl import full_divergence
from a1jax.sharding import platform
from a1jax.types import Metrics

Mode = Literal["salient", "tail", "full"]
Valid = jax.Array | np.ndarray | None

WIDE_SLAB = 1 << 26  # elements, 268 MB of float32: a loop over a few tokens at a time would leave a large device idle
ABSENT = -1e30  # the logit of a place in S that no id takes: probability 0, and unlike -inf no "0 times inf" in the gradient


class TeacherTargets(NamedTuple):
    """What a teacher says at N tokens. logits float32 [N, k] on the support, falling; support int32 [N, k] ids;
    logsumexp float32 [N] over its whole vocabulary. Small enough to keep while another teacher takes the device."""

    logits: jax.Array
    support: jax.Array
    logsumexp: jax.Array


def teacher_targets(hidden: jax.Array, unembed: jax.Array, k: int, block: int, valid: Valid = None) -> TeacherTargets:
    """The teacher's k best ids per token. hidden [N, D'], unembed [V, D'] of any width D'; valid [V] bool: ids that are tokens.

    No gradient. Raises ValueError when k exceeds the number of valid ids.
    """
    return TeacherTargets(*vocab_align.topk(hidden, unembed, k, block, valid))


def sva(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    teacher_logits: jax.Array,
    support: jax.Array,
    weights: jax.Array,
    *,
    teacher_logsumexp: jax.Array | None = None,
    mode: Mode = "salient",
    divergence: divergences.Divergence = "reverse",
    coverage: bool | jax.Array = True,
    tail_below: float = 0.0,
    block: int = 4096,
    slab: int | None = None,
    valid: Valid = None,
    members: Members | None = None,
    alone: jax.Array | np.ndarray | None = None,
) -> tuple[jax.Array, Metrics]:
    """sum over n of weights[n] * divergence[n], and metrics; gradient to the student's two arrays only.

    student_hidden [N, D]; student_unembed [V, D]; teacher_logits float32 [N, k] at support int32 [N, k] (distinct ids of a
    token; a logit of -inf marks a place no id takes); weights float32 [N] from ``masked.token_weights``.
    teacher_logsumexp [N]: mode "tail" and tail_below only. coverage: False saves the student's log-sum-exp in mode "salient", the only
    thing there that reads its whole output matrix; a traced bool scalar decides that at run time. block, valid: of that log-sum-exp.
    tail_below: in mode "salient", tokens with less coverage than this are compared as in mode "tail", at its cost; 0: none.
    slab: of ``gather_logits``, memory only; None: what suits the platform.

    members: with another tokenizer, from ``members.members``; support then holds units (-1: none), teacher_logits sums over their
    ids, and a teacher_logsumexp that is not given is 0: they are log-probabilities already. alone int32 [N], -1 for none: an id that is
    set apart from its unit as the class of the last place, see ``vocab_align.gather_units``. A token without any class adds 0.

    With p, q the renormalised probabilities, the reverse KL's gradient to the student's logit of u in S is
    weight * p_u * (log p_u - log q_u - KL), and zero outside S (vocabulary_alignment.md, section 3).

    Metrics over tokens with a weight (plain means): distill/kl, distill/teacher_entropy (of q: in nats, on the classes
    compared), distill/coverage (student's un-renormalised mass on S), distill/tokens (their number). Where coverage is traced,
    distill/coverage_tokens is the number of tokens it was measured on, 0 where it was not, and distill/coverage is then 0. With
    tail_below also distill/tail, the share of tokens that are compared with the rest.
    Raises ValueError for an unknown mode or divergence, mode "tail" without teacher_logsumexp, alone without members, a tail_below that
    is no share, and shapes that do not match.
    """
    if members is not None and teacher_logsumexp is None:
        teacher_logsumexp = jnp.zeros(student_hidden.shape[:1], jnp.float32)
    if alone is not None and (members is None or alone.shape != weights.shape):
        raise ValueError(f"alone {alone.shape} needs members, and must be {weights.shape} as weights")
    _check(teacher_logits, support, weights, student_hidden, mode, teacher_logsumexp, tail_below)
    slab = slab or (SLAB if platform() == "cpu" else WIDE_SLAB)
    term = divergences.term(divergence)
    teacher_logits = lax.stop_gradient(teacher_logits.astype(jnp.float32))
    present = jnp.logical_not(jnp.isneginf(teacher_logits))
    teacher = jnp.where(present, teacher_logits, ABSENT)
    if members is None:
        student = vocab_align.gather_logits(student_hidden, student_unembed, jnp.where(present, support, 0), slab)
        student = jnp.where(present, student, ABSENT)
    else:
        units = jnp.where(present, support, -1)
        student = vocab_align.gather_units(student_hidden, student_unembed, units, members, alone, slab)
        student = jnp.where(present & jnp.logical_not(jnp.isneginf(student)), student, ABSENT)  # a NaN stays one
    on_support = jax.nn.logsumexp(student, axis=1)
    static = isinstance(coverage, bool | np.bool_)
    tails = mode == "tail" or tail_below > 0
    if tails or (static and coverage):
        arrays = (student_hidden, student_unembed) if tails else lax.stop_gradient((student_hidden, student_unembed))
        everything = vocab_align.logsumexp(*arrays, block, valid)
    elif not static:
        arrays = lax.stop_gradient((student_hidden, student_unembed))
        nothing = jnp.zeros(weights.shape, jnp.float32)
        everything = lax.cond(coverage, lambda *a: vocab_align.logsumexp(*a, block, valid), lambda *a: nothing, *arrays)

    def compare(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(term(ours, theirs), axis=1), -jnp.sum(jnp.exp(theirs) * theirs, axis=1)

    if mode == "salient":
        value, entropy = compare(student - on_support[:, None], jax.nn.log_softmax(teacher, axis=1))
    if tails:
        rest = _with_rest(teacher, jax.nn.logsumexp(teacher, axis=1), lax.stop_gradient(teacher_logsumexp))
        wide = compare(_with_rest(student, on_support, everything), rest)
    extra = {}
    if mode == "tail":
        value, entropy = wide
    elif tails:
        low = (lax.stop_gradient(on_support - everything) < jnp.log(tail_below)) & jnp.any(present, axis=1)
        value, entropy = jnp.where(low, wide[0], value), jnp.where(low, wide[1], entropy)
        extra["tail"] = low.astype(jnp.float32)
    if members is not None:
        some = jnp.any(present, axis=1)
        value, entropy = jnp.where(some, value, 0), jnp.where(some, entropy, 0)
    if static:
        extra |= {"coverage": jnp.exp(on_support - everything)} if coverage else {}
        return reduce(value, weights, teacher_entropy=entropy, **extra)
    extra["coverage"] = jnp.where(coverage, jnp.exp(on_support - everything), 0)
    total, metrics = reduce(value, weights, teacher_entropy=entropy, **extra)
    return total, {**metrics, "distill/coverage_tokens": jnp.where(coverage, metrics["distill/tokens"], 0)}


def distill(
    student_hidden: jax.Array,
    student_unembed: jax.Array,
    teacher_hidden: jax.Array,
    teacher_unembed: jax.Array,
    weights: jax.Array,
    *,
    k: int = 128,
    mode: Mode = "salient",
    divergence: divergences.Divergence = "reverse",
    coverage: bool = True,
    tail_below: float = 0.0,
    block: int = 4096,
    slab: int | None = None,
    valid: Valid = None,
) -> tuple[jax.Array, Metrics]:
    """``teacher_targets`` and ``sva`` in one, and the only way to mode "full"; arguments and errors are theirs.

    teacher_hidden [N, D'] and teacher_unembed [V, D'] may have another width than the student's. In mode "full" k and
    coverage are not read (all of V is covered) and there is no metric distill/coverage.
    """
    if mode == "full":
        arrays = (student_hidden, student_unembed, teacher_hidden, teacher_unembed)
        value, entropy = full_divergence(*arrays, block, divergence, valid)
        return reduce(value, weights, teacher_entropy=entropy)
    targets = teacher_targets(teacher_hidden, teacher_unembed, k, block, valid)
    return sva(
        student_hidden, student_unembed, targets.logits, targets.support, weights, teacher_logsumexp=targets.logsumexp,
        mode=mode, divergence=divergence, coverage=coverage, tail_below=tail_below, block=block, slab=slab, valid=valid,
    )  # fmt: skip


def _check(teacher_logits, support, weights, student_hidden, mode, teacher_logsumexp, tail_below) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}, choose one of {', '.join(get_args(Mode))}")
    if mode == "full":
        raise ValueError("mode 'full' compares all of the vocabulary: call distill with the teacher's hidden states")
    if not 0 <= tail_below <= 1 or (tail_below and mode != "salient"):
        raise ValueError(f"tail_below is {tail_below} in mode {mode!r}: it is a share, from 0 to 1, and belongs to mode 'salient'")
    if (mode == "tail" or tail_below) and teacher_logsumexp is None:
        raise ValueError("mode 'tail' and tail_below need teacher_logsumexp, the third part of teacher_targets")
    tokens = student_hidden.shape[0]
    if teacher_logits.shape != support.shape or support.shape[0] != tokens or weights.shape != (tokens,):
        raise ValueError(
            f"teacher_logits {teacher_logits.shape}, support {support.shape} and weights {weights.shape} "
            f"must be [{tokens}, k], [{tokens}, k] and [{tokens}]"
        )


def _with_rest(logits: jax.Array, on_support: jax.Array, everything: jax.Array) -> jax.Array:
    """[N, k + 1] log-probabilities: un-renormalised on S, then what S leaves over."""
    rest = divergences.log_rest(on_support - everything)
    return jnp.concatenate([logits - everything[:, None], rest[:, None]], axis=1)


def reduce(value: jax.Array, weights: jax.Array, **per_token: jax.Array) -> tuple[jax.Array, Metrics]:
    """The weighted sum, and plain means over the tokens that have a weight."""
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    counts = weights != 0
    count = jnp.sum(counts.astype(jnp.float32))
    some = jnp.maximum(count, 1.0)
    means = {f"distill/{name}": jnp.sum(jnp.where(counts, x, 0.0)) / some for name, x in {"kl": value, **per_token}.items()}
    return jnp.sum(weights * value), {**lax.stop_gradient(means), "distill/tokens": count}
