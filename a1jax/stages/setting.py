"""What the stages of one run share, and the few acts all of them need: placing parameters, finding a finished stage again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from .. import checkpoint, distributed, metrics, sharding, train
from .. import params as param_specs
from ..data.tokenizer import Tokenizer
from ..domains import Domain
from ..models import transformer
from ..models.config import ModelConfig
from ..types import Batch, Params
from . import fitting_mesh, folders
from .fitting_mesh import Demand


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    shape: dict[str, int] = dataclasses.field(default_factory=dict)  # axis of mesh_shapes.MESH_AXES -> size; empty: one device, no mesh


@dataclasses.dataclass(frozen=True)
class Setting:
    """model: of student and teachers. mesh: None on one device. workdir: the run's folder. domains: their order is their index.
    initial: the parameters folder that the base model comes from, see folders; empty: random parameters. families: domain -> what its
    tasks are drawn from."""

    model: ModelConfig
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    mesh: Mesh | None
    workdir: pathlib.Path
    writer: metrics.Writer
    seed: int
    initial: str = ""
    families: dict[str, Domain] = dataclasses.field(default_factory=dict)

    @property
    def specs(self) -> Any:
        return transformer.specs(self.model)

    def on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def init_params(self) -> Params:
        """The base model, made or read where it will lie: of the folder ``initial``, else random from the run's seed."""
        if self.initial:
            return folders.load(pathlib.Path(self.initial), self.abstract_params())
        key = jax.random.key(self.seed)
        if self.mesh is None:  # parameter by parameter: small programs that compile in no time
            return param_specs.init(self.specs, key)
        return jax.jit(lambda key: param_specs.init(self.specs, key), out_shardings=param_specs.shardings(self.specs, self.mesh))(key)

    def put(self, batch: Batch) -> Batch:
        """A whole batch, which every process has, where it will lie. Raises RuntimeError where the processes have different ones."""
        if self.mesh is None:
            return batch
        distributed.check_same(batch, "a batch")
        return sharding.put_batch(batch, self.mesh)

    def put_rows(self, batch: Batch, total: int) -> Batch:
        """A batch of ``total`` rows of which this process has those of ``rows_here``."""
        return batch if self.mesh is None else sharding.put_batch(batch, self.mesh, self.rows_here(total), total)

    def rows_here(self, total: int) -> list[int] | None:
        """Which rows of a batch this process builds: those that its devices hold; None: all."""
        return None if self.mesh is None or not self.mesh.is_multi_process else sharding.rows_here(self.mesh, total)

    def put_tokens(self, values: np.ndarray) -> jax.Array:
        """[B, T, ...] beside a batch that was ``put``; as there."""
        if self.mesh is None:
            return jnp.asarray(values)
        distributed.check_same(values, "an array beside a batch")
        return sharding.put_tokens(values, self.mesh)

    def directory(self, stage: str) -> pathlib.Path:
        return self.workdir / "stages" / stage

    def finished(self, stage: str) -> Params | None:
        """The parameters a finished stage left, or None when it has still to run (or to go on): the first process looks."""
        directory = self.directory(stage)
        if not distributed.from_first((directory / "done.json").exists()):
            return None
        return checkpoint.load_params(directory / "params", self.abstract_params())

    def abstract_params(self) -> Any:
        """Shapes, types and, under a mesh, shardings of the parameters."""
        shapes = param_specs.abstract(self.specs)
        if self.mesh is None:
            return shapes
        placed = param_specs.shardings(self.specs, self.mesh)
        return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)

    def finish(self, stage: str, params: Params, facts: dict) -> Params:
        """Store a stage's parameters and their model, then its facts: only the facts make it finished."""
        checkpoint.save_params(self.directory(stage) / "params", params)
        self.conclude(stage, facts)
        return params

    def conclude(self, stage: str, facts: dict) -> None:
        """Write model and facts beside parameters that are there: the stage is finished then. The first process writes."""
        distributed.by_first(lambda: self._conclude(stage, facts))

    def _conclude(self, stage: str, facts: dict) -> None:
        directory = self.directory(stage)
        initial = str(pathlib.Path(self.initial).resolve()) if self.initial else ""
        folders.write_model(directory, self.model, {"stage": stage, "initial": initial})
        part = directory / "done.part"
        part.write_text(json.dumps(facts, indent=1))
        part.rename(directory / "done.json")

    def facts(self, stage: str) -> dict:
        return json.loads((self.directory(stage) / "done.json").read_text())


def train_stage(
    setting: Setting,
    cfg: Any,
    params: Params,
    stage: str,
    make_step: Callable[[optax.GradientTransformation], Callable],
    make_source: Callable[[], train.Source],
    **probing: Any,
) -> Params:
    """What every stage does: nothing when it is finished, else train from ``params`` (or go on), store and return the result.

    cfg: has optimizer, steps, save_every, keep, log_every. make_step(tx): the jitted step. probing: see train.fit.
    """
    done = setting.finished(stage)
    if done is not None:
        return done
    began = time.perf_counter()
    tx = cfg.optimizer(setting.specs, cfg.steps)
    with setting.on_mesh():
        state = train.fit(
            train.init_state(params, tx, setting.seed),
            make_step(tx),
            make_source(),
            steps=cfg.steps,
            stage=stage,
            directory=setting.directory(stage) / "checkpoints",
            writer=setting.writer,
            save_every=cfg.save_every,
            keep=cfg.keep,
            log_every=cfg.log_every,
            **probing,
        )
        return setting.finish(stage, state.params, {"steps": cfg.steps, "seconds": time.perf_counter() - began})


def make_mesh(cfg: MeshConfig, demands: Sequence[Demand] = ()) -> Mesh | None:
    """The mesh of a run, or None for one device. demands: what has to be cut over it, see ``fitting_mesh``.

    One process may use fewer devices than it has, the first ones; several use all of theirs.
    Raises ConfigError, in one line with the reason and the nearest possible shape, for an impossible one.
    """
    return fitting_mesh.make_mesh(cfg.shape, demands)
