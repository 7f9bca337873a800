"""Is it the length of what a model was trained on, or its size, that decides how long a task it can do?

    a1jax run experiments/ablations/horizon_vs_params.py                     # started once for each core: they share the cells
    a1jax run experiments/ablations/horizon_vs_params.py --set shard=0/2     # on machines that share no disk, each its part
    a1jax run experiments/ablations/horizon_vs_params.py:smoke               # the same path in under 3 minutes; learns nothing
    a1jax run experiments/ablations/horizon_vs_params.py:gpu                 # more tokens and seeds; a dozen processes share one GPU

A grid of five sizes (31x in active parameters) x five horizons (30x in tokens, from a question and one step to whole runs) x three seeds,
for two budgets (equal training tokens, equal training FLOPs) and two arms: longer runs cut into consults, or left out. Cells share runs,
curriculum, optimizer and held-out tasks; see a1jax/stages/horizon_cell.py. A step of search costs 24 tokens, a run of n steps 28 + 24 n.
Every run numbers its steps from anywhere in 1 .. 48 on 64 pages: no token is unknown to a cell that sees short runs only. 195 cells.

Measured: all 195 cells, beside this file as horizon_vs_params.jsonl.gz (``a1jax.analysis.sweep.load``; ``a1jax report`` makes its page).
151 cells at commit 7033f2c with the first command, two processes on 2 CPU cores (AMD EPYC, jax 0.10.2): 88 minutes beside other work, each
process having four fifths of a core. The other 44, in which nothing is cut (H = 1024 and arm solvable of seeds 0 and 1), are from
before: 41 of commit b7f7ee9 (26 on one H100, 11 on its 16 cores, 4 on 2 cores), 3 of 38ce934. Their equal-FLOPs budget is 0.2 % larger, and
what they train on (``train.supervised``, ``feedback``, ``with_turn_before``) was counted again, as it follows from the configuration.
By the seconds of the cells run here all 195 take 3.6 hours of a core, 1.8 hours on two: nano_16 19 s a cell of 1.2M tokens, nano_32 24,
nano_48 39, nano_80 104, nano_128 188, compiling and judging included.
:gpu (325 cells, some 2 billion tokens) was not run; thirteen processes on the H100 trained 25,000 to 41,000 tokens/s each.

Success in percent, mean of three seeds, all lengths pooled (n = 184 a seed), in brackets the lowest and highest seed; H = 34, 80, 190, 440,
1024 (solvable: 80, 190, 440):

    equal tokens, consults
    nano_16     1 (1-2)    9 (3-18)  11 (4-25)  14 (10-17) 12 (5-25)
    nano_32     6 (4-8)   33 (26-39) 56 (43-66) 57 (48-73) 63 (41-83)
    nano_48     5 (4-7)   26 (24-29) 45 (42-49) 42 (28-54) 49 (43-60)
    nano_80     8 (7-10)  40 (29-49) 60 (55-65) 52 (46-63) 57 (44-64)
    nano_128    5 (1-8)   34 (28-41) 66 (46-77) 64 (49-92) 78 (45-96)
    equal FLOPs, consults
    nano_16     6 (4-8)   27 (25-29) 61 (56-65) 74 (70-77) 76 (55-93)
    nano_32     7 (3-12)  34 (31-37) 62 (53-66) 58 (51-72) 64 (48-75)
    nano_48     6 (4-7)   26 (18-32) 45 (42-49) 56 (38-84) 43 (41-47)
    nano_80     3 (2-4)   25 (21-30) 39 (33-45) 34 (29-42) 32 (29-38)
    nano_128    4 (1-9)    8 (7-9)   20 (16-26) 10 (5-16)   8 (3-14)
    equal tokens, solvable
    nano_16              14 (12-16) 18 (8-24)  22 (13-36)
    nano_32              26 (26-26) 50 (49-51) 67 (64-72)
    nano_48              26 (26-26) 49 (46-51) 44 (27-57)
    nano_80              26 (26-26) 49 (45-52) 64 (60-72)
    nano_128             26 (26-26) 50 (46-54) 63 (40-75)

One doubling of H in the grid's middle (101K active parameters, 188 tokens): worth 2.5 times the parameters at equal tokens (95 %: 2.0 to
3.7), 5.3 times in the solvable arm (3.0 to 45); at equal FLOPs size lowers success (-0.88 logits a doubling, -1.1 to -0.69), so no factor
of parameters is worth it. Before, with two seeds and consults that had no turn before them: 2.5 (1.7 to 17), 3.8 (1.5 to over 1,000).
How to read it: a consult has the turn before it as context and the question in front where there is room. At H = 34 89 % of the pieces
have that turn (or begin their run) and 20 % the question, at 80 tokens 85 % and 83 %, from 190 tokens on all have both; what hangs on what
is missing cannot be known and is a target all the same. The arm "solvable" has no such targets. Equal tokens are not equal targets: of
1.2M tokens 456K are targets at H = 34, 462K at 80, 570K at 190, 613K at 440, 624K at 1,024, which favours long horizons a little. Under
equal FLOPs nano_16 trains on 5.5M to 6.9M tokens, nano_128 on 0.2M, less than one pass over the long runs. One learning rate, chosen at
nano_48 on tasks of the admission split, serves all. Rows of 1,024 tokens come one a step, of 256 four.
Held-out tasks are distinct by content since commit 4c5d0c2, and tool calling redraws some; the figures are of the tasks before: do not go
on with their cells.
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
        # a run that does not stop by itself is lost, as it was in what was measured: nobody asks it for an answer
        limits=Limits(slots=64, max_turns=52, max_turn_tokens=20, max_length=1280, final_request="", temperature=0.0),
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
