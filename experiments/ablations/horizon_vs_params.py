"""Is it the length of what a model was trained on, or its size, that decides how long a task it can do?

    a1jax run experiments/ablations/horizon_vs_params.py                     # started once for each core: they share the cells
    a1jax run experiments/ablations/horizon_vs_params.py --set shard=0/2     # on machines that share no disk, each its part
    a1jax run experiments/ablations/horizon_vs_params.py:smoke               # the same path in under 3 minutes; learns nothing
    a1jax run experiments/ablations/horizon_vs_params.py:gpu                 # more tokens and seeds; a dozen processes share one GPU

A grid of five sizes (31x in active parameters) x five horizons (30x in tokens, from a question and one step to whole runs) x three seeds,
for two budgets (equal training tokens, equal training FLOPs) and two arms: longer runs cut into consults, or left out. Cells share runs,
curriculum, optimizer and held-out tasks; see a1jax/stages/horizon_cell.py. A step of search costs 24 tokens, a run of n steps 28 + 24 n.
Every run numbers its steps from anywhere in 1 .. 48 on 64 pages: no token is unknown to a cell that sees short runs only. 195 cells.

Measured so far: 107 of the 195 cells, beside this file as horizon_vs_params.jsonl.gz (``a1jax.analysis.sweep.load``); commit b7f7ee9,
seed 0 whole, 42 cells of seed 1, none of seed 2. 101 of them on one machine with an H100 and 16 cores (jax 0.11.2, float32 products in
full): 470 s with 4 processes on the GPU, 11 on the cores and another job, then 325 s with 13 on the GPU and 2 on the cores; 6 on 2 CPU
cores (jax 0.10.2). A process on the GPU trained 59,000 to 69,000 tokens/s where four shared it and 25,000 to 41,000 where thirteen did,
one on a core of that machine 7,000 to 9,000 (nano_48 and nano_32, 15 at once): the whole grid, 359M tokens, is about 15 minutes of that
GPU.
:gpu (325 cells, some 2 billion tokens) would be eight or nine pieces of ten minutes there, reckoned by these rates, not run.
Success in percent, all lengths pooled (n = 184 a seed), H = 34, 80, 190, 440, 1024 (solvable: 80, 190, 440):

                equal tokens, consults    equal FLOPs, consults     equal tokens, solvable
    nano_16      3   5   4  10   5         2  24  43  47  93        14  14  15
    nano_32      7  27  54  69  74         7  29  60  65  73        26  50  69
    nano_48      7  28  46  38  43        12  26  49  46  42        26  51  42
    nano_80      6  26  48  60  53         1  20  41  34  30        26  45  60
    nano_128    10  30  60  90  45        10  13  26  18  14        26  51  40

One doubling of H in the grid's middle (87K active parameters, 181 tokens): worth 2.48 times the parameters at equal tokens (95 %: 1.65 to
17.2); 3.83 in the solvable arm (1.52 to more than 1,000); at equal FLOPs size lowers success, so no factor is worth it.
How to read it: consults of 34 and 80 tokens train on targets that cannot be known, as the number of a step stands in the dropped turn (84
% and 38 % of their pieces do not begin their run, 80 % and 19 % lack the question too; 9 % at 190, 2 % at 440): the arm "solvable" has no
such targets. Evaluation shows whole runs to all. Equal tokens are not equal targets: of 1.2M, 548K are targets at H = 34, 506K at 80,
579K at 190, 614K at 440, 624K at 1,024. Under equal FLOPs nano_16 trains on 6M tokens, nano_128 on 0.2M, less than one pass over the long
runs. One learning rate, chosen at nano_48 on tasks of the admission split, serves all. Rows of 1,024 tokens come one a step, of 256 four.

Seconds of one core for the 1.2M tokens of a cell, by the time of 8 to 20 steps on a busy machine (Intel(R) Xeon(R) Processor, jax 0.10.2):
nano_16 17 at 190 tokens and 33 at 1,024, nano_128 210 at 1,024; 15 more for every program that is compiled, about 10 for judging. By these
the 195 cells take about 2.2 hours on two idle cores (reckoned, not run as a whole there).
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
