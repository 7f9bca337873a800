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

Measured: all 96 cells, beside this file as three_stages.jsonl.gz; commit 0c0a379, 2 CPU cores (AMD EPYC, jax 0.10.2): 26 minutes for seeds
1 and 2, a process each, so about 40 minutes for all three. 24 different models a seed: a student 70 to 120 s with its judging, a model of
stage 1 alone 40 to 70 s. Success in percent, mean of three seeds over both domains, the lowest and highest seed, by domain; difference to
the value without one, paired by seed and task, t interval over seeds (two degrees of freedom: wide):

    ablation       value             mean    by seed   search    tools   difference (95 %)
    stages         sft               74.3   69.2- 81.8    69.8    78.8   -19.8 (-36.0 to -3.6)
                   teachers          97.3   92.5- 99.8    94.8    99.8    +3.2 (-2.7 to 9.1)
                   sft_continued     89.8   81.0- 96.5    88.5    91.0    -4.4 (-8.8 to -0.0)
                   student           94.2   87.0- 99.0    88.3   100.0        -
    k              8                 85.1   76.5- 92.5    82.2    88.0        -
                   32                89.0   85.8- 91.0    84.3    93.7    +3.9 (-19.0 to 26.8)
                   128               77.2   52.5- 94.5    87.2    67.3    -7.8 (-42.9 to 27.2)
                   full              93.8   86.2- 99.0    88.0    99.7    +8.8 (-16.3 to 33.8)
    modes          salient           88.0   86.5- 90.5    85.5    90.5    -6.2 (-21.7 to 9.4)
                   tail              94.2   87.0- 99.0    88.3   100.0        -
                   full              93.8   86.2- 99.0    88.0    99.7    -0.3 (-1.3 to 0.6)
                   sampled           83.7   77.0- 94.5    74.2    93.2   -10.5 (-26.1 to 5.1)
    divergence     reverse           94.2   87.0- 99.0    88.3   100.0        -
                   forward           94.1   85.2- 98.8    89.5    98.7    -0.1 (-4.4 to 4.3)
                   jensen_shannon    94.2   87.0- 99.0    88.8    99.7    +0.1 (-0.8 to 0.9)
    reduction      domain_mean       94.2   87.0- 99.0    88.3   100.0        -
                   sample_mean       93.5   87.0- 98.5    88.0    99.0    -0.7 (-2.6 to 1.2)
                   token_mean        94.0   86.5- 99.8    88.0   100.0    -0.2 (-2.2 to 1.8)
    routing        hard              94.2   87.0- 99.0    88.3   100.0        -
                   own_0.8           76.3   67.5- 89.5    70.5    82.2   -17.8 (-36.8 to 1.1)
                   uniform           16.2    7.8- 25.8    19.3    13.0  -78.0 (-100 to -54.8)
    writers        student           94.2   87.0- 99.0    88.3   100.0        -
                   teacher           93.9   85.2- 99.0    88.0    99.8    -0.3 (-3.7 to 3.2)
    experts        2_experts         75.3   72.0- 78.8    71.8    78.8    +1.0 (-7.6 to 9.6)
                   4_experts         73.2   70.0- 76.0    67.0    79.5    -1.1 (-11.2 to 9.0)
                   8_experts         74.3   69.2- 81.8    69.8    78.8        -
                   16_experts        73.6   64.8- 79.0    65.8    81.3    -0.7 (-13.3 to 11.8)
                   32_experts        72.7   69.5- 75.5    68.8    76.5    -1.7 (-17.4 to 14.1)
    active_experts 1_of_4            79.5   76.5- 81.2    76.2    82.8    +5.2 (-9.8 to 20.1)
                   2_of_8            74.3   69.2- 81.8    69.8    78.8        -
                   4_of_16           60.0   28.5- 78.2    57.2    62.8   -14.3 (-71.5 to 42.8)
                   8_of_32           77.2   73.8- 83.0    76.5    78.0    +2.9 (-22.7 to 28.5)

What holds: distillation is worth 20 points over stage 1, and more than stage 1 continued in every seed (2.5 to 6 points). One teacher a
run is needed: with a fifth of the weight on the other domain's teacher 18 points are lost, with half of it all was lost; a teacher is no
judge of another domain's tasks. Not told apart: tail and full; reverse, forward and Jensen-Shannon; the reductions; who writes the runs
(the teachers here are nearly perfect, and so is what they write). The paper's renormalised loss is worse than tail or full at every k in
the mean (77 to 89 against 94), but seeds differ by up to 42 points (k = 128: 53, 85 and 95), so that no k is told from another. Experts:
none of it is told from the luck of training.
Held-out tasks are distinct by content since commit 4c5d0c2, and tool calling redraws some; the figures are of the tasks before: do not go
on with their cells.
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
