"""A run folder in a notebook: where it comes from, its table, one of its runs turn by turn, its curves."""

from __future__ import annotations

import pathlib

from .. import config, metrics, provenance
from ..config import ConfigError
from ..domains import solve
from ..stages import experts
from ..stages.pipeline import Experiment
from . import behaviour, kept, page, seeds, show
from .kept import Kept
from .shown import Markup, Several, Table, drawn, printed


def source(run: pathlib.Path) -> Table:
    """Command, commit, seed, machine and stages of a run, as its run.json and its stages tell."""
    told, machine = provenance.read(run), provenance.read(run).get("machine", {})
    rows = [("command", told.get("command", "?")), ("commit", told.get("commit") or "?"), ("outcome", told.get("outcome", "?"))]
    rows += [("seed", str(told.get("seed", "?"))), ("machine", f"{machine.get('cores', '?')} cores, {machine.get('processor', '?')}")]
    rows += [(f"stage {name}", f"{f['steps']} steps, {f['seconds']:.0f} s") for name, f in page.read_stages(run).items()]
    return Table(f"{run}", ("what", "value"), tuple(rows))


def success(run: pathlib.Path) -> Table:
    """Success on held-out tasks per domain and model, in percent, with 95 % Wilson intervals; models that have been judged so far."""
    rows = [
        (r["domain"], r["model"], r["n"], f"{100 * r['success']:.1f}", f"{100 * r['low']:.0f}-{100 * r['high']:.0f}")
        for r in seeds.rows([run])
    ]
    return Table("Success on held-out tasks, percent", ("domain", "model", "n", "success", "95 % interval"), tuple(rows))


def models(run: pathlib.Path) -> Table:
    """How many runs each model left to be read, and how they ended."""
    counts: dict[str, dict[str, int]] = {}
    for one in kept.every(run):
        of_model = counts.setdefault(one.model, {})
        of_model[one.run.status or "?"] = of_model.get(one.run.status or "?", 0) + 1
    rows = [(model, sum(ends.values()), ", ".join(f"{status} {n}" for status, n in sorted(ends.items()))) for model, ends in counts.items()]
    return Table("Runs that were kept", ("model", "runs", "how they ended"), tuple(rows))


def turns(run: pathlib.Path, model: str = kept.FIRST, task: str | None = None) -> Markup:
    """One kept run of a model turn by turn, as `a1jax show` prints it. task: its id; None: the task on which it took most turns.

    Raises ConfigError for a model or a task that is not there."""
    found = kept.of_task(run, task, model) if task else list(kept.every(run, model))
    one = max(found, key=lambda k: show.sizes(k.run)[0])
    return printed(lambda console: show.print_run(one, console, kept.tokenizer_of(run)))


def expert(run: pathlib.Path, domain: str, steps: int) -> Markup:
    """What stage 1 learns from: the expert's run of a training task of so many steps. Raises ConfigError for a domain the run has not."""
    cfg = experiment(run)
    if domain not in cfg.domains:
        raise ConfigError(f"{run}: no domain '{domain}'; it has {', '.join(cfg.domains)}")
    (task,) = experts.tasks(cfg.family(domain), {steps: 1}, "sft", cfg.seed)
    return printed(lambda console: show.print_run(Kept("expert", solve(task)), console))


def curves(run: pathlib.Path, *names: str) -> Several:
    """The figures of a run, with ``names`` only those of these names (``figures``)."""
    made = behaviour.figures(page.read_scores(run), metrics.read(run))
    known = [figure.name for figure in made]
    for name in names:
        if name not in known:
            raise ConfigError(f"{run}: no figure '{name}'; there are {', '.join(known)}")
    return drawn([figure for figure in made if not names or figure.name in names])


def experiment(run: pathlib.Path) -> Experiment:
    """The config of a run. Raises ConfigError where the folder has none of three stages."""
    path = run / "config.py"
    if not path.is_file():
        raise ConfigError(f"{run}: no config.py; give the folder of a run")
    cfg = config.load(str(path))
    if not isinstance(cfg, Experiment):
        raise ConfigError(f"{run}: a run of a {type(cfg).__name__}; what is read here is an Experiment of three stages")
    return cfg
