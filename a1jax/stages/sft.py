"""Stage 1: supervised fine-tuning on the tokens the model writes (arXiv 2606.30616, 4.1); also what teachers and controls are made by."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import optim, train
from ..config import Binding, ConfigError, bind
from ..data import batches
from ..data.packing import Example
from ..losses import cross_entropy, masked
from ..models import transformer
from ..models.config import ModelConfig
from ..sharding import flatten_tokens
from ..types import Batch, Metrics, Params, TrainState
from .setting import Setting, train_stage


@dataclasses.dataclass(frozen=True)
class Phase:
    """One piece of a curriculum: lengths grow from phase to phase."""

    share: float  # of the stage's steps; the shares of all phases add up to 1
    max_steps: int  # only runs up to this many steps are seen


@dataclasses.dataclass(frozen=True)
class SftConfig:
    steps: int = 400  # optimizer steps
    rows: int = 16  # packed rows per step (batch size); a multiple of microbatches and of the mesh's data axes
    max_length: int = 512  # tokens per packed row
    optimizer: Binding = bind(optim.adamw)  # a function of (specs, steps)
    phases: tuple[Phase, ...] = ()  # empty: all runs from the start
    policy: Literal["split", "drop"] = "drop"  # what happens to runs longer than max_length; counted either way
    reduction: Literal["token_mean", "sample_mean", "domain_mean"] = "token_mean"  # how token losses are averaged
    microbatches: int = 1  # gradient accumulation: memory shrinks, value and gradient stay
    vocab_block: int = 8192  # ids per block of the loss; memory of the logits is rows x max_length x this
    loss_tile: int | None = None  # tokens per step of the loss, those without weight skipped: 256 is fastest on one CPU; None under a mesh
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    log_every: int = 10  # steps between lines of metrics.jsonl

    def __post_init__(self):
        for name in ("steps", "rows", "max_length", "microbatches", "vocab_block", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"SftConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.rows % self.microbatches:
            raise ConfigError(f"SftConfig.rows is {self.rows}; it must be a multiple of microbatches = {self.microbatches}")
        if self.phases and abs(sum(p.share for p in self.phases) - 1.0) > 1e-6:
            raise ConfigError(f"SftConfig.phases have shares that add up to {sum(p.share for p in self.phases):g}; they must add up to 1")


def weigh(batch: Batch, num_domains: int, reduction: str) -> dict[str, Any]:
    """The batch with the weight of every token, computed on the whole batch."""
    weights = masked.token_weights(batch.mask, batch.segment_ids, batch.domains, num_domains, reduction)
    return {"batch": batch, "weights": weights}


def loss(
    params: Params, data: dict[str, Any], share: float, model: ModelConfig, vocab_block: int, tile: int | None
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy on the tokens with weight, from hidden states in blocks of the vocabulary, plus the router's losses."""
    batch, weights = data["batch"], data["weights"]
    hidden, aux = transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model)
    value, out = cross_entropy.blocked_cross_entropy(
        flatten_tokens(hidden),
        transformer.unembed(params, model),
        flatten_tokens(batch.targets),
        flatten_tokens(weights),
        vocab_block,
        tile,
    )
    tokens = out["ce/tokens"]
    sums = {"ce": value, "ce/loss": out["ce/loss"] * tokens, "ce/accuracy": out["ce/accuracy"] * tokens, "ce/tokens": tokens}
    return value + share * aux["loss"], {**sums, **router_metrics(aux, share)}


def finish(sums: Metrics) -> Metrics:
    """Sums over micro-batches to means over the tokens the loss looked at."""
    some = jnp.maximum(sums["ce/tokens"], 1.0)
    return {**sums, "ce/loss": sums["ce/loss"] / some, "ce/accuracy": sums["ce/accuracy"] / some}


def router_metrics(aux: Metrics, share: float) -> Metrics:
    """What a model's aux says of its router, scaled so that micro-batches add up to their mean: scalars "router/load_balance", "router/z",
    "router/entropy", "router/max_load", and the array "router/load" [L, E], each expert's share of the pairs in its layer."""
    return {**{name: share * value for name, value in aux.items() if name.startswith("router/")}, "router/load": share * aux["load"]}


class Packed:
    """A train.Source over one grain loader; its state is the loader's position."""

    def __init__(self, loader: batches.Loader, setting: Setting):
        self.loader, self.setting = loader, setting

    def next(self, state: TrainState) -> tuple[Batch, Metrics]:
        del state
        batch = next(self.loader)
        return self.setting.put(batch), {"tokens": int((batch.segment_ids > 0).sum())}

    def get_state(self) -> dict:
        return self.loader.get_state()

    def set_state(self, state: dict) -> None:
        self.loader.set_state(state)


class Curriculum:
    """A train.Source with one packed loader per phase, chosen by the step; data: pairs of length in steps and example."""

    def __init__(self, cfg: SftConfig, data: Sequence[tuple[int, Example]], setting: Setting):
        phases = cfg.phases or (Phase(1.0, max(steps for steps, _ in data)),)
        ends = np.cumsum([p.share for p in phases]) * cfg.steps
        self.ends = [round(float(e)) for e in ends]
        self.phases = [
            Packed(
                batches.loader(
                    [e for steps, e in data if steps <= p.max_steps],
                    batch_size=cfg.rows,
                    max_length=cfg.max_length,
                    seed=setting.seed + i,
                    policy=cfg.policy,
                ),
                setting,
            )
            for i, p in enumerate(phases)
        ]

    def next(self, state: TrainState) -> tuple[Batch, Metrics]:
        phase = int(np.searchsorted(self.ends, int(state.step), side="right"))
        return self.phases[min(phase, len(self.phases) - 1)].next(state)

    def get_state(self) -> dict:
        return {"phases": [phase.get_state() for phase in self.phases]}

    def set_state(self, state: dict) -> None:
        for phase, position in zip(self.phases, state["phases"], strict=True):
            phase.set_state(position)


@functools.lru_cache(maxsize=8)
def jitted_step(
    model: ModelConfig, num_domains: int, reduction: str, vocab_block: int, tile: int | None, microbatches: int, optimizer: Binding
):
    """The train step of this stage, its state donated. Stages that differ only in data, rates and length share it, compiled."""
    loss_fn = functools.partial(loss, model=model, vocab_block=vocab_block, tile=tile)
    weigh_fn = functools.partial(weigh, num_domains=num_domains, reduction=reduction)
    tx = optimizer(transformer.specs(model), 1)
    return jax.jit(train.make_train_step(loss_fn, tx, microbatches, weigh_fn, finish), donate_argnums=(0,))


def train_step(cfg: SftConfig, model: ModelConfig, num_domains: int) -> Callable:
    """The jitted step(state, batch) of a stage with these settings. Equal programs share one, whatever the rates in the state."""
    program = optim.program(cfg.optimizer, cfg.steps)
    return jitted_step(model, num_domains, cfg.reduction, cfg.vocab_block, cfg.loss_tile, cfg.microbatches, program)


def run(
    cfg: SftConfig,
    params: Params,
    source: train.Source,
    setting: Setting,
    stage: str = "sft",
    probe: Callable[[Params], Metrics] | None = None,
    probe_every: int = 1,
) -> Params:
    """Train on the batches of ``source``, starting from ``params``; resumable; returns the new parameters. probe: see train.fit."""

    def make_step(tx: optax.GradientTransformation) -> Callable:
        del tx
        return train_step(cfg, setting.model, len(setting.domains))

    return train_stage(setting, cfg, params, stage, make_step, lambda: source, probe=probe, probe_every=probe_every)
