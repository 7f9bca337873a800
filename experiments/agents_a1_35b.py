"""The paper's three stages for Qwen3.5-35B-A3B at 131,072 tokens, on a TPU pod (arXiv 2606.30616).

    a1jax compile experiments/agents_a1_35b.py:v5p-256 --topology v5p:4x4x8 --stage sft          # no chip and no weights are needed
    a1jax compile experiments/agents_a1_35b.py:v6e-256 --topology v6e:16x16 --stage sft
    a1jax import models/Qwen3.5-35B-A3B models/qwen3_5_35b_a3b && a1jax run experiments/agents_a1_35b.py:v5p-256   # on every host
    a1jax run experiments/agents_a1_35b.py:smoke        # all stages, small, on a CPU

Batch, length, rates, clip range, coefficients, groups, budgets and temperature are the paper's. It does not give the size of
micro-batches, the steps of the teachers, and of stage 3 no k, rate, batch nor steps: those are ours. Its ~100K trajectories of 45K tokens
are 2,146 steps of 16 x 131,072; the expert runs here are those of the embedded domains.

Mesh. 16 rows are cut over fsdp 16, and each row over the rest of the chips as context: 16,384 tokens a chip on v5p-256 (128 chips), 8,192
on v6e-256 (256 chips). All weights are cut over all chips: 2 experts of a layer lie on a chip of the former, 1 on one of the latter.
Micro-batches of 16 rows in the stages whose batches are larger.

Six frozen teachers stay on the chips, none is swapped: they are cut over all chips as the student is, 34.66e9 x 4 bytes / 128 = 1.08 GB of
float32 each on v5p-256, 6.5 GB together of 102.8; swapping would move those bytes from disk or host at every step to save memory that
nothing else needs. They score in turn, by one program whose argument is the teacher, and are not stacked: a stack would be a second copy.

Compiled to the end at full depth by libtpu 0.0.52, no chip here. GB = 10^9 bytes per chip, of 102.79 on v5p and 33.55 on v6e; beside: the
models that a run keeps in HBM besides, counted as of commit 1355cd6. The meshes: A fsdp 64, B fsdp 16 x context 4, C fsdp 16 x context 8,
D fsdp 16 x context 16.

    program                topology     mesh  tokens        arguments  temporaries  beside   peak  10^9 FLOPs/token  CPU s   commit
    sft                    v5p:4x4x4    A     64 x 4,096         6.52         6.19    2.17  15.26             19.39    461  7d26e11
    sft                    v5p:4x4x4    B     16 x 131,072       6.52        23.82    2.17  33.02             50.60    514  83cab01
    sft, teacher's sft     v5p:4x4x8    C     16 x 131,072       3.27        12.01    1.09  16.86             50.60    359  f1ef54e
    grpo                   v5p:4x4x8    C     16 x 131,072       3.27        13.43    8.70  25.89             50.60    942  f1ef54e
    grpo, reference        v5p:4x4x8    C     16 x 131,072       1.09         4.50   10.88  16.63             16.87   both  f1ef54e
    rollout, a token       v5p:4x4x8    C     256 slots          7.49         2.08   10.88  20.73             27.46    976  f1ef54e
    rollout, known tokens  v5p:4x4x8    C     65,536             7.49         4.42   10.88  23.68             27.46    all  f1ef54e
    distill, scoring       v5p:4x4x8    C     16 x 131,072       1.09         4.37   10.88  16.51             16.87    556  aca48e4
    distill, step          v5p:4x4x8    C     96 x 131,072       3.37        15.05    8.70  27.63             47.65   both  aca48e4
    sft                    v6e:16x16    D     16 x 131,072       1.64         6.11    0.55   8.77             50.60    635  f1ef54e

All fit. MaxText 0.2.5 takes 18.99 and 77.70 GB of temporaries for the tokens of the first two on the same chips
(../shared/design/platform.md): here a third of that and less. The 256 slots are 32 questions x 8 rollouts, with room for 131,072 tokens
each; a teacher's sft has up to 7.61 beside it. Sent per chip and step, in GB: the first 30.9 by all-reduce (weights and gradients) and
13.3 by all-to-all (pairs, a round); the second 30.9, 13.2, and 16.1 by collective-permute and 9.2 by other collectives over context
(keys, values, queries, states). The time to compile hardly grows with depth, because the layers are a scan over blocks of 4: 8 layers
take 364 s of CPU, 40 take 461. Nearly all of it is generating code, which begins a minute after the start, when memory is assigned. On a
busy machine the wait was 23 minutes.

FLOPs per token grow with the length by full attention alone, in 10 of 40 layers: 19.39e9 at 4,096; 50.60e9 at 131,072 with one run in a
row, 2.61 times as many; 29.45e9 in rows packed with runs of 45,000, 1.52 times as many.

    a1jax compile experiments/agents_a1_35b.py:v5p-256 --topology v5p:4x4x4 --stage sft --set 'mesh.shape={"fsdp": 64}' \\
        sft.rows=64 sft.max_length=4096

    sft: train_step   262,144 tokens a call   compiled in 1357 s   fits
      bytes per device
        arguments                                        6.516 GB
        temporaries                                      6.186 GB
        outputs                                          6.516 GB
        of which aliased                                 6.516 GB
        code                                             382.3 MB
        beside: the base model                           2.171 GB
        peak                                             15.26 GB
        HBM                                              102.8 GB
      10^9 FLOPs per token by formula 19.39: forward 6.464, backward 12.93; besides, computed again 7.036
        forward by part: delta projections 2.023, experts 2.013, output matrix 1.017, attention projections 0.5453, attention 0.3356,
        shared expert 0.2518, delta rule 0.2361, router 0.04194
      bytes through HBM per device and call 953.4 GB (8 loops without a known number of trips counted once)
      collectives per device and call          axes                      count        result          sent
        all-reduce                           fsdp                         436      15.69 GB      30.89 GB
        all-to-all                           fsdp                         282      13.47 GB      13.26 GB
      estimated 0.481 s a call, bound by compute (seconds: compute 0.481, hbm 0.345, ici 0.221); 545,182 tokens/s, 8,518 a chip
      largest temporaries (of those that take turns in one place, the largest)
          335.5 MB  f32[10,4,2048,1024]        jit(step)/transpose(jvp())/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice
      ... (7 more, and the largest arguments; the time is an estimate, not a measurement)

The loops without a number of trips are rounds of models.exchange: balanced routing takes 2 at 4,096 tokens a chip, 8 at 16,384 and 16 at
32,768, each with all-to-all once. Gathers of weights are among the all-reduces: over all 64 chips the compiler writes them as sums.
"""

import dataclasses

from a1jax import optim
from a1jax.analysis import report
from a1jax.config import ConfigError, bind
from a1jax.domains import DOMAINS, LongContext
from a1jax.domains.science import Science
from a1jax.models import config as models
from a1jax.rollout.agent import Limits
from a1jax.stages import recipes
from a1jax.stages.distill import DistillConfig
from a1jax.stages.evaluate import Evaluation
from a1jax.stages.experts import Prompts, Runs
from a1jax.stages.grpo import PAPER_LIMITS, GrpoConfig, Objective
from a1jax.stages.pipeline import Experiment, TokenizerConfig
from a1jax.stages.setting import MeshConfig
from a1jax.stages.sft import SftConfig
from a1jax.stages.teacher import TeacherConfig

MESHES = {"v5p-256": {"fsdp": 16, "context": 8}, "v6e-256": {"fsdp": 16, "context": 16}}
LENGTH = 131_072
NAMES = ("search", "engineering", "science", "instruction_following", "tool_calling", "general")
STEPS = (1, 2, 3, 4)
EXPERTS, PROMPTS = Runs(dict.fromkeys(STEPS, 2000)), (Prompts(STEPS),)
# What else two domains have: science without tools; questions over long contexts, counted in fours of characters, of which the tokenizer
# makes two ids: the longest have about 98,000.
DERIVATIONS = Science(tools=False)
CONTEXTS = tuple(LongContext(tokens=n) for n in (2_048, 16_384, 49_152))
QUESTIONS = tuple(Prompts(STEPS, family) for family in CONTEXTS)
BOTH = {  # domain -> runs of both kinds
    "science": (EXPERTS, Runs(EXPERTS.counts, DERIVATIONS)),
    "instruction_following": (EXPERTS, *(Runs(dict.fromkeys(STEPS, n), family) for n, family in zip((500, 50, 10), CONTEXTS, strict=True))),
}


def get_config(arg: str = "") -> Experiment:
    """arg: "v5p-256" (128 chips, also where there is none), "v6e-256" (256 chips) or "smoke"."""
    if arg not in ("", "smoke", *MESHES):
        raise ConfigError(f"agents_a1_35b has no argument '{arg}'; there are 'v5p-256', 'v6e-256' and 'smoke'")
    sft = SftConfig(steps=2146, rows=16, max_length=LENGTH, optimizer=bind(optim.adamw), save_every=200)
    limits = dataclasses.replace(PAPER_LIMITS, slots=256, feed_tokens=2048, workers=64, show_tools=True)
    cfg = Experiment(
        name="agents_a1_35b",
        main=bind(report.run),
        model=models.qwen3_5_35b_a3b(remat="layer"),
        tokenizer=TokenizerConfig(path="models/Qwen3.5-35B-A3B/tokenizer.json"),
        domains=NAMES,
        families={d: DOMAINS[d] for d in NAMES},
        runs=dict.fromkeys(NAMES, EXPERTS) | BOTH,
        sft=sft,
        teachers=teachers(dataclasses.replace(sft, steps=300), limits),
        distill=DistillConfig(
            steps=300,
            prompts=32,
            lengths=STEPS,
            of={"science": (*PROMPTS, Prompts(STEPS, DERIVATIONS)), "instruction_following": PROMPTS * len(QUESTIONS) + QUESTIONS},
            rows=16,
            max_length=LENGTH,
            k=128,
            mode="salient",
            coverage_every=10,
            optimizer=bind(optim.adamw, learning_rate=1e-6, warmup=0.0, final=1.0),
            limits=limits,
            microbatches=6,
        ),
        evaluation=held_out({1: 50, 2: 50, 4: 50}),
        admission=held_out({1: 32, 4: 32}),
        limits=dataclasses.replace(limits, temperature=0.0),
        mesh=MeshConfig(MESHES.get(arg or "v5p-256", {})),
        elsewhere=False,
        initial="models/qwen3_5_35b_a3b",
    )
    return smoke(cfg) if arg == "smoke" else cfg


def held_out(counts: dict[int, int]) -> Evaluation:
    """Tasks of every length, and as many questions over contexts of each length."""
    long = tuple(Runs(counts, family) for family in CONTEXTS)
    return Evaluation(counts, of={"instruction_following": (Runs(counts), *long)})


def teachers(sft: SftConfig, limits: Limits) -> dict[str, TeacherConfig]:
    """Domain -> recipe (4.2). 256 runs of 45K tokens on average are 88 rows of 131,072: 96 have room for a step's."""
    grpo = GrpoConfig(
        steps=60,
        prompts=32,
        samples=8,
        objective=Objective(
            kl_coefficient=0.001, entropy_coefficient=0.0001
        ),  # clip range 0.2, 0.28 and recorded log-probabilities: defaults
        rows=96,
        microbatches=6,
        max_length=LENGTH,
        limits=limits,
    )
    return {
        "search": recipes.search(EXPERTS, sft, grpo, PROMPTS, candidates=8000),
        "engineering": recipes.sft_then_grpo(EXPERTS, sft, grpo, PROMPTS),
        "science": recipes.science(Runs(EXPERTS.counts, DERIVATIONS), sft, EXPERTS, sft),
        "instruction_following": recipes.instruction_following(grpo, PROMPTS, grpo, QUESTIONS),
        "tool_calling": recipes.tool_calling(EXPERTS, sft, grpo, PROMPTS, candidates=2000),
        "general": recipes.sft_then_grpo(EXPERTS, sft, grpo, PROMPTS),
    }


def smoke(cfg: Experiment) -> Experiment:
    """The same path with a tiny model of the same pattern and short runs, on one device."""
    length = 384
    sft = dataclasses.replace(cfg.sft, steps=4, rows=4, max_length=length, save_every=2, log_every=2, loss_tile=256)
    limits = dataclasses.replace(
        cfg.limits, slots=16, max_turns=4, max_turn_tokens=24, max_length=length, feed_tokens=0, workers=4, show_tools=False
    )
    sampling = dataclasses.replace(limits, temperature=1.0)

    def brief(source):
        """Of one step, from the same family; a context as short as its register can be."""
        family = LongContext(tokens=150, distractors=0) if isinstance(source.family, LongContext) else source.family
        return Prompts((1,), family) if isinstance(source, Prompts) else Runs({1: 60}, family)

    def few(sources):
        found = [brief(one) for one in (sources if isinstance(sources, tuple) else (sources,))]
        return tuple(one for i, one in enumerate(found) if one not in found[:i])

    def phase(one):
        if not isinstance(one, GrpoConfig):
            return dataclasses.replace(one, runs=few(one.runs), sft=sft)
        pool = one.pool and dataclasses.replace(one.pool, candidates=4, select="all", size=0)
        small = {"steps": 2, "prompts": 2, "samples": 2, "rows": 8, "microbatches": 2, "max_length": length, "save_every": 1}
        return dataclasses.replace(
            one, **small, sources=few(one.sources), refills=0, drop_equal=False, pool=pool, limits=sampling, vocab_block=256
        )

    recipe = {d: dataclasses.replace(t, recipe=tuple(map(phase, t.recipe))) for d, t in cfg.teachers.items()}
    small = {"steps": 2, "prompts": 2, "lengths": (1,), "rows": 2, "max_length": length, "k": 16, "microbatches": 2, "save_every": 1}
    held = Evaluation({1: 1}, of={d: tuple(Runs({1: 1}, r.family) for r in few(runs)) for d, runs in cfg.evaluation.of.items()})
    return dataclasses.replace(
        cfg,
        name="agents_a1_35b-smoke",
        model=models.tiny_deep(vocab_size=1280, remat="layer"),
        tokenizer=TokenizerConfig(vocab_size=1280),
        runs={d: few(runs) for d, runs in cfg.runs.items()},
        sft=sft,
        teachers=recipe,
        distill=dataclasses.replace(
            cfg.distill, **small, of={d: few(sources) for d, sources in cfg.distill.of.items()}, limits=sampling, vocab_block=256
        ),
        control=dataclasses.replace(sft, steps=2),
        evaluation=held,
        admission=held,
        limits=limits,
        mesh=MeshConfig(),
        initial="",
    )
