"""The jitted programs that a stage runs, with abstract arguments: what `a1jax compile` compiles. They are the stages' own functions.

Nothing here makes an array: parameters, state, batches and caches are shapes with the places they would have on the mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from .. import params as param_specs
from .. import sharding, train
from ..config import ConfigError
from ..models import transformer
from ..models.config import ModelConfig
from . import sft
from .pipeline import Experiment

STAGES = ("sft", "teacher", "distill", "rollout")


@dataclasses.dataclass(frozen=True)
class Program:
    """fn: a jitted function; args: its arguments, ShapeDtypeStructs and all. tokens: places of the batch that one call reads; settings:
    the field of the experiment that its sizes come from, as ``--set`` names it."""

    stage: str
    name: str
    fn: Callable
    args: Sequence[Any]
    tokens: int
    settings: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where programs run: a mesh, or one device without a mesh."""

    mesh: Mesh | None
    device: Any

    def on(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def params(self, model: ModelConfig) -> Any:
        """The parameters' shapes where they lie. Raises ConfigError, naming the parameter, where the mesh does not cut it evenly."""
        specs = transformer.specs(model)
        shapes = param_specs.abstract(specs)
        if self.mesh is None:
            placed = jax.tree.map(lambda _: SingleDeviceSharding(self.device), shapes)
        else:
            placed = param_specs.shardings(specs, self.mesh)
        return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)

    def batch(self, rows: int, length: int, routes: tuple[int, int] | None = None) -> Any:
        return sharding.abstract_batch(rows, length, self.mesh, self.device, routes)


def of_stage(cfg: Experiment, stage: str, place: Place) -> list[Program]:
    """The programs of one of STAGES, different ones only. Raises ConfigError for sizes that the mesh cannot cut."""
    if stage not in STAGES:
        raise ConfigError(f"stage '{stage}' is unknown: choose {', '.join(STAGES)}")
    with place.on():
        return {"sft": _sft}[stage](cfg, place)


def supervised(cfg: sft.SftConfig, model: ModelConfig, domains: int, place: Place, stage: str, name: str, settings: str) -> Program:
    """The train step of ``sft.run``."""
    state = train.abstract_state(place.params(model), cfg.optimizer(transformer.specs(model), cfg.steps))
    step = sft.train_step(cfg, model, domains)
    return Program(stage, name, step, (state, place.batch(cfg.rows, cfg.max_length)), cfg.rows * cfg.max_length, settings)


def _sft(cfg: Experiment, place: Place) -> list[Program]:
    return [supervised(cfg.sft, cfg.model, len(cfg.domains), place, "sft", "train_step", "sft")]
