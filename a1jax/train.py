"""One train step for all stages, and the loop that runs it with resume.

A stage brings a loss of arrays and a source of batches; nothing here knows a model. Per-token weights are computed once on the
whole batch (``weigh``), so micro-batches simply add up: value and gradient do not depend on how a batch is cut.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from . import checkpoint, interruption, lost_process, metrics, sharding
from . import params as param_specs
from .config import ConfigError
from .rollout.judges import JudgeError
from .types import Metrics, Params, TrainState
from .update_rule import Rule, plain_step, to_device, to_host

LossFn = Callable[[Params, Any, float], tuple[jax.Array, Metrics]]
"""loss(params, batch slice, share) -> (scalar float32, sums). Loss and sums are additive over slices (weights are of the whole batch);
share = 1 / micro-batches scales what is a mean per slice (router losses), so that it adds up to the mean."""


class Source(Protocol):
    """Where batches come from. Its state is saved with every checkpoint: what was trained on, not where a loader stood."""

    def next(self, state: TrainState) -> tuple[Any, Metrics]: ...
    def get_state(self) -> dict: ...
    def set_state(self, state: dict) -> None: ...


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation | Rule,
    microbatches: int = 1,
    weigh: Callable[[Any], Any] | None = None,
    finish: Callable[[Metrics], Metrics] | None = None,
    specs: Any = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), to be jitted by the caller with the state donated.

    batch: a pytree of arrays with leading axis B, a multiple of ``microbatches``. weigh(batch) -> batch adds whole-batch weights.
    finish(sums) -> metrics turns the loss's added-up sums into what is reported.
    Gradients are accumulated in float32 by summation over micro-batches in a scan.
    specs: the parameters' ParamSpecs. Under a mesh gradients, their sum, the new parameters and the optimizer's state lie as these say;
    without them the compiler chooses, and may choose whole copies. Metrics lie on every device, so that every
    process can read them.
    """

    def cut(tree: Any) -> Any:
        return tree if specs is None else param_specs.constrain(specs, tree)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        batch = weigh(batch) if weigh is not None else batch
        value_and_grad = jax.value_and_grad(lambda p, b: loss_fn(p, b, 1.0 / microbatches), has_aux=True)

        def grad_fn(params: Params, piece: Any) -> Any:
            value, grads = value_and_grad(params, piece)
            return value, cut(grads)

        if microbatches == 1:
            (loss, parts), grads = grad_fn(state.params, batch)
        else:
            slices = jax.tree.map(lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:]), batch)
            first = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], slices))
            value, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)

            def add(total, piece):
                return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grad_fn(state.params, piece)), None

            ((loss, parts), grads), _ = jax.lax.scan(add, (value, cut(grads)), slices)
        if isinstance(tx, Rule):
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            opt_state = to_device(state.opt_state, state.params) if tx.host else state.opt_state
            params, opt_state = tx.step(grads, opt_state, state.params, state.key)
        else:
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
            params, opt_state = plain_step(tx, grads, state.opt_state, state.params)
        params, opt_state = cut((params, opt_state))
        if isinstance(tx, Rule) and tx.host:
            opt_state = to_host(opt_state, params)
        parts = finish(parts) if finish is not None else parts
        out = {"loss": loss, **parts, "grad_norm": optax.tree.norm(grads)}
        out = jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), out)
        return TrainState(state.step + 1, params, opt_state, state.key), out

    return step


def init_state(params: Params, tx: optax.GradientTransformation | Rule, seed: int) -> TrainState:
    """A fresh state; parameters are copied, because the train step donates its state and the caller may want to keep them.

    Under a mesh every moment and master is made where it will lie, cut as its parameter; what belongs to no parameter is on all devices.
    """
    params = jax.tree.map(jnp.copy, params)
    opt_state = jax.jit(tx.init, out_shardings=_places(params, tx))(params)
    step, key = jnp.zeros((), jnp.int32), jax.random.key(seed)
    if isinstance(whole := _everywhere(params), NamedSharding):  # where the step leaves them: else its second call would compile again
        step, key = jax.device_put((step, key), whole)
    return TrainState(step, params, opt_state, key)


def abstract_state(params: Params, tx: optax.GradientTransformation | Rule) -> TrainState:
    """Shapes, types and places of ``init_state``'s result, to compile a step for devices that are not here.

    params: ShapeDtypeStructs with their shardings."""
    whole, places = _everywhere(params), _places(params, tx)
    shapes = jax.eval_shape(tx.init, params)
    places = jax.tree.map(lambda _: whole, shapes) if places is None else places
    opt_state = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
    step, key = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), jax.random.key(0)))
    step, key = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in (step, key))
    return TrainState(step, params, opt_state, key)


def _places(params: Params, tx: optax.GradientTransformation | Rule) -> Any:
    """A sharding for everything in the optimizer's state; None where there is no choice."""
    whole, host = _everywhere(params), isinstance(tx, Rule) and tx.host
    if not (host or isinstance(whole, NamedSharding)):
        return None  # one device: where jax puts things

    def place(leaf: Any, owner: Any) -> Any:
        if owner is None:
            return whole
        return owner.sharding.with_memory_kind("pinned_host") if host else owner.sharding

    return param_specs.with_owners(place, jax.eval_shape(tx.init, params), params)


def _everywhere(params: Params) -> Any:
    """All devices of the parameters, each with the whole array."""
    some = jax.tree.leaves(params)[0].sharding
    return NamedSharding(some.mesh, P()) if isinstance(some, NamedSharding) else some


def fit(
    state: TrainState,
    step_fn: Callable,
    source: Source,
    *,
    steps: int,
    stage: str,
    directory: pathlib.Path,
    writer: metrics.Writer,
    save_every: int,
    keep: int,
    log_every: int = 10,
    probe: Callable[[Params], Metrics] | None = None,
    probe_every: int = 1,
) -> TrainState:
    """Run ``step_fn`` until ``steps``, from the last complete checkpoint in ``directory`` when there is one, under whichever mesh that was.

    Saves every ``save_every`` steps and at the end, keeping ``keep``. A resumed run is bitwise the uninterrupted one: the state, the
    source's position and the keys all come from the checkpoint, and metrics lines written after it are dropped.
    probe(params) -> metrics is asked before the first step, every ``probe_every`` steps and after the last, and written as "<stage>/probe".
    Told to stop (``interruption``), it finishes the step in hand, but abandons a batch in the making, saves, waits until that is complete
    and raises Interrupted. Raises ConfigError at the first step that finds a save to have failed. A ConfigError of the source, such as a
    JudgeError, is raised on when what was trained before it is saved.
    """
    manager = checkpoint.open_manager(directory, keep=keep, save_every=save_every)

    def saved(at: int, state: TrainState, position: dict) -> str:
        if at:  # before the first step there is nothing to lose
            checkpoint.save(manager, at, state, {"source": position, "stage": stage}, force=True)
            checkpoint.wait(manager)
        return f"{stage} is saved at step {at}" if at else f"{stage} is at its beginning"

    try:
        with interruption.listening(), interruption.holding(), lost_process.going_on(lambda: _from_where(stage, directory)):
            # Committed to where it lies, as what a checkpoint gives: for others jax compiles another program, which may round otherwise.
            state = jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)
            found = checkpoint.restore(manager, state)
            if found is not None:
                state, extra, _ = found
                source.set_state(extra["source"])
            done = int(state.step)
            writer.rewind(stage, done)
            writer.rewind(f"{stage}/probe", done)
            if probe is not None and done == 0:
                writer.write(0, f"{stage}/probe", probe(state.params))
            with metrics.progress(stage, total=steps, done=done) as bar:
                clock, tokens = time.perf_counter(), 0
                for at in range(done, steps):
                    position = source.get_state()
                    try:
                        with interruption.abandonable():
                            batch, extra_metrics = source.next(state)
                    except interruption.Interrupted as stop:
                        raise interruption.Interrupted(stop.number, saved(at, state, position)) from None
                    except ConfigError as error:  # what is only found out on the way loses no step
                        goes_on = ", the same command goes on from there" if isinstance(error, JudgeError) else ""
                        raise type(error)(f"{error}; {saved(at, state, position)}{goes_on}") from None
                    tokens += extra_metrics.get("tokens", 0)
                    state, out = step_fn(state, batch)
                    if (at + 1) % log_every == 0 or at + 1 == steps or at == done:
                        out, arrays = _reported(out, stage, at + 1)
                        seconds = time.perf_counter() - clock
                        rate = tokens / seconds if at > done else 0.0  # the first step only compiles
                        clock, tokens = time.perf_counter(), 0
                        writer.write(at + 1, stage, {**out, **extra_metrics, "tokens_per_second": rate}, arrays)
                        bar.update(at + 1, loss=out["loss"], tokens_per_second=rate)
                    if probe is not None and ((at + 1) % probe_every == 0 or at + 1 == steps):
                        writer.write(at + 1, f"{stage}/probe", probe(state.params))
                    if (at + 1) % save_every == 0 or at + 1 == steps:
                        checkpoint.save(manager, at + 1, state, {"source": source.get_state(), "stage": stage}, force=True)
                    if number := interruption.asked():
                        raise interruption.Interrupted(number, saved(at + 1, state, source.get_state()))
                    checkpoint.check(manager)
            checkpoint.wait(manager)
    finally:
        manager.close()
    return state


def _reported(out: Metrics, stage: str, step: int) -> tuple[dict[str, float], Metrics]:
    """A step's metrics on the host, numbers and arrays apart. Raises FloatingPointError for a loss that is none."""
    out = jax.device_get(out)
    arrays = {k: v for k, v in out.items() if np.ndim(v)}
    out = {k: float(v) for k, v in out.items() if k not in arrays}
    if not np.isfinite(out["loss"]):
        raise FloatingPointError(f"{stage}: loss is {out['loss']} at step {step}; lower the learning rate")
    return {k: v for k, v in out.items() if out.get(f"{k}_tokens", 1) > 0}, arrays  # the others were measured at no token


def _from_where(stage: str, directory: pathlib.Path) -> str:
    step = checkpoint.latest(directory)
    return f"{stage} goes on from {'its beginning' if step is None else f'step {step}'}"
