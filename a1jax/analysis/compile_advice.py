"""What would make a program fit: settings, each with a rough number of the bytes that it would save, from what its largest pieces are.

A piece of the temporaries is told by the scope it comes from; arguments are told by their names. Only settings that this experiment has,
and that its sizes and its mesh allow, are named.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from typing import Any

from .. import sharding
from ..stages import distill
from ..stages.pipeline import Experiment
from ..stages.programs import Program, held_bytes

Advice = tuple[float, str]
"""(bytes saved per device, roughly; what to set)."""


def three(cfg: Experiment, program: Program, found: dict[str, Any], mesh: dict[str, int]) -> list[str]:
    """The three settings that would save most, the best first, with the estimate in words. found: of compile_report.measure."""
    settings = _settings(cfg, program.settings)
    share = _shares(found)
    ideas = [*_of_temporaries(cfg, program, settings, found["temp_bytes"], share, mesh), *_of_arguments(cfg, program, settings, mesh)]
    ideas += _of_mesh(cfg, program, settings, found, mesh)
    ideas.sort(key=lambda idea: -idea[0])
    return [f"{text}   (saves about {saved / 1e9:.3g} GB per device)" for saved, text in ideas if saved > 0][:3]


def kind_of(scope: str) -> str:
    """Which part of the program a buffer belongs to, by its scope."""
    inside = "/layer" in scope
    for name, words in (("experts", ("/moe",)), ("delta", ("/gated_delta", "delta_rule")), ("attention", ("/attention",))):
        if any(word in scope for word in words):
            return name
    if "dynamic_update_slice" in scope or "checkpoint" in scope or inside:
        return "activations"
    return "update" if "/while" not in scope and "embed" not in scope else "logits" if "dot_general" in scope else "activations"


def _shares(found: dict[str, Any]) -> dict[str, float]:
    """Shares of the temporaries by kind, judged by the largest buffers."""
    total = sum(b["bytes"] for b in found["largest_buffers"]) or 1
    out: dict[str, float] = {}
    for b in found["largest_buffers"]:
        kind = kind_of(b["scope"])
        out[kind] = out.get(kind, 0.0) + b["bytes"] / total
    return out


def _settings(cfg: Any, path: str) -> Any:
    """The part of the experiment that a path such as teachers.search.recipe.0 names."""
    for name in path.split("."):
        cfg = cfg[int(name)] if name.isdigit() else cfg[name] if isinstance(cfg, dict) else getattr(cfg, name)
    return cfg


def _set(path: str, value: Any) -> str:
    return f"--set '{path}={json.dumps(value)}'"


def _of_temporaries(
    cfg: Experiment, program: Program, settings: Any, temp: float, share: dict[str, float], mesh: dict[str, int]
) -> Iterator[Advice]:
    path, model = program.settings, cfg.model
    grows = temp * (1 - share.get("update", 0.0))  # with the tokens of a micro-batch
    micro, rows = getattr(settings, "microbatches", 0), getattr(settings, "rows", 0)
    if micro and program.name.endswith(("train_step", "sft", "grpo")):
        cut = math.prod(mesh.get(axis, 1) for axis in sharding.RULES["batch"])
        each = [distill.rows_in(settings, d) for d in cfg.domains] if program.stage == "distill" else [rows]
        many = sum(each)
        more = next(
            (n for n in range(micro + 1, many + 1) if not any(r % n for r in each) and many % n == 0 and (many // n) % cut == 0), None
        )
        if more:
            yield grows * (1 - micro / more), _set(f"{path}.microbatches", more)
        if model.remat == "none":
            yield grows * (1 - 1 / model.num_blocks) * (1 - share.get("logits", 0.0)), _set("model.remat", "block")
        if model.remat == "block":
            yield temp * sum(share.get(k, 0.0) for k in ("experts", "delta", "attention")) * 0.5, _set("model.remat", "layer")
    block = getattr(settings, "vocab_block", 0)
    if block and share.get("logits"):
        smaller = min(block, model.vocab_size) // 2
        yield temp * share["logits"] / 2, _set(f"{path}.vocab_block", smaller)
    if share.get("attention") and model.attention_chunk != 128:
        chunk = 512 if not model.attention_chunk else max(128, model.attention_chunk // 2)
        length = getattr(settings, "max_length", chunk)
        saved = 1 - chunk / (model.attention_chunk or max(length, chunk))
        yield temp * share["attention"] * saved, _set("model.attention_chunk", chunk)


def _of_arguments(cfg: Experiment, program: Program, settings: Any, mesh: dict[str, int]) -> Iterator[Advice]:
    path, first = program.settings, program.args[0]
    state = first if hasattr(first, "opt_state") else program.beside.get("the state")
    params = held_bytes(first.params if hasattr(first, "params") else first)
    everything = params + sum(held_bytes(tree) for tree in program.beside.values())
    optimizer = getattr(settings, "optimizer", None)
    options = inspect.signature(optimizer.fn).parameters if optimizer is not None else {}
    if cfg.model.param_dtype == "float32":
        yield (
            everything / 2,
            _set("model.param_dtype", "bfloat16") + (f" {_set(f'{path}.optimizer.precision', 'master')}" if "precision" in options else ""),
        )
    if state is not None and hasattr(state, "opt_state"):
        moments = held_bytes(state.opt_state)
        if "offload" in options and not optimizer.kwargs.get("offload"):
            yield moments, _set(f"{path}.optimizer.offload", True)
        if "first_moment" in options and "first_moment" not in optimizer.kwargs:
            yield moments / 4, _set(f"{path}.optimizer.first_moment", "bfloat16")
    if program.stage == "rollout":
        slots = held_bytes(program.args[1])
        cut = math.prod(mesh.get(axis, 1) for axis in sharding.RULES["batch"])
        fewer = settings.slots // 2 // cut * cut
        if fewer:
            yield slots * (1 - fewer / settings.slots), _set(f"{path}.slots", fewer)
        yield slots / 2, _set(f"{path}.max_length", settings.max_length // 2)


def _of_mesh(cfg: Experiment, program: Program, settings: Any, found: dict[str, Any], mesh: dict[str, int]) -> Iterator[Advice]:
    """Another shape of the same chips: axes that only copy weights, or that leave rows whole, turned into others. Else fewer rows."""
    if not mesh:
        return
    rows = getattr(settings, "rows", 0)
    held = found["argument_bytes"] + found["beside_bytes"]
    shape = {name: n for name, n in mesh.items() if n > 1}

    def moved(source: str, target: str) -> str | None:
        factor = next((f for f in (2, 3, 5, 7) if mesh.get(source, 1) % f == 0), 0)
        if not factor:
            return None
        other = {**shape, source: mesh[source] // factor, target: mesh.get(target, 1) * factor}
        return _set("mesh.shape", {name: n for name, n in other.items() if n > 1})

    for source, target, saved in (
        ("data", "fsdp", held / 2),  # data copies every parameter
        ("fsdp", "context", 0.0 if getattr(settings, "microbatches", 1) == 1 and rows else found["temp_bytes"] / 8),
    ):
        text = moved(source, target)
        if text:
            yield saved, text
    cut = math.prod(mesh.get(axis, 1) for axis in sharding.RULES["batch"])
    if rows > cut and not getattr(settings, "rows_of", {}):
        fewer = max(cut, rows // 2 // cut * cut)
        yield found["temp_bytes"] * (1 - fewer / rows) * 0.9, _set(f"{program.settings}.rows", fewer)
    elif getattr(settings, "max_length", 0) > 1 and rows:
        yield found["temp_bytes"] * 0.45, _set(f"{program.settings}.max_length", settings.max_length // 2)
