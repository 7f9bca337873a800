"""Stage 3: multi-teacher domain-routed on-policy distillation with salient vocabulary alignment (arXiv 2606.30616, 2.3 and 4.3).

At every step a frozen copy of the student (its parameters at that step) rolls out fresh tasks of every domain; only the teacher of
a run's domain scores it, on the student's own tokens; the student learns by renormalised reverse KL on the teacher's k best ids,
averaged within runs, then within domains, then over domains. TRUNCATED runs are kept, ABORTED ones retried, then left out.
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
from ..models import moe, transformer
from ..models.config import ModelConfig
from ..rollout.agent import Engine, Limits
from ..sharding import flatten_tokens, unflatten_tokens
from ..types import ABORTED, Batch, Metrics, Params, Rollout, TrainState
from . import experts
from .setting import Setting, train_stage
from .sft import router_metrics


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The paper gives no k, learning rate, batch or steps for this stage: those defaults are ours."""

    steps: int = 60  # rollout-and-update steps
    prompts: int = 32  # unique tasks per domain and step
    lengths: tuple[int, ...] = (1, 2, 4, 8)  # lengths of those tasks in steps, in equal shares
    rows: int = 12  # packed rows per domain and step; runs that find no room are left out and counted
    max_length: int = 512  # tokens per packed row, at least limits.max_length
    k: int = 16  # ids on which student and teacher are compared
    mode: Literal["salient", "tail"] = "salient"  # renormalised on S (the paper), or with one more class for the rest of the vocabulary
    reduction: Literal["domain_mean", "sample_mean", "token_mean"] = "domain_mean"  # domain_mean is the paper's
    coverage: bool = True  # also measure how much of the student's mass S holds; costs one log-sum-exp over the vocabulary
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
        if self.max_length < self.limits.max_length:
            raise ConfigError(
                f"DistillConfig.max_length is {self.max_length}; runs may be limits.max_length = {self.limits.max_length} long"
            )
        if self.replay_routes and not self.limits.record_routes:
            raise ConfigError("DistillConfig.replay_routes is True but nothing is recorded: set limits.record_routes = True")


def weigh(data: dict[str, Any], num_domains: int, reduction: str) -> dict[str, Any]:
    batch = data["batch"]
    return {**data, "weights": masked.token_weights(batch.mask, batch.segment_ids, batch.domains, num_domains, reduction)}


def loss(params: Params, data: dict[str, Any], share: float, model: ModelConfig, cfg: DistillConfig) -> tuple[jax.Array, Metrics]:
    """SVA on the tokens the student wrote; targets are arrays, so no teacher is differentiated. Routes in the batch are replayed."""
    batch, flat = data["batch"], flatten_tokens
    hidden, aux = transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model, batch.routes)
    value, out = distill_loss.sva(
        flat(hidden),
        transformer.unembed(params, model),
        flat(data["teacher_logits"]),
        flat(data["support"]),
        flat(data["weights"]),
        mode=cfg.mode,
        teacher_logsumexp=flat(data["teacher_logsumexp"]),
        coverage=cfg.coverage,
        block=cfg.vocab_block,
    )
    tokens = out["distill/tokens"]
    sums = {name: x if name == "distill/tokens" else x * tokens for name, x in out.items()}
    return value + share * aux["loss"], {"sva": value, **sums, **router_metrics(aux, share)}


def finish(sums: Metrics) -> Metrics:
    """Sums over micro-batches to means over the tokens the loss looked at."""
    some = jnp.maximum(sums["distill/tokens"], 1.0)
    return {n: x / some if n.startswith("distill/") and n != "distill/tokens" else x for n, x in sums.items()}


def score(teacher: Params, batch: Batch, model: ModelConfig, k: int, block: int) -> dict[str, jax.Array]:
    """A teacher's k best ids at every position: {"support" int32, "teacher_logits" [B, T, k], "teacher_logsumexp" [B, T]}.

    It chooses its own experts: the routes in the batch are the student's.
    """
    hidden, _ = transformer.apply(teacher, batch.tokens, batch.positions, batch.segment_ids, model)
    found = distill_loss.teacher_targets(flatten_tokens(hidden), transformer.unembed(teacher, model), k, block)
    b, t = batch.tokens.shape
    names = {"support": found.support, "teacher_logits": found.logits, "teacher_logsumexp": found.logsumexp}
    return {name: unflatten_tokens(x, b, t) for name, x in names.items()}


def pack_domain(rollouts: list[Rollout], index: int, rows: int, max_length: int, replay: ModelConfig | None = None) -> tuple[Batch, int]:
    """The runs of one domain as [rows, max_length] (padding rows where there are fewer) and how many runs found no room.

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
    examples = [packing.Example(tokens=r.tokens, mask=r.sampled, domain=index, routes=r.routes) for r in runs]
    packed, _ = packing.pack(examples, max_length, policy="drop")
    left_out = sum(len(row) for row in packed[rows:])
    return packing.to_batch([*packed[:rows], *[()] * (rows - len(packed))], max_length, routes=shape), left_out


class OnPolicy:
    """A train.Source that samples its batches from the student it trains. Stateless: step and seed say everything."""

    def __init__(self, cfg: DistillConfig, setting: Setting, engine: Engine, teachers: dict[str, Params]):
        self.cfg, self.setting, self.engine, self.teachers = cfg, setting, engine, teachers
        self.score = jax.jit(functools.partial(score, model=setting.model, k=cfg.k, block=cfg.vocab_block))

    def next(self, state: TrainState) -> tuple[dict[str, Any], Metrics]:
        cfg, setting, at = self.cfg, self.setting, int(state.step)
        began = time.perf_counter()
        tasks = [t for d in setting.domains for t in experts.prompts(d, cfg.lengths, cfg.prompts, at, setting.seed)]
        rollouts, counts = self.engine.run(state.params, tasks, seed=setting.seed * 1_000_003 + at)
        sampled = time.perf_counter()
        pieces, left_out, replay = [], 0, setting.model if cfg.replay_routes else None
        for index, domain in enumerate(setting.domains):
            batch, lost = pack_domain([r for r in rollouts if r.domain == domain], index, cfg.rows, cfg.max_length, replay)
            batch, left_out = setting.put(batch), left_out + lost
            pieces.append({"batch": batch, **self.score(self.teachers[domain], batch)})
        data = jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces)
        out = {
            "tokens": int(sum((p["batch"].segment_ids > 0).sum() for p in pieces)),
            "rollout/left_out": left_out,
            "rollout/seconds": sampled - began,
            "score/seconds": time.perf_counter() - sampled,
            **rollout_metrics(rollouts),
        }
        return data, {**out, **{f"rollout/{k}": v for k, v in counts.items()}}

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        del state  # nothing to set: the step in TrainState is the position


def rollout_metrics(rollouts: list[Rollout]) -> Metrics:
    """Success per domain, statuses as shares, mean length."""
    out = {f"rollout/{status.lower()}": n / len(rollouts) for status, n in Counter(r.status for r in rollouts).items()}
    for domain in sorted({r.domain for r in rollouts}):
        out[f"rollout/success/{domain}"] = float(np.mean([r.reward for r in rollouts if r.domain == domain]))
    return {**out, "rollout/mean_tokens": float(np.mean([len(r.tokens) for r in rollouts]))}


def run(cfg: DistillConfig, params: Params, teachers: dict[str, Params], setting: Setting, stage: str = "distill") -> Params:
    """Distil the teachers (domain -> parameters, same architecture and tokenizer) into the student ``params``. Resumable at every step."""
    missing = [d for d in setting.domains if d not in teachers]
    if missing:
        raise ConfigError(f"distill: no teacher for domain {missing[0]}; teachers are {', '.join(sorted(teachers))}")

    def make_step(tx: optax.GradientTransformation) -> Callable:
        loss_fn = functools.partial(loss, model=setting.model, cfg=cfg)
        weigh_fn = functools.partial(weigh, num_domains=len(setting.domains), reduction=cfg.reduction)
        return jax.jit(train.make_train_step(loss_fn, tx, cfg.microbatches, weigh_fn, finish), donate_argnums=(0,))

    def make_source() -> OnPolicy:
        return OnPolicy(cfg, setting, Engine(setting.model, setting.tokenizer, cfg.limits), teachers)

    return train_stage(setting, cfg, params, stage, make_step, make_source)
