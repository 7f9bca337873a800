"""Ablations of the three stages: an experiment with one thing changed, one of its models judged, as a cell of a sweep.

Cells share what they have in common (``shared_stages``, in the sweep's folder ``shared``): stage 1 and the teachers are trained once a
seed, and where two ablations ask for the same model (each contains the unchanged one) it is trained and judged once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

from .. import config, metrics
from ..config import ConfigError, bind
from ..models import flops, transformer
from ..types import FINISHED
from . import evaluate, kept_runs, mixtures, pipeline, shared_stages, teacher
from .pipeline import Experiment
from .shared_stages import Judged, Trained
from .sweep import Planned

CURVES = ("ce/loss", "distill/kl", "distill/coverage")
OF_WRITER = ("rollout/entropy", "rollout/success")  # of whoever writes the runs; the second of every domain


@dataclasses.dataclass(frozen=True)
class Value:
    """One value of an ablation. changes: as after ``--set``, of the experiment."""

    changes: tuple[str, ...] = ()
    judged: Judged = "student"


@dataclasses.dataclass(frozen=True)
class AblationCell:
    """against: the value of its ablation that it is compared with; unchanged: whether that one leaves the experiment as it is."""

    experiment: Experiment
    judged: Judged
    against: str = ""
    unchanged: bool = False


def cells(base: Experiment, ablations: dict[str, dict[str, Value]], seeds: tuple[int, ...] = (0, 1, 2)) -> list[Planned]:
    """A cell per value of every ablation and seed, seed by seed, so that a sweep that is stopped early has whole seeds.

    Raises ConfigError for a change that does not fit, naming ablation and value."""
    if not seeds:
        raise ConfigError("seeds is empty; name at least one")
    return [cell for seed in seeds for name, values in ablations.items() for cell in _planned(base, name, values, seed)]


def _planned(base: Experiment, ablation: str, values: dict[str, Value], seed: int) -> list[Planned]:
    changed = {}
    for label, value in values.items():
        try:
            changed[label] = config.override(base, [f"seed={seed}", *value.changes])
        except ConfigError as error:
            raise ConfigError(f"ablations.{ablation}.{label}: {error}") from None
    same = [label for label, experiment in changed.items() if experiment == config.override(base, [f"seed={seed}"])]
    against = next((label for label in same if values[label].judged == "student"), [*same, *values][0] if values else "")
    out = []
    for label, experiment in changed.items():
        cell = AblationCell(experiment, values[label].judged, against, bool(same))
        axes = {"ablation": ablation, "value": label, "seed": seed}
        out.append(Planned(f"{ablation}-{label}-s{seed}", axes, cell, bind(run), busy=bind(busy)))
    return out


def shared(workdir: pathlib.Path) -> pathlib.Path:
    """Of the sweep that has its cell in ``workdir``."""
    return workdir.parent.parent / "shared"


def busy(cell: AblationCell, workdir: pathlib.Path) -> bool:
    """Whether the cell would wait for another process, which trains or judges a model that it needs."""
    return shared_stages.busy(cell.experiment, cell.judged, shared(workdir))


def run(cell: AblationCell, axes: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """Trains what is not there yet, and judges; what ``sweep`` writes of it. workdir: <sweep>/cells/<name>.

    "train" sums up all stages behind the model, "curves" are of its own ones alone: the last one, or all teachers. "seconds": "train" of
    its own ones, "shared_train" of those before. Cells with equal train["model"] are of one model: its seconds stand in each of them."""
    del axes
    cfg, root = cell.experiment, shared(workdir)
    made = shared_stages.train(cfg, cell.judged, root)
    where = shared_stages.folder_of(cfg, cell.judged, root)
    with shared_stages.alone(where):
        tasks = [record for name, domains in judged_on(cfg, cell.judged).items() for record in judge(cfg, made, name, domains, where)]
    total, active = transformer.parameter_counts(cfg.model)
    lines = {}
    for stage, folder in made.stages.items():
        phases = _facts(made, stage).get("phases", [stage])  # of a recipe: each logs under its own name
        lines[stage] = [line for line in metrics.read(folder) if line["stage"] in phases]
    each = {stage: _trained(cfg, stage, lines[stage], made) for stage in made.stages}
    own = [stage for stage, folder in made.stages.items() if folder == where]
    won = {d: [task["success"] for task in tasks if task["domain"] == d] for d in cfg.domains}
    rates = ", ".join(f"{d} {100 * sum(x) / max(1, len(x)):.1f} %" for d, x in won.items())
    return {
        "parameters": {"total": total, "active": active},
        "train": {
            **{k: sum(e[k] for e in each.values()) for k in ("steps", "tokens", "flops")},
            "stages": each,
            "taught_by": made.chosen,
            "model": where.name,
        },
        "against": {"value": cell.against, "unchanged": cell.unchanged},
        "tasks": tasks,
        "curves": {f"{stage}/{name}": points for stage in own for name, points in curves(lines[stage], shown(cfg, stage)).items()},
        "seconds": {
            "train": sum(e["seconds"] for stage, e in each.items() if stage in own),
            "shared_train": sum(e["seconds"] for stage, e in each.items() if stage not in own),
        },
        "summary": f"success {rates}",
    }


def judged_on(cfg: Experiment, judged: Judged) -> dict[str, tuple[str, ...]]:
    """Model -> the domains whose held-out tasks it is judged on: teachers on their own."""
    if judged == "teachers":
        return {teacher.stage_name(d): (d,) for d in cfg.domains}
    return {judged: cfg.domains}


def judge(cfg: Experiment, made: Trained, model: str, domains: Iterable[str], where: pathlib.Path) -> list[dict[str, Any]]:
    """One record per held-out task; read back where the model was judged before. The runs are kept beside, as of every evaluation."""
    asked = repr((cfg.evaluation, cfg.limits, cfg.distill.teacher_max_length, domains))  # the folder does not depend on these
    path = where / f"evaluations/{model}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"
    with made.setting.on_mesh():
        actor = pipeline.actor(cfg, made.setting, made.models, made.given, model)
        evaluate.run(cfg.evaluation, *actor, {d: cfg.family(d) for d in domains}, model, path)
    return [
        {
            "domain": kept.domain,
            "steps": kept.metadata["steps"],
            "task_id": kept.task_id,
            "success": int(kept.status == FINISHED and kept.reward >= 1.0),
            "status": kept.status,
            "tokens": len(kept.metadata[kept_runs.KEY]["tokens"]),
        }
        for kept in kept_runs.read(evaluate.runs_of(path))
    ]


def _trained(cfg: Experiment, stage: str, lines: list[dict[str, Any]], made: Trained) -> dict[str, float]:
    """Steps, tokens, FLOPs and seconds of one stage. Tokens: of its steps by the mean of those that were logged. FLOPs are those of its
    training; of a teacher's reinforcement the sampling and the reference are not in them."""
    facts, told = _facts(made, stage), [line["tokens"] for line in lines if "tokens" in line]
    tokens = facts["steps"] * sum(told) / max(1, len(told))
    length = cfg.limits.max_length // 2  # of attention's cost: about the mean run
    cost = flops.training(cfg.model, length).model
    if stage == "distill":  # and scored by each teacher that has a weight, and sampled
        scorers = sum(share > 0 for share in mixtures.weights(cfg.distill.own_weight, 0, len(cfg.domains)))
        cost += (scorers + 1) * flops.forward(cfg.model, length).model
    return {"steps": facts["steps"], "tokens": round(tokens), "flops": tokens * cost, "seconds": facts["seconds"]}


def _facts(made: Trained, stage: str) -> dict[str, Any]:
    return dataclasses.replace(made.setting, workdir=made.stages[stage]).facts(stage)


def shown(cfg: Experiment, stage: str) -> tuple[str, ...]:
    """The metrics of a stage that say something of the model that it trains, by how their names begin."""
    return CURVES if stage == "distill" and cfg.distill.rollouts == "teacher" else CURVES + OF_WRITER


def curves(lines: list[dict[str, Any]], begins: tuple[str, ...], most: int = 100) -> dict[str, list[list[float]]]:
    """Metric -> [step, value], every n-th so that there are at most so many."""
    names = sorted({name for line in lines for name in line if name.startswith(begins)})
    thinned = lines[:: max(1, -(-len(lines) // most))]
    return {name: [[line["step"], round(line[name], 4)] for line in thinned if name in line] for name in names}
