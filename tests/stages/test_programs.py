"""What `a1jax compile` is given of a stage: the scoring of a mixture has all of its teachers as arguments and is paid for all of them."""

import dataclasses

import jax

from a1jax.models import flops
from a1jax.stages import mixtures, programs


def scoring_programs(cfg, own_weight):
    cfg = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, own_weight=own_weight))
    found = programs.of_stage(cfg, "distill", programs.Place(None, jax.devices()[0]))
    return [p for p in found if p.name.startswith("score/")]


def test_a_mixture_is_scored_by_all_its_teachers(small_experiment):
    cfg = small_experiment
    hard, soft = scoring_programs(cfg, 1.0), scoring_programs(cfg, 0.75)
    assert len(hard) == 1  # the same program for both domains
    assert [p.name for p in soft] == ["score/search", "score/tool_calling"]
    assert [len(p.args[0]) for p in soft] == [2, 2] and not any("teacher" in name for name in soft[0].beside)
    own = cfg.distill
    assert soft[0].fn is mixtures.score_step((cfg.model,) * 2, (0.75, 0.25), own.k, own.vocab_block, False)
    length, twice = own.limits.max_length, flops.forward(cfg.model, own.limits.max_length, 2.0)
    assert soft[0].cost.forward == 2 * twice.forward > 2 * flops.forward(cfg.model, length).forward == 2 * hard[0].cost.forward
    assert soft[0].cost.parts == {name: 2 * x for name, x in twice.parts.items()}
    all_of_the_other = scoring_programs(cfg, 0.0)
    assert [len(p.args[0]) for p in all_of_the_other] == [1]
