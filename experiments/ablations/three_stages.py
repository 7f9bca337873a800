"""What does each part of the three stages give? One thing changed at a time in the quickstart's run.

    a1jax run experiments/ablations/three_stages.py             # all of them, three seeds
    a1jax run experiments/ablations/three_stages.py:modes       # one ablation: stages, k, modes, divergence, reduction, routing, writers,
                                                                # experts, active_experts
    a1jax run experiments/ablations/three_stages.py:smoke       # every path, about 4 minutes of CPU time; learns nothing

    stages          stage 1 alone | the teachers on their own domains | stage 1 continued at stage 3's compute | the student
    k               the paper's loss on the teacher's k best ids, k in 8, 32, 128, and on all 640 ids
    modes           how the k = 16 best are compared: renormalised, with a class for the rest, all ids, the written token only
    divergence      reverse KL, forward KL, Jensen-Shannon; of mode tail
    reduction       means over samples, then domains, then over domains (the paper's) | over samples | over tokens
    routing         a run is scored by its domain's teacher (the paper's) | 0.8 of that and 0.2 of the other | half and half
    writers         the student writes the runs it learns from (the paper's) | the teachers write them
    experts         2 (all of them used) to 32 experts, two of them used: more parameters, as many used; stage 1 only
    active_experts  1, 2, 4 or 8 used of four times as many, of the same width in all; stage 1 only

sft_continued has as many steps as cost what stage 3 costs when every slot of its packed rows is counted, the padding too; a cell's "flops"
count real tokens alone, so the two differ there.
Everything else is experiments/quickstart.py's, mode "tail" included; stage 1 and teachers are trained once a seed, and the unchanged
student, which is a value of most ablations, once. Held-out tasks are the same everywhere: 200 a domain.
`a1jax report` says of every value by how many points it is off the unchanged one of its ablation, with an interval.

Cost: 24 different models a seed, 14 of them students. An estimate from the quickstart's 414 s on 2 busy cores: a student about 200 s with
its judging, a model of stage 1 alone 60 s, so about an hour a seed, and :modes or :k a quarter of an hour a seed. Not run yet: there are
no figures of it.
"""

import dataclasses
import pathlib

from a1jax import config
from a1jax.config import ConfigError, bind
from a1jax.stages import ablation_cell, sweep
from a1jax.stages.ablation_cell import Value
from a1jax.stages.sweep import Sweep

QUICKSTART = pathlib.Path(__file__).resolve().parents[1] / "quickstart.py"


def mode(name: str, *more: str) -> Value:
    return Value((f'distill.mode="{name}"', *more))


def experts(count: int, active: int, width: int) -> Value:
    return Value((f"model.num_experts={count}", f"model.num_experts_active={active}", f"model.expert_width={width}"), "sft")


ABLATIONS = {
    "stages": {"sft": Value(judged="sft"), "teachers": Value(judged="teachers"), "sft_continued": Value(judged="sft_continued"),
               "student": Value()},
    "k": {**{str(k): mode("salient", f"distill.k={k}") for k in (8, 32, 128)}, "full": mode("full")},
    "modes": {name: mode(name) for name in ("salient", "tail", "full", "sampled")},
    "divergence": {name: Value((f'distill.divergence="{name}"',)) for name in ("reverse", "forward", "jensen_shannon")},
    "reduction": {name: Value((f'distill.reduction="{name}"',)) for name in ("domain_mean", "sample_mean", "token_mean")},
    "routing": {"hard": Value(), "own_0.8": Value(("distill.own_weight=0.8",)), "uniform": Value(("distill.own_weight=0.5",))},
    "writers": {"student": Value(), "teacher": Value(('distill.rollouts="teacher"',))},
    "experts": {f"{count}_experts": experts(count, 2, 64) for count in (2, 4, 8, 16, 32)},
    "active_experts": {f"{active}_of_{4 * active}": experts(4 * active, active, 128 // active) for active in (1, 2, 4, 8)},
}  # fmt: skip


def get_config(arg: str = "") -> Sweep:
    if arg not in ("", "smoke", *ABLATIONS):
        raise ConfigError(f"three_stages has no argument '{arg}'; there are '', 'smoke' and {', '.join(ABLATIONS)}")
    base = config.load(f"{QUICKSTART}:smoke" if arg == "smoke" else str(QUICKSTART))
    chosen = {arg: ABLATIONS[arg]} if arg in ABLATIONS else ABLATIONS
    grid = bind(ablation_cell.cells, base=base, ablations=chosen)
    cfg = Sweep(name="-".join(["three_stages", *([arg] if arg else [])]), main=bind(sweep.run), cells=grid)
    return smoke(cfg, base) if arg == "smoke" else cfg


def smoke(cfg: Sweep, base) -> Sweep:
    """One value a path, one seed, as little training as there is."""
    distill = dataclasses.replace(base.distill, steps=1, prompts=4, rows=2)
    small = dataclasses.replace(base, distill=distill, control=dataclasses.replace(base.control, steps=1))
    picked = {"stages": ("sft", "teachers", "sft_continued", "student"), "modes": ("salient", "full"), "routing": ("hard", "uniform"),
              "writers": ("student", "teacher"), "experts": ("4_experts",)}  # fmt: skip
    few = {name: {label: ABLATIONS[name][label] for label in labels} for name, labels in picked.items()}
    return dataclasses.replace(cfg, cells=bind(ablation_cell.cells, base=small, ablations=few, seeds=(0,)))
