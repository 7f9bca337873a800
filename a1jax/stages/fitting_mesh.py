"""Whether a run fits its mesh, told before anything is written or compiled: every size that the mesh cuts, by the name the user knows."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from .. import distributed, mesh_shapes, sharding
from ..config import ConfigError
from ..mesh_shapes import MESH_AXES, Shape
from ..models import transformer
from ..models.config import ModelConfig
from . import folders


@dataclasses.dataclass(frozen=True)
class Demand:
    """A size that is cut evenly over the mesh axes of a logical axis. one_is_whole: a size of 1 is not cut but copied.

    advised: a number of which the size had better be a multiple on each device; said where it is refused anyway."""

    what: str
    size: int
    axis: str
    one_is_whole: bool = False
    advised: int = 1


FIELDS = {"rows": "batch", "heldout_rows": "batch", "slots": "batch"}
"""Fields of a config, wherever they stand, that are cut as a logical axis says. max_length is cut where there are rows of that length."""


def demands(cfg: Any) -> list[Demand]:
    """What an experiment (a config with fields model and mesh) asks of its mesh, model first."""
    found = of_model(cfg.model)
    for name, source in getattr(cfg, "checkpoints", {}).items():
        found += of_model(folders.read_model(pathlib.Path(source.params))[0], f"checkpoints.{name}: ")
    for path, part in _parts(cfg, ""):
        found += _of_part(path, part, cfg)
    return found


def of_model(model: ModelConfig, name: str = "") -> list[Demand]:
    """Every size of a parameter that the table cuts, once, by the first parameter that has it; and heads, which are cut whole."""
    sizes: dict[tuple[str, int], str] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(transformer.specs(model)):
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            if axis is not None and sharding.RULES[axis]:
                sizes.setdefault((axis, size), jax.tree_util.keystr(path, simple=True, separator="/"))
    named = {
        ("experts", model.num_experts): "model.num_experts",
        ("vocab", model.vocab_size): "model.vocab_size",
        ("embed", model.d_model): "model.d_model",
        ("shared_width", model.shared_expert_width): "model.shared_expert_width",
        ("linear_heads", model.linear_num_value_heads): "model.linear_num_value_heads",
    }
    found = [Demand(f"{name}model.num_heads", model.num_heads, "heads")]
    for (axis, size), path in sizes.items():
        known = named.get((axis, size))
        found.append(Demand(name + (f"{known} (parameter {path})" if known else f"parameter {path}, its {axis}"), size, axis))
    return found


def _parts(cfg: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, dataclass) of every part of a config."""
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, ModelConfig):
        yield path, cfg
        each = [(field.name, getattr(cfg, field.name)) for field in dataclasses.fields(cfg)]
    elif isinstance(cfg, dict):
        each = list(cfg.items())
    elif isinstance(cfg, tuple | list):
        each = list(enumerate(cfg))
    else:
        return
    for name, value in each:
        yield from _parts(value, f"{path}.{name}" if path else str(name))


def _of_part(path: str, part: Any, cfg: Any) -> list[Demand]:
    names = {field.name for field in dataclasses.fields(part)}
    own = getattr(part, "rows_of", {})
    asked = names - ({"rows"} if own and own.keys() >= set(cfg.domains) else set())
    found = [Demand(f"{path}.{name}", getattr(part, name), axis) for name, axis in FIELDS.items() if name in asked]
    if "slots" in names and getattr(part, "feed_tokens", 0) > 1:  # an eighth of the slots is fed at a time, see rollout.lockstep
        found.append(Demand(f"{path}.slots / 8, which are fed pieces of feed_tokens,", max(1, part.slots // 8), "batch", True))
    if "rows" in names and "max_length" in names:
        # The delta rule and the convolution take any length on a device; whole chunks only spare padding.
        found.append(Demand(f"{path}.max_length", part.max_length, "length", advised=cfg.model.delta_chunk))
        slices = getattr(part, "microbatches", 1)
        found += [Demand(f"{path}.rows_of.{domain}", rows, "batch") for domain, rows in own.items() if domain in cfg.domains]
        if slices > 1:
            # Distillation cuts the rows of all domains together; in mode full the loss then takes each domain's share by itself.
            each = [own.get(d, part.rows) for d in cfg.domains] if hasattr(part, "mode") and part.mode != "full" else [part.rows]
            what = f"{path}.rows{f' x {len(each)} domains' if len(each) > 1 else ''} / microbatches"
            found.append(Demand(what, sum(each) // slices, "batch", True))
    return found


def violations(shape: Shape, wanted: Sequence[Demand]) -> list[str]:
    """A sentence for every demand that a shape cannot meet."""
    found = []
    for demand in wanted:
        axes = [name for name in sharding.RULES[demand.axis] if shape.get(name, 1) > 1]
        parts = math.prod(shape[name] for name in axes)
        if demand.size % parts and not (demand.one_is_whole and demand.size == 1):
            over = " x ".join(f"{name} {shape[name]}" for name in axes) + (f" = {parts}" if len(axes) > 1 else "")
            better = f" (best of {parts * demand.advised}: whole chunks of the delta rule)" if demand.advised > 1 else ""
            found.append(f"{demand.what} = {demand.size} cannot be cut over {over}: it must be a multiple of {parts}{better}")
    return found


def make_mesh(shape: Shape, wanted: Sequence[Demand] = ()) -> Mesh | None:
    """The mesh of this shape over this run's devices, None for an empty shape; refusals as ``setting.make_mesh`` says."""
    here, several = jax.device_count(), distributed.several()
    if not distributed.joined() and jax.process_count() > 1:
        raise ConfigError(f"here are {jax.process_count()} processes that have not joined: start each with --coordinator auto")

    def fits(found: Shape) -> bool:
        return not violations(found, wanted)

    if not shape and several:
        advice = mesh_shapes.advice({"fsdp": here}, here, fits)
        raise ConfigError(f"mesh.shape is empty, and {jax.process_count()} processes have {here} devices{advice}")
    if not shape:
        return None
    for name, size in shape.items():
        if name not in MESH_AXES or size < 1:
            mesh_shapes.check(shape, here)
    needed = mesh_shapes.size(shape)
    if needed > here or (several and needed != here):
        raise ConfigError(mesh_shapes.wrong_count(shape, here, fits))
    found = violations(shape, wanted)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(f"mesh.shape={shape}: {'; '.join(found[:3])}{more}{mesh_shapes.advice(shape, needed, fits)}")
    return sharding.make_mesh(shape, jax.devices()[:needed])
