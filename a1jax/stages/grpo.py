"""Stage 2 by reinforcement: group-relative policy optimisation of one domain's teacher (arXiv 2606.30616, section 4.2).

At every step the model as it is rolls out P prompts G times each (``groups``); rewards become advantages within each group; one or more
updates follow on one packed batch of static shape. The reference of the KL is the model that the stage began with, frozen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from .. import optim, train
from ..config import Binding, ConfigError, bind
from ..losses import grpo as grpo_loss
from ..losses.token_logp import token_logp
from ..models import transformer
from ..models.config import ModelConfig
from ..rollout import judges, rewards
from ..rollout.agent import Engine, Limits
from ..sharding import flatten_tokens, unflatten_tokens
from ..types import Batch, Metrics, Params, TrainState
from . import experts, groups, task_pool, verdicts
from .setting import Setting, train_stage
from .sft import router_metrics


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an update minimises; clip, KL and entropy are the paper's numbers, see ``losses.grpo``."""

    clip_low: float = 0.2  # a token's ratio of probabilities stops to pay below 1 - this
    clip_high: float = 0.28  # and above 1 + this
    dual_clip: float | None = None  # most that a token of negative advantage may cost, in advantages; above 1; None: no bound
    kl_coefficient: float = 0.001  # per nat of KL to the stage's first parameters; 0: no reference is scored
    kl: Literal["k1", "k2", "k3"] = "k3"  # its estimate
    entropy_coefficient: float = 0.0001  # per nat of entropy, paid for
    reduction: Literal["sample_mean", "token_mean", "fixed_length"] = "sample_mean"  # how the losses of tokens are averaged
    fixed_length: int = 0  # reduction fixed_length only: tokens that a run's sum is divided by; the response budget is usual
    old: Literal["rollout", "recomputed"] = "rollout"  # whose log-probabilities the ratio starts from: the sampler's (the paper) or
    # the training forward's before the first update, then corrected by the truncated ratio of the two
    truncation: float = 2.0  # old recomputed only: bound of that ratio

    def __post_init__(self):
        if (self.reduction == "fixed_length") != (self.fixed_length > 0):
            raise ConfigError(
                f"Objective.reduction is '{self.reduction}' and fixed_length {self.fixed_length}; fixed_length belongs to that reduction, "
                "and must then be at least 1"
            )
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0 or self.truncation <= 0:
            raise ConfigError(
                f"Objective: clip_low {self.clip_low} must be in [0, 1], clip_high {self.clip_high} not negative, "
                f"truncation {self.truncation} above 0"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"Objective.dual_clip is {self.dual_clip}; it must be above 1, or None for no bound")
        if self.kl_coefficient < 0 or self.entropy_coefficient < 0:
            raise ConfigError("Objective.kl_coefficient and Objective.entropy_coefficient must not be negative")


PAPER_LIMITS = Limits(max_turns=300, max_turn_tokens=4096, max_length=131_072, temperature=1.0)
"""The search teacher's budgets in the paper: 300 tool calls (one a turn), 4,096 tokens a response (of a turn), 131,072 a run. What else
``Limits`` has is the machine's: slots, feed_tokens, workers."""


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Prompts, rollouts, clip, KL, entropy, temperature and learning rate are the search teacher's in the paper, which gives no steps.

    Its budgets are ``PAPER_LIMITS``. The default here is smaller, as are ``rows`` and ``max_length``: runs of the embedded domains in the
    small tokenizer have some hundred tokens, and a cache of 131,072 for every slot fits no small machine."""

    steps: int = 60  # rollout-and-update steps
    prompts: int = 32  # groups per step
    samples: int = 8  # runs per group
    sources: tuple[experts.Prompts, ...] = (experts.Prompts((1, 2, 4, 8)),)  # what tasks are drawn from, in equal shares
    pool: task_pool.Pool | None = None  # a finite choice of those tasks, reused in epochs; None: fresh tasks every step
    reward: Binding = bind(rewards.outcome_reward)  # trajectory -> rollout.rewards.Reward; metadata["rubrics"] is there in every run
    judge: Binding | None = None  # Case -> Verdict, as of rollout.judges: of answers, in the verifiers' place; or bind(RemoteJudge, ...)
    advantage: Literal["group", "papo"] = "group"  # papo: failed runs are also compared by the share of rubrics met
    deviation: bool = True  # advantages are divided by the group's deviation; False: nearly solved prompts weigh no more than others
    process_coefficient: float = 0.5  # papo only: weight of that comparison
    drop_equal: bool = True  # dynamic sampling: groups whose runs are all worth the same are dropped
    refills: int = 1  # times per step that dropped groups are replaced by further prompts; each costs rollouts
    overlong: Literal["keep", "mask"] = "keep"  # mask: a TRUNCATED run counts in its group, but its tokens are not learnt from
    objective: Objective = Objective()
    updates: int = 1  # updates on each batch of rollouts, all of it each time
    rows: int = 64  # packed rows per step; groups that find no room are left out whole, their runs counted
    max_length: int = 512  # tokens per packed row, at least limits.max_length
    optimizer: Binding = bind(optim.adamw, learning_rate=1e-6, warmup=0.0, final=1.0)  # a function of (specs, updates)
    limits: Limits = Limits()  # budgets of the rollouts; temperature 1
    replay_routes: bool = False  # train through the experts taken while sampling (arXiv 2510.11370); needs limits.record_routes
    microbatches: int = 1  # gradient accumulation
    vocab_block: int = 8192  # ids per block of the loss; memory of the logits is rows x max_length / microbatches x this
    save_every: int = 20  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    log_every: int = 1  # steps between lines of metrics.jsonl

    def __post_init__(self):
        for name in ("steps", "prompts", "updates", "rows", "max_length", "microbatches", "vocab_block", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"GrpoConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.pool is None and self.steps * self.prompts > experts.LANE:
            raise ConfigError(
                f"GrpoConfig: {self.steps} steps of {self.prompts} prompts want {self.steps * self.prompts} fresh tasks, and a stage has "
                f"{experts.LANE}; set pool to reuse some, or take fewer steps or prompts"
            )
        if self.samples < 2:
            raise ConfigError(f"GrpoConfig.samples is {self.samples}; a group needs at least 2 runs to be compared")
        if not self.sources or self.refills < 0 or self.process_coefficient < 0:
            raise ConfigError("GrpoConfig.sources must name at least one source; refills and process_coefficient must not be negative")
        if self.rows % self.microbatches:
            raise ConfigError(f"GrpoConfig.rows is {self.rows}; it must be a multiple of microbatches = {self.microbatches}")
        if self.max_length < self.limits.max_length:
            raise ConfigError(f"GrpoConfig.max_length is {self.max_length}; runs may be limits.max_length = {self.limits.max_length} long")
        if self.limits.temperature <= 0:
            raise ConfigError("GrpoConfig.limits.temperature is 0: all runs of a group would be one; the paper samples at 1.0")
        if self.judge is not None:
            judges.opened(self.judge)
        if self.replay_routes and not self.limits.record_routes:
            raise ConfigError("GrpoConfig.replay_routes is True but nothing is recorded: set limits.record_routes = True")


def weigh(data: dict[str, Any], objective: Objective) -> dict[str, Any]:
    batch, length = data["batch"], objective.fixed_length or None
    return {**data, "weights": grpo_loss.policy_weights(batch.mask, batch.segment_ids, objective.reduction, length=length)}


def policy(params: Params, batch: Batch, model: ModelConfig, block: int, temperature: float) -> tuple[jax.Array, jax.Array, dict]:
    """(log-probability of every target, entropy), flat [B * T] each, and the forward's aux."""
    hidden, aux = transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model, batch.routes)
    both = token_logp(flatten_tokens(hidden), transformer.unembed(params, model), flatten_tokens(batch.targets), block, temperature)
    return *both, aux


def loss(
    params: Params, data: dict[str, Any], share: float, model: ModelConfig, objective: Objective, block: int, temperature: float
) -> tuple[jax.Array, Metrics]:
    """GRPO on the tokens the model wrote, plus the router's losses. data: as ``groups.Reinforced`` makes it, with "weights"."""
    logp, entropy, aux = policy(params, data["batch"], model, block, temperature)
    flat = {name: flatten_tokens(x) for name, x in data.items() if name != "batch"}
    again = objective.old == "recomputed"
    value, out = grpo_loss.grpo(
        logp,
        flat["old_logp" if again else "rollout_logp"],
        flat["advantages"],
        flat["weights"],
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        ref_logp=flat.get("ref_logp"),
        kl_coefficient=objective.kl_coefficient,
        kl=objective.kl,
        entropy=entropy,
        entropy_coefficient=objective.entropy_coefficient,
        rollout_logp=flat["rollout_logp"] if again else None,
        truncation=objective.truncation,
    )
    count = out.pop("grpo/tokens")
    sums = {name: x * count for name, x in out.items()}
    return value + share * aux["loss"], {"grpo/loss": value, "grpo/tokens": count, **sums, **router_metrics(aux, share)}


def finish(sums: Metrics) -> Metrics:
    """Sums over micro-batches to means over the tokens the loss looked at."""
    some = jnp.maximum(sums["grpo/tokens"], 1.0)
    whole = ("grpo/tokens", "grpo/loss")
    return {name: x / some if name.startswith("grpo/") and name not in whole else x for name, x in sums.items()}


@functools.lru_cache(maxsize=8)
def jitted_step(
    model: ModelConfig, objective: Objective, block: int, temperature: float, microbatches: int, optimizer: Binding
) -> Callable:
    """One update, its state donated. Stages that differ only in data, rates and length share it, compiled."""
    loss_fn = functools.partial(loss, model=model, objective=objective, block=block, temperature=temperature)
    specs = transformer.specs(model)
    weigh_fn = functools.partial(weigh, objective=objective)
    step = train.make_train_step(loss_fn, optimizer(specs, 1), microbatches, weigh_fn, finish, specs)
    return jax.jit(step, donate_argnums=(0,))


def train_step(cfg: GrpoConfig, model: ModelConfig) -> Callable:
    """The jitted update(state, data) of a stage with these settings. Equal programs share one, whatever the rates in the state."""
    program = optim.program(cfg.optimizer, cfg.steps * cfg.updates)
    return jitted_step(model, cfg.objective, cfg.vocab_block, cfg.limits.temperature, cfg.microbatches, program)


def logp_step(cfg: GrpoConfig, model: ModelConfig) -> Callable:
    """The jitted logp(params, batch) of a stage with these settings, see ``jitted_logp``."""
    return jitted_logp(model, cfg.vocab_block, cfg.limits.temperature, cfg.microbatches)


@functools.lru_cache(maxsize=8)
def jitted_logp(model: ModelConfig, block: int, temperature: float, microbatches: int) -> Callable:
    """logp(params, batch) -> float32 [B, T], the log-probability of every target; row slices one after the other, as in the update."""

    def one(params: Params, batch: Batch) -> jax.Array:
        return unflatten_tokens(policy(params, batch, model, block, temperature)[0], *batch.tokens.shape)

    def run(params: Params, batch: Batch) -> jax.Array:
        if microbatches == 1:
            return one(params, batch)
        slices = jax.tree.map(lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:]), batch)
        return jax.lax.map(functools.partial(one, params), slices).reshape(batch.tokens.shape)

    return jax.jit(run)


class Scorer:
    """What is said of a batch before the first update: the reference's log-probabilities, and the model's own where they are wanted.

    The reference is an argument of the compiled program: a constant would be part of it."""

    def __init__(self, cfg: GrpoConfig, model: ModelConfig, reference: Params):
        self.objective, self.reference = cfg.objective, reference
        self.logp = logp_step(cfg, model)

    def __call__(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        out = {}
        if self.objective.kl_coefficient:
            out["ref_logp"] = self.logp(self.reference, batch.replace(routes=None))  # the reference chooses its own experts
        if self.objective.old == "recomputed":
            out["old_logp"] = self.logp(params, batch)
        return out


def run(cfg: GrpoConfig, params: Params, setting: Setting, domain: str, stage: str = "grpo", lane: int = 0) -> Params:
    """Reinforce ``params`` on one domain; returns the new parameters. Resumable at every step, bitwise.

    lane: 0 to 9, another for every stage of a domain, so that no two draw the same tasks. Raises ConfigError for a pool without a task.
    """

    def make_step(tx: optax.GradientTransformation) -> Callable:
        del tx
        step = train_step(cfg, setting.model)

        def updates(state: TrainState, data: Any) -> tuple[TrainState, Metrics]:
            if data is None:  # no group had anything to teach: not even the optimizer's momentum moves
                return state.replace(step=state.step + 1), {"loss": 0.0, "grpo/tokens": 0.0}
            for _ in range(cfg.updates):
                state, out = step(state, data)
            return (state if cfg.updates == 1 else state.replace(step=state.step - (cfg.updates - 1))), out

        return updates

    def make_source() -> groups.Reinforced:
        engine = Engine(setting.model, setting.tokenizer, cfg.limits)
        tasks = task_pool.Tasks(setting.families[domain], cfg.sources, setting.seed, lane)
        if cfg.judge is not None:
            verdicts.check(cfg.judge, tasks.take(0, len(cfg.sources)))  # one of each source
        if cfg.pool is not None:
            tasks = task_pool.choose(cfg.pool, tasks, engine, params, setting.directory(stage) / "pool.json", stage, cfg.judge)
        scorer = Scorer(cfg, setting.model, params)
        return groups.Reinforced(cfg, setting, engine, tasks, setting.domains.index(domain), scorer, stage)

    # The schedule counts updates, of which a step may have several.
    counted = dataclasses.replace(cfg, optimizer=lambda specs, steps: cfg.optimizer(specs, steps * cfg.updates))
    return train_stage(setting, counted, params, stage, make_step, make_source)
