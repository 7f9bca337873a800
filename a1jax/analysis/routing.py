"""Which experts a model's routers choose for the runs of each domain, and how far the domains' choices lie apart.

Every held-out expert run goes through the model alone; counted are the pairs of token and expert of all its tokens. Distances between two
domains' loads are Jensen-Shannon distances in base 2 (0: equal, 1: no expert in common), as scipy computes them. What they would be if
domains made no difference is told by dealing the runs out to the domains anew; what of them is in the tokens alone, by the same model with
random parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from scipy.spatial.distance import jensenshannon

from .. import checkpoint, config, metrics
from .. import params as param_specs
from ..config import ConfigError
from ..data import packing
from ..models import transformer
from ..models.config import ModelConfig
from ..stages import experts, folders, pipeline, sft
from ..types import Params
from . import kept, run_views
from .figures import Figure, Heat
from .shown import Drawn, Table


@dataclasses.dataclass(frozen=True, eq=False)
class Loads:
    """R runs of some domains, L layers, E experts. pairs: float64 [R, L, E], token-expert pairs of each run; of_run: int [R], the place of
    its domain in ``domains``. name: of the model."""

    name: str
    domains: tuple[str, ...]
    of_run: np.ndarray
    pairs: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """[D, L, E]: of a domain's pairs in a layer, those of each expert."""
        return shares(self.pairs, self.of_run, len(self.domains))


@dataclasses.dataclass(frozen=True)
class Apart:
    """Mean over pairs of domains of their distance, one number a layer [L]. dealt: the mean of the same over shuffles of the runs; most:
    its 95th percentile. p: share of the shuffles, the real one among them, that are at least as far apart."""

    found: tuple[float, ...]
    dealt: tuple[float, ...]
    most: tuple[float, ...]
    p: tuple[float, ...]


def first_stage(experiment: str, into: str | pathlib.Path, changes: Sequence[str] = ()) -> pathlib.Path:
    """The folder of a run of ``experiment`` of which only stage 1 is trained, made in ``into`` where it is not there yet."""
    cfg = config.override(config.load(str(experiment)), changes)
    config.check(cfg)
    if not isinstance(cfg, pipeline.Experiment):
        raise ConfigError(f"{experiment}: a {type(cfg).__name__}; stage 1 is one of an Experiment's")
    folder = pathlib.Path(into) / f"{cfg.name}-stage-1"
    if (folder / "config.py").is_file() and config.diff(config.load(str(folder / "config.py")), cfg):
        raise ConfigError(f"{folder}: holds stage 1 of another config; remove it, or choose another folder")
    config.save(cfg, folder / "config.py")
    with metrics.Writer(folder) as writer:
        setting = pipeline.open_setting(cfg, folder, writer)
        if setting.finished("sft") is None:
            print(f"stage 1 of {experiment}, {cfg.sft.steps} steps")
            show = cfg.limits.show_tools
            made = [
                experts.examples(cfg.family(d), i, cfg.runs[d], "sft", cfg.seed, setting.tokenizer, show) for i, d in enumerate(cfg.domains)
            ]
            sft.run(cfg.sft, setting.init_params(), sft.Curriculum(cfg.sft, list(itertools.chain(*made)), setting), setting)
    return folder


def of_run(run: pathlib.Path, stage: str = "sft", each: int = 8) -> Loads:
    """The loads of a finished stage of a run on ``each`` held-out expert runs of every domain, their lengths as in its evaluation."""
    folder = folders.find(pathlib.Path(run), stage)
    model, _ = folders.read_model(folder)
    params = checkpoint.load_params(folder / "params", param_specs.abstract(transformer.specs(model)))
    return _loads(run, stage, params, model, each)


def untrained(run: pathlib.Path, each: int = 8) -> Loads:
    """The same of the run's model with random parameters, drawn from its seed."""
    cfg = run_views.experiment(pathlib.Path(run))
    return _loads(run, "random parameters", param_specs.init(transformer.specs(cfg.model), jax.random.key(cfg.seed)), cfg.model, each)


def shares(pairs: np.ndarray, of_run: np.ndarray, domains: int) -> np.ndarray:
    """[R, L, E] pairs of runs -> [D, L, E] shares of each domain's pairs in a layer; every domain has a run."""
    member = (of_run[None] == np.arange(domains)[:, None]).astype(float)
    summed = np.tensordot(member, pairs, axes=1)
    return summed / summed.sum(axis=-1, keepdims=True)


def distances(of_domain: np.ndarray) -> np.ndarray:
    """[D, L, E] shares -> [L, D, D] Jensen-Shannon distances, base 2."""
    at = np.swapaxes(of_domain, 0, 1)
    return np.nan_to_num(jensenshannon(at[:, :, None], at[:, None], base=2, axis=-1))  # nan: of equal ones, by rounding below 0


def apart(loads: Loads, shuffles: int = 500, seed: int = 0) -> Apart:
    """How far the domains lie apart, and how far they would if runs were dealt out to them at random. Raises ConfigError for one domain."""
    domains = len(loads.domains)
    if domains < 2:
        raise ConfigError(f"the distance between domains needs two; there is {', '.join(loads.domains)}")
    rng = np.random.default_rng(seed)
    found = _mean(distances(loads.shares))
    dealt = np.stack([_mean(distances(shares(loads.pairs, rng.permutation(loads.of_run), domains))) for _ in range(shuffles)])
    p = (1 + np.sum(dealt >= found - 1e-12, axis=0)) / (1 + shuffles)
    columns = (found, dealt.mean(axis=0), np.percentile(dealt, 95, axis=0), p)
    return Apart(*(tuple(map(float, column)) for column in columns))


def heat_map(loads: Loads) -> Drawn:
    """A panel for each layer: domains by experts, 1 where an expert has its balanced share."""
    layers, count = loads.pairs.shape[1:]
    values = loads.shares * count
    top = max(2.0, float(values.max()))
    x, y = tuple(range(count)), tuple(range(len(loads.domains)))
    panels = tuple(
        Heat(
            f"layer {layer + 1}", "expert", "", "load (1: balanced)", x, y, _from_below(values[:, layer]),
            xticks=tuple(str(i + 1) for i in x) if count <= 16 else (), yticks=loads.domains[::-1], limits=(0.0, top),
        )
        for layer in range(layers)
    )  # fmt: skip
    number = ", ".join(f"{d} {int(np.sum(loads.of_run == i))}" for i, d in enumerate(loads.domains))
    caption = f"{loads.name}. An expert's load is its share of the layer's token-expert pairs times the number of experts. Runs: {number}."
    return Drawn(Figure("routing", "Expert load by domain", caption, panels))


def distance_map(loads: Loads) -> Drawn:
    """A panel for each layer: the distance of every two domains."""
    found, names = distances(loads.shares), loads.domains
    at, top = tuple(range(len(names))), max(0.1, float(found.max()))
    short = tuple(name if len(name) <= 12 else name[:11] + "." for name in names)
    panels = tuple(
        Heat(f"layer {i + 1}", "", "", "distance", at, at, _from_below(of_layer), xticks=tuple(str(k + 1) for k in at),
             yticks=tuple(f"{k + 1} {name}" for k, name in enumerate(short))[::-1], limits=(0.0, top))
        for i, of_layer in enumerate(found)
    )  # fmt: skip
    caption = f"{loads.name}. Jensen-Shannon distance, base 2: 0 equal loads, 1 no expert in common."
    return Drawn(Figure("distances", "Distance between domains' loads", caption, panels))


def specialisation(*models: Loads) -> Table:
    """Per model and layer, how far its domains lie apart against runs dealt out at random."""
    rows = []
    for loads in models:
        a = apart(loads)
        rows += [(loads.name, i + 1, *row) for i, row in enumerate(zip(a.found, a.dealt, a.most, a.p, strict=True))]
    columns = ("model", "layer", "distance", "dealt at random", "95 % of them below", "p")
    return Table("Mean distance between domains", columns, tuple(rows), "p: share of 500 shuffles of the runs that are as far apart.")


def evenness(loads: Loads) -> Table:
    """Per domain and layer: the busiest expert's load (1: balanced), and how many experts used evenly would have the load's entropy."""
    count, rows = loads.pairs.shape[2], []
    for i, domain in enumerate(loads.domains):
        for layer, p in enumerate(loads.shares[i]):
            some = p[p > 0]
            rows.append((domain, layer + 1, int(p.argmax()) + 1, float(count * p.max()), float(np.exp(-np.sum(some * np.log(some))))))
    columns = ("domain", "layer", "busiest expert", "its load", "experts in effect")
    return Table(f"How evenly experts are used ({loads.name}, {count} experts)", columns, tuple(rows))


def _from_below(rows: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Rows for a figure whose y goes up, so that the first one stands at the top."""
    return tuple(map(tuple, rows[::-1].tolist()))


def _mean(found: np.ndarray) -> np.ndarray:
    """[L, D, D] -> [L], over the pairs of different domains."""
    above = np.triu_indices(found.shape[1], 1)
    return found[:, above[0], above[1]].mean(axis=1)


def _loads(run: pathlib.Path, name: str, params: Params, model: ModelConfig, each: int) -> Loads:
    cfg, tokenizer = run_views.experiment(pathlib.Path(run)), kept.tokenizer_of(pathlib.Path(run))
    tokenizer = tokenizer or pipeline.open_tokenizer(cfg, pathlib.Path(run))
    length, found, of = cfg.sft.max_length, [], []
    for i, domain in enumerate(cfg.domains):
        runs = experts.examples(
            cfg.family(domain), i, held_out(cfg, domain, each), "heldout", cfg.evaluation.seed, tokenizer, cfg.limits.show_tools
        )
        for _, example in runs:
            cut = packing.cut(example, 0, min(length, len(example)))
            found.append(len(cut) * model.num_experts_active * np.asarray(_load(model)(params, packing.to_batch([(cut,)], length)), float))
            of.append(i)
    return Loads(name, cfg.domains, np.array(of), np.stack(found))


def held_out(cfg: pipeline.Experiment, domain: str, each: int) -> tuple[experts.Runs, ...]:
    """``each`` held-out tasks of a domain, spread evenly over the lengths and families that the run's evaluation asks for."""
    sources = cfg.evaluation.of.get(domain, (experts.Runs(cfg.evaluation.counts),))
    places = [(i, steps) for i, source in enumerate(sources) for steps in sorted(source.counts)]
    number = {place: len(range(k, each, len(places))) for k, place in enumerate(places)}
    return tuple(experts.Runs({s: n for (j, s), n in number.items() if j == i}, source.family) for i, source in enumerate(sources))


@functools.lru_cache(maxsize=4)
def _load(model: ModelConfig):
    """The jitted load(params, batch) -> [L, E] of one model."""

    def load(params, batch):
        return transformer.apply(params, batch.tokens, batch.positions, batch.segment_ids, model)[1]["load"]

    return jax.jit(load)
