"""Stage 3: multi-teacher domain-routed on-policy distillation with salient vocabulary alignment (arXiv 2606.30616, 2.3 and 4.3).

At every step a frozen copy of the student (its parameters at that step) rolls out fresh tasks of every domain; only the teacher of
a run's domain scores it, on the student's own tokens (``scoring``: also a teacher of another tokenizer or architecture); the student
learns by renormalised reverse KL on the teacher's k best ids, averaged within runs, then within domains, then over domains. TRUNCATED
runs are kept, ABORTED ones retried, then left out.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import optim, train
from ..config import Binding, ConfigError, bind
from ..data import packing
from ..losses import distill as distill_loss
from ..losses import masked
from ..losses.divergence import Divergence
from ..losses.sampled import sampled
from ..models import moe, transformer
from ..models.config import ModelConfig
from ..rollout import sampler
from ..rollout.agent import Engine, Limits
from ..sharding import flatten_tokens
from ..types import ABORTED, Metrics, Params, Rollout, TrainState
from . import experts, full, kept_runs, mixtures, scoring
from .scoring import Placed, Teacher
from .setting import Setting, train_stage
from .sft import router_metrics
from .written_by_teachers import TeachersEngine


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The paper gives no k, learning rate, batch or steps for this stage: those defaults are ours."""

    steps: int = 60  # rollout-and-update steps
    prompts: int = 32  # unique tasks per domain and step
    lengths: tuple[int, ...] = (1, 2, 4, 8)  # lengths of those tasks in steps, in equal shares
    of: dict[str, tuple[experts.Prompts, ...]] = dataclasses.field(default_factory=dict)  # domain -> its own, instead of ``lengths``
    rows: int = 12  # packed rows per domain and step; runs that find no room are left out and counted
    rows_of: dict[str, int] = dataclasses.field(default_factory=dict)  # domain -> its own, instead of ``rows``, where runs differ in length
    max_length: int = 512  # tokens per packed row, at least limits.max_length
    k: int = 16  # ids on which student and teacher are compared
    mode: Literal["salient", "tail", "sampled", "full"] = (
        "salient"  # renormalised on S (the paper); with one more class for the rest; written token only; all units, k is not read
    )
    tail_below: float = 0.0  # mode salient: tokens whose student has less mass on S than this are compared as in mode tail; 0: none
    divergence: Divergence = "reverse"  # the paper's; forward and jensen_shannon in every mode
    reduction: Literal["domain_mean", "sample_mean", "token_mean"] = "domain_mean"  # domain_mean is the paper's
    own_weight: float = 1.0  # of the run's own teacher in the target, the others' equal; 1: hard routing (the paper's). See mixtures
    rollouts: Literal["student", "teacher"] = "student"  # who writes the runs: student is on-policy (the paper's); see written_by_teachers
    coverage_every: int = 1  # steps between measurements of the student's mass on S: one log-sum-exp over the vocabulary; 0: never
    teacher_max_length: int = 0  # tokens of a run in a teacher's other tokenizer, the rest is masked and counted; 0: max_length
    optimizer: Binding = bind(optim.adamw, learning_rate=1e-3, final=1.0, weight_decay=0.0)  # a function of (specs, steps)
    limits: Limits = Limits()  # budgets of the rollouts
    replay_routes: bool = False  # train through the experts taken while sampling (arXiv 2510.11370); needs limits.record_routes
    microbatches: int = 1  # gradient accumulation
    vocab_block: int = 8192  # ids per block when teachers are scored
    save_every: int = 20  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    log_every: int = 1  # steps between lines of metrics.jsonl

    def __post_init__(self):
        for name in ("steps", "prompts", "rows", "max_length", "k", "microbatches", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"DistillConfig.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("coverage_every", "teacher_max_length"):
            if getattr(self, name) < 0:
                raise ConfigError(f"DistillConfig.{name} is {getattr(self, name)}; it must not be negative")
        if self.max_length < self.limits.max_length:
            raise ConfigError(
                f"DistillConfig.max_length is {self.max_length}; runs may be limits.max_length = {self.limits.max_length} long"
            )
        if self.mode == "sampled" and self.limits.temperature != 1:
            raise ConfigError(
                f"DistillConfig.mode 'sampled' is an estimate from tokens drawn at temperature 1, and limits.temperature is "
                f"{self.limits.temperature}; set it to 1.0"
            )
        if not 0 <= self.tail_below <= 1 or (self.tail_below and self.mode != "salient"):
            raise ConfigError(
                f"DistillConfig.tail_below is {self.tail_below} in mode '{self.mode}'; it is a share of probability from 0 to 1, for mode "
                "'salient' only"
            )
        for domain, rows in self.rows_of.items():
            if rows < 1:
                raise ConfigError(f"DistillConfig.rows_of.{domain} is {rows}; it must be at least 1")
        if self.mode == "full" and self.rows % self.microbatches:
            raise ConfigError(
                f"DistillConfig.rows is {self.rows} and microbatches {self.microbatches}; mode 'full' needs a multiple of them, so that "
                "every micro-batch has rows of every domain"
            )
        if self.mode == "full" and any(rows != self.rows for rows in self.rows_of.values()):
            raise ConfigError("DistillConfig.rows_of is set in mode 'full', which takes as many rows of every domain; set rows alone")
        if not 0 <= self.own_weight <= 1:
            raise ConfigError(f"DistillConfig.own_weight is {self.own_weight}; it is a share of the target, from 0 to 1")
        if self.own_weight < 1 and self.mode == "full":
            raise ConfigError(
                f"DistillConfig.own_weight is {self.own_weight} in mode 'full', which compares with one teacher at a time; set mode "
                "'salient' with k = the size of the vocabulary, which is the same, or own_weight = 1.0"
            )
        if self.rollouts == "teacher":
            for wrong, what in ((self.mode == "sampled", "mode 'sampled', an estimate from"), (self.replay_routes, "replay_routes, of")):
                if wrong:
                    raise ConfigError(f"DistillConfig.rollouts is 'teacher' with {what} what the student wrote; set rollouts = 'student'")
        if self.replay_routes and not self.limits.record_routes:
            raise ConfigError("DistillConfig.replay_routes is True but nothing is recorded: set limits.record_routes = True")


def rows_in(cfg: DistillConfig, domain: str) -> int:
    """Packed rows of a domain in a step."""
    return cfg.rows_of.get(domain, cfg.rows)


def weigh(data: dict[str, Any], num_domains: int, reduction: str) -> dict[str, Any]:
    batch = data["batch"]
    return {**data, "weights": masked.token_weights(batch.mask, batch.segment_ids, batch.domains, num_domains, reduction)}


def loss(
    params: Params,
    data: dict[str, Any],
    share: float,
    model: ModelConfig,
    cfg: DistillConfig,
    members: Any = None,
    frozen: full.Frozen | None = None,
) -> tuple[jax.Array, Metrics]:
    """SVA on the tokens the student wrote; targets are arrays, so no teacher is differentiated. Routes in the batch are replayed.

    members: which ids each class of the targets sums over (``scoring.make_scorers``); None: every id is a class. frozen: the teachers'
    matrices, in mode "full" only."""
    batch, flat = data["batch"], flatten_tokens
    hidden, aux = transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model, batch.routes)
    unembed = transformer.unembed(params, model)
    states, hidden, weights = hidden, flat(hidden), flat(data["weights"])
    if cfg.mode == "full":
        value, out = full.loss(states, unembed, data["full"], frozen, data["weights"], cfg.divergence, cfg.vocab_block)
    elif cfg.mode == "sampled":
        arrays = (hidden, unembed, flat(batch.targets), flat(data["score"]), weights)
        value, out = sampled(*arrays, divergence=cfg.divergence, block=cfg.vocab_block)
    else:
        value, out = distill_loss.sva(
            hidden,
            unembed,
            flat(data["teacher_logits"]),
            flat(data["support"]),
            weights,
            mode=cfg.mode,
            tail_below=cfg.tail_below,
            divergence=cfg.divergence,
            teacher_logsumexp=flat(data["teacher_logsumexp"]),
            coverage=data["measured"][0] if cfg.coverage_every > 1 else cfg.coverage_every == 1,
            block=cfg.vocab_block,
            members=members,
            alone=flat(data["alone"]) if "alone" in data else None,
        )
    count = out["distill/tokens"]
    counts = {name: x for name, x in out.items() if name.endswith("tokens")}
    sums = {name: x * counts.get(f"{name}_tokens", count) for name, x in out.items() if name not in counts}
    return value + share * aux["loss"], {"sva": value, **counts, **sums, **router_metrics(aux, share)}


def finish(sums: Metrics) -> Metrics:
    """Sums over micro-batches to means over the tokens the loss looked at, or over "<name>_tokens" where a metric has such a count."""
    out = dict(sums)
    for name in sums:
        if name.startswith("distill/") and not name.endswith("tokens"):
            out[name] = sums[name] / jnp.maximum(sums.get(f"{name}_tokens", sums["distill/tokens"]), 1.0)
    return out


def pack_domain(rollouts: list[Rollout], index: int, rows: int, max_length: int, replay: ModelConfig | None = None) -> Placed:
    """The runs of one domain as [rows, max_length], padding rows where there are fewer; runs that find no room are counted.

    Those are drawn by lot, the same for the same number of runs: packing by itself would leave out the shortest, the most often right.

    replay: the model whose recorded routes are laid out too. Raises ConfigError where they do not fit it.
    """
    runs = [r for r in rollouts if r.status != ABORTED]
    shape = None
    if replay is not None:
        shape = (replay.num_layers, replay.num_experts_active)
        for r in runs:
            if r.routes is None:
                raise ConfigError(f"run {r.task_id} has no recorded routes to replay: sample with limits.record_routes = True")
            moe.check_routes(r.routes, replay)
    lot = np.random.default_rng(len(runs)).permutation(len(runs))
    room = packing.fitting([[len(runs[i].tokens)] for i in lot], rows, max_length)
    left_out, runs = len(runs) - room, [runs[i] for i in sorted(lot[:room])]
    examples = [packing.Example(tokens=r.tokens, mask=r.sampled, domain=index, routes=r.routes) for r in runs]
    plan = packing.plan([len(e) for e in examples], max_length, policy="drop")[0]
    placed, kept = plan[:rows], []
    for number, row in enumerate(placed):
        starts = np.cumsum([0, *(stop - start for start, stop in ((s, e) for _, s, e in row))])
        kept += [(runs[i], number, int(at)) for (i, _, _), at in zip(row, starts, strict=False)]
    packed = [tuple(examples[i] for i, _, _ in row) for row in placed]
    batch = packing.to_batch([*packed, *[()] * (rows - len(packed))], max_length, routes=shape)
    columns = zip(*kept, strict=True) if kept else ((), (), ())
    return Placed(batch, *columns, left_out + sum(len(row) for row in plan[rows:]))


class OnPolicy:
    """A train.Source that samples its batches from the student it trains. Stateless: step and seed say everything. With a
    ``TeachersEngine`` they are sampled from the teachers."""

    def __init__(
        self,
        cfg: DistillConfig,
        setting: Setting,
        engine: Engine | TeachersEngine,
        scorers: dict[str, scoring.Scorer] | dict[str, mixtures.MixedScorer],
        stage: str = "distill",
    ):
        self.cfg, self.setting, self.engine, self.scorers, self.stage = cfg, setting, engine, scorers, stage

    def next(self, state: TrainState) -> tuple[dict[str, Any], Metrics]:
        cfg, setting, at = self.cfg, self.setting, int(state.step)
        began = time.perf_counter()
        sources = {d: cfg.of.get(d, (experts.Prompts(cfg.lengths),)) for d in setting.domains}
        tasks = [t for d in setting.domains for t in experts.mixed_prompts(setting.families[d], sources[d], cfg.prompts, at, setting.seed)]
        rollouts, counts = self.engine.run(state.params, tasks, seed=sampler.seed_of(setting.seed, self.stage, at))
        sampled = time.perf_counter()
        kept_runs.keep_some(setting.workdir, self.stage, rollouts, at, cfg.save_every)
        pieces, left_out, shares, replay = [], 0, {}, setting.model if cfg.replay_routes else None
        for index, domain in enumerate(setting.domains):
            placed = pack_domain([r for r in rollouts if r.domain == domain], index, rows_in(cfg, domain), cfg.max_length, replay)
            batch, scores, found = self.scorers[domain].score(placed, setting.put(placed.batch))
            left_out += placed.left_out
            shares |= {f"{name}/{domain}": value for name, value in found.items()}
            pieces.append({"batch": batch, **scores})
        if cfg.mode == "full":
            data = {"batch": full.together([p.pop("batch") for p in pieces], cfg.microbatches), "full": pieces}
        else:
            data = jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces)
        if cfg.coverage_every > 1:
            data["measured"] = jnp.full(data["batch"].tokens.shape[0], at % cfg.coverage_every == 0)
        out = {
            "tokens": int((data["batch"].segment_ids > 0).sum()),
            "rollout/left_out": left_out,
            "rollout/seconds": sampled - began,
            "score/seconds": time.perf_counter() - sampled,
            **shares,
            **over_domains(shares),
            **rollout_metrics(rollouts),
        }
        return data, {**out, **{f"rollout/{k}": v for k, v in counts.items()}}

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        del state  # nothing to set: the step in TrainState is the position


def over_domains(shares: Metrics) -> Metrics:
    """The shares of all aligned positions, from those of each domain: "align/masked" from "align/masked/search", ..."""
    counts = {name.rpartition("/")[2]: value for name, value in shares.items() if name.startswith("align/positions/")}
    total = sum(counts.values())
    out = {"align/positions": total} if counts else {}
    for name in {n.rpartition("/")[0] for n in shares} - {"align/positions"}:
        out[name] = sum(shares[f"{name}/{d}"] * n for d, n in counts.items()) / max(total, 1.0)
    return out


def rollout_metrics(rollouts: list[Rollout]) -> Metrics:
    """Success per domain, statuses as shares, mean length."""
    out = {f"rollout/{status.lower()}": n / len(rollouts) for status, n in Counter(r.status for r in rollouts).items()}
    for domain in sorted({r.domain for r in rollouts}):
        out[f"rollout/success/{domain}"] = float(np.mean([r.reward for r in rollouts if r.domain == domain]))
    logp, written = (np.concatenate([getattr(r, name) for r in rollouts]) for name in ("logp", "sampled"))
    if written.any():  # what a token drawn at temperature 1 says of the entropy
        out["rollout/entropy"] = float(-np.mean(logp[written > 0]))
    return {**out, "rollout/mean_tokens": float(np.mean([len(r.tokens) for r in rollouts]))}


def train_step(cfg: DistillConfig, model: ModelConfig, num_domains: int, tx: optax.GradientTransformation, members: Any = None) -> Callable:
    """The jitted step(state, data, frozen) of this stage, its state donated; arguments as of ``loss``."""
    weigh_fn = functools.partial(weigh, num_domains=num_domains, reduction=cfg.reduction)

    def step(state: TrainState, data: Any, frozen: full.Frozen | None) -> tuple[TrainState, Metrics]:
        loss_fn = functools.partial(loss, model=model, cfg=cfg, members=members, frozen=frozen)
        return train.make_train_step(loss_fn, tx, cfg.microbatches, weigh_fn, finish, transformer.specs(model))(state, data)

    return jax.jit(step, donate_argnums=(0,))


def make_scorers(cfg: DistillConfig, teachers: dict[str, Teacher], setting: Setting) -> tuple[dict[str, Any], Any]:
    """(domain -> scorer, ``members`` for the loss): of each domain's own teacher, or of the mixture. teachers: in the order of the domains.

    Raises ConfigError where teachers of another tokenizer are mixed."""
    sampled = cfg.mode == "sampled"
    if cfg.own_weight < 1:
        return mixtures.make_scorers(teachers, cfg.own_weight, setting.tokenizer, cfg.k, cfg.vocab_block, sampled), None
    return scoring.make_scorers(
        teachers,
        setting.tokenizer,
        cfg.k,
        cfg.vocab_block,
        sampled,
        cfg.limits.show_tools,
        cfg.teacher_max_length or cfg.max_length,
        cfg.mode == "full",
    )


def run(cfg: DistillConfig, params: Params, teachers: dict[str, Teacher], setting: Setting, stage: str = "distill") -> Params:
    """Distil the teachers (domain -> Teacher) into the student ``params``. Resumable at every step.

    Raises ConfigError for a domain without a teacher, as ``scoring.check_mesh``, and for teachers of another tokenizer where they are
    mixed or write the runs."""
    missing = [d for d in setting.domains if d not in teachers]
    if missing:
        raise ConfigError(f"distill: no teacher for domain {missing[0]}; teachers are {', '.join(sorted(teachers))}")
    for domain in setting.domains:
        scoring.check_mesh(teachers[domain], setting.mesh, f"of {domain}")
    teachers = {d: teachers[d] for d in setting.domains}
    scorers, members = make_scorers(cfg, teachers, setting)
    frozen = None
    if cfg.mode == "full":
        full.check(teachers, setting.mesh is not None)
        frozen = full.frozen([*teachers.values()], cfg.vocab_block)
    engine: Engine | TeachersEngine = Engine(setting.model, setting.tokenizer, cfg.limits)
    if cfg.rollouts == "teacher":
        engine = TeachersEngine(teachers, setting.tokenizer, cfg.limits)

    def make_step(tx: optax.GradientTransformation) -> Callable:
        compiled = train_step(cfg, setting.model, len(setting.domains), tx, members)
        return lambda state, data: compiled(state, data, frozen)  # an argument: a constant would be part of the program

    def make_source() -> OnPolicy:
        return OnPolicy(cfg, setting, engine, scorers, stage)

    return train_stage(setting, cfg, params, stage, make_step, make_source)
