"""Optimizers as functions to bind in a config: ``bind(optim.adamw, learning_rate=1e-5)``; a stage adds parameter specs and steps.

Peak rates and the length of the schedule live in the optimizer's state, not in the program: stages that differ only there share one
compiled train step (``program``). For bfloat16 parameters (``model.param_dtype``): ``bind(optim.adamw, precision="master")`` or
"stochastic", see update_rule; ``update_rule.rule`` does the same for any optax transformation.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from .config import Binding, ConfigError, bind
from .update_rule import Precision, Rule, rule

# Logical axes that mark a parameter as something else than a plain matrix: tables, taps, norms, gates.
_NOT_MATRICES = {"vocab", "tap", "norm", "single", "router"}
_STACKS = {"layers", "experts"}
_IN_STATE = ("learning_rate", "table_learning_rate", "warmup", "final")
Stored = Literal["as_parameter", "float32", "bfloat16"]


class ScheduleState(NamedTuple):
    """count: updates done. The rest is the schedule: float32 scalars; rates [2]: peak for matrices, peak for everything else."""

    count: jax.Array
    steps: jax.Array
    warmup: jax.Array
    final: jax.Array
    rates: jax.Array


def rate(state: ScheduleState) -> jax.Array:
    """Share of the peak rate at update ``count``: linear from 0 over ``warmup`` updates, then a cosine to ``final`` at the last one."""
    count = state.count.astype(jnp.float32)
    share = jnp.clip((count - state.warmup) / jnp.maximum(state.steps - state.warmup, 1.0), 0.0, 1.0)
    cosine = state.final + (1.0 - state.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
    return jnp.where(count < state.warmup, (count + 1.0) / (state.warmup + 1.0), cosine)


def scheduled(
    specs: Any, steps: int, learning_rate: float, table_learning_rate: float, warmup: float, final: float
) -> optax.GradientTransformation:
    """Multiplies updates by the rate of the schedule: matrices by one peak, everything else by the other.

    warmup: share of ``steps``. Raises ConfigError for a schedule that makes no sense.
    """
    if steps < 1 or not 0.0 <= warmup < 1.0 or not 0.0 <= final <= 1.0:
        raise ConfigError(f"schedule: steps is {steps} (at least 1), warmup {warmup} (in [0, 1)), final {final} (in [0, 1])")
    which = jax.tree.map(lambda s: 0 if is_matrix(s) else 1, specs)

    def init(params: Any) -> ScheduleState:
        del params
        parts = (steps, round(warmup * steps), final, (learning_rate, table_learning_rate))
        return ScheduleState(jnp.zeros((), jnp.int32), *(jnp.asarray(x, jnp.float32) for x in parts))

    def update(updates: Any, state: ScheduleState, params: Any = None):
        del params
        now = rate(state) * state.rates
        updates = jax.tree.map(lambda u, w: (u * now[w]).astype(u.dtype), updates, which)
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def is_matrix(spec: Any) -> bool:
    """Whether the last two axes of a parameter are (in, out) of a plain matrix."""
    return len(spec.axes) >= 2 and spec.axes[-2] not in _STACKS and not _NOT_MATRICES & set(spec.axes)


def adamw(
    specs: Any,
    steps: int,
    *,
    learning_rate: float = 1e-5,
    warmup: float = 0.05,
    final: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    precision: Precision = "plain",
    first_moment: Stored = "as_parameter",
    second_moment: Stored = "as_parameter",
    offload: bool = False,
) -> optax.GradientTransformation | Rule:
    """AdamW, cosine with warm-up, global-norm clip; defaults are the paper's stage 1 (arXiv 2606.30616, 4.1; b2 and clip are ours).

    learning_rate: peak. weight_decay acts on matrices and tables, not on norms, gates and taps. final=1.0 is a constant rate.
    precision: of bfloat16 parameters, see update_rule. first_moment, second_moment: stored type between steps ("as_parameter": float32
    with master and stochastic); they are computed in float32, and rounded to nearest. offload: moments and masters lie in host memory.
    Raises ConfigError for a bfloat16 moment that decays too slowly for its 8 bits.
    """
    narrow = precision == "plain" and any(s.dtype == "bfloat16" for s in jax.tree.leaves(specs))
    for name, stored, decay in (("first_moment", first_moment, b1), ("second_moment", second_moment, b2)):
        if (
            stored == "bfloat16" or (stored == "as_parameter" and narrow)
        ) and 1.0 - decay <= 2.0**-8:  # half the largest distance between neighbours: rounding would undo it
            letter = {"first_moment": "b1", "second_moment": "b2"}[name]
            raise ConfigError(f"adamw {name} is bfloat16 with {letter} {decay}: it would never fall; use float32, or {letter} below 0.996")
    spared = jax.tree.map(lambda s: is_matrix(s) or "vocab" in s.axes, specs)
    chained = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(1.0, b1, b2, weight_decay=weight_decay, mask=spared),
        scheduled(specs, steps, learning_rate, learning_rate, warmup, final),
    )
    return rule(_moments_as(chained, {"mu": first_moment, "nu": second_moment}), precision, offload)


def _moments_as(tx: optax.GradientTransformation, stored: dict[str, Stored]) -> optax.GradientTransformation:
    """tx with Adam's moments ("mu", "nu") stored so between updates, which see them in float32: in bfloat16 even the decay would be
    rounded, 0.95 to 0.949, and 0.99 to 0.988."""
    types = {name: dtype for name, dtype in stored.items() if dtype != "as_parameter"}

    def cast(state: Any, types: dict[str, str]) -> Any:
        def adam(s: Any) -> Any:
            return s._replace(**{name: optax.tree.cast(getattr(s, name), dtype) for name, dtype in types.items()}) if is_adam(s) else s

        return jax.tree.map(adam, state, is_leaf=is_adam)

    def is_adam(state: Any) -> bool:
        return isinstance(state, optax.ScaleByAdamState)

    def update(updates: Any, state: Any, params: Any = None):
        updates, state = tx.update(updates, cast(state, dict.fromkeys(types, "float32")), params)
        return updates, cast(state, types)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), types), update) if types else tx


def muon(
    specs: Any,
    steps: int,
    *,
    learning_rate: float = 1e-2,
    table_learning_rate: float = 1e-2,
    warmup: float = 0.05,
    final: float = 0.1,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    precision: Precision = "plain",
    offload: bool = False,
) -> optax.GradientTransformation | Rule:
    """Muon on the matrices of every layer and expert, Adam on everything else; cosine with warm-up, global-norm clip.

    learning_rate: peak for matrices; table_learning_rate: peak for embeddings, taps, gates, norms and the router.
    precision, offload: as in adamw. The quickstart trains with it (optax.contrib.muon; Jordan et al. 2024).
    """
    numbers = jax.tree.map(lambda s: MuonDimensionNumbers(len(s.axes) - 2, len(s.axes) - 1) if is_matrix(s) else None, specs)
    chained = optax.chain(
        optax.clip_by_global_norm(clip),
        optax_muon(1.0, weight_decay=weight_decay, adam_b2=b2, adam_learning_rate=1.0, muon_weight_dimension_numbers=numbers),
        scheduled(specs, steps, learning_rate, table_learning_rate, warmup, final),
    )
    return rule(chained, precision, offload)


def program(optimizer: Binding, steps: int) -> Binding:
    """The optimizer without what lives in its state: two stages whose programs are equal can share one compiled step.

    Rates and the shape of the schedule are left out for the optimizers above, so whoever compiles the step may name any number of
    updates. Any other function may build its schedule into its program: it is bound to ``steps``.
    """
    if optimizer.fn not in (adamw, muon):
        return bind(of_length, optimizer=optimizer, steps=steps)
    return bind(optimizer.fn, **{k: v for k, v in optimizer.kwargs.items() if k not in _IN_STATE})


def of_length(specs: Any, any_steps: int, *, optimizer: Binding, steps: int) -> optax.GradientTransformation:
    """The optimizer for so many steps, whatever is asked for."""
    del any_steps
    return optimizer(specs, steps)
