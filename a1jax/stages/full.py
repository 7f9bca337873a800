"""Mode "full" in stage 3: the student against all that its teachers say, of its own tokenizer and of others.

A teacher's logits over a vocabulary are too many to keep beside a batch, its hidden states are not: they are what is scored, and the
step multiplies both sides' output matrices block by block. The teachers' matrices come into the step as frozen arguments. Rows stand
domain by domain in every micro-batch, so that each is compared with its own teacher's matrix and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ..align import whole
from ..align.vocab_map import VocabMap
from ..config import ConfigError
from ..kernels.vocab_align.targets import Positions, Targets
from ..losses import distill as distill_loss
from ..losses.divergence import Divergence
from ..losses.full_aligned import batch_divergence
from ..losses.full_kl import full_divergence
from ..models import transformer
from ..models.config import ModelConfig
from ..sharding import flatten_tokens, unflatten_tokens
from ..types import Batch, Metrics, Params

if TYPE_CHECKING:  # scoring reads this module
    from .scoring import Teacher

Frozen = list[dict[str, Any]]
"""Per domain: "unembed" [V_T, D'], and "walks" (``align.whole.walks``) of a teacher of another tokenizer."""


def check(teachers: dict[str, Teacher], on_mesh: bool) -> None:
    """Raises ConfigError for a teacher of another tokenizer under a mesh."""
    for domain, teacher in teachers.items():
        if on_mesh and teacher.vocab_map is not None:
            raise ConfigError(
                f"distill: the teacher of {domain} has another tokenizer, which mode full compares on one device only: set mesh.shape={{}}"
            )


def frozen(teachers: Sequence[Teacher], block: int) -> Frozen:
    """What the step needs of the teachers, in the order of the domains; block: rows of both sides at a time."""
    made, walks = [], {}
    for teacher in teachers:
        own = {"unembed": transformer.unembed(teacher.params, teacher.model)}
        if teacher.vocab_map is not None:
            key = (teacher.vocab_map.mode, teacher.vocab_map.student_hash, teacher.vocab_map.teacher_hash)
            if key not in walks:
                walks[key] = jax.tree.map(jnp.asarray, whole.walks(teacher.vocab_map, max(block // 2, 1)))
            own["walks"] = walks[key]
        made.append(own)
    return made


def native(teacher: Params, batch: Batch, model: ModelConfig) -> dict[str, jax.Array]:
    """The scores of a teacher of the student's tokenizer: "hidden" [B, T, D']."""
    return {"hidden": transformer.apply(teacher, batch.tokens, batch.positions, batch.segment_ids, model)[0]}


def aligned(at: Positions, vocab_map: VocabMap, hidden: jax.Array, found: Targets, rows: int, length: int) -> dict[str, Any]:
    """Those of another tokenizer's: "hidden" [B, T, D'], what is read of it, "whole" and "inside", and "index", see ``whole.Reads``.

    hidden [NT, D']: the teacher's own rows; found: targets at ``at``, of which only the scores are read."""
    reads = whole.reads(at, vocab_map, rows, length)
    complete, inside = reads.with_score(found.score.reshape(rows, length))
    return {"hidden": hidden[reads.teacher_row], "whole": complete, "inside": inside, "index": reads.index}


def together(batches: Sequence[Batch], microbatches: int) -> Batch:
    """The batches of all domains as one, in such an order of rows that every micro-batch has its share of each, domain by domain."""

    def join(*parts: jax.Array) -> jax.Array:
        cut = [x.reshape(microbatches, -1, *x.shape[1:]) for x in parts]
        joined = jnp.concatenate(cut, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *batches)


def loss(
    hidden: jax.Array,
    unembed: jax.Array,
    scores: Sequence[dict[str, Any]],
    frozen: Frozen,
    weights: jax.Array,
    divergence: Divergence,
    block: int,
) -> tuple[jax.Array, Metrics]:
    """(sum of weights * divergence, metrics as of ``losses.distill``, no coverage: everything is covered).

    hidden [B, T, D] and weights [B, T] of a micro-batch, in the order of ``together``; scores: per domain, [B / domains, T, ...] each."""
    values, count = [], hidden.shape[0] // len(scores)
    for index, (said, teacher) in enumerate(zip(scores, frozen, strict=True)):
        own = hidden[index * count : (index + 1) * count]
        if "walks" in teacher:
            arrays = own, unembed, said["hidden"], teacher["unembed"], teacher["walks"], said["whole"], said["inside"], said["index"]
            values.append(batch_divergence(*arrays, divergence=divergence, block=block))
        else:
            arrays = flatten_tokens(own), unembed, flatten_tokens(said["hidden"]), teacher["unembed"]
            found = full_divergence(*arrays, block, divergence)
            values.append(tuple(unflatten_tokens(x, *own.shape[:2]) for x in found))
    value, entropy = (flatten_tokens(jnp.concatenate(parts)) for parts in zip(*values, strict=True))
    return distill_loss.reduce(value, flatten_tokens(weights), teacher_entropy=entropy)
