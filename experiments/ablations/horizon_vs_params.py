"""Is it the length of what a model was trained on, or its size, that decides how long a task it can do?

    a1jax run experiments/ablations/horizon_vs_params.py --set shard=0/2     # and, beside it, shard=1/2: one process a core
    a1jax run experiments/ablations/horizon_vs_params.py:smoke               # the same path in under 3 minutes; learns nothing
    a1jax run experiments/ablations/horizon_vs_params.py:gpu --set shard=0/8  # more tokens and seeds; many processes share one GPU

A grid of five sizes (31x in active parameters) x five horizons (30x in tokens, from a question and one step to whole runs) x three seeds,
for two budgets (equal training tokens, equal training FLOPs) and two arms: longer runs cut into consults, or left out. Cells share runs,
curriculum, optimizer and held-out tasks; see a1jax/stages/horizon_cell.py. A step of search costs 24 tokens, a run of n steps 28 + 24 n.
Every run numbers its steps from anywhere in 1 .. 48 on 64 pages: no token is unknown to a cell that sees short runs only. 195 cells; with
13 shards each process has one horizon, budget and arm, and compiles five programs.

Seconds of one core for the 1.2M tokens of a cell, by the time of 8 to 20 steps on a busy machine (Intel(R) Xeon(R) Processor, jax 0.10.2):
nano_16 17 at 190 tokens and 33 at 1,024, nano_128 210 at 1,024; 15 more for every program that is compiled, about 10 for judging. By these
the 195 cells take about 2.2 hours on two idle cores (reckoned, not run as a whole).
One seed and nano_48, tasks of the admission split that settings were chosen by (12 a length, 8 from 24 steps on), 1.2M tokens, solved by
consults of 80 tokens: 1 and 2 steps all, 4 steps 1, none above; of 190 tokens: 12, 12, 10 at 1, 2, 4 steps, 6 at 6, none above; by whole
runs of up to 1,024: 12, 12, 12, 11, 12, 10 at 1, 2, 4, 6, 8, 16 steps, 5 of 8 at 24, 8 of 8 at 32. With 0.5M tokens 190 solved 4 of 48 at
1 to 8 steps.
"""

import dataclasses

from a1jax import optim
from a1jax.config import ConfigError, bind
from a1jax.domains.search import Search
from a1jax.models import config as models
from a1jax.rollout.agent import Limits
from a1jax.stages import horizon_grid, sweep
from a1jax.stages.horizon_cell import HorizonCell
from a1jax.stages.pipeline import TokenizerConfig
from a1jax.stages.sft import Phase, SftConfig
from a1jax.stages.sweep import Sweep

SIZES = tuple(f"nano_{width}" for width in models.NANO_WIDTHS)
HORIZONS = (34, 80, 190, 440, 1024)  # a question of one step and a step; whole runs of 2, 6, 17 and 41 steps


def get_config(arg: str = "") -> Sweep:
    if arg not in ("", "smoke", "gpu"):
        raise ConfigError(f"horizon_vs_params has no argument '{arg}'; there are '', 'smoke' and 'gpu'")
    base = HorizonCell(
        model=models.nano(48),
        horizon=190,
        families={"search": Search(pages=64, numbers=48)},
        runs={
            **{1: 400, 2: 400, 3: 150, 4: 150, 5: 100, 6: 100, 8: 60, 10: 60, 12: 60, 14: 60, 16: 60},
            **{20: 30, 24: 30, 28: 30, 32: 30, 36: 30, 40: 30},
        },
        sft=SftConfig(
            loss_tile=256,
            optimizer=bind(optim.muon, learning_rate=0.01, table_learning_rate=0.01),
            phases=(Phase(0.3, 2), Phase(0.2, 6), Phase(0.2, 16), Phase(0.3, 40)),
            save_every=1000,
        ),
        tokens=1_200_000,
        heldout={1: 24, 2: 24, 4: 24, 6: 24, 8: 24, 16: 24, 24: 16, 32: 16, 48: 8},
        limits=Limits(slots=64, max_turns=52, max_turn_tokens=20, max_length=1280, temperature=0.0),
        tokenizer=TokenizerConfig(vocab_size=608, counters=48),
    )
    grid = bind(horizon_grid.cells, base=base, sizes=SIZES, horizons=HORIZONS, seeds=(0, 1, 2), solvable=HORIZONS[1:-1])
    cfg = Sweep(name="horizon_vs_params", main=bind(sweep.run), cells=grid)
    if arg == "smoke":
        small = dataclasses.replace(
            base,
            runs={1: 60, 2: 60, 4: 20},
            sft=dataclasses.replace(base.sft, phases=(Phase(0.5, 2), Phase(0.5, 4)), save_every=4),
            tokens=12_000,
            heldout={1: 4, 2: 4, 4: 4},
            limits=dataclasses.replace(base.limits, slots=12, max_turns=8, max_length=256),
            row_lengths=(256,),
        )
        grid = bind(grid, base=small, sizes=SIZES[:2], horizons=(34, 80, 190), seeds=(0,), solvable=(80,))
        cfg = dataclasses.replace(cfg, name="horizon_vs_params-smoke", cells=grid)
    if arg == "gpu":
        larger = dataclasses.replace(base, tokens=4_000_000, heldout={n: 64 for n in base.heldout})
        cfg = dataclasses.replace(cfg, name="horizon_vs_params-gpu", cells=bind(grid, base=larger, seeds=(0, 1, 2, 3, 4)))
    return cfg
