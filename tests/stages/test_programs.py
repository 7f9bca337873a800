"""What `a1jax compile` is given of a stage: mixtures are scored by all their teachers, and models that a run keeps are counted."""

import dataclasses

import jax

from a1jax.models import flops
from a1jax.stages import mixtures, programs, scoring


def scoring_programs(cfg, own_weight):
    cfg = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, own_weight=own_weight))
    found = programs.of_stage(cfg, "distill", programs.Place(None, jax.devices()[0]))
    return [p for p in found if p.name.startswith("score/")]


def test_what_a_run_keeps_beside_a_program_is_counted(small_experiment):
    """One model's bytes are m: the base; then stage 1's; then each teacher, once it is trained; at the end all but the one that acts."""
    cfg, place = small_experiment, programs.Place(None, jax.devices()[0])
    m = programs.held_bytes(place.params(cfg.model))

    def beside(stage):
        return {p.name: {name: programs.held_bytes(x) // m for name, x in p.beside.items()} for p in programs.of_stage(cfg, stage, place)}

    base, sft = {"the base model": 1}, {"the base model": 1, "the stage-1 model": 1}
    teachers = {"the teacher of search": 1, "the teacher of tool_calling": 1}
    assert beside("sft") == {"train_step": base}
    assert beside("control") == {"train_step": sft | teachers | {"the student": 1}}
    found = beside("teacher")  # equal programs: told of the last domain, which has most beside it
    assert list(found.values()) == [sft | {"the teacher of search": 1}]
    found = beside("distill")
    assert found["train_step"] == sft | teachers and found["score/search"]["the state"] >= 2  # parameters and moments
    found = beside("rollout")
    assert found["decode/distill"].keys() == sft.keys() | teachers.keys() | {"the optimizer's state"}
    judged = [p for name, p in found.items() if name == "decode/evaluation"]
    assert all(p == sft | teachers | {"stage 1 continued": 1} for p in judged)
    by_teachers = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, rollouts="teacher"))
    (writing,) = [p for p in programs.of_stage(by_teachers, "rollout", place) if p.name.startswith("decode/distill")]
    assert writing.name == "decode/distill by the teacher of search"  # the other one is of the same architecture
    assert writing.beside.keys() == sft.keys() | {"the teacher of tool_calling", "the student", "the optimizer's state"}
    given = dataclasses.replace(cfg, checkpoints={"tool_calling": scoring.Checkpoint("nowhere")})
    sft_step = next(iter(programs.of_stage(given, "sft", place)))
    assert sft_step.beside.keys() == {"the base model", "the teacher of tool_calling"}  # opened before anything is trained


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
