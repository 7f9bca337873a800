"""Soft routing in stage 3: a run is scored by a mixture of all domains' teachers instead of that of its own domain alone.

Not the paper's, whose routing is hard; made to be compared with it. The mixture is of probabilities (``losses.mixture``), so every
teacher has to share the student's vocabulary. The others' weights are equal; with the own teacher's at 1 it is hard routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from ..config import ConfigError
from ..data.tokenizer import Tokenizer
from ..losses import mixture
from ..models import transformer
from ..models.config import ModelConfig
from ..sharding import flatten_tokens, unflatten_tokens
from ..types import Batch, Metrics, Params
from . import scoring
from .scoring import Placed, Scores, Teacher


def weights(own_weight: float, own: int, count: int) -> tuple[float, ...]:
    """Of ``count`` teachers: ``own_weight`` for the one of number ``own``, the rest in equal parts for the others."""
    if count == 1:
        return (1.0,)
    return tuple(own_weight if i == own else (1.0 - own_weight) / (count - 1) for i in range(count))


def best(
    teachers: Sequence[Params], batch: Batch, models: tuple[ModelConfig, ...], shares: tuple[float, ...], k: int, block: int
) -> Scores:
    """The mixture's k best ids at every position, as ``scoring.native`` says those of one teacher."""
    found = mixture.mixture_targets(*_states(teachers, batch, models), shares, k, block)
    names = {"support": found.support, "teacher_logits": found.logits, "teacher_logsumexp": found.logsumexp}
    return {name: unflatten_tokens(x, *batch.tokens.shape) for name, x in names.items()}


def written(teachers: Sequence[Params], batch: Batch, models: tuple[ModelConfig, ...], shares: tuple[float, ...], block: int) -> Scores:
    """The mixture's log-probability of every target, as ``scoring.written`` says that of one teacher."""
    states = _states(teachers, batch, models)
    return {"score": unflatten_tokens(mixture.mixture_score(*states, shares, flatten_tokens(batch.targets), block), *batch.tokens.shape)}


def _states(teachers, batch, models) -> tuple[list[jax.Array], list[jax.Array]]:
    """Hidden states [N, D_t] and output matrices [V, D_t] of every teacher."""
    hidden, unembed = [], []
    for params, model in zip(teachers, models, strict=True):
        states, _ = transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model)
        hidden.append(flatten_tokens(states))
        unembed.append(transformer.unembed(params, model))
    return hidden, unembed


def score_step(models: tuple[ModelConfig, ...], shares: tuple[float, ...], k: int, block: int, sampled: bool):
    """The jitted score(list of teachers' parameters, batch) -> Scores."""
    static = {"models": models, "shares": shares, "block": block}
    return scoring.jitted(written, **static) if sampled else scoring.jitted(best, k=k, **static)


class MixedScorer:
    """All teachers, ready to score the batches of one domain together; teachers without a weight are not run."""

    def __init__(self, teachers: Sequence[Teacher], shares: tuple[float, ...], k: int, block: int, sampled: bool):
        some = [(t, s) for t, s in zip(teachers, shares, strict=True) if s > 0]
        self.params = [t.params for t, _ in some]
        self.step = score_step(tuple(t.model for t, _ in some), tuple(s for _, s in some), k, block, sampled)

    def score(self, placed: Placed, batch: Batch) -> tuple[Batch, Scores, Metrics]:
        """As ``scoring.Scorer.score``; every position has a target."""
        return batch, self.step(self.params, batch), {}


def make_scorers(
    teachers: dict[str, Teacher], own_weight: float, student: Tokenizer, k: int, block: int, sampled: bool
) -> dict[str, MixedScorer]:
    """Domain -> scorer. Raises ConfigError for a teacher of another tokenizer than the student's."""
    for domain, teacher in teachers.items():
        if teacher.vocab_map is not None:
            raise ConfigError(
                f"distill.own_weight is {own_weight}, and the teacher of {domain} has another tokenizer than {student.path}: distributions "
                "over different vocabularies have no mixture, set own_weight=1.0"
            )
    names = list(teachers)
    return {d: MixedScorer([*teachers.values()], weights(own_weight, i, len(names)), k, block, sampled) for i, d in enumerate(names)}
