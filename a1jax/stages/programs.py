"""The jitted programs that a stage runs, with abstract arguments: what `a1jax compile` compiles. They are the stages' own functions.

Nothing here makes an array: parameters, state, batches and caches are shapes with the places they would have on the mesh. Where a domain's
teacher is a checkpoint whose folder is not here, it is taken to be of the student's architecture; every teacher is taken to have the
student's tokenizer, because aligning others is the host's work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from .. import params as param_specs
from .. import sharding, train
from ..config import ConfigError
from ..models import decode, flops, transformer
from ..models.config import ModelConfig
from ..rollout import sampler
from ..rollout.agent import Limits
from . import distill, folders, grpo, mixtures, pipeline, scoring, sft, teacher
from .pipeline import Experiment

STAGES = ("sft", "teacher", "distill", "rollout", "control")  # the last is the first again, with more beside it


@dataclasses.dataclass(frozen=True)
class Program:
    """fn: a jitted function; args: its arguments, abstract. tokens: places that one call reads; cost: per token of them.

    beside: what else the stage keeps on the devices meanwhile, name -> abstract arrays. settings: the field of the experiment that the
    sizes come from, as ``--set`` names it."""

    stage: str
    name: str
    fn: Callable
    args: Sequence[Any]
    tokens: int
    cost: flops.Flops
    settings: str
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where programs run: a mesh, or one device without a mesh."""

    mesh: Mesh | None
    device: Any

    def on(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def put(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        """An abstract array with these logical axes. Raises ConfigError where the mesh does not cut it evenly."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(self.device))
        placed = NamedSharding(self.mesh, sharding.partition_spec(axes, self.mesh, shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def like(self, tree: Any, *axes: str | None) -> Any:
        """The tree of shapes with these logical axes in front and whole behind them."""
        return jax.tree.map(lambda x: self.put(x.shape, x.dtype, (*axes, *[None] * (len(x.shape) - len(axes)))), tree)

    def params(self, model: ModelConfig) -> Any:
        """The parameters' shapes where they lie. Raises ConfigError, naming the parameter, where the mesh does not cut it evenly."""
        specs = transformer.specs(model)
        shapes = param_specs.abstract(specs)
        if self.mesh is None:
            placed = jax.tree.map(lambda _: SingleDeviceSharding(self.device), shapes)
        else:
            placed = param_specs.shardings(specs, self.mesh)
        return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)

    def state(self, model: ModelConfig, optimizer: Callable, steps: int) -> Any:
        return train.abstract_state(self.params(model), optimizer(transformer.specs(model), steps))

    def batch(self, rows: int, length: int, routes: tuple[int, int] | None = None) -> Any:
        return sharding.abstract_batch(rows, length, self.mesh, self.device, routes)


def of_stage(cfg: Experiment, stage: str, place: Place) -> list[Program]:
    """The programs of one of STAGES, different ones only: of equal ones that which most is kept beside. Raises ConfigError for sizes that
    the mesh cannot cut."""
    if stage not in STAGES:
        raise ConfigError(f"stage '{stage}' is unknown: choose {', '.join(STAGES)}")
    with place.on():
        found: dict[Any, Program] = {}
        for program in {"sft": _sft, "teacher": _teacher, "distill": _distill, "rollout": _rollout, "control": _control}[stage](cfg, place):
            leaves = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(program.args))
            other = found.setdefault((program.fn, leaves), program)
            if held_bytes(program.beside) > held_bytes(other.beside):
                found[program.fn, leaves] = program
        return list(found.values())


def _routes(replay: bool, model: ModelConfig) -> tuple[int, int] | None:
    return (model.num_layers, model.num_experts_active) if replay else None


def _again(block: int, model: ModelConfig) -> float:
    """Logits that a loss in blocks of the vocabulary makes a second time."""
    return 1.0 if block < model.vocab_size else 0.0


BASE, SFT = "the base model", "the stage-1 model"


def kept(cfg: Experiment, place: Place, after: str = "") -> dict[str, Any]:
    """What ``pipeline.train_all`` holds, name -> abstract parameters: teachers that are checkpoints, and the base model; once stage
    1 is over its model; then the teachers trained, in the order of domains: those before the domain ``after``, or all for "teachers"."""
    models = _teachers(cfg)
    named = {f"the teacher of {d}": place.params(m) for d, m in models.items() if d in cfg.checkpoints} | {BASE: place.params(cfg.model)}
    own = [d for d in models if d not in cfg.checkpoints]
    if after:
        named[SFT] = place.params(cfg.model)
        done = own if after == "teachers" else own[: own.index(after)] if after in own else []
        named |= {f"the teacher of {d}": place.params(cfg.model) for d in done}
    return named


def _supervised(cfg: sft.SftConfig, model: ModelConfig, domains: int, place: Place, beside: dict[str, Any], *names: str) -> Program:
    """The train step of ``sft.run``, which copies the parameters it starts from: these are among what is kept."""
    stage, name, settings = names
    args = (place.state(model, cfg.optimizer, cfg.steps), place.batch(cfg.rows, cfg.max_length))
    cost = flops.training(model, cfg.max_length, head_again=_again(cfg.vocab_block, model))
    return Program(stage, name, sft.train_step(cfg, model, domains), args, cfg.rows * cfg.max_length, cost, settings, beside)


def _sft(cfg: Experiment, place: Place) -> Iterator[Program]:
    yield _supervised(cfg.sft, cfg.model, len(cfg.domains), place, kept(cfg, place), "sft", "train_step", "sft")


def _control(cfg: Experiment, place: Place) -> Iterator[Program]:
    """Stage 1 continued, at the end of a run: every other model is kept."""
    beside, control = kept(cfg, place, "teachers") | {"the student": place.params(cfg.model)}, pipeline.control_config(cfg)
    yield _supervised(control, cfg.model, len(cfg.domains), place, beside, "control", "train_step", "control")


def _teacher(cfg: Experiment, place: Place) -> Iterator[Program]:
    for domain, settings in cfg.teachers.items():
        for i, phase in enumerate(settings.recipe):
            path, name = f"teachers.{domain}.recipe.{i}", f"{domain}/{i + 1}"
            beside = kept(cfg, place, domain) | ({"the phase before": place.params(cfg.model)} if i else {})
            if isinstance(phase, teacher.SftPhase):
                yield _supervised(phase.sft, cfg.model, len(cfg.domains), place, beside, "teacher", f"{name}_sft", f"{path}.sft")
            else:
                yield from _reinforced(phase, cfg.model, place, beside, name, path)


def _reinforced(cfg: grpo.GrpoConfig, model: ModelConfig, place: Place, beside: dict[str, Any], name: str, path: str) -> Iterator[Program]:
    """The update of ``grpo.run``, and the pass that scores the frozen reference (or the model itself) where its objective wants one.
    beside: what is kept, the reference among it."""
    batch = place.batch(cfg.rows, cfg.max_length, _routes(cfg.replay_routes, model))
    kept = ["advantages", "rollout_logp"] + ["ref_logp"] * bool(cfg.objective.kl_coefficient)
    kept += ["old_logp"] * (cfg.objective.old == "recomputed")
    data = {"batch": batch, **{n: dataclasses.replace(batch).mask for n in kept}}
    state, first = place.state(model, cfg.optimizer, cfg.steps * cfg.updates), place.params(model)
    tokens, length = cfg.rows * cfg.max_length, cfg.limits.max_length
    cost = flops.training(model, length, head_again=_again(cfg.vocab_block, model))
    reference = "the phase before" if "the phase before" in beside else SFT
    others = {n: p for n, p in beside.items() if n != reference}
    yield Program("teacher", f"{name}_grpo", grpo.train_step(cfg, model), (state, data), tokens, cost, path, beside)
    scored = flops.forward(model, length)
    if cfg.objective.kl_coefficient:
        args = (first, batch.replace(routes=None))
        yield Program("teacher", f"{name}_reference", grpo.logp_step(cfg, model), args, tokens, scored, path, others | {"the state": state})
    if cfg.objective.old == "recomputed":
        rest = beside | {"the optimizer's state": state.opt_state}
        yield Program("teacher", f"{name}_own", grpo.logp_step(cfg, model), (first, batch), tokens, scored, path, rest)


def _teachers(cfg: Experiment) -> dict[str, ModelConfig]:
    """Domain -> architecture of its teacher."""
    out = {}
    for domain in cfg.domains:
        folder = pathlib.Path(cfg.checkpoints[domain].params) if domain in cfg.checkpoints else None
        out[domain] = folders.read_model(folder)[0] if folder and folder.is_dir() else cfg.model
    return out


def _distill(cfg: Experiment, place: Place) -> Iterator[Program]:
    """Scoring by each architecture of teacher, and the train step on all domains' rows; all teachers stay on the devices."""
    own, model, models = cfg.distill, cfg.model, _teachers(cfg)
    everything, held = own.mode == "full", kept(cfg, place, "teachers")
    state = place.state(model, own.optimizer, own.steps)
    rows, scores = {domain: distill.rows_in(own, domain) for domain in models}, {}
    for domain, m in models.items():
        batch = place.batch(rows[domain], own.max_length, _routes(own.replay_routes, model))
        fn = scoring.score_step(m, own.k, own.vocab_block, own.mode == "sampled", everything)
        args, others = (held[f"the teacher of {domain}"], batch), {n: p for n, p in held.items() if n != f"the teacher of {domain}"}
        cost = flops.forward(m, own.limits.max_length, 0.0 if everything else 1.0)
        if own.own_weight < 1:
            fn, args, cost = _mixed(own, models, domain, held, batch)
            others = {n: p for n, p in held.items() if not any(p is one for one in args[0])}
        scores[domain] = jax.eval_shape(fn, *args)
        beside = {"the state": state, **others}
        yield Program("distill", f"score/{domain}", fn, args, rows[domain] * own.max_length, cost, "distill", beside)
    together = sum(rows.values())
    data: dict[str, Any] = {"batch": place.batch(together, own.max_length, _routes(own.replay_routes, model))}
    frozen = None
    if everything:
        data["full"] = [place.like(scores[d], "batch", "length") for d in models]
        frozen = [{"unembed": transformer.unembed(held[f"the teacher of {d}"], m)} for d, m in models.items()]
    else:
        some = next(iter(scores.values()))
        joined = {n: jax.ShapeDtypeStruct((together, *x.shape[1:]), x.dtype) for n, x in some.items()}
        data |= place.like(joined, "batch", "length")
    if own.coverage_every > 1:
        data["measured"] = place.put((together,), jnp.bool_, (None,))
    tx = own.optimizer(transformer.specs(model), own.steps)
    fn = distill.train_step(own, model, len(models), tx)
    cost = flops.training(model, own.limits.max_length, *_heads(own, model))
    yield Program("distill", "train_step", fn, (state, data, frozen), together * own.max_length, cost, "distill", held)


def _mixed(own: distill.DistillConfig, models: dict[str, ModelConfig], domain: str, held: dict[str, Any], batch: Any) -> tuple:
    """(function, arguments, cost) of scoring a domain's rows by all teachers; their output matrices are read twice."""
    shares = mixtures.weights(own.own_weight, list(models).index(domain), len(models))
    some = {d: share for d, share in zip(models, shares, strict=True) if share > 0}
    fn = mixtures.score_step(tuple(models[d] for d in some), tuple(some.values()), own.k, own.vocab_block, own.mode == "sampled")
    each = [flops.forward(models[d], own.limits.max_length, 2.0) for d in some]
    return fn, ([held[f"the teacher of {d}"] for d in some], batch), flops.total(each)


def _heads(cfg: distill.DistillConfig, model: ModelConfig) -> tuple[float, float, float]:
    """What the loss makes of the output matrix: see ``flops.training``. mode salient reads k rows of it, and all where it measures."""
    again = _again(cfg.vocab_block, model)
    if cfg.mode == "salient" and not cfg.tail_below:
        some = cfg.k / model.vocab_size
        return some + (1 / cfg.coverage_every if cfg.coverage_every else 0.0), 2 * some, 0.0
    if cfg.mode == "full":  # both sides' logits
        return 2.0, 2.0, 2 * again
    return 1.0, 2.0, again


def _rollout(cfg: Experiment, place: Place) -> Iterator[Program]:
    """Decoding as every stage that samples does it: distillation (each architecture of teacher, where they write the runs), each phase of
    GRPO, evaluation."""
    model, held = cfg.model, kept(cfg, place, "teachers")
    optimizer = _optimizer(cfg.distill, model, place, cfg.distill.steps)
    for name, writer, others in _writers(cfg, place, held):
        yield from _decoding(cfg.distill.limits, writer, place, name, "distill.limits", others | optimizer)
    own = {}
    for domain, settings in cfg.teachers.items():
        for i, phase in enumerate(settings.recipe):
            if isinstance(phase, grpo.GrpoConfig):
                before = kept(cfg, place, domain) | ({"the phase before": place.params(model)} if i else {})
                own[f"teachers.{domain}.recipe.{i}"] = (phase.limits, before | _optimizer(phase, model, place, phase.steps * phase.updates))
    judged = held | {"stage 1 continued": place.params(model)}  # the student is the one that acts
    own["evaluation"] = (cfg.limits, judged)
    for path, (limits, beside) in own.items():
        settings = "limits" if path == "evaluation" else f"{path}.limits"
        yield from _decoding(limits, model, place, path, settings, beside)


def _writers(cfg: Experiment, place: Place, held: dict[str, Any]) -> Iterator[tuple[str, ModelConfig, dict[str, Any]]]:
    """(name, architecture, what lies beside it) of whoever writes the runs of stage 3."""
    if cfg.distill.rollouts == "student":
        yield "distill", cfg.model, held
        return
    seen: list[ModelConfig] = []
    for domain, model in _teachers(cfg).items():
        others = {name: x for name, x in held.items() if name != f"the teacher of {domain}"} | {"the student": place.params(cfg.model)}
        if model not in seen:
            yield f"distill by the teacher of {domain}", model, others
        seen.append(model)


def _optimizer(cfg: Any, model: ModelConfig, place: Place, steps: int) -> dict[str, Any]:
    return {"the optimizer's state": place.state(model, cfg.optimizer, steps).opt_state}


def abstract_slots(limits: Limits, model: ModelConfig, place: Place) -> Any:
    """``sampler.open_slots`` where it lies: slots over the data axes, see ``decode.cache_axes``."""
    cache, newest = jax.eval_shape(lambda: sampler.open_slots(model, limits.slots, limits.max_length))
    axes = decode.cache_axes(model, limits.max_length)
    placed = [place.put(x.shape, x.dtype, a) for x, a in zip(jax.tree.leaves(cache), _leaves(axes), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(cache), placed), place.like(newest)


def _leaves(axes: Any) -> list[tuple]:
    return jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))


def _decoding(limits: Limits, model: ModelConfig, place: Place, name: str, settings: str, beside: dict) -> Iterator[Program]:
    """One token for every slot, and, where known tokens are fed in pieces, a piece for an eighth of the slots."""
    params, slots = place.params(model), abstract_slots(limits, model, place)

    def host(*shape: int, dtype: Any = jnp.int32) -> Any:
        return place.put(shape, dtype, (None,) * len(shape))

    options, b = (limits.temperature, limits.record_routes), limits.slots
    flags = [host(b, dtype=jnp.bool_)] * 2
    step = (params, slots, host(b), *flags, host(b, dtype=jnp.float32))
    cost = flops.decoding(model, limits.max_length)
    yield Program("rollout", f"decode/{name}", sampler.make_advance(model, *options), step, b, cost, settings, beside)
    if limits.feed_tokens > 1:
        r, c = max(1, b // 8), limits.feed_tokens
        fed = (params, slots, host(r), host(r, c), host(r), host(r, dtype=jnp.bool_), host(r, dtype=jnp.float32))
        cost = dataclasses.replace(flops.decoding(model, limits.max_length), exact=flops.delta_chunked(model))
        yield Program("rollout", f"prefill/{name}", sampler.make_feed(model, *options), fed, r * c, cost, settings, beside)


def held_bytes(tree: Any) -> int:
    """Bytes that one device holds of abstract arrays, those in the host's memory left out."""
    return sum(_part(x) for x in jax.tree.leaves(tree) if getattr(x.sharding, "memory_kind", None) not in ("pinned_host", "unpinned_host"))


def _part(x: Any) -> int:
    kind = x.dtype
    width = 8 if jnp.issubdtype(kind, jax.dtypes.prng_key) else kind.itemsize
    return math.prod(x.sharding.shard_shape(x.shape)) * width
